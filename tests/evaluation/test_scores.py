import json
import random
import re
import statistics
from pathlib import Path

import evaluate
import pytest
import tiny
from nltk.stem.porter import PorterStemmer

import hf_dskd.evaluation
from hf_dskd.evaluation.scores import (
    answer_scores,
    average,
    bootstrap_interval,
    exact_match,
    reference_scores,
    rouge_l,
)


SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def plain_rouge_l(prediction, references):
    """F-measure of the longest common subsequence of stems, the best over references."""
    stemmer, values = PorterStemmer(), []

    def stems(text):
        words = re.sub(r"[^a-z0-9]+", " ", text.lower()).split()
        return [stemmer.stem(word) if len(word) > 3 else word for word in words]

    for reference in references:
        x, y = stems(prediction), stems(reference)
        longest = [0] * (len(y) + 1)
        for a in x:
            before = longest[:]
            for j, b in enumerate(y, start=1):
                longest[j] = before[j - 1] + 1 if a == b else max(before[j], longest[j - 1])
        common = longest[-1]
        precision, recall = common / max(len(x), 1), common / max(len(y), 1)
        values.append(2 * precision * recall / (precision + recall) if common else 0.0)
    return max(values)


def real_pairs():
    """Answers with some words left out, doubled or swapped, or those to another question; one reference or several."""
    rows = []
    for name, count in (("dolly", 300), ("sinst/11_", 700)):
        with (SHARED / name / "test.jsonl").open(encoding="utf-8") as file:
            rows += [json.loads(line)["output"] for line in file][:count]
    shuffle = random.Random(0)
    for index, output in enumerate(rows):
        references = output if isinstance(output, list) else [output]
        other = rows[shuffle.randrange(len(rows))] if index % 4 == 0 else output
        words = (other if isinstance(other, str) else other[-1]).split(" ")[:120]
        for _ in range(len(words) // 3):
            words.insert(shuffle.randrange(len(words)), words.pop(shuffle.randrange(len(words))))
        yield " ".join(words[: shuffle.randrange(1, 120)]), references


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the papers' data in ../shared/data")
def test_rouge_l_of_a_thousand_real_pairs():
    pairs = list(real_pairs())
    assert len(pairs) == 1000 and sum(len(references) > 1 for _, references in pairs) > 100
    expected = [plain_rouge_l(*pair) for pair in pairs]
    assert [rouge_l(*pair) for pair in pairs] == pytest.approx(expected, abs=1e-9)
    assert 0.2 < statistics.fmean(expected) < 0.9


def test_rouge_l_of_small_cases():
    for references in (["A cat sat on the mat."], ["", "moon"], [*tiny.TEXTS]):
        for text in ("The cats sat on mats", "", "...", "Zwölf Boxkämpfer jagen", *tiny.TEXTS[:2]):
            assert rouge_l(text, references) == pytest.approx(plain_rouge_l(text, references), abs=1e-9)
    # Stems make "cats" and "cat" one word; 2 of 2 words found, 2 of 3 wanted.
    assert rouge_l("Cats sit", ["dog", "a cat sits"]) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))


def test_the_metric_of_evaluate(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(hf_dskd.evaluation.__file__).parent / "rouge_l"
    metric = evaluate.load(str(folder), cache_dir=str(tmp_path / "cache"))
    predictions, several = ["The cat sat.", "moon"], [["A cat sat down.", "dog"], ["the moon"]]
    values = [100 * rouge_l(text, references) for text, references in zip(predictions, several)]
    result = metric.compute(predictions=predictions, references=several)
    assert result == {"rouge_l": pytest.approx(sum(values) / 2, abs=1e-9)}
    one = metric.compute(predictions=predictions, references=["dog", "the moon"], per_example=True)
    assert one["rouge_l_per_example"] == pytest.approx([0.0, values[1]], abs=1e-9)


def test_exact_match():
    assert exact_match("  The  Cat, sat!", ["dog", "the cat sat"])
    assert not exact_match("A cat sat", ["the cat sat", "cat sat"])
    assert exact_match("...", [""])


def test_bootstrap_interval():
    values = [float(index % 10) for index in range(400)]
    low, high = bootstrap_interval(values)
    # The mean's standard error, 1.96 of them on either side.
    error = statistics.pstdev(values) / 400**0.5
    assert low == pytest.approx(4.5 - 1.96 * error, abs=0.05)
    assert high == pytest.approx(4.5 + 1.96 * error, abs=0.05)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    assert bootstrap_interval([3.0]) == (3.0, 3.0)


def lines(*answers):
    return [
        {"response": text, "references": ["cat", "the cat"], "finished": finished, "tokens": len(text)}
        for text, finished in answers
    ]


def test_scores_over_seeds():
    # ROUGE-L of the first seed 100 and 0, of the second 100 and 100.
    scores = answer_scores([lines(("cat", True), ("dog", False)), lines(("Cat!", True), ("the cat", True))])
    assert scores["rouge_l"] == scores["exact_match"] == 75
    assert scores["rouge_l_seeds"] == [50, 100] and scores["rouge_l_sd"] == pytest.approx(50 / 2**0.5, abs=1e-6)
    # Of the means of the two examples, 100 and 50.
    assert scores["rouge_l_interval"] == [50, 100]
    assert (scores["answers"], scores["unfinished"], scores["tokens"]) == (4, 1, 4.25)
    alone = answer_scores([lines(("cat", True))])
    assert "rouge_l_sd" not in alone and "rouge_l_seeds" not in alone


def test_scores_of_references():
    rows = [
        {"example": 0, "nats": 3 * 0.6931471805599453, "bytes": 4, "correct": 1, "tokens": 3, "cut": 0, "skipped": 0},
        {"example": 1, "nats": 5 * 0.6931471805599453, "bytes": 4, "correct": 2, "tokens": 3, "cut": 1, "skipped": 2},
    ]
    expected = {"bits_per_byte": 1.0, "token_accuracy": 50.0, "references_cut": 1, "references_skipped": 2}
    assert reference_scores(rows) == expected
    nothing = [{"example": 0, "nats": 0.0, "bytes": 0, "correct": 0, "tokens": 0, "cut": 0, "skipped": 1}]
    assert reference_scores(nothing)["bits_per_byte"] is None


def test_average_counts_every_set_the_same():
    sets = [
        {
            "examples": examples,
            "bits_per_byte": bits,
            "token_accuracy": None,
            "greedy": {"rouge_l": 10.0 * bits, "exact_match": 0.0},
            "sampled": {"rouge_l": bits, "exact_match": 0.0, "rouge_l_seeds": seeds, "exact_match_seeds": [0.0, 0.0]},
        }
        for examples, bits, seeds in ((500, 1.0, [0.0, 2.0]), (5, 2.0, [3.0, 1.0]))
    ]
    result = average(sets)
    assert result["bits_per_byte"] == 1.5 and result["token_accuracy"] is None
    assert result["greedy"] == {"rouge_l": 15.0, "exact_match": 0.0}
    # Of the averages of each seed, which are both 1.5; not of the sets' own deviations.
    assert result["sampled"]["rouge_l"] == 1.5 and result["sampled"]["rouge_l_sd"] == 0
