"""The settings of a run that neither training nor distillation has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..offline.python_functions import PYTHON_FUNCTIONS


if TYPE_CHECKING:
    from trl import ModelConfig, ScriptArguments

    from ..config import DSKDConfig


@dataclass
class RunArguments:
    """What a recipe needs beside the model, the data and the training."""

    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "name or folder of the teacher"})
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the teacher on the hub"}
    )
    rename_columns: str | None = field(
        default=None, metadata={"help": "columns of the dataset under other names, as old=new,old=new"}
    )
    train_size: int | None = field(default=None, metadata={"help": "train on this many examples only"})
    held_out_size: int = field(
        default=0, metadata={"help": "examples to evaluate on where the dataset has no test split"}
    )
    maximum_characters: int = field(
        default=300, metadata={"help": f"longest prompt and response of dataset_name={PYTHON_FUNCTIONS}"}
    )
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "examples per optimizer step over all processes; sets gradient_accumulation_steps"},
    )
    smoke: bool = field(
        default=False,
        metadata={"help": "try the recipe in a minute: tiny random models of the same kinds, a few steps, no network"},
    )
    sft_teacher: bool = field(
        default=False, metadata={"help": "first train the teacher on the same data, into OUTPUT_DIR/teacher"}
    )
    sft_teacher_epochs: float = field(default=3.0, metadata={"help": "epochs of that training"})
    sft_teacher_learning_rate: float = field(default=1e-4, metadata={"help": "learning rate of that training"})
    sft_teacher_lora_r: int = field(
        default=64, metadata={"help": "rank of the teacher's adapter, which is merged afterwards; 0 trains all of it"}
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
    """The parsed arguments of a run."""

    script: ScriptArguments
    config: DSKDConfig
    model: ModelConfig
    options: RunArguments
