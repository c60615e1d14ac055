"""Student and teacher before their weights are read: resolved, checked against each other and the settings, loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from ..alignment.min_edit import vocabulary_map
from ..data.kinds import as_tokenizer
from ..data.prompts import Frame, answer_frame, check_eos, depends_on_the_day, set_pad_token
from ..errors import UserError
from ..kernels.linear_divergence import chunk_sizes
from ..models.causal_lm import base_causal_lm, check_config, check_vocabulary, hidden_size, lm_head
from ..models.generation import add_end_tokens, check_generation_config, check_saved_generation
from ..models.pretrained import (
    check_options,
    dtype_option,
    empty_model,
    generation_config,
    load_tokenizer,
    options_of,
    origin,
    quantization,
    read_config,
    reading,
    weight_options,
)
from ..teacher.cache import TeacherCache, open_cache
from ..teacher.load import check_teacher_options, load_causal_lm, load_teacher_model, teacher_quantization
from .arguments import check_optimized
from .compatibility import (
    as_model,
    check_adapter_config,
    check_not_exchanged,
    check_own_tokenizer,
    check_pair,
    check_peft,
    check_positions,
    check_quantization,
    check_quantized_student,
    check_trainable,
    check_vocabularies,
)


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from ..config import DSKDConfig

logger = logging.getLogger(__name__)


class Side:
    """
    One of the two models, of which configuration and tokenizer are read when they are first asked for.

    `role` is `"student"` or `"teacher"`, `model` a name or folder with its `init_kwargs`, or a loaded model, and
    `tokenizer` one that is given instead of the model's own. `name` is the model's, `loaded` the model if it was
    loaded.
    """

    def __init__(self, role: str, model: Any, init_kwargs: Any = None, tokenizer: Any = None):
        self.role, self.model, self.init_kwargs, self.given = role, model, init_kwargs, tokenizer
        self.name: str = model if isinstance(model, str) else model.name_or_path
        self.loaded = None if isinstance(model, str) else model
        self._prefix = "" if role == "student" else "teacher_"

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration; a [`UserError`] unless it is that of a causal language model."""
        check_options(self.model, self.init_kwargs, f"{self._prefix}model_init_kwargs")
        config = read_config(self.model, self.init_kwargs, f"the {self.role}")
        check_config(config, self.name, f"the {self.role}", self.loaded)
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was given, or else the model's own."""
        if self.given is not None:
            return self.given
        parameter = f"{self._prefix}processing_class"
        return load_tokenizer(self.name, self.init_kwargs, f"the {self.role}'s tokenizer", parameter)

    @property
    def rows(self) -> int:
        """Tokens that the head knows; some have more than their tokenizer."""
        if self.loaded is None:
            return self.config.get_text_config().vocab_size
        return lm_head(self.loaded).weight.shape[0]

    @property
    def short_name(self) -> str:
        """The name without the folder that the model happens to lie in: a run may move to another machine."""
        return Path(self.name).resolve().name if os.path.isdir(self.name) else self.name

    @property
    def origin(self) -> dict[str, str | None]:
        """The commits that the model's files are of (see [`~hf_dskd.models.pretrained.origin`])."""
        return origin(self.model, self.init_kwargs)

    def check_positions(self, args: DSKDConfig) -> None:
        """Raises a [`UserError`] if the model has no position for every token of the longest sequence."""
        check_positions(args, self.config, self.name, f"the {self.role}")

    def check_tokenizer(self, args: DSKDConfig) -> None:
        """Raises a [`UserError`] for a tokenizer that can't end a response, or has tokens that the model hasn't."""
        if self.given is not None:
            check_own_tokenizer(self.given, self.model, self.name, f"{self._prefix}processing_class", self.init_kwargs)
        check_eos(self.tokenizer, self.role)
        said = [set_pad_token(self.tokenizer, self.role)]
        if args.prompt_style == "chat":
            said.append(depends_on_the_day(self.tokenizer, self.role, options_of(args.chat_template_kwargs)))
        for line in filter(None, said):
            logger.warning(line)
        rows = self.config.get_text_config().vocab_size
        if self.loaded is not None:
            rows = self.loaded.get_input_embeddings().weight.shape[0]
        check_vocabulary(self.tokenizer, rows, self.role)


class Pair:
    """
    Student and teacher of a run, before their weights are read.

    The arguments are those of [`~hf_dskd.DSKDTrainer`]; a [`UserError`] for what doesn't go together.

    Attributes:
        student ([`Side`]), teacher ([`Side`] or `None`)
        quantization, teacher_quantization: How each is to be quantized when it is loaded, or `None`.
        adapters (`list[PeftConfig]`): Those of the student, new or loaded.
    """

    def __init__(
        self,
        args: DSKDConfig,
        model: Any,
        teacher_model: Any = None,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        *,
        peft_config: Any = None,
        quantization_config: Any = None,
        teacher_quantization_config: Any = None,
    ):
        model, teacher_model = as_model(model, "model"), as_model(teacher_model, "teacher_model")
        processing_class = as_tokenizer(processing_class, "processing_class")
        teacher_processing_class = as_tokenizer(teacher_processing_class, "teacher_processing_class")
        check_adapter_config(peft_config)
        check_quantization(
            quantization_config=quantization_config, teacher_quantization_config=teacher_quantization_config
        )
        check_pair(args, model, teacher_model)
        for setting, wanted, given in (
            ("quantization_config", quantization_config, model),
            ("teacher_quantization_config", teacher_quantization_config, teacher_model),
        ):
            if wanted is not None and not isinstance(given, str):
                raise UserError(f"{setting} needs its model as a name: a loaded model can't be quantized")
        check_teacher_options(args, teacher_model)
        self.args, self.peft_config = args, peft_config
        self.adapters = [a for a in (peft_config, *getattr(model, "peft_config", {}).values()) if a]
        self.teacher_quantization: Any = None
        self.student = Side("student", model, args.model_init_kwargs, processing_class)
        self.quantization = quantization(
            quantization_config, args.model_init_kwargs, self.student.config, self.student.name, "quantization_config"
        )
        self.student.check_positions(args)
        self.student.check_tokenizer(args)
        self.teacher: Side | None = None
        if teacher_model is not None:
            teacher = Side("teacher", teacher_model, args.teacher_model_init_kwargs, teacher_processing_class)
            self.teacher = teacher
            teacher.check_positions(args)
            self.teacher_quantization = teacher_quantization(
                args, teacher_quantization_config, teacher.config, teacher.name
            )
            if processing_class is not None and teacher_processing_class is not None:
                configs, names = (self.student.config, teacher.config), (self.student.name, teacher.name)
                check_not_exchanged((processing_class, teacher_processing_class), configs, names)
            teacher.check_tokenizer(args)
            check_vocabularies(args, *self.tokenizers)
        vocabularies = [self.student.config.get_text_config().vocab_size]
        if self.teacher is not None and args.method_row.needs_teacher:
            vocabularies.append(self.teacher.config.get_text_config().vocab_size)
        chunk_sizes([max(vocabularies)] * 2, [torch.float32] * 2, args.device.type, args.loss_memory_mb)

    def check_student(self, trains: bool) -> None:
        """Raises a [`UserError`] for a student that can't be trained, if it `trains`, or whose adapter can't be."""
        student, args = self.student, self.args
        if getattr(self.peft_config, "inference_mode", False):
            raise UserError(
                "peft_config.inference_mode=True: nothing of the adapter would be trained; set it to False"
            )
        check_quantized_student(args.device, student.config, student.name, self.quantization, bool(self.adapters))
        if trains and student.loaded is None:
            check_saved_generation(generation_config(student.name, args.model_init_kwargs), student.name)
        elif trains:
            plain: Any = base_causal_lm(student.model)
            check_saved_generation(getattr(plain, "generation_config", None), student.name)
            if self.peft_config is None:
                check_trainable(student.model)
        if self.adapters:
            empty = empty_model(student.config, args.model_init_kwargs, student.loaded)
            for adapter in self.adapters:
                check_peft(adapter, empty)

    @property
    def tokenizers(self) -> tuple[Any, Any]:
        """The student's tokenizer, and the teacher's, which is `None` where there is no teacher."""
        return self.student.tokenizer, None if self.teacher is None else self.teacher.tokenizer

    @cached_property
    def frames(self) -> dict[str, Frame]:
        """What the prompt style puts around an answer, by role."""
        options = self.args.prompt_style, options_of(self.args.chat_template_kwargs)
        sides = [self.student] if self.teacher is None else [self.student, self.teacher]
        return {side.role: answer_frame(side.tokenizer, *options) for side in sides}

    @property
    def ends(self) -> tuple[int, int]:
        """The token at which an answer of the student, and one of the teacher, stops."""
        return self.frames["student"].end[-1], self.frames["teacher"].end[-1]

    @cached_property
    def vocabulary_map(self) -> Tensor | None:
        """The teacher's nearest token by edit distance for each of the student's, where the method aligns by it."""
        if "vocabulary_map" not in self.args.method_row.all_needs:
            return None
        assert self.teacher is not None
        with self.args.main_process_first(desc="vocabulary map"):
            return vocabulary_map(*self.tokenizers, rows=self.teacher.rows, ends=self.ends)

    @property
    def load_again(self) -> Callable[[], Any] | None:
        """[`~Pair.load_student`] where it gives another student at every call: of one given by name."""
        return self.load_student if self.student.loaded is None else None

    def load_student(self) -> Any:
        """Returns the student with its adapter, a name loaded anew at every call."""
        # Trainer seeds in its own __init__, which is after an adapter has been initialised.
        set_seed(self.args.seed)
        student: Any = self.student.model
        if self.student.loaded is None:
            dtype = dtype_option(self.args.model_init_kwargs, "model_init_kwargs") or torch.float32
            options = weight_options(self.args.model_init_kwargs, dtype)
            with reading("the student", student, options):
                student = load_causal_lm(student, quantization_config=self.quantization, **options)
        # Wherever it is loaded later, it must stop where it is taught to.
        add_end_tokens(student, self.frames["student"].end[-1])
        return student if self.peft_config is None else _with_adapter(student, self.peft_config, self.args)

    def open_cache(self, folder: str | Path | None) -> TeacherCache | None:
        """Opens the cache of the teacher's states in `folder`, if there is one and the method runs a teacher."""
        side = self.teacher
        if folder is None or side is None or not self.args.method_row.needs_teacher:
            return None
        return open_cache(folder, self.args, side.model, side.config, side.tokenizer, self.teacher_quantization)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be resumed from: method, models and their widths."""
        row, teacher = self.args.method_row, self.teacher if self.args.method_row.needs_teacher else None
        return {
            "method": self.args.method,
            **row.composition,
            "as_published": self.args.as_published,
            "student": self.student.short_name,
            "teacher": None if teacher is None else teacher.short_name,
            "student_hidden_size": hidden_size(self.student.config),
            "teacher_hidden_size": None if teacher is None else hidden_size(teacher.config),
        }

    def check_loaded(self, student: Any, optimizer: Any, trains: bool) -> None:
        """Raises a [`UserError`] for a student, now that it is there, that can't be trained or can't write."""
        if trains:
            check_trainable(student)
            check_optimized(optimizer, student)
        if self.args.on_policy_fraction:
            check_generation_config(student, "the student")

    def load_teacher(self) -> Any:
        """Returns the teacher on its device, in the dtype of the settings where it is given by name."""
        assert self.teacher is not None
        return load_teacher_model(self.teacher.model, self.args, self.teacher_quantization)


def _with_adapter(model: Any, peft_config: Any, args: DSKDConfig) -> Any:
    from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

    if isinstance(model, PeftModel):
        raise UserError("peft_config and a model that already has an adapter: pass only one of them")
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise UserError(f"peft_config doesn't fit the student: {reason}; see its target_modules") from error
