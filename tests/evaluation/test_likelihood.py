import pytest
import runs

from hf_dskd.evaluation.likelihood import bits_per_byte


@pytest.mark.parametrize("batch_size", [1, 5])
def test_agrees_with_the_trainer_and_with_any_batch_size(batch_size, tmp_path):
    run = runs.trainer(tmp_path, method="sft")
    expected = run.evaluate(run.train_dataset)["eval_bits_per_byte"]
    assert bits_per_byte(run.model, run.train_dataset, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_teacher_side_is_the_teachers_own_student_side(tmp_path):
    """Scoring a model as teacher equals scoring it as the student of a run with the sides swapped."""
    run = runs.trainer(tmp_path)
    as_teacher = bits_per_byte(run.teacher.model, run.train_dataset, side="teacher")
    swapped = runs.trainer(
        tmp_path / "swapped",
        method="sft",
        student=run.teacher.model,
        processing_class=runs._TEACHER_TOKENIZER,
        teacher_processing_class=runs._STUDENT_TOKENIZER,
    )
    assert as_teacher == pytest.approx(bits_per_byte(swapped.model, swapped.train_dataset), rel=1e-5)
