"""How well answers agree with references, as the papers count it, and how sure that is."""

from __future__ import annotations

import functools
import math
import statistics
import string
from collections.abc import Iterable, Sequence
from typing import Any


RESAMPLES = 1000


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Computes the F-measure of ROUGE-L (Lin, 2004) with stemming, that of the best reference, from 0 to 1."""
    return max(_scorer().score(target=reference, prediction=prediction)["rougeL"].fmeasure for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Tells whether an answer is a reference but for case, punctuation and spaces (SQuAD's, articles kept)."""
    return _normalized(prediction) in {_normalized(reference) for reference in references}


def _normalized(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def bootstrap_interval(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """
    Finds the interval in which the mean lies with 95% confidence (percentile bootstrap over examples; Efron, 1979).

    `values` are those of the examples, which are drawn `resamples` times with replacement.
    """
    import numpy as np

    given = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [given[generator.integers(0, len(given), len(given))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def answer_scores(decodings: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """
    Scores the answers to one set, in percent.

    Args:
        decodings (`list[list[dict]]`): The answers of each seed, or the greedy ones alone; all to the same examples.

    Returns:
        `dict`: `rouge_l` and `exact_match`, means over examples and seeds, each with `_interval` (95%, bootstrap over
        examples of their means over the seeds) and, for several seeds, `_seeds` and their sample standard deviation
        `_sd`; `unfinished`, answers that ran into the maximum length; and `tokens`, the mean length.
    """
    result: dict[str, Any] = {}
    for name, value in (("rouge_l", rouge_l), ("exact_match", exact_match)):
        rows = [[100.0 * value(line["response"], line["references"]) for line in lines] for lines in decodings]
        of_seeds = [statistics.fmean(row) for row in rows]
        of_examples = [statistics.fmean(column) for column in zip(*rows)]
        result[name] = rounded(statistics.fmean(of_seeds))
        result[f"{name}_interval"] = [rounded(end) for end in bootstrap_interval(of_examples)]
        if len(decodings) > 1:
            result[f"{name}_sd"] = rounded(statistics.stdev(of_seeds))
            result[f"{name}_seeds"] = [rounded(mean) for mean in of_seeds]
    lines = [line for lines in decodings for line in lines]
    result["answers"] = len(lines)
    result["unfinished"] = sum(not line["finished"] for line in lines)
    result["tokens"] = rounded(statistics.fmean(line["tokens"] for line in lines))
    return result


def bits_of_a_byte(nats: float, count: float) -> float:
    """Converts the nats spent on a text of `count` bytes to bits for each of them."""
    return nats / math.log(2) / count


def reference_scores(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sums up a set's references: bits per byte, token accuracy in percent, and how many were cut or skipped."""
    lines = list(lines)
    total = {name: math.fsum(line[name] for line in lines) for name in lines[0] if name != "example"}
    some = total["tokens"] > 0
    return {
        "bits_per_byte": rounded(bits_of_a_byte(total["nats"], total["bytes"])) if some else None,
        "token_accuracy": rounded(100.0 * total["correct"] / total["tokens"]) if some else None,
        "references_cut": int(total["cut"]),
        "references_skipped": int(total["skipped"]),
    }


def average(sets: list[dict[str, Any]]) -> dict[str, Any]:
    """Averages over sets, each counting the same; standard deviations are those of the means of each seed."""

    def mean(values: list[Any]) -> float | None:
        return None if None in values else rounded(statistics.fmean(values))

    result: dict[str, Any] = {
        name: mean([part[name] for part in sets]) for name in ("bits_per_byte", "token_accuracy")
    }
    for kind in ("greedy", "sampled"):
        kinds = [part[kind] for part in sets if kind in part]
        if not kinds:
            continue
        result[kind] = {name: mean([part[name] for part in kinds]) for name in ("rouge_l", "exact_match")}
        for name in ("rouge_l", "exact_match"):
            if f"{name}_seeds" in kinds[0]:
                of_seeds = map(statistics.fmean, zip(*(part[f"{name}_seeds"] for part in kinds)))
                result[kind][f"{name}_sd"] = rounded(statistics.stdev(of_seeds))
    return result


def rounded(number: float) -> float:
    """Rounds to six digits after the point: what is left of rounding within the model doesn't show."""
    return round(number, 6)
