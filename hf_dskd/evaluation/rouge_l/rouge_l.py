"""
ROUGE-L as the papers compute it, as a metric of the library `evaluate`; loading it needs no network:

    evaluate.load(str(Path(hf_dskd.evaluation.__file__).parent / "rouge_l"))
"""

import datasets
import evaluate

from hf_dskd.evaluation.scores import rouge_l


DESCRIPTION = (
    "F-measure of ROUGE-L with stemming, that of the best reference of each prediction: the mean, in percent."
)

CITATION = """\
@inproceedings{lin-2004-rouge,
    title = "{ROUGE}: A Package for Automatic Evaluation of Summaries",
    author = "Lin, Chin-Yew",
    booktitle = "Text Summarization Branches Out",
    year = "2004",
    pages = "74--81",
}"""

INPUTS = """
Args:
    predictions (`list[str]`): Answers.
    references (`list[str]` or `list[list[str]]`): Right answers, one for each prediction or several.
    per_example (`bool`, *optional*, defaults to `False`): Whether to return the value of each prediction too.

Returns:
    `dict`: `rouge_l`, the mean in percent, and where asked for `rouge_l_per_example`, in percent.
"""


class RougeL(evaluate.Metric):
    """ROUGE-L, best over references (see [`~hf_dskd.evaluation.scores.rouge_l`])."""

    def _info(self) -> evaluate.MetricInfo:
        prediction = datasets.Value("string")
        kinds = [datasets.Sequence(datasets.Value("string")), datasets.Value("string")]
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[datasets.Features({"predictions": prediction, "references": kind}) for kind in kinds],
            reference_urls=["https://github.com/google-research/google-research/tree/master/rouge"],
        )

    def _compute(
        self, predictions: list[str], references: list[str] | list[list[str]], per_example: bool = False
    ) -> dict[str, float | list[float]]:
        values = [
            100.0 * rouge_l(prediction, [reference] if isinstance(reference, str) else reference)
            for prediction, reference in zip(predictions, references)
        ]
        result: dict[str, float | list[float]] = {"rouge_l": sum(values) / len(values)}
        return {**result, "rouge_l_per_example": values} if per_example else result
