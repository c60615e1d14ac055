"""Other tools' words: the same thing under another name is taken, another thing is answered with what to write."""

import inspect
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import runs
import tiny
from transformers import TrainingArguments

import hf_dskd
from hf_dskd import DSKDConfig, DSKDTrainer, cli, run
from hf_dskd.errors import UserError
from hf_dskd.run import arguments as run_arguments
from hf_dskd.run.arguments import RunArguments
from hf_dskd.words import ARGUMENTS, FLAGS, INSTEAD, SETTINGS, translated


KNOWN = {setting.name for setting in fields(DSKDConfig)}


def test_the_tables_lead_to_names_that_there_are():
    from trl import ModelConfig, ScriptArguments

    flags = KNOWN | {
        setting.name for group in (ModelConfig, ScriptArguments, RunArguments) for setting in fields(group)
    }
    assert set(SETTINGS.values()) <= KNOWN
    assert set(FLAGS.values()) <= flags
    assert set(ARGUMENTS.values()) <= set(inspect.signature(DSKDTrainer).parameters)
    assert not INSTEAD.keys() & (SETTINGS.keys() | FLAGS.keys())
    assert not INSTEAD.keys() & {setting.name for setting in fields(hf_dskd.settings.DistillationSettings)}


VALUES = {
    "max_length": 64,
    "on_policy_fraction": 0.5,
    "student_temperature": 1.5,
    "teacher_temperature": 1.5,
    "eval_strategy": "no",
    "use_cpu": True,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 3,
    "hub_token": "t",
    "hub_model_id": "me/it",
}


@pytest.mark.parametrize("word", [word for word in SETTINGS if word not in KNOWN])
def test_settings_under_other_names(word):
    ours, value = SETTINGS[word], VALUES[SETTINGS[word]]
    config = DSKDConfig("out", **{word: value})
    assert getattr(config, ours) == value
    with pytest.raises(UserError, match=f"^DSKDConfig: {word} is {ours} here, and both are given"):
        DSKDConfig("out", **{word: value, ours: value})


def test_the_signature_is_that_of_the_settings():
    """For editors, parsers and `replace`, although other names are understood."""
    assert set(inspect.signature(DSKDConfig).parameters) == {s.name for s in fields(DSKDConfig) if s.init}
    config = DSKDConfig("out", use_cpu=True, lmbda=0.25)
    assert replace(config, kd_rate=0.25).on_policy_fraction == 0.25
    assert isinstance(config, TrainingArguments)


def test_arguments_of_a_trainer_under_other_names(tmp_path):
    trainer = DSKDTrainer(
        student=tiny.gpt2(len(runs._STUDENT_TOKENIZER)),
        teacher=tiny.qwen2(len(runs._TEACHER_TOKENIZER)),
        config=runs.config(tmp_path),
        train_dataset=tiny.dataset(4),
        tokenizer=runs._STUDENT_TOKENIZER,
        teacher_tokenizer=runs._TEACHER_TOKENIZER,
    )
    assert trainer.processing_class is runs._STUDENT_TOKENIZER
    assert trainer.teacher_processing_class is runs._TEACHER_TOKENIZER


def test_flags_and_files_under_other_names(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\nmax_seq_length: 64\nlmbda: 0.5\nteacher: t\ndivergence: tvd\n")
    given = ["--config", str(file), "--use_cpu", "--bf16", "false"]
    parsed = run.parse(None, None, [*given, "--student", "s", "--uld-student-temperature=1.5"])
    assert (parsed.config.max_length, parsed.config.on_policy_fraction) == (64, 0.5)
    assert (parsed.config.divergence, parsed.config.student_temperature) == ("total_variation", 1.5)
    assert (parsed.model.model_name_or_path, parsed.options.teacher_model_name_or_path) == ("s", "t")
    # The command line goes before the file, whatever the names.
    assert run.parse(None, None, [*given, "--max_length", "32"]).config.max_length == 32
    assert run.parse(None, None, [*given, "--max_seq_length", "16"]).config.max_length == 16


@pytest.mark.parametrize("word", sorted(INSTEAD))
def test_what_is_done_in_another_way_is_said_in_one_line(word):
    for call in (
        lambda: translated("DSKDConfig", {word: 1}, KNOWN - {word}, SETTINGS, "leave it out"),
        lambda: run_arguments.our_flags([f"--{word}", "1"], KNOWN - {word}, {**SETTINGS, **FLAGS}),
    ):
        with pytest.raises(UserError, match=f"{word} is no setting: ") as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1 and INSTEAD[word] in str(caught.value)


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"hf_dskd {hf_dskd.__version__}\n"
    code = (
        "import sys; from hf_dskd import cli; cli.main(['--version']);"
        " print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [f"hf_dskd {hf_dskd.__version__}", "[]"]
