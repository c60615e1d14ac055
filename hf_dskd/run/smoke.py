"""A try of a recipe in a minute: tiny random models of the same kinds, a few steps, no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..offline.python_functions import PYTHON_FUNCTIONS
from ..training.run_folder import held, remove_run


if TYPE_CHECKING:
    from .settings import Run

# What `--smoke` puts in the place of a recipe's own settings; those of the command line go before.
SMOKE: dict[str, Any] = {
    "dataset_name": PYTHON_FUNCTIONS,
    "rename_columns": "",
    "prompt_column": "prompt",
    "response_column": "completion",
    "train_size": 16,
    "held_out_size": 4,
    "maximum_characters": 150,
    "max_length": 384,
    "max_steps": 4,
    "warmup_steps": 0,
    "total_batch_size": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_steps": 2,
    "report_to": "none",
    "push_to_hub": False,
    "sft_teacher_epochs": 1,
}


def smoke_flags(settings: dict[str, Any], given: set[str]) -> list[str]:
    """
    Writes the flags of a short run of a recipe's `settings`, in a folder of its own and on data that are always there.

    Of those data are left out that the command line, which names the settings `given`, replaces.
    """
    changed = {"output_dir": f"{settings.get('output_dir', 'runs/run')}_smoke", **SMOKE}
    if "dataset_name" in given:
        for name in ("prompt_column", "response_column", "train_size"):
            del changed[name]
    if "dataset_num_proc" in settings:
        changed["dataset_num_proc"] = 1
    return [f"--{name}={value}" for name, value in changed.items()]


def smoke_models(student: str | None, teacher: str | None, output_dir: Path) -> list[str | None]:
    """Makes tiny random models of the same kinds as the two in the output folder, and gives their folders."""
    from ..offline.tiny_models import tiny_model

    return [
        None if name is None else str(tiny_model(name, output_dir / "tiny_models" / role, role))
        for role, name in (("student", student), ("teacher", teacher))
    ]


def wants_smoke(arguments: list[str], settings: dict[str, Any]) -> bool:
    """Tells whether `--smoke` is set, on the command line or else in the file."""
    wanted = bool(settings.get("smoke", False))
    for word, following in zip(arguments, [*arguments[1:], ""]):
        name, _, value = word.partition("=")
        if name == "--smoke":
            wanted = (value or following).lower() not in ("false", "no", "n", "f", "0")
        elif name in ("--no_smoke", "--no-smoke"):
            wanted = False
    return wanted


def prepare_smoke(run: Run) -> None:
    """Puts tiny models, made in the output folder, into the place of a run's own."""
    from .trl_settings import student_options, teacher_options, without_place

    config, model, options = run.config, run.model, run.options
    folder = Path(str(config.output_dir))
    if (folder / "tiny_models").is_dir() and not config.resume_from_checkpoint:
        # A smoke run's folder is of no worth, and the same command is to work again.
        with config.main_process_first(desc="the last smoke run"):
            if config.process_index == 0:
                with held(folder):
                    remove_run(folder)
    with config.main_process_first(desc="tiny models"):
        names = smoke_models(model.model_name_or_path, options.teacher_model_name_or_path, folder)
    model.model_name_or_path, options.teacher_model_name_or_path = names
    config.model_init_kwargs = without_place(student_options(run))
    config.teacher_model_init_kwargs = without_place(teacher_options(run))
    model.model_revision, options.teacher_model_revision = "main", None
    # What is written of the run names these models, and its settings alone make it again.
    options.smoke = False
