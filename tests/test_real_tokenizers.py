"""Training steps with the tokenizers of the papers' pairs, in both directions, on tiny models."""

import math

import pytest
import runs
import tiny


@pytest.mark.parametrize("student, teacher", [("gpt2", "qwen1.5"), ("tinyllama", "mistral"), ("mistral", "gpt2")])
def test_real_tokenizers_both_ways(student, teacher, tmp_path):
    make = {"gpt2": tiny.gpt2, "qwen1.5": tiny.qwen2, "tinyllama": tiny.llama, "mistral": tiny.llama}
    student_tokenizer, teacher_tokenizer = tiny.real_tokenizer(student), tiny.real_tokenizer(teacher)
    run = runs.trainer(
        tmp_path,
        student=make[student](len(student_tokenizer), width=64),
        teacher=make[teacher](len(teacher_tokenizer), width=128),
        processing_class=student_tokenizer,
        teacher_processing_class=teacher_tokenizer,
        learning_rate=5e-3,
        max_steps=4,
        loss_memory_mb=512,
    )
    run.train()
    losses = runs.history(run, "ce_loss", "t2s_ce_loss", "s2t_kd_loss", "kq_loss")
    assert all(math.isfinite(value) for row in losses for value in row)
    assert losses[-1][0] < losses[0][0] and losses[-1][1] < losses[0][1]
    # The same text on both sides.
    for row in run.train_dataset:
        assert row["byte_ends"][-1] == row["teacher_byte_ends"][-1] == row["response_bytes"]
