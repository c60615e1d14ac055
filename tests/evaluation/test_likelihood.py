import math

import pytest
import runs
import torch

from hf_dskd.evaluation import likelihood
from hf_dskd.evaluation.likelihood import bits_per_byte, row_likelihoods


def test_agrees_with_the_trainer_and_with_any_batch_size(tmp_path):
    run = runs.trainer(tmp_path, method="sft", max_steps=5)
    run.train()
    expected = run.evaluate(run.train_dataset)
    for batch_size in (1, 5):
        found = bits_per_byte(run.model, run.train_dataset, batch_size=batch_size)
        assert found == pytest.approx(expected["eval_bits_per_byte"], rel=1e-5)
    rows = row_likelihoods(run.model.eval(), list(run.train_dataset))
    accuracy = sum(row.correct for row in rows) / sum(row.tokens for row in rows)
    assert accuracy == pytest.approx(expected["eval_token_accuracy"]) and 0 < accuracy < 1


def test_teacher_side_is_the_teachers_own_student_side(tmp_path):
    """Scoring a model as teacher equals scoring it as the student of a run with the sides swapped."""
    run = runs.trainer(tmp_path)
    as_teacher = bits_per_byte(run.teacher.model, run.train_dataset, side="teacher")
    swapped = runs.trainer(
        tmp_path / "swapped",
        method="sft",
        # A teacher is frozen, which a student can't be.
        student=run.teacher.model.requires_grad_(True),
        processing_class=runs._TEACHER_TOKENIZER,
        teacher_processing_class=runs._STUDENT_TOKENIZER,
    )
    assert as_teacher == pytest.approx(bits_per_byte(swapped.model, swapped.train_dataset), rel=1e-5)


def test_rows_by_hand(tmp_path, monkeypatch):
    """One row at a time without padding, token by token; the EOS token counts as a token, but not as text."""
    run = runs.trainer(tmp_path, method="sft")
    model, rows = run.model.eval(), [run.train_dataset[index] for index in range(6)]
    # A few tokens at a time.
    monkeypatch.setattr(likelihood, "LOGITS_BYTES", 4 * 400 * 7)
    found = row_likelihoods(model, rows)
    for row, result in zip(rows, found):
        ids, start, nats, correct = row["input_ids"], row["prompt_length"], 0.0, 0
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for position in range(start, len(ids)):
            before = row["byte_ends"][position - start - 1] if position > start else 0
            if row["byte_ends"][position - start] > before:
                nats -= scores[position - 1, ids[position]].item()
            correct += int(scores[position - 1].argmax()) == ids[position]
        assert result.nats == pytest.approx(nats, rel=1e-5)
        assert result[1:] == (row["response_bytes"], correct, len(ids) - start)
    expected = sum(row.nats for row in found) / math.log(2) / sum(row.bytes for row in found)
    assert bits_per_byte(model, rows, batch_size=4) == pytest.approx(expected, rel=1e-6)
