"""The precision of a run: what its settings say, then its launcher, then the GPU; the teacher's follows."""

import json
import logging
import os

import pytest
import runs
import torch
from transformers import TrainingArguments

from hf_dskd import DSKDConfig, UserError, doctor, precision, run
from hf_dskd.run import arguments as run_arguments


@pytest.fixture
def launched(monkeypatch):
    return lambda value: monkeypatch.setenv(precision.LAUNCHED, value)


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU, with and without instructions for bf16; the CPU does the work."""

    def there(bf16):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(precision, "gpu_computes_in_bf16", lambda: bf16)
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: bf16)

    monkeypatch.delenv(precision.LAUNCHED, raising=False)
    return there


@pytest.fixture
def folders(tmp_path):
    return runs.save_pair(tmp_path)


def trained_in(folder, **settings):
    config = DSKDConfig(str(folder), report_to="none", **settings)
    return config.training_dtype


# ---- A launcher


@pytest.mark.parametrize("said, dtype", [("bf16", "bfloat16"), ("no", "float32")])
def test_the_launchers_precision_is_the_teachers_too(said, dtype, launched, folders, tmp_path):
    launched(said)
    student, teacher = folders
    trainer = runs.trainer(tmp_path / "run", student=student, teacher=teacher, method="dskd_cma")
    assert trainer.args.training_dtype == dtype
    assert trainer.accelerator.mixed_precision == ("bf16" if said == "bf16" else "no")
    assert trainer.teacher.model.dtype == getattr(torch, dtype) and trainer.model.dtype == torch.float32
    trainer.train()
    cache = tmp_path / "cache"
    runs.trainer(tmp_path / "other", student=student, teacher=teacher, method="dskd_cma", teacher_cache=str(cache))
    assert json.loads((cache / "index.json").read_text())["facts"]["teacher_dtype"] == dtype


def test_bf16_of_a_launcher_on_a_machine_without_gpus(launched, tmp_path):
    launched("bf16")
    config = DSKDConfig(str(tmp_path), report_to="none")
    assert config.bf16 and config.use_cpu


def test_a_setting_goes_before_the_launcher(launched, tmp_path):
    launched("bf16")
    trainer = runs.trainer(tmp_path, bf16=False, max_steps=1)
    assert trainer.args.training_dtype == "float32" and trainer.accelerator.mixed_precision == "no"
    launched("no")
    assert trained_in(tmp_path, bf16=True, use_cpu=True) == "bfloat16"
    launched("bf16")
    assert precision.choose_precision(None, True, False) == (False, True)
    launched("fp16")
    assert precision.choose_precision(None, False, False) == (False, True)


@pytest.mark.parametrize("said", [None, "no", "bf16"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("writes", [True, False])
def test_settings_hear_the_launcher_and_not_the_settings_before(
    said, first, writes, launched, gpu, monkeypatch, tmp_path
):
    """Where TrainingArguments writes the variable, as that of transformers 4.57 does, and where it doesn't."""
    gpu(False)
    finish = TrainingArguments.__post_init__

    def writing(args):
        said = "bf16" if args.bf16 else "fp16" if args.fp16 else os.environ.get(precision.LAUNCHED, "no")
        os.environ[precision.LAUNCHED] = said
        finish(args)

    if writes:
        monkeypatch.setattr(TrainingArguments, "__post_init__", writing)
    if said is not None:
        launched(said)
    chosen = "bfloat16" if first else "float32"
    dtype = "bfloat16" if said == "bf16" else "float32"
    assert trained_in(tmp_path, bf16=first, use_cpu=True) == chosen
    for _ in range(2):
        config = DSKDConfig(str(tmp_path), report_to="none", use_cpu=True)
        assert config.training_dtype == dtype
        # What Trainer hears, by its argument or by the variable.
        assert getattr(config, "mixed_precision", "no") == ("bf16" if said == "bf16" else "no")
        if writes:
            assert os.environ[precision.LAUNCHED] == ("bf16" if said == "bf16" else "no")
    # Another launcher, as a notebook has it.
    other = "no" if os.environ.get(precision.LAUNCHED) == "bf16" else "bf16"
    launched(other)
    assert trained_in(tmp_path, use_cpu=True) == ("bfloat16" if other == "bf16" else "float32")


def test_a_precision_that_no_run_has(launched, tmp_path):
    launched("fp8")
    with pytest.raises(UserError, match=r"ACCELERATE_MIXED_PRECISION='fp8'.*--mixed_precision bf16, fp16 or no"):
        DSKDConfig(str(tmp_path), report_to="none")


def test_the_command_line_hears_the_launcher(launched, monkeypatch, tmp_path):
    monkeypatch.setattr(run_arguments, "fastest_precision", lambda: ["--fp16"])
    launched("bf16")
    assert run.parse(None, None, [f"--output_dir={tmp_path}", "--use_cpu=true"]).config.training_dtype == "bfloat16"


def test_doctor_hears_the_launcher(launched):
    launched("fp16")
    assert [text for _, text in doctor.precision()] == [
        "fp16 is what a run takes here; --bf16 and --fp16 say otherwise"
    ]


# ---- A GPU


def test_a_gpu_that_computes_in_bf16_does(gpu, tmp_path, caplog, monkeypatch):
    gpu(bf16=False)
    assert trained_in(tmp_path) == "float32"
    gpu(bf16=True)
    monkeypatch.setenv("RANK", "1")
    assert precision.choose_precision(None, False, False) == (True, False)
    # One process says so.
    assert "bf16" not in caplog.text
    monkeypatch.delenv("RANK")
    with caplog.at_level(logging.WARNING):
        assert trained_in(tmp_path) == "bfloat16"
    assert "training in bf16, in which this GPU computes" in caplog.text and "bf16=False for float32" in caplog.text


@pytest.mark.parametrize(
    "settings, dtype",
    [({"bf16": False}, "float32"), ({"bf16": True}, "bfloat16"), ({"use_cpu": True}, "float32")],
)
def test_what_is_said_is_kept_in_silence(settings, dtype, gpu, tmp_path, caplog):
    gpu(bf16=True)
    with caplog.at_level(logging.WARNING, logger="hf_dskd.precision"):
        assert trained_in(tmp_path, **settings) == dtype
    assert not [record for record in caplog.records if record.name == "hf_dskd.precision"]


def test_emulated_bf16_does_not_count(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(including_emulation)
    )
    assert not precision.gpu_computes_in_bf16() and asked == [False]


# ---- What is written makes the same run


@pytest.mark.parametrize("flag", ["--bf16=false", "--bf16=true", "--bf16"])
def test_a_file_of_settings_keeps_the_precision(flag, gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(run_arguments, "fastest_precision", lambda: ["--bf16"])
    first = run.parse(None, None, [f"--output_dir={tmp_path}", "--use_cpu=true", flag])
    written = run.changed_settings(first)
    assert written["bf16"] is (flag != "--bf16=false")
    (tmp_path / "settings.yaml").write_text(json.dumps(written))
    again = run.parse(None, None, ["--config", str(tmp_path / "settings.yaml")])
    assert again.config.training_dtype == first.config.training_dtype
    assert run.variant(again.config, seed=3).training_dtype == first.config.training_dtype
