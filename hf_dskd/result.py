"""What a run came to and what it was made of: `result.json` and `settings.yaml`."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .redaction import without_secrets
from .training.run_folder import RESULT_NAME as RESULT_NAME
from .utils.environment import command_line, hardware, versions
from .utils.files import plain, write_json


SETTINGS_NAME = "settings.yaml"
# Settings that DSKDConfig makes itself, and one that must not be written down.
UNWRITTEN = ("remove_unused_columns", "logging_nan_inf_filter", "hub_token")


def write_result(
    path: Path,
    trainer: Any,
    metrics: dict[str, float],
    history: dict[int, dict[str, float]],
    train_runtime: float | None,
    source: str | None = None,
    card: dict[str, Any] | None = None,
) -> None:
    """
    Writes what a run came to and what it was made of, as JSON.

    Args:
        path (`Path`): File to write.
        trainer ([`DSKDTrainer`]): After training.
        metrics (`dict[str, float]`): Of the final model.
        history (`dict[int, dict[str, float]]`): Metrics by optimizer step, of the evaluations on the way.
        train_runtime (`float`, *optional*):
            Seconds of training since the start or the last resume; `None` if there was nothing left to train.
        source (`str`, *optional*): Name of the dataset.
        card (`dict[str, Any]`, *optional*):
            What the user has for the model card: `language`, `license`, `tags`, `model_name`, `datasets`.
    """
    from .data.fingerprint import fingerprint
    from .settings import DistillationSettings

    config, state = trainer.args, trainer.state
    student: Any = trainer.model
    best = state.best_model_checkpoint if config.load_best_model_at_end else None
    teacher = getattr(trainer.teacher, "model", None)
    result = {
        "method": config.method,
        "seed": config.seed,
        "data_seed": config.data_seed,
        "run_id": trainer._run_id,
        "steps": state.global_step,
        "skipped_steps": trainer.skipped_steps,
        "best_checkpoint": best and Path(best).name,
        "metrics": metrics,
        "evaluations": history,
        "train_runtime": train_runtime,
        "command": command_line(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(trainer.accelerator.num_processes),
        "models": {
            "student": trainer._facts["student"],
            "teacher": trainer._facts["teacher"],
            "base_model": trainer._identity["base_model"],
            "student_type": trainer._identity["model_type"],
            "student_bits": next(
                (bits for bits in (4, 8) if getattr(student, f"is_loaded_in_{bits}bit", False)), None
            ),
            # Not the sum over parameters: two of four bits are packed into one byte.
            "student_parameters": student.num_parameters(),
            "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "teacher_parameters": None if teacher is None else teacher.num_parameters(),
            "adapter": trainer._facts["adapter"],
            **{f"{role}_{name}": value for role, found in trainer._origins.items() for name, value in found.items()},
        },
        "data": {
            "source": source,
            "fingerprint": fingerprint(trainer.train_dataset),
            **{name: asdict(part) for name, part in trainer.tokenization_reports.items()},
        },
        "settings": without_secrets(
            {setting.name: getattr(config, setting.name) for setting in fields(DistillationSettings)}
        ),
        "changed_settings": differences(config),
        **({"card": card} if card else {}),
    }
    write_json(path, result)


def evaluations(history: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Metrics by the optimizer step they were taken at, out of `trainer.state.log_history`."""
    return {
        entry["step"]: {name: value for name, value in entry.items() if name.startswith("eval_")}
        for entry in history
        if any(name.startswith("eval_") for name in entry)
    }


def differences(settings: Any) -> dict[str, list[Any]]:
    """
    `[default, value]` of the settings of a dataclass that are not at their default, as plain as YAML and JSON need.

    Left out are those that [`DSKDConfig`] sets itself, and tokens.
    """
    found = {}
    for setting in fields(settings):
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        value = without_secrets(plain(getattr(settings, setting.name)))
        default = None if default is MISSING else plain(default)
        # Objects that a setting was parsed into.
        known = value is None or isinstance(value, (str, bool, int, float, list, dict))
        # Of None Trainer makes what suits the metric, and that isn't False.
        decided = setting.name == "greater_is_better" and value is not None
        # Of None a run makes what suits the machine.
        decided |= setting.name == "bf16" and value is False and not settings.fp16
        same = not decided and (value == default or all(_is_nothing(part) for part in (value, default)))
        if setting.init and known and not same and setting.name not in UNWRITTEN:
            found[setting.name] = [default, value]
    return found


def _is_nothing(value: Any) -> bool:
    """Some settings make one of these of another."""
    return value is None or value is False or value in ([], {}, "", "none", ["none"])
