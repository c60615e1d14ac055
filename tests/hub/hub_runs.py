"""Finished runs of tiny models, as `hf-dskd train` leaves them, for tests of what is pushed."""

import json
from pathlib import Path

import runs
import tiny
from peft import LoraConfig
from transformers import AutoTokenizer

from hf_dskd.evaluation.protocol import EvaluationSettings, evaluate
from hf_dskd.report.record import evaluations
from hf_dskd.training.run_folder import RESULT_NAME, SETTINGS_NAME
from hf_dskd.utils.files import read_yaml, write_yaml


SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"


def saved(folder: Path, model, tokenizer) -> Path:
    """A model of random weights with its tokenizer in a folder."""
    tokenizer.save_pretrained(folder)
    model(len(tokenizer)).save_pretrained(folder)
    return folder


def finished(folder: Path, student: Path, teacher: Path, adapter: bool = False, **settings) -> Path:
    """A run of two steps with everything that `hf-dskd train` writes beside its model."""
    lora = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    made = {"hub_token": SECRET, "logging_dir": str(folder / "logs"), "teacher_cache": None}
    trainer = runs.trainer(
        folder,
        student=str(student),
        teacher=str(teacher),
        rows=8,
        max_steps=2,
        train_dataset=tiny.dataset(8),
        eval_dataset=tiny.dataset(4),
        processing_class=AutoTokenizer.from_pretrained(student),
        peft_config=lora if adapter else None,
        **{"hub_token": SECRET, **settings},
    )
    trainer.train()
    trainer.save_model()
    history = evaluations(trainer.state.log_history)
    metrics = trainer.evaluate()
    trainer.save_state()
    record = trainer.run_record(metrics, history, 3.5, str(folder / "data" / "rows.jsonl"))
    record.write(folder / RESULT_NAME)
    write_yaml(
        folder / SETTINGS_NAME,
        {
            **made,
            "model_name_or_path": str(student),
            "teacher_model_name_or_path": str(teacher),
            "output_dir": str(folder),
            "dataset_name": str(folder / "data" / "rows.jsonl"),
            "model_init_kwargs": {"dtype": "float32", "cache_dir": str(folder), "token": SECRET},
            "run_name": str(folder),
            "learning_rate": 0.001,
            "kd_rate": 0.25,
        },
    )
    return folder


def evaluated(folder: Path, output: str = "evaluation", seeds: tuple[int, ...] = (1, 2)) -> dict:
    """Scores of a run by `hf-dskd evaluate`."""
    questions = folder / "questions.jsonl"
    rows = [{"instruction": f"Say {word}", "output": word} for word in ("cat", "moon")]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluate(
        EvaluationSettings(
            str(folder),
            folder / output,
            {"inside": str(questions)},
            in_distribution=("inside",),
            seeds=seeds,
            max_prompt_length=64,
            max_length=70,
        )
    )


def changed(folder: Path, **changes) -> Path:
    """The run with parts of its `result.json` replaced; those that are objects are updated."""
    path = folder / RESULT_NAME
    result = json.loads(path.read_text())
    for name, value in changes.items():
        result[name] = {**(result.get(name) or {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(result))
    return folder


def with_settings(folder: Path, **settings) -> Path:
    """The run with some of its settings replaced."""
    path = folder / SETTINGS_NAME
    write_yaml(path, {**read_yaml("settings", path), **settings})
    return folder


def of_pair(folder: Path, student: str, teacher: str, source: str | None = None) -> Path:
    """A run of models with these names, none of which was a folder."""
    changed(folder, models={"student": student, "teacher": teacher}, data={"source": source})
    with_settings(folder, model_name_or_path=student, teacher_model_name_or_path=teacher)
    config = folder / "adapter_config.json"
    if config.is_file():
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": student}))
    return folder


def texts(folder: Path) -> dict[str, str]:
    """Every file of a folder by its path, as Latin-1: whatever its bytes are."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes().decode("latin-1")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
