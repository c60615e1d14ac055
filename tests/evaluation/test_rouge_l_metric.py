from pathlib import Path

import evaluate
import pytest

import hf_dskd.evaluation
from hf_dskd.evaluation.scores import rouge_l


PREDICTIONS = ["The cat sat.", "moon"]
SEVERAL = [["A cat sat down.", "dog"], ["the moon"]]


@pytest.fixture
def metric(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(hf_dskd.evaluation.__file__).parent / "rouge_l"
    return evaluate.load(str(folder), cache_dir=str(tmp_path / "cache"))


def test_several_references_or_one(metric):
    values = [100 * rouge_l(text, references) for text, references in zip(PREDICTIONS, SEVERAL)]
    result = metric.compute(predictions=PREDICTIONS, references=SEVERAL)
    assert result == {"rouge_l": pytest.approx(sum(values) / 2, abs=1e-9)}
    one = metric.compute(predictions=PREDICTIONS, references=["dog", "the moon"], per_example=True)
    assert one["rouge_l_per_example"] == pytest.approx([0.0, values[1]], abs=1e-9)
