"""Every setting of a distillation run, once."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy

from .errors import UserError
from .field_checks import TRAINING, check_fields
from .hub.names import check_repo_id
from .launch import check_processes, check_sharding, must_use_cpu
from .methods import ALIGNMENTS, METHODS, Method
from .precision import choose_precision, told
from .redaction import is_secret, redact, without_secrets
from .settings import DistillationSettings, parse_layers
from .words import SETTINGS, understands


# Settings that replace a part of a dual-space method's row.
PARTS = ("alignment", "spaces", "matching", "teacher_value", "t2s_label", "projector_init")
# What the code released with arXiv 2603.22056 has a counterpart of.
_PUBLISHED_METHODS = ("sft", "kd", "dskd", "dskd_cma", "dskd_cma_ga", "dskd_cma_ct", "dskd_clp", "dskd_cla", "uld")


@dataclass
class DSKDConfig(DistillationSettings, TrainingArguments):  # type: ignore[misc]  # bf16 may be unsaid here
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

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "teacher_model_init_kwargs",
        "chat_template_kwargs",
    ]

    def __post_init__(self) -> None:
        self.check()
        # The batch carries the teacher's columns, which no student's forward names.
        self.remove_unused_columns = False
        if self.max_grad_norm is None:
            # Both clip nothing; Trainer compares it with a number.
            self.max_grad_norm = 0.0
        # A loss that isn't finite ends the run (see NonFiniteLossError); Trainer would hide it from the log.
        self.logging_nan_inf_filter = False
        self._set_best_metric()
        self.use_cpu = self.use_cpu or must_use_cpu()
        self.bf16, self.fp16 = choose_precision(self.bf16, self.fp16, self.use_cpu)
        # transformers wants to be told that bf16 on a CPU is meant.
        self.use_cpu = self.use_cpu or (self.bf16 and not torch.accelerator.is_available())
        try:
            with told(self.bf16, self.fp16):
                super().__post_init__()
        except (ValueError, TypeError, OSError) as error:
            raise UserError(" ".join(str(error).split())) from error
        check_processes(self.world_size)

    def __str__(self) -> str:
        return redact(super().__str__())

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Everything but tokens: for trackers."""
        return without_secrets(super().to_dict())

    def without_tokens(self) -> DSKDConfig:
        """A copy to be saved."""
        saved = copy(self)
        for name, value in vars(self).items():
            if type(value) in (str, list, dict):
                setattr(saved, name, None if is_secret(name) else without_secrets(value))
        return saved

    def _set_best_metric(self) -> None:
        # eval_loss would be Trainer's choice: it moves with the discriminator and with temperature schedules.
        chooses = self.load_best_model_at_end or self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
        if chooses and self.metric_for_best_model is None:
            self.metric_for_best_model = "bits_per_byte"
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("bits_per_byte"):
            self.greater_is_better = False

    def check(self) -> None:
        """Raises a [`UserError`] for a value that can't work; again where settings change, as in a search."""
        check_fields(self, TRAINING)
        self._check_composition()
        optim = str(getattr(self.optim, "value", self.optim))
        if self.method_row.dual_space and (optim.endswith("_layerwise") or optim in ("lomo", "adalomo")):
            raise UserError(
                f"optim={optim!r} updates the student's parameters one by one in the backward pass, and would leave"
                f" the projectors of method={self.method!r} as they are: choose another ('adamw_8bit' saves memory)"
            )
        self._check_mappings()
        self._check_schedule()
        self._check_attention()
        if self.load_best_model_at_end and self.eval_strategy in ("no", IntervalStrategy.NO):
            raise UserError(
                "load_best_model_at_end=True needs evaluations to choose by: set eval_strategy as save_strategy"
            )
        if self.label_smoothing_factor:
            raise UserError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not supported: leave it at 0"
                " (distillation already softens the labels)"
            )
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise UserError(
                f"hub_strategy={str(HubStrategy(self.hub_strategy).value)!r} would publish a student before its run is"
                " over: leave it at 'end', and push a run of your own choice with `hf-dskd push RUN REPO`"
            )
        if getattr(self, "train_sampling_strategy", None) == "batch_rebalance":
            raise UserError(
                "train_sampling_strategy='batch_rebalance' knows the student's lengths only, and has a seed of its"
                " own: use 'group_by_length'"
            )
        if getattr(self, "enable_jit_checkpoint", False):
            raise UserError(
                "enable_jit_checkpoint=True saves in the middle of a step, from which a run can't go on bit by bit:"
                " leave it out, and set save_steps to what may be lost"
            )
        check_sharding(self)
        if self.push_to_hub or self.hub_model_id is not None:
            check_repo_id(self.hub_model_id or Path(str(self.output_dir)).absolute().name, "hub_model_id")

    def _check_mappings(self) -> None:
        for name in (name for name in self._VALID_DICT_FIELDS if name.endswith("_kwargs")):
            value = getattr(self, name, None)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                    # TrainingArguments reads what begins with a brace, and leaves other strings as they are.
                    setattr(self, name, None if value is None else getattr(self, name).strip())
                except json.JSONDecodeError:
                    pass
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{name}={value!r} isn't a mapping: write a JSON object, such as '{{\"name\": 1}}'")
            if name == "chat_template_kwargs":
                taken = [
                    key
                    for key in ("tokenize", "add_generation_prompt", "continue_final_message")
                    if key in (value or {})
                ]
                if taken:
                    raise UserError(
                        f"chat_template_kwargs has {taken[0]!r}, which training decides: leave it out, and name what"
                        " the chat template itself reads"
                    )

    def _check_composition(self) -> None:
        """Refuses combinations that mean nothing, by name."""
        for name in PARTS:
            value = getattr(self, name)
            if value is not None and not METHODS[self.method].dual_space:
                dual = ", ".join(name for name, method in METHODS.items() if method.dual_space)
                raise UserError(f"{name}={value!r} means nothing for method={self.method!r}: it needs one of {dual}")
        row = self.method_row
        for space in ("student", "teacher"):
            name = f"{space}_space_divergence"
            if getattr(self, name) is not None and space not in row.spaces:
                raise UserError(
                    f"{name}={getattr(self, name)!r}: method={self.method!r} with spaces={self.spaces!r} compares"
                    f" nothing in {space} space; leave it out"
                )
        if row.matching is not None and not row.has_queries:
            raise UserError(
                f"matching={row.matching!r} needs queries and keys, which alignment={row.alignment!r} has none of:"
                f" set alignment to {' or '.join(name for name, row in ALIGNMENTS.items() if 'queries' in row.needs)},"
                " or matching to none"
            )
        if row.label == "teacher" and row.dual_space and not ALIGNMENTS[str(row.alignment)].one_to_one:
            fitting = " or ".join(name for name, alignment in ALIGNMENTS.items() if alignment.one_to_one)
            raise UserError(
                f"t2s_label='teacher' needs one teacher token per student token, which alignment={row.alignment!r}"
                f" doesn't give: set alignment to {fitting}"
            )
        if self.as_published:
            if self.method not in _PUBLISHED_METHODS:
                raise UserError(
                    f"as_published=True: method={self.method!r} isn't in the released code, which has"
                    f" {', '.join(_PUBLISHED_METHODS)}"
                )
            replaced = [name for name in (*PARTS, "student_temperature") if getattr(self, name) is not None]
            replaced += ["on_policy_fraction"] if self.on_policy_fraction else []
            replaced += ["adversarial_loss"] if self.adversarial_loss != "minimax" else []
            if replaced:
                raise UserError(f"as_published=True: the released code has no {replaced[0]}; leave it at its default")
            if self.padding_free:
                raise UserError(
                    "padding_free=True: as_published=True needs the states of padding too; leave one of them out"
                )
        if self.teacher_cache is not None and row.needs_teacher:
            if self.as_published:
                raise UserError(
                    f"teacher_cache={self.teacher_cache!r}: as_published=True needs the states of prompts and padding"
                    " too, and a cache holds those of responses; leave one of them out"
                )
            if self.on_policy_fraction:
                raise UserError(
                    f"teacher_cache={self.teacher_cache!r}: on_policy_fraction={self.on_policy_fraction} makes"
                    " responses that no cache can hold; leave one of them out"
                )
        if self.on_policy_fraction and not row.needs_teacher:
            raise UserError(
                f"on_policy_fraction={self.on_policy_fraction}: method={self.method!r} would learn the student's own"
                " samples without a teacher; choose a method with one, or set it to 0"
            )

    def _check_attention(self) -> None:
        rate = self.attention_kd_rate
        parse_layers(self.attention_layers)
        if not rate:
            return
        if not self.method_row.needs_teacher:
            raise UserError(
                f"attention_kd_rate={rate}: method={self.method!r} runs no teacher, whose attention is needed; choose"
                " a method with one, or set it to 0"
            )
        if self.as_published:
            raise UserError("as_published=True: the released code has no attention_kd_rate; leave it at its default")
        if self.teacher_cache is not None:
            raise UserError(
                f"teacher_cache={self.teacher_cache!r}: attention_kd_rate={rate} needs the teacher's queries and keys,"
                " and a cache holds last hidden states alone; leave one of them out"
            )
        if self.padding_free:
            raise UserError(
                f"padding_free=True: attention_kd_rate={rate} compares queries and keys of padded batches; leave one"
                " of them out"
            )

    def _check_schedule(self) -> None:
        scheduled = self.temperature_schedule != "constant"
        if scheduled != (self.final_kd_temperature is not None):
            raise UserError(
                f"temperature_schedule={self.temperature_schedule!r} and final_kd_temperature="
                f"{self.final_kd_temperature} belong together: set both (such as 'linear' and 1.0), or neither"
            )

        # A schedule goes by the ratio of the two.
        default = type(self).__dataclass_fields__["kd_temperature"].default
        if self.method == "bpm" and not scheduled and self.kd_temperature != default:
            raise UserError(
                f"kd_temperature={self.kd_temperature} means nothing for method='bpm', whose models have temperatures"
                " of their own: set teacher_temperature, student_temperature or both"
            )

    @property
    def method_row(self) -> Method:
        """What `method` is composed of, with the parts that other settings replace."""
        row = METHODS[self.method]
        changes: dict[str, Any] = {}
        if self.spaces is not None:
            changes["spaces"] = ("student", "teacher") if self.spaces == "both" else (self.spaces,)
        if self.matching is not None:
            changes["matching"] = None if self.matching == "none" else self.matching
        for setting, part in (
            ("alignment", "alignment"),
            ("teacher_value", "teacher_value"),
            ("t2s_label", "label"),
            ("projector_init", "projector_init"),
        ):
            if getattr(self, setting) is not None:
                changes[part] = getattr(self, setting)
        return replace(row, **changes)

    @property
    def groups_by_length(self) -> bool:
        """Whether batches hold examples of similar length: one setting in transformers 4, another in 5."""
        strategy = getattr(self, "train_sampling_strategy", "random")
        return bool(getattr(self, "group_by_length", strategy == "group_by_length"))

    @property
    def training_dtype(self) -> str:
        """Name of the torch dtype that matrix products run in."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"


# The generated one, which takes other tools' names too.
DSKDConfig.__init__ = understands("DSKDConfig", SETTINGS, "leave it out")(DSKDConfig.__init__)  # type: ignore[method-assign]
