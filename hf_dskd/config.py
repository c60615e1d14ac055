"""Every setting of a distillation run, once."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from transformers import SchedulerType, TrainingArguments

from .checks import check_sharding
from .errors import UserError
from .losses.divergences import DIVERGENCES
from .methods import METHODS, Method
from .settings import ADVERSARIAL_LOSSES, DTYPES, PROMPT_STYLES, DistillationSettings


def choice(name: str, value: str, known: Any) -> None:
    """Raises a [`UserError`] that suggests the nearest of `known` unless `value` is one of them."""
    if value in known:
        return
    near = difflib.get_close_matches(str(value), list(known), n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"{name}={value!r} is unknown: {hint}one of {', '.join(known)}")


@dataclass
class DSKDConfig(DistillationSettings, TrainingArguments):
    """
    Configuration of the [`DSKDTrainer`]: everything of [`~transformers.TrainingArguments`] (with `logging_steps` 10 by
    default), and the settings that [`~hf_dskd.settings.DistillationSettings`] explains one by one.

    Raises:
        UserError: For a value that can't work, when the configuration is made.

    Example:

    ```python
    config = DSKDConfig("gpt2-distilled", method="dskd_cma_ga", divergence="forward_kl", kd_temperature=1.0)
    ```
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs", "teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        choice("method", self.method, METHODS)
        choice("divergence", self.divergence, DIVERGENCES)
        choice("adversarial_loss", self.adversarial_loss, ADVERSARIAL_LOSSES)
        choice(
            "discriminator_lr_scheduler_type",
            self.discriminator_lr_scheduler_type,
            [kind.value for kind in SchedulerType],
        )
        choice("prompt_style", self.prompt_style, PROMPT_STYLES)
        choice("teacher_dtype", self.teacher_dtype, DTYPES)
        within = {"kd_rate": self.kd_rate, "discriminator_dropout": self.discriminator_dropout}
        for name, value in within.items():
            if not 0 <= value <= 1:
                raise UserError(f"{name}={value} is outside [0, 1]: the papers use 0.5 and 0.1")
        for name, value in {"skew_lambda": self.skew_lambda, "adaptive_kl_alpha": self.adaptive_kl_alpha}.items():
            if not 0 < value < 1:
                raise UserError(f"{name}={value} is outside (0, 1): the papers use 0.1 and 0.5")
        if not self.kd_temperature > 0:
            raise UserError(f"kd_temperature={self.kd_temperature} must be above 0 (the papers use 2.0)")
        if not self.kq_rate >= 0:
            raise UserError(f"kq_rate={self.kq_rate} must not be negative: 0 switches matching off")
        if self.discriminator_steps < 1:
            raise UserError(f"discriminator_steps={self.discriminator_steps} must be at least 1")
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length} leaves no room for a prompt and a response")
        if self.label_smoothing_factor:
            raise UserError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not supported: leave it at 0"
                " (distillation already softens the labels)"
            )
        check_sharding(self)
        # The batch carries the teacher's columns, which no student's forward names.
        self.remove_unused_columns = False
        # A loss that isn't finite ends the run (see NonFiniteLossError); Trainer would hide it from the log.
        self.logging_nan_inf_filter = False
        super().__post_init__()

    @property
    def method_row(self) -> Method:
        """What `method` is composed of."""
        return METHODS[self.method]

    @property
    def training_dtype(self) -> str:
        """Name of the torch dtype that matrix products run in."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"
