"""The settings of a run that neither training nor distillation has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..offline.python_functions import PYTHON_FUNCTIONS


if TYPE_CHECKING:
    from trl import ModelConfig, ScriptArguments

    from ..config import DSKDConfig


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class RunArguments:
    """Holds what a recipe needs beside the model, the data and the training."""

    teacher_model_name_or_path: str | None = _setting(None, "name of the teacher on the hub, or its folder")
    teacher_model_revision: str | None = _setting(None, "branch, tag or commit of the teacher on the hub")
    rename_columns: str | None = _setting(None, "columns of the dataset under other names, as old=new,old=new")
    train_size: int | None = _setting(None, "train on this many examples only, the first ones")
    held_out_size: int = _setting(0, "examples to evaluate on where the dataset has no test split")
    maximum_characters: int = _setting(300, f"longest prompt and response of dataset_name={PYTHON_FUNCTIONS}")
    total_batch_size: int | None = _setting(
        None, "examples per optimizer step over all processes; sets gradient_accumulation_steps"
    )
    smoke: bool = _setting(
        False, "try the recipe in a minute: tiny random models of the same kinds, a few steps, no network"
    )
    sft_teacher: bool = _setting(False, "first train the teacher on the same data, into OUTPUT_DIR/teacher")
    sft_teacher_epochs: float = _setting(3.0, "epochs of the teacher's own training")
    sft_teacher_learning_rate: float = _setting(1e-4, "learning rate of the teacher's own training")
    sft_teacher_lora_r: int = _setting(
        64, "rank of the teacher's adapter, which is merged afterwards; 0 trains all of it"
    )


RULES: dict[str, dict[str, Any]] = {
    **{name: {"least": 1} for name in ("train_size", "maximum_characters", "total_batch_size")},
    **{name: {"least": 0} for name in ("held_out_size", "sft_teacher_learning_rate", "sft_teacher_lora_r")},
    "sft_teacher_epochs": {"above": 0},
    # Empty where a smoke run replaces a recipe's.
    "rename_columns": {"unchecked": True},
}


@dataclass
class Run:
    """Holds the parsed arguments of a run."""

    script: ScriptArguments
    config: DSKDConfig
    model: ModelConfig
    options: RunArguments
