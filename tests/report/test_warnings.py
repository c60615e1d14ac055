"""A report warns where it should, and nowhere else."""

import tempfile
from pathlib import Path

import pytest
from run_folders import ANALYSES, FULL, LEARNING, RESULT, folder, logs, written

from hf_dskd.report.files import read_run
from hf_dskd.report.warnings import warnings_of


pytestmark = pytest.mark.usefixtures("undrawn")


def warned(history=(), analyses=(), **result):
    with tempfile.TemporaryDirectory() as path:
        run = read_run(folder(Path(path), {**RESULT, **result}, list(history), analyses))
    return warnings_of(run)


def test_a_good_run_has_no_warning(tmp_path):
    history = logs(
        loss=list(LEARNING.values()),
        ce_loss=list(LEARNING.values()),
        discriminator_accuracy_real=0.8,
        discriminator_accuracy_fake=0.7,
        correctness_mask_rate=0.3,
        eval_bits_per_byte=list(LEARNING.values()),
    )
    assert warned(history, ANALYSES, evaluations={"0": {"eval_bits_per_byte": 0.8}}, data=FULL["data"]) == []
    result = {**RESULT, "evaluations": {"0": {"eval_bits_per_byte": 0.8}}, "data": FULL["data"]}
    markdown, _ = written(folder(tmp_path / "run", result, history, ANALYSES))
    [line] = [line for line in markdown.splitlines() if line.startswith("Checked and found in order")]
    assert line.count(",") == 8 and "[!WARNING]" not in markdown
    assert warned() == []


def told(real, fake, **settings):
    """Of the discriminator's accuracies."""
    history = logs(discriminator_accuracy_real=real, discriminator_accuracy_fake=fake)
    return warned(history, settings={**RESULT["settings"], **settings})


def test_a_discriminator_that_has_won():
    [text] = told([0.5] * 3 + [1.0] * 7, [0.5] * 4 + [0.995] * 6)
    assert "100.0 % of the keys and 99.5 % of the queries at step 100" in text and "since step 50" in text
    assert "non_saturating" in text and "discriminator_learning_rate" in text
    [text] = told(1.0, 1.0, adversarial_loss="non_saturating")
    assert "since step 10" in text and "non_saturating" not in text
    assert told([1.0] * 9 + [0.98], 1.0) == [] == told(1.0, 0.9) == told(0.9, 1.0)
    # Between the first and the last it may have been otherwise.
    assert "since step 60" in told([1.0] * 4 + [0.9] + [1.0] * 5, 1.0)[0]


def test_a_discriminator_that_guesses():
    [text] = told([1.0] + [0.5] * 9, [0.08] + [0.5] * 9)
    assert "at most 54.0 %, at step 10" in text and "50.0 % at step 100" in text
    assert "discriminator_learning_rate" in text
    [text] = told(1.0, 0.0, as_published=True)
    assert "as_published=True never trains it" in text
    assert told([0.7] + [0.5] * 9, 0.5) == []
    assert warned(logs(discriminator_accuracy_real=0.5, discriminator_accuracy_fake=0.5)[:2]) == []


def test_a_gradient_of_matching_that_vanishes():
    def found(matching, **norms):
        last = {"step": 1200, "gradient_norm_kq": matching, **{f"gradient_norm_{k}": v for k, v in norms.items()}}
        return warned(analyses=[ANALYSES[0], last])

    [text] = found(0.0099, t2s_kd=0.5, s2t_kd=1.0, ce=9.0)
    assert "0.99 % of the norm of that of s2t_kd at step 1,200 (0.0099 against 1)" in text and "kq_rate" in text
    assert found(0.0, t2s_kd=0.5) and found(0.01, t2s_kd=1.0, ce=100.0) == [] == found(0.0, ce=1.0)


def test_a_correctness_mask_that_lets_little_through():
    [text] = warned(logs(correctness_mask_rate=[0.9] * 7 + [0.05, 0.07, 0.15]))
    assert "9.0 %" in text and "from step 80 on" in text and "spaces=teacher" in text
    assert warned(logs(correctness_mask_rate=[0.0] * 7 + [0.1, 0.1, 0.15])) == []
    unused = {**RESULT["settings"], "correctness_mask": False}
    assert warned(logs(correctness_mask_rate=0.0), settings=unused) == []


def test_loss_spikes():
    noise = [0.1 * (-1) ** i for i in range(10)]
    steady = [2.0 + value for value in noise]
    [text] = warned(logs(s2t_kd_loss=[*steady[:6], 9.0, *steady[7:]]))
    assert "s2t_kd_loss jumps to 9 at step 70" in text and "4.7 times the 1.9 around it" in text
    assert "also" not in text and "learning rate" in text
    [text] = warned(logs(loss=[*steady[:3], 16.0, *steady[4:9], 20.0]))
    assert "jumps to 20 at step 100" in text and "(also at step 40)" in text
    assert warned(logs(loss=[*steady[:6], 5.5, *steady[7:]])) == []
    # What goes down fast, or up for good, or always jumps, or is the loss of a game, is no spike.
    assert warned(logs(loss=[30.0, 9.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])) == []
    assert warned(logs(t2s_ce_loss=[1.0] * 5 + [5.0] * 5)) == []
    assert warned(logs(loss=[0.1, 4.0] * 5)) == []
    assert warned(logs(loss=[0.1, 0.1, 0.1, 4.0] * 2 + [0.1, 0.1])) != []
    assert warned(logs(kq_loss=[1.0] * 9 + [9.0], t2s_kd_loss=[1.0] * 9 + [9.0])) == []
    assert warned(logs(loss=-1.0)) == []


def test_training_that_diverges():
    rising = [2.0, 1.5, 1.0, 1.0, 1.1, 1.2, 1.2, 1.3, 1.3, 1.3]
    [text] = warned(logs(ce_loss=rising))
    assert "ends at 1.3 (median from step 70)" in text and "after 1 around step 40" in text
    assert warned(logs(ce_loss=[min(value, 1.2) for value in rising])) == []
    assert warned(logs(ce_loss=rising)[:7]) == []


def test_evaluation_that_gets_worse():
    def found(values, key="eval_bits_per_byte", **result):
        return warned([{"step": step, key: value} for step, value in values.items()], **result)

    values = {100: 0.9, 300: 0.7, 1000: 0.75}
    [text] = found(values)
    assert "bits per byte was best at step 300 (0.7000) and ends at 0.7500 at step 1,000" in text
    assert "load_best_model_at_end" in text
    assert "bits per byte (code)" in found(values, "eval_code_bits_per_byte")[0]
    assert "method's own loss" in found(values, "eval_loss")[0]
    # The model that is kept is the best; late; by very little; falling; too few to say.
    assert found(values, best_checkpoint="checkpoint-300") == []
    assert found({100: 0.9, 800: 0.7, 1000: 0.75}) == [] == found({100: 0.9, 300: 0.7, 1000: 0.703})
    assert found({100: 0.9, 300: 0.7, 1000: 0.6}) == [] == found({300: 0.7, 1000: 0.75})


def test_training_that_does_not_help():
    [text] = warned(evaluations={"0": {"eval_bits_per_byte": 0.75}})
    assert "is 0.7500 after 100 steps and was 0.7500 at step 0" in text
    assert warned([{"step": 0, "eval_bits_per_byte": 0.5}]) != []
    assert warned(evaluations={"0": {"eval_bits_per_byte": 0.7501}}) == []
    assert warned(evaluations={"10": {"eval_bits_per_byte": 0.5}}) == []


def test_attention_that_aligns_nothing():
    def found(mass):
        return warned(analyses=[ANALYSES[1], {"step": 1000, "chunk_mass": mass, "chunk_mass_uniform": 0.2}])

    [text] = found(0.21)
    assert "21.0 %" in text and "step 1,000" in text and "20.0 %" in text and "chunk_attention" in text
    assert found(0.23) == [] == warned(analyses=[{"step": 0, "chunk_mass": 0.0}])


def test_examples_that_were_cut_or_skipped():
    part = {"rows": 1200, "kept": 1100, "cut": 56, "empty_responses": 100, "long_prompts": 0}
    first, second = warned(data={"train": part, "eval": None})
    assert "56 of 1,100 training responses (5.1 %)" in first and "max_length" in first
    assert "100 of 1,200 training examples (8.3 %) were skipped" in second
    [text] = warned(data={"train": None, "eval": {"rows": 20, "kept": 20, "cut": 2}})
    assert "2 of 20 evaluation responses" in text
    assert warned(data={"train": {**part, "kept": 1140, "cut": 57}}) == []
    assert len(warned(data={"train": {"rows": 3, "kept": 0, "cut": 0}})) == 1
