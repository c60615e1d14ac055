"""When things happen: steps, optimizers, checkpoints, ranks, logs. What is computed is in `objective`."""

from __future__ import annotations

import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Sized
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import broadcast_object_list, get_mixed_precision_context_manager
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from . import checkpoint as checkpoint_files
from .adversary import Adversary, clip, reduce_over_ranks
from .alignment.chunked import input_chunks
from .alignment.min_edit import partners
from .alignment.min_edit import vocabulary_map as edit_distance_map
from .alignment.spans import answer_spans
from .arguments import (
    as_model,
    check_adapter_config,
    check_args,
    check_backends,
    check_callbacks,
    check_collator,
    check_evaluation,
    check_functions,
    check_not_exchanged,
    check_optimization,
    check_optimized,
    check_optimizers,
    check_own_tokenizer,
    check_quantization,
    making,
)
from .attention_capture import AttentionPairs
from .checks import (
    check_columns,
    check_eos,
    check_launch,
    check_metric,
    check_output_dir,
    check_pair,
    check_peft,
    check_positions,
    check_quantized_student,
    check_steps,
    check_trainable,
    check_vocabularies,
    quantization,
)
from .config import DSKDConfig
from .data.collator import DualCollator
from .data.fillers import FilledStream, first_examples, without_fillers
from .data.fingerprint import fingerprint
from .data.kinds import as_dataset, as_datasets, as_tokenizer
from .data.on_policy import is_on_policy, on_policy_batch
from .data.prompts import answer_frame, depends_on_the_day, set_pad_token
from .data.sampler import EpochSampler, LengthGroupedEpochSampler, example_lengths
from .data.tokenization import TokenizationReport, is_tokenized, tokenize_dataset
from .data.tokenized import check_tokenized
from .data.vocabulary import same_vocabulary, shared_tokens
from .errors import NonFiniteLossError, UserError
from .evaluation.generation import (
    add_end_tokens,
    check_generation_config,
    check_saved_generation,
    read_response,
    response_text,
    save_generation_config,
    score_generation,
)
from .evaluation.likelihood import covers_text
from .finite import largest_gradient, spoilt
from .hub.identity import identity
from .hub.publishing import Publishing
from .kernels.linear_divergence import chunk_sizes
from .losses.attention import attention_kl, chunk_attention_kl
from .losses.conditional_transport import TransportCritics
from .losses.dual_space import IGNORE, ResponseStates, published_states, response_states
from .losses.key_query import Discriminator
from .losses.likelihood import boundary_tokens
from .losses.terms import ratios
from .models import (
    LastHiddenState,
    base_causal_lm,
    check_config,
    check_head,
    check_student_head,
    check_vocabulary,
    hidden_size,
    input_embedding,
    lm_head,
)
from .objective import (
    PairConstants,
    Terms,
    distillation_terms,
    student_terms,
    total_loss,
    weighted_loss,
)
from .pretrained import (
    check_options,
    dtype_option,
    empty_model,
    generation_config,
    load_tokenizer,
    name_and_config,
    options_of,
    origin,
    reading,
    weight_options,
)
from .projectors import Projectors
from .redaction import without_secrets
from .resume import active_adapter, check_checkpoint, check_settings, rates, set_rates, trajectory
from .run_folder import (
    RESULT_NAME,
    check_fresh,
    check_no_other,
    forget_run,
    held,
    last_checkpoint,
    note,
    noted,
    recover,
)
from .running_log import REMEDY, RunningLog, exact_dtype
from .saving import saved_for_others
from .teacher.cache import CachedTeacher, TeacherCache, open_cache
from .teacher.load import (
    Teacher,
    check_teacher_options,
    load_causal_lm,
    load_teacher_model,
    teacher_quantization,
)
from .teacher.responses import write_responses
from .words import ARGUMENTS, understands


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig
    from transformers import EvalPrediction
    from transformers.trainer_utils import EvalLoopOutput

logger = logging.getLogger(__name__)


# Settings that go into what the trials of a search share.
PREPARED_ONCE = (
    *("method", "alignment", "as_published", "max_length", "prompt_style", "chat_template_kwargs", "prompt_column"),
    *(
        "response_column",
        "skip_long_prompts",
        "on_bad_row",
        "train_on",
        "teacher_cache",
        "load_teacher_in_4bit",
        "teacher_device",
    ),
    *("teacher_dtype", "output_dir"),
)


def bits_per_byte(metrics: dict[str, float]) -> float:
    """Objective of a search: comparable between methods and weights of their terms, as a sum of metrics isn't."""
    return metrics["eval_bits_per_byte"]


class _StepCallback(TrainerCallback):
    """Trainer's hooks around its own optimizer step, where the projectors' gradients and the discriminator belong."""

    def __init__(self, trainer: DSKDTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._before_optimizer_step()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._after_optimizer_step()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Also where auto_find_batch_size begins once more, or an interrupted training does.
        self.trainer._forget_step()
        self.trainer._begin_analyses()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (
            args.analysis_steps
            and state.global_step % args.analysis_steps == 0
            and state.global_step < state.max_steps
        ):
            self.trainer._analyse(pictures=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._analyse(pictures=True)


class DSKDTrainer(Publishing):
    """
    Distils a large language model into a small one whose tokenizer is different.

    A [`~transformers.Trainer`] whose loss compares student and teacher in both hidden spaces, aligned by cross-model
    attention (DSKD-CMA, arXiv 2406.17328), with queries matched to keys by a discriminator that has an optimizer of
    its own (DSKD-CMA-GA, arXiv 2603.22056).

    Args:
        model (`str`, `Path`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student: a name or folder, or a loaded causal language model.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher; its name or folder may be that of an adapter. Not needed for `method="sft"`.
        args ([`DSKDConfig`], *optional*): Every setting. `None` is `DSKDConfig("dskd_output")`.
        data_collator (`Callable`, *optional*): Defaults to [`DualCollator`].
        train_dataset ([`~datasets.Dataset`], *optional*), eval_dataset (same or `dict` of such, *optional*):
            A list of rows, a pandas `DataFrame` and a torch dataset of rows are taken too. With columns
            `prompt`/`completion`, `messages`, `instruction`(`/input`)`/output`, the columns named in
            `args`, or already tokenized by [`tokenize_dataset`]. Of `messages` every answer is learnt, or the last
            (`train_on`).
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer, or a processor that has it.
        teacher_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The teacher's tokenizer.
        compute_metrics (`Callable`, *optional*): As in [`~transformers.Trainer`]; receives the student's logits.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*): As in [`~transformers.Trainer`].
        optimizers (`tuple`, *optional*):
            Optimizer and schedule of the student. The projectors join the optimizer as a group of their own.
        preprocess_logits_for_metrics (`Callable`, *optional*):
            As in [`~transformers.Trainer`]: of the logits of every batch, what `compute_metrics` needs, such as their
            largest. Without it all logits of the evaluation are kept.
        peft_config ([`~peft.PeftConfig`], *optional*): Trains an adapter instead of the whole student.
        quantization_config, teacher_quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            For a student or teacher given by name.

    Attributes:
        teacher ([`~hf_dskd.teacher.load.Teacher`], [`~hf_dskd.teacher.cache.CachedTeacher`] or `None`)
        projectors ([`~hf_dskd.projectors.Projectors`] or `None`): float32, outside the student.
        adversary ([`~hf_dskd.adversary.Adversary`] or `None`): The discriminator with its optimizer.
        tokenization_reports (`dict[str, TokenizationReport]`): What was cut or skipped, by split.
        samples (`list[dict[str, Any]]`): What the student answered in the last evaluation, on this process.

    Raises:
        UserError: For input that can't work, before models are loaded.
        NonFiniteLossError: When a loss term, a gradient or a weight becomes NaN or infinite (see `on_nonfinite`).

    Example:

    ```python
    trainer = DSKDTrainer(
        model="openai-community/gpt2",
        teacher_model="Qwen/Qwen1.5-1.8B",
        args=DSKDConfig("gpt2-distilled", method="dskd_cma_ga"),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ["hf_dskd", "distillation"]

    @understands("DSKDTrainer", ARGUMENTS, "settings go into args=DSKDConfig(...)")
    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        teacher_model: str | PreTrainedModel | nn.Module | None = None,
        args: DSKDConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        teacher_quantization_config: Any = None,
    ):
        if args is None:
            args = DSKDConfig("dskd_output")
        check_args(args)
        row = args.method_row

        # What can be refused is refused first; models are loaded last.
        model, teacher_model = as_model(model, "model"), as_model(teacher_model, "teacher_model")
        processing_class = as_tokenizer(processing_class, "processing_class")
        teacher_processing_class = as_tokenizer(teacher_processing_class, "teacher_processing_class")
        train_dataset = as_dataset(train_dataset, "train_dataset")
        eval_dataset = as_datasets(eval_dataset, "eval_dataset")
        check_functions(
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        check_callbacks(callbacks)
        check_evaluation(args, eval_dataset, compute_metrics)
        check_backends(args)
        check_optimizers(optimizers, model)
        check_optimization(args, optimizers[0])
        check_adapter_config(peft_config)
        check_quantization(
            quantization_config=quantization_config, teacher_quantization_config=teacher_quantization_config
        )
        check_launch(args)
        check_pair(args, model, teacher_model)
        check_output_dir(str(args.output_dir))
        check_metric(args, eval_dataset)
        for name, wanted, given in (
            ("quantization_config", quantization_config, model),
            ("teacher_quantization_config", teacher_quantization_config, teacher_model),
        ):
            if wanted is not None and not isinstance(given, str):
                raise UserError(f"{name} needs its model as a name: a loaded model can't be quantized")
        check_options(model, args.model_init_kwargs, "model_init_kwargs")
        if getattr(peft_config, "inference_mode", False):
            raise UserError(
                "peft_config.inference_mode=True: nothing of the adapter would be trained; set it to False"
            )
        check_teacher_options(args, teacher_model)
        if row.dual_space and optimizers[1] is not None:
            raise UserError(
                "optimizers=(…, scheduler): a schedule made before the projectors join the optimizer can't drive them;"
                " pass (optimizer, None) and set lr_scheduler_type"
            )
        student_name, student_config = name_and_config(model, args.model_init_kwargs, "the student")
        check_config(student_config, student_name, "the student", None if isinstance(model, str) else model)
        quantization_config = quantization(
            quantization_config, args.model_init_kwargs, student_config, student_name, "quantization_config"
        )
        adapters = [adapter for adapter in (peft_config, *getattr(model, "peft_config", {}).values()) if adapter]
        check_quantized_student(args.device, student_config, student_name, quantization_config, bool(adapters))
        check_positions(args, student_config, student_name, "the student")
        tokenizer = processing_class or load_tokenizer(
            student_name, args.model_init_kwargs, "the student's tokenizer", "processing_class"
        )
        if processing_class is not None:
            check_own_tokenizer(tokenizer, model, student_name, "processing_class", args.model_init_kwargs)
        self._check_tokenizer(tokenizer, model, student_config, "student", args)
        teacher_tokenizer: Any = teacher_processing_class
        teacher_name = None
        if teacher_model is not None:
            teacher_name, teacher_config = name_and_config(
                teacher_model, args.teacher_model_init_kwargs, "the teacher"
            )
            check_config(
                teacher_config, teacher_name, "the teacher", None if isinstance(teacher_model, str) else teacher_model
            )
            check_positions(args, teacher_config, teacher_name, "the teacher")
            teacher_quantization_config = teacher_quantization(
                args, teacher_quantization_config, teacher_config, teacher_name
            )
            teacher_tokenizer = teacher_tokenizer or load_tokenizer(
                teacher_name, args.teacher_model_init_kwargs, "the teacher's tokenizer", "teacher_processing_class"
            )
            if processing_class is not None and teacher_processing_class is not None:
                both, configs = (tokenizer, teacher_tokenizer), (student_config, teacher_config)
                check_not_exchanged(both, configs, (student_name, teacher_name))
            if teacher_processing_class is not None:
                named = teacher_model, teacher_name, "teacher_processing_class"
                check_own_tokenizer(teacher_tokenizer, *named, args.teacher_model_init_kwargs)
            self._check_tokenizer(teacher_tokenizer, teacher_model, teacher_config, "teacher", args)
            check_vocabularies(args, tokenizer, teacher_tokenizer)
        vocabularies = [student_config.get_text_config().vocab_size]
        if row.needs_teacher:
            vocabularies.append(teacher_config.get_text_config().vocab_size)
        chunk_sizes([max(vocabularies)] * 2, [torch.float32] * 2, args.device.type, args.loss_memory_mb)
        if train_dataset is not None and isinstance(model, str):
            check_saved_generation(generation_config(model, args.model_init_kwargs), student_name)
        elif train_dataset is not None:
            plain: Any = base_causal_lm(model)  # type: ignore[arg-type]  # no name
            check_saved_generation(getattr(plain, "generation_config", None), student_name)
            if peft_config is None:
                check_trainable(model)
        if adapters:
            empty = empty_model(student_config, args.model_init_kwargs, None if isinstance(model, str) else model)
            for adapter in adapters:
                check_peft(adapter, empty)
        self._identity = identity(student_name, bool(adapters), args.method, student_config.model_type)
        self._origins = {"student": origin(model, args.model_init_kwargs)}
        if teacher_name is not None:
            self._origins["teacher"] = origin(teacher_model, args.teacher_model_init_kwargs)
        if args.push_to_hub:
            self._check_hub(args)

        def load_teacher() -> Any:
            return load_teacher_model(teacher_model, args, teacher_quantization_config)

        if args.teacher_cache is not None and row.needs_teacher and data_collator is not None:
            raise UserError(
                f"teacher_cache={args.teacher_cache!r} and a data_collator of your own: batches need the cached"
                " states, which DualCollator adds; leave one of them out"
            )
        self._load_teacher = load_teacher
        self._cache: TeacherCache | None = None
        if args.teacher_cache is not None and row.needs_teacher:
            self._cache = open_cache(
                args.teacher_cache, args, teacher_model, teacher_config, teacher_tokenizer, teacher_quantization_config
            )

        if row.text == "teacher":
            train_dataset = self._written_by_teacher(
                train_dataset, load_teacher, teacher_tokenizer, args, teacher_name
            )
        self.tokenization_reports: dict[str, TokenizationReport] = {}
        vocabulary_map = None
        if row.alignment == "min_edit":
            with args.main_process_first(desc="vocabulary map"):
                options = args.prompt_style, options_of(args.chat_template_kwargs)
                ends = (answer_frame(tokenizer, *options).end[-1], answer_frame(teacher_tokenizer, *options).end[-1])
                vocabulary_map = edit_distance_map(
                    tokenizer, teacher_tokenizer, rows=_rows(teacher_model, teacher_config), ends=ends
                )
        self._tokenize = _Tokenize(tokenizer, teacher_tokenizer, args, self.tokenization_reports, vocabulary_map)
        with args.main_process_first(desc="tokenization"):
            train_dataset = self._tokenize(train_dataset, "train")
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: self._tokenize(split, f"eval_{name}") for name, split in eval_dataset.items()}
            else:
                eval_dataset = self._tokenize(eval_dataset, "eval")
        if train_dataset is not None:
            check_steps(args, train_dataset)
        if data_collator is not None:
            check_collator(data_collator, train_dataset, row.needs_teacher)

        if self._cache is not None:
            splits: dict[str, Any] = {"eval": eval_dataset}
            if isinstance(eval_dataset, dict):
                splits = {f"eval_{name}": split for name, split in eval_dataset.items()}
            self._cache.fill({"train": train_dataset, **splits}, load_teacher)

        def load_student() -> Any:
            # Trainer seeds in its own __init__, which is after an adapter has been initialised.
            set_seed(args.seed)
            student: Any = model
            if isinstance(model, str):
                dtype = dtype_option(args.model_init_kwargs, "model_init_kwargs") or torch.float32
                options = weight_options(args.model_init_kwargs, dtype)
                with reading("the student", model, options):
                    student = load_causal_lm(model, quantization_config=quantization_config, **options)
            # Wherever it is loaded later, it must stop where it is taught to.
            add_end_tokens(student, self._tokenize.frames["student"].end[-1])
            return student if peft_config is None else _wrap_with_adapter(student, peft_config, args)

        self._load_student = load_student if isinstance(model, str) else None
        student = load_student()
        if train_dataset is not None:
            check_trainable(student)
            check_optimized(optimizers[0], student)
        if args.on_policy_fraction:
            check_generation_config(student, "the student")
        if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
            # Reentrant checkpointing needs an input that requires a gradient, which a frozen embedding doesn't give.
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}

        self.teacher: Teacher | CachedTeacher | None = None
        if self._cache is not None:
            self.teacher = CachedTeacher(*self._cache.load_head(args.device))
        elif row.needs_teacher:
            self.teacher = Teacher(load_teacher(), args.device)
            check_head(self.teacher.model, self.teacher.head, "teacher")

        if data_collator is None:
            data_collator = DualCollator(
                student_pad_token_id=tokenizer.pad_token_id,
                teacher_pad_token_id=None if teacher_tokenizer is None else teacher_tokenizer.pad_token_id,
                # The released code pads every batch to the full length, and its losses depend on it. The last
                # position has no next token, hence one more.
                pad_to_length=args.max_length + 1 if args.as_published else None,
                teacher_states=None if self._cache is None else self._cache.batch,
            )
        if args.world_size > 1 and args.accelerator_config.dispatch_batches is None:  # type: ignore[union-attr]
            # One rank would cut the batches of all out of its own, which are padded to lengths of their own.
            args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.args: DSKDConfig
        self.model: nn.Module
        # compute_loss divides by the tokens of the global batch itself. The first name is read by transformers from
        # 5.19 on, the second before.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.teacher_processing_class = teacher_tokenizer
        sizes = hidden_size(student_config), None if self.teacher is None else hidden_size(teacher_config)
        self._vocabulary_map = vocabulary_map
        self._prepare_pair(student, sizes)
        # What must agree for a checkpoint to be resumed from.
        composition = {key: value for key, value in asdict(row).items() if key not in ("summary", "source")}
        self._facts = {
            "method": args.method,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in composition.items()},
            "as_published": args.as_published,
            "student": _short_name(student_name),
            "teacher": _short_name(teacher_name) if row.needs_teacher else None,
            "student_hidden_size": sizes[0],
            "teacher_hidden_size": sizes[1],
            "adapter": hasattr(student, "peft_config"),
        }
        self._running = RunningLog(self.accelerator.device)
        self._items: Tensor | None = None  # response tokens of the global batch: student's, teacher's
        self._on_policy = False
        self._learning_rates: dict[str, float] = {}
        self._update_hook: Any = None
        self._updated = False  # whether the last step was, which a scaler or `on_nonfinite` may leave out
        self.skipped_steps = self._skipped_in_a_row = 0
        self._begun: dict[str, str | None] = {}  # the runs of this trainer, by their folders
        self._run_id: str | None = None
        self._data: str | None = None  # fingerprint of the training data, made when it is needed
        self._changed_settings = False
        self._evaluated: list[Tensor] = []
        self.samples: list[dict[str, Any]] = []
        self._trial: Any = None  # of a search
        self._staging: Path | None = None
        self.add_callback(_StepCallback(self))

    def _prepare_pair(self, student: Any, sizes: tuple[int, int | None]) -> None:
        """What is made for one student, on its device: hooks, projectors, discriminator."""
        args, row, device = self.args, self.args.method_row, self.accelerator.device
        self._sizes = sizes
        # In the training precision: without it flash attention doesn't run.
        check_student_head(student)
        with self._autocast():
            check_head(student, lm_head(student), "student")
            self._last_hidden_state = LastHiddenState(student, args.padding_free)
            self._attention: AttentionPairs | None = None
            if args.attention_kd_rate and isinstance(self.teacher, Teacher):
                layers, heads = args.attention_layers, args.attention_relation_heads
                self._attention = AttentionPairs(student, self.teacher.model, layers, heads, args.max_length)
        dataset: Any = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        self._same_tokens = self._attention is not None and _reads_same_tokens(
            self._tokenize.student, self._tokenize.teacher, dataset
        )
        self.projectors: Projectors | None = None
        self.adversary: Adversary | None = None
        self._constants = PairConstants()
        width, teacher_width = sizes
        if self.teacher is None or teacher_width is None:
            return
        self._constants = self._pair_constants(self._vocabulary_map)
        if row.dual_space:
            self.projectors = Projectors(width, teacher_width, seed=args.seed, has_query=row.has_queries)
            if row.projector_init == "pseudo_inverse":
                shared = shared_tokens(*self._tokenize.both, self._tokenize.ends)
                residuals = self.projectors.init_from_heads(lm_head(student), self.teacher.head, *shared)
                logger.info("projectors from the heads over %d shared tokens: %s", len(shared[0]), residuals)
            self.projectors.to(device)
        if row.matching in ("gan", "ct"):
            kind = Discriminator if row.matching == "gan" else TransportCritics
            critic = kind(
                2 * teacher_width, args.discriminator_hidden_size, args.discriminator_dropout, seed=args.seed + 1
            )
            self.adversary = Adversary(critic.to(device), args)

    # ---- Data

    @staticmethod
    def _check_tokenizer(
        tokenizer: PreTrainedTokenizerBase, model: Any, config: Any, role: str, args: DSKDConfig
    ) -> None:
        check_eos(tokenizer, role)
        said = set_pad_token(tokenizer, role)
        if said:
            logger.warning(said)
        if args.prompt_style == "chat":
            said = depends_on_the_day(tokenizer, role, options_of(args.chat_template_kwargs))
            if said:
                logger.warning(said)
        rows = config.get_text_config().vocab_size
        if not isinstance(model, str):
            rows = model.get_input_embeddings().weight.shape[0]
        check_vocabulary(tokenizer, rows, role)

    @staticmethod
    def _written_by_teacher(
        dataset: Any, load_teacher: Callable[[], Any], tokenizer: Any, args: DSKDConfig, name: str | None
    ) -> Any:
        """The same prompts with the teacher's responses, written once into the output folder (`seq_kd`)."""
        if dataset is None:
            return None
        if is_tokenized(dataset):
            raise UserError(
                f"method={args.method!r} needs prompts as text for the teacher to answer, and the train data is"
                " already tokenized: pass the text"
            )
        if not hasattr(dataset, "__len__"):
            raise UserError(
                f"method={args.method!r} needs all prompts before training for the teacher to answer, and"
                f" train_dataset is a {type(dataset).__name__}: pass a datasets.Dataset"
            )
        with args.main_process_first(desc="teacher's responses"):
            return write_responses(
                dataset,
                load_teacher,
                tokenizer,
                Path(str(args.output_dir)) / "teacher_responses",
                max_length=args.max_length,
                prompt_style=args.prompt_style,
                chat_template_kwargs=options_of(args.chat_template_kwargs),
                prompt_column=args.prompt_column,
                response_column=args.response_column,
                on_bad_row=args.on_bad_row,
                facts={
                    "teacher": _short_name(name),
                    "dtype": args.training_dtype if args.teacher_dtype == "auto" else args.teacher_dtype,
                    "load_in_4bit": args.load_teacher_in_4bit,
                },
            )

    def _pair_constants(self, vocabulary_map: Tensor | None) -> PairConstants:
        """What the method's losses read of the two vocabularies."""
        assert self.teacher is not None
        row, device, rows = self.args.method_row, self.accelerator.device, self.teacher.head.weight.shape[0]
        label_map = boundary = None
        if row.label == "teacher":
            label_map = torch.full((rows,), -1, dtype=torch.int64)
            student_ids, teacher_ids = shared_tokens(*self._tokenize.both, self._tokenize.ends)
            label_map[teacher_ids] = student_ids
            label_map = label_map.to(device)
        if row.spaces == ("likelihood",) and self.args.alm_bias_threshold is not None:
            student_rows = lm_head(self.model).weight.shape[0]
            boundary = (
                boundary_tokens(self._tokenize.student, student_rows).to(device),
                boundary_tokens(self._tokenize.teacher, rows).to(device),
            )
        if vocabulary_map is not None:
            vocabulary_map = vocabulary_map.to(device)
        return PairConstants(label_map, vocabulary_map, boundary)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in [`~transformers.Trainer`]; a dataset that isn't tokenized yet is tokenized first."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._tokenize(as_dataset(eval_dataset, "eval_dataset"), "eval")
            if self._cache is not None:
                self._cache.fill({"eval": eval_dataset}, self._load_teacher)
        if eval_dataset is None or isinstance(eval_dataset, str):
            chosen: Any = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]  # type: ignore
            if chosen is not None and not hasattr(chosen, "__len__"):
                eval_dataset = chosen
        return super().get_eval_dataloader(self._filled(eval_dataset, self.args.eval_batch_size))

    def get_train_dataloader(self) -> Any:
        """As in [`~transformers.Trainer`]; a stream ends with a whole batch of every rank."""
        dataset = self.train_dataset
        self.train_dataset = self._filled(dataset, self._train_batch_size)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _filled(self, dataset: Any, batch_size: int) -> Any:
        """A stream for several ranks, or `dataset` as it is."""
        ranks = self.accelerator.num_processes
        if dataset is None or isinstance(dataset, str) or hasattr(dataset, "__len__") or ranks == 1:
            return dataset
        return FilledStream(dataset, batch_size * (1 if self.accelerator.split_batches else ranks))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in [`~transformers.Trainer`]; a dataset that isn't tokenized yet is tokenized first."""
        test_dataset = self._tokenize(as_dataset(test_dataset, "test_dataset"), "test")
        if self._cache is not None:
            self._cache.fill({"test": test_dataset}, self._load_teacher)
        return super().get_test_dataloader(test_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed

        def epoch() -> int:
            return int(self.state.epoch or 0)

        if self.args.groups_by_length and hasattr(dataset, "__len__"):
            group_size = self._train_batch_size * self.args.world_size
            return LengthGroupedEpochSampler(example_lengths(dataset), group_size, seed, epoch)
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(len(sampler), seed, epoch) if isinstance(sampler, RandomSampler) else sampler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in [`~transformers.Trainer`]; in an on-policy step the student answers the prompts of the batches now."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._on_policy = is_on_policy(self.state.global_step, self.args.on_policy_fraction)
        if self._on_policy and batches:
            batches = [self._answered_by_student(batch, place) for place, batch in enumerate(batches)]
        if self.accelerator.num_processes > 1:
            batches = [without_fillers(batch) for batch in batches]
        filled = self._leave_fillers_out(batches)
        if batches and (self._on_policy or filled or not hasattr(self.train_dataset, "__len__")):
            items = self._get_num_items_in_batch(batches, device)
        return batches, items

    def _leave_fillers_out(self, batches: list[dict[str, Tensor]]) -> bool:
        """
        Takes from an epoch's last batch what accelerate has filled it with, where the examples don't go up in ranks
        times batch size: the first ones of the epoch, which would count twice. Whether there was any, on any rank.
        """
        state, ranks = self.accelerator.gradient_state, self.accelerator.num_processes
        if ranks == 1 or not batches or not state.end_of_dataloader:
            return False
        rest, dataset = state.remainder, self.train_dataset
        if rest < 0 and isinstance(dataset, Sized) and not self.args.dataloader_drop_last:
            # Accelerate doesn't know it in an epoch that a run goes on in.
            rest = len(dataset) % (self._train_batch_size * (1 if self.accelerator.split_batches else ranks))
        if rest <= 0:
            return False
        size = len(batches[-1]["labels"])
        batches[-1] = first_examples(batches[-1], rest - self.accelerator.process_index * size)
        return rest < ranks * size

    def _answered_by_student(self, batch: dict[str, Tensor], place: int) -> dict[str, Tensor]:
        model: Any = self.accelerator.unwrap_model(self.model)
        seed = (self.args.seed + 1) * 1_000_003 + self.state.global_step * 1_009
        return on_policy_batch(
            batch,
            model,
            self._tokenize.student,
            self._tokenize.teacher,
            self.data_collator,
            max_length=self.args.max_length,
            generation_config=model.generation_config,
            seed=(seed + place) * 64 + self.accelerator.process_index,
            autocast=self._autocast(),
            align=self._tokenize.partners,
            frames=self._tokenize.frames,
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Response tokens of the global batch: all micro-batches of the optimizer step, all ranks, both tokenizers."""
        if not batch_samples:
            return None
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batch_samples:
            counts[0] += (batch["labels"][:, 1:] != -100).sum().to(device)
            if self.teacher is not None:
                counts[1] += (batch["teacher_labels"][:, 1:] != -100).sum().to(device)
        # Without any, every sum is 0, and so is the loss.
        self._items = self.accelerator.reduce(counts, reduction="sum").clamp_min(1)
        return self._items[0]

    # ---- Loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in [`~transformers.Trainer`]; the projectors' gradients are averaged where data parallelism does it."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            # Before a gradient scaler looks for overflows: all ranks must find the same, to skip a step together.
            reduce_over_ranks(self._projector_parameters(), self.accelerator, "mean")
        if self.args.on_nonfinite == "skip":
            # Trainer adds them up before it is known whether the step counts.
            self._running.add(loss=loss)
            loss = loss.nan_to_num(0.0, 0.0, 0.0)
        return loss

    def _autocast(self) -> AbstractContextManager:
        """As `accelerator.autocast`, which in accelerate 1.10 stays on for good after an error inside it."""
        return get_mixed_precision_context_manager(self.accelerator.native_amp, self.accelerator.autocast_handler)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """
        The method's loss on one micro-batch, divided by the response tokens of the global batch.

        With `return_outputs` also `{"logits": [B, S, V_s]}`, the student's.
        """
        hidden, student, teacher, attention = self._run_both(model, inputs)
        with self._autocast():
            terms = self._terms(student, teacher, inputs, model.training, attention)
            outputs = {"logits": lm_head(self.model)(hidden)} if return_outputs else None

        if num_items_in_batch is None:
            counts = (
                terms.student_tokens,
                terms.student_tokens if terms.teacher_tokens is None else terms.teacher_tokens,
            )
            loss = total_loss(self.args, terms, counts[0].sum().clamp_min(1), counts[1].sum().clamp_min(1))
        else:
            assert self._items is not None
            ranks = self.accelerator.num_processes
            if terms.added is not None:
                # A mean over the micro-batches of all ranks: Trainer's sum would weigh more with every one of them.
                terms = replace(terms, added=terms.added / (self.current_gradient_accumulation_steps * ranks))
            # Every rank divides by the tokens of all ranks; data parallelism then averages the gradients.
            loss = total_loss(self.args, terms, self._items[0], self._items[1])
            loss = loss * ranks

        if model.training:
            self._running.watch(self.state.global_step, inputs.get("example_ids"), {**terms.student, **terms.teacher})
            self._running.add(
                student_tokens=terms.student_tokens.sum(),
                **{name: value.sum() for name, value in (terms.student | terms.teacher).items()},
            )
            if terms.teacher_tokens is not None:
                self._running.add(teacher_tokens=terms.teacher_tokens.sum())
            if terms.added is not None:
                self._running.watch(self.state.global_step, None, {"aux": terms.added})
                self._running.add(aux=terms.added * self.accelerator.num_processes)
            if self.adversary is not None and terms.features is not None:
                self.adversary.keep(terms.features)
        else:
            self._note_evaluated(student, terms, inputs)
        return (loss, outputs) if outputs is not None else loss

    def _run_both(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, ResponseStates, ResponseStates | None, Tensor | None]:
        """The student's last hidden states, the response rows of both models, and the term of their attention."""
        watched: AbstractContextManager[list[Any]] = nullcontext([])
        if self._attention is not None:
            watched = self._attention.recording()
        with watched as pairs:
            hidden = self._last_hidden_state(model, inputs["input_ids"], inputs["attention_mask"])
            with self._autocast():
                student, teacher = self._both_states(hidden, inputs)
        attention, heads = None, self.args.attention_relation_heads
        if self._attention is not None and self._same_tokens:
            attention = attention_kl(pairs, inputs["labels"], inputs["attention_mask"], heads)
        elif self._attention is not None:
            chunks, teacher_chunks = (
                inputs[f"{side}chunk_ids"].masked_fill(inputs[f"{side}labels"] == IGNORE, -1)
                for side in ("", "teacher_")
            )
            attention = chunk_attention_kl(pairs, chunks, teacher_chunks, heads)
        return hidden, student, teacher, attention

    def _both_states(self, hidden: Tensor, inputs: dict[str, Any]) -> tuple[ResponseStates, ResponseStates | None]:
        """The student's response rows out of its last hidden states, and the teacher's, who is run or looked up."""
        student = self._states(hidden, inputs, "", input_embedding(self.model))
        if self.teacher is None:
            return student, None
        cached = isinstance(self.teacher, CachedTeacher)
        if isinstance(self.teacher, CachedTeacher):
            teacher_hidden = inputs["teacher_states"]
        else:
            teacher_hidden = self.teacher(inputs["teacher_input_ids"], inputs["teacher_attention_mask"])
        return student, self._states(teacher_hidden, inputs, "teacher_", self.teacher.embedding, cached)

    def _terms(
        self,
        student: ResponseStates,
        teacher: ResponseStates | None,
        inputs: dict[str, Any],
        training: bool,
        attention: Tensor | None = None,
        only: str | None = None,
    ) -> Terms:
        # What the forward pass of these states left.
        added = self._last_hidden_state.added if only in (None, "aux") else None
        student_head = lm_head(self.model)
        if teacher is None:
            return replace(student_terms(self.args, student, student_head), added=added)
        assert self.teacher is not None
        critic = None if self.adversary is None else self.adversary.critic.train(training)
        terms = distillation_terms(
            self.args,
            student,
            teacher,
            student_head,
            self.teacher.head,
            self.projectors,
            critic,
            inputs.get("example_ids"),
            self._dropout_seed(),
            self._constants,
            self.state.global_step / max(self.state.max_steps, 1),
            on_policy=training and self._on_policy,
            only=only,
            attention=attention,
        )
        return replace(terms, added=added)

    def _states(
        self, hidden: Tensor, inputs: dict[str, Any], side: str, embedding: Tensor, gathered: bool = False
    ) -> ResponseStates:
        ids, labels = inputs[f"{side}input_ids"], inputs[f"{side}labels"]
        chunks = inputs.get(f"{side}chunk_ids") if self.args.method_row.needs_chunks else None
        if not self.args.as_published:
            partners = inputs.get("partners") if side == "" else None
            answers = inputs.get(f"{side}places"), inputs.get(f"{side}silent")
            return response_states(hidden, ids, labels, embedding, chunks, partners, gathered, *answers)
        if chunks is not None:
            chunks = input_chunks(chunks[:, 1:], labels[:, 1:] != -100)
        return published_states(hidden[:, :-1], ids[:, :-1], labels[:, 1:], embedding, chunks)

    def _dropout_seed(self) -> int:
        """For the discriminator's dropout: another one in every step, the same one after a resume."""
        return (self.args.seed + 1) * 1_000_003 + self.state.global_step * 1_009

    # ---- Optimizers

    def _projector_parameters(self) -> list[nn.Parameter]:
        return [] if self.projectors is None else list(self.projectors.parameters())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The student's optimizer, with the projectors as one more group at their own learning rate."""
        with making(self.args, "optim", "optim_args"):
            optimizer = super().create_optimizer(*args, **kwargs)
        if self._update_hook is not None:
            self._update_hook.remove()
        # Accelerate's wrapper, of an earlier training, calls no hooks.
        self._update_hook = getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(self._before_update)
        projectors = self._projector_parameters()
        present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if projectors and id(projectors[0]) not in present:
            optimizer.add_param_group(
                {
                    "params": projectors,
                    "lr": self.args.projector_learning_rate,
                    "weight_decay": self.args.weight_decay,
                }
            )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The student's schedule; the discriminator's optimizer and schedule are made at the same moment."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        # This is after the accelerator let go of its memory and before a checkpoint is loaded.
        if self._trains_critic:
            assert self.adversary is not None
            self.adversary.create_optimizer(num_training_steps)
        return scheduler

    def _zero_projectors(self) -> None:
        for parameter in self._projector_parameters():
            parameter.grad = None

    def _forget_step(self) -> None:
        """What is left of a step that was begun and not ended."""
        self._zero_projectors()
        self._running = RunningLog(self.accelerator.device)
        if self.adversary is not None:
            self.adversary.forget()

    def _before_optimizer_step(self) -> None:
        projectors = self._projector_parameters()
        # A scaler that has found an overflow doesn't come to `_before_update`.
        self._updated = self.accelerator.scaler is None
        # Also where such a step is left out: its losses are in the sums.
        self._running.add(ranked_sums=1.0)
        # As Trainer logs the student's: the rates of the step, not of the next one.
        if projectors:
            self._learning_rates["projector_learning_rate"] = float(self.optimizer.param_groups[-1]["lr"])  # type: ignore[union-attr]
            self._projector_norm = clip(projectors, self.args.max_grad_norm)
        if self._trains_critic:
            assert self.adversary is not None
            self._learning_rates["discriminator_learning_rate"] = self.adversary.learning_rate

    def _before_update(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        """
        Just before the optimizer moves student and projectors: the gradients are those that it will use.

        A scaler of fp16 that has found an overflow doesn't come here, or with an optimizer that leaves the step out
        by itself; the critic is to agree.
        """
        step, projectors, running = self.state.global_step, self._projector_parameters(), self._running
        gradients = {"the student's gradient": largest_gradient(self.model.parameters())}
        if projectors:
            gradients["the projectors' gradient"] = largest_gradient(projectors)
        if self.accelerator.scaler is not None and not all(map(torch.isfinite, gradients.values())):
            return
        skips = self.args.on_nonfinite == "skip"
        if self._trains_critic:
            assert self.adversary is not None and self._items is not None
            before = self.adversary.copy() if skips else None
            report = self.adversary.update(self._items[0], self._items[1], self.accelerator, self._dropout_seed())
            # Of the steps that it is updated in, which a scaler may leave out.
            query_tokens, key_tokens = self._items / self.accelerator.num_processes
            report |= {"query_tokens": query_tokens, "key_tokens": key_tokens}
            running.add(discriminator_grad_norm=report.pop("grad_norm"), **report)
            gradients[f"the {self._critic_name.replace('_', ' ')}'s gradient"] = self.adversary.largest_gradient
        running.watch(step, None, gradients)
        if skips and (bad := running.found(self.accelerator)):
            if self._trains_critic:
                self.adversary.take_back(before)  # type: ignore[union-attr, arg-type]
            self._leave_out(bad)
            return
        self._updated = True
        running.add(ranked_steps=1.0)
        if projectors:
            if not self.args.max_grad_norm and self.accelerator.scaler is not None:
                # Nobody has taken the scale away before; an optimizer that does so by itself is told it.
                scale = getattr(optimizer, "grad_scale", None)
                self._projector_norm = clip(projectors, None) / (1.0 if scale is None else scale)
            running.add(projector_grad_norm=self._projector_norm)

    def _leave_out(self, bad: str) -> None:
        """Leaves the step out that is under way: no optimizer moves a parameter without a gradient."""
        self._updated = False
        self._running.discard()
        for parameter in (*self.model.parameters(), *self._projector_parameters()):
            parameter.grad = None
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == 10:
            raise NonFiniteLossError(f"{bad}; 10 steps in a row were left out; {REMEDY}")
        logger.warning("%s; the step is left out", bad)

    def _after_optimizer_step(self) -> None:
        # Trainer zeroes the gradients of the student only.
        self._zero_projectors()
        scaler = self.accelerator.scaler
        if self._updated:
            self._skipped_in_a_row = 0
        elif scaler is not None and scaler.get_scale() < 1:
            # Of a gradient that is too large without any scale, no lower one will ever make a step.
            self._running.watch(
                self.state.global_step, None, {"the gradient, at a loss scale of 1,": torch.tensor(torch.inf)}
            )
        # So that Trainer's schedule leaves out what the optimizer did.
        self.optimizer._is_overflow = not self._updated  # type: ignore[union-attr]
        if self.adversary is not None:
            self.adversary.forget()
            if self._trains_critic and self._updated:
                self.adversary.scheduler.step()

    @property
    def _trains_critic(self) -> bool:
        return self.adversary is not None and not self.args.as_published

    # ---- Search

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """
        As in [`~transformers.Trainer`], without a `model_init`: every trial, and every `train` after the search, loads
        the student by its name and makes projectors and discriminator anew. The teacher and the tokenized data stay,
        so that their settings can't vary.

        The objective, which is minimized by default, is `eval_bits_per_byte`.

        Raises:
            UserError: Without a student given by name or `eval_dataset`, or for a setting that can't vary.
        """
        if self._load_student is None:
            raise UserError(
                f"hyperparameter_search loads the student anew for every trial: pass model as a name or folder instead"
                f" of a {type(self.model).__name__}"
            )
        if self.eval_dataset is None:
            raise UserError("hyperparameter_search compares evaluations, and eval_dataset=None: pass one")
        if isinstance(self.eval_dataset, dict) and compute_objective is None:
            names = ", ".join(f"eval_{name}_bits_per_byte" for name in self.eval_dataset)
            raise UserError(
                f"hyperparameter_search minimizes eval_bits_per_byte, and eval_dataset has {len(self.eval_dataset)}"
                f" sets: pass compute_objective, a function of the metrics, which has {names}"
            )
        # From now on every `train` loads the student anew, as with a model_init.
        model_init: Any = self._load_student
        self.model_init = model_init
        return super().hyperparameter_search(hp_space, compute_objective or bits_per_byte, *args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        before = {name: getattr(self.args, name) for name in PREPARED_ONCE}
        super()._hp_search_setup(trial)
        for name, value in before.items():
            if getattr(self.args, name) != value:
                raise UserError(
                    f"hyperparameter_search can't vary {name} ({value!r}, {getattr(self.args, name)!r}): teacher and"
                    " data are prepared once; compare such settings with `hf-dskd compare --variants`"
                )
        self.args.check()
        check_steps(self.args, self.train_dataset)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new student for a trial, with projectors and discriminator of its own."""
        # The old one may hold as much memory as the new one needs.
        self.model = self.model_wrapped = self.optimizer = self.projectors = self.adversary = None  # type: ignore
        student: Any = super().call_model_init(trial)
        if self.place_model_on_device:
            self._move_model_to_device(student, self.args.device)
        self.model = student
        self._prepare_pair(student, self._sizes)
        return student

    # ---- Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every loss term, norms, learning rates, accuracies and speed to what Trainer logs while training."""
        if "loss" in logs:
            logs.update(self._running.drain(self.accelerator) | self._learning_rates)
        if self.skipped_steps and ("loss" in logs or "train_loss" in logs):
            self._note_skipped(logs)
        super().log(logs, start_time)

    def _note_skipped(self, logs: dict[str, float]) -> None:
        """Takes the steps that were left out from what Trainer counted."""
        logs["skipped_steps"] = self.skipped_steps
        if "train_loss" in logs:
            self._running.drain(self.accelerator)
            logs["train_loss"] = self._running.mean_loss if self._running.mean_loss is not None else math.nan
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]

    # ---- Evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, and logits `[B, S, V_s]` with labels `[B, S]` where they are asked for."""
        inputs = without_fillers(self._prepare_inputs(inputs))
        with torch.no_grad():
            result = self.compute_loss(model, inputs, return_outputs=not prediction_loss_only)
        if self.accelerator.num_processes > 1 and self._evaluated:
            # Without the examples with which ranks fill their last batch, which were already seen.
            self._evaluated[-1] = self.accelerator.gather_for_metrics(self._evaluated[-1])
        if isinstance(result, tuple):
            return result[0].detach(), result[1]["logits"].float(), inputs["labels"]
        return result.detach(), None, None

    def _note_evaluated(self, student: ResponseStates, terms: Terms, inputs: dict[str, Any]) -> None:
        """One row of sums per example: exact means need neither equal batches nor equal ranks."""
        if "example_ids" not in inputs:
            return
        assert terms.ce_rows is not None
        text = student.per_example(terms.ce_rows * covers_text(inputs["byte_ends"])[inputs["labels"][:, 1:] != -100])
        zeros = torch.zeros_like(text)
        teacher_tokens = zeros if terms.teacher_tokens is None else terms.teacher_tokens
        columns = [terms.student_tokens, teacher_tokens, inputs["response_bytes"], text]
        values = {**terms.student, **terms.teacher}
        if self.args.as_published:
            # Its other terms depend on what else is in a batch, and none has an exact mean.
            values = {name: value for name, value in values.items() if name in ("ce", "correct")}
        elif terms.added is not None:
            values["aux"] = terms.added.expand_as(text)
        self._evaluated_names = sorted(values)
        columns += [values[name] for name in self._evaluated_names]
        exact = exact_dtype(self.accelerator.device)
        self._evaluated.append(torch.stack([column.detach().to(exact) for column in columns], dim=1))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """
        As in [`~transformers.Trainer`], with exact means: each term per response token over the whole dataset.

        Adds `{prefix}_ce_loss` and the other terms, and `{prefix}_bits_per_byte`: bits that the student spends on
        the responses' text (without EOS) per UTF-8 byte, comparable across tokenizers. With
        `eval_generation_samples` also ROUGE-L and exact match of what it answers.
        """
        self._running.check(self.accelerator)
        self._evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        metrics = self._exact_metrics()
        if self.args.eval_generation_samples:
            dataloader = args[0] if args else kwargs["dataloader"]
            metrics |= self._answer(dataloader.dataset)
        output = output._replace(
            metrics={**(output.metrics or {}), **{f"{prefix}_{name}": value for name, value in metrics.items()}}
        )
        self._running.restart_clock()
        return output

    def _exact_metrics(self) -> dict[str, float]:
        if not self._evaluated:
            return {}
        rows = torch.cat(self._evaluated)
        sums = rows.sum(0).tolist()
        self._evaluated = []
        student_tokens, teacher_tokens, response_bytes, text, *values = sums
        totals = dict(zip(self._evaluated_names, values))
        metrics = {}
        if not self.args.as_published:
            metrics["loss"] = weighted_loss(self.args, totals, student_tokens, teacher_tokens)
            # Of a batch, not of its tokens: a mean over examples, as of the loss in Trainer.
            metrics["loss"] += totals.get("aux", 0.0) / len(rows)
        counts = {"student_tokens": student_tokens, "teacher_tokens": teacher_tokens, "ranked_sums": len(rows)}
        metrics |= ratios(totals | counts, evaluated=True)
        metrics["bits_per_byte"] = text / math.log(2) / response_bytes
        return metrics

    def _answer(self, dataset: Any) -> dict[str, float]:
        """Scores of greedy answers to the first prompts; each rank writes its share. Keeps them in `self.samples`."""
        tokenizer, rank, ranks = self._tokenize.student, self.accelerator.process_index, self.accelerator.num_processes
        count = self.args.eval_generation_samples
        # As accelerate and the filling for several ranks wrap a stream.
        while isinstance(dataset, (IterableDatasetShard, FilledStream)):
            dataset = dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset.stream
        if hasattr(dataset, "__len__"):
            rows = [dataset[place] for place in range(min(count, len(dataset)))]
        else:
            rows = list(dataset.take(count))
        rows = rows[rank::ranks]
        frame = self._tokenize.frames["student"]
        # Of a conversation the last answer.
        last = [(list(row["input_ids"]), *answer_spans(row)[-1]) for row in rows]
        prompts = [ids[:start] for ids, start, _ in last]
        references = [read_response(tokenizer, ids[start:stop], frame.end[-1:], frame)[0] for ids, start, stop in last]
        names = ("rouge_l", "exact_match", "unfinished")
        sums = torch.zeros(len(names) + 1, dtype=torch.float32, device=self.accelerator.device)
        self.samples = []
        if rows:
            with self._autocast():
                scores = score_generation(
                    self.accelerator.unwrap_model(self.model),
                    tokenizer,
                    [(prompt, [reference]) for prompt, reference in zip(prompts, references)],
                    max_length=self.args.max_length,
                    frame=frame,
                    batch_size=self.args.per_device_eval_batch_size,
                    description="answering" if rank == 0 and not self.args.disable_tqdm else None,
                )
            sums += torch.tensor([*(scores.metrics[name] * len(rows) for name in names), len(rows)]).to(sums)
            self.samples = [
                {
                    "step": self.state.global_step,
                    "prompt": response_text(tokenizer, prompt),
                    "reference": reference,
                    "response": text,
                }
                for prompt, reference, text in zip(prompts, references, scores.responses)
            ]
        *totals, answered = self.accelerator.reduce(sums, reduction="sum").tolist()
        return {name: total / answered for name, total in zip(names, totals)}

    # ---- Analysis

    @property
    def analysis_folder(self) -> Path:
        """Where the analyses of the run are written (see [`hf_dskd.analysis.record`])."""
        return Path(super()._get_output_dir(self._trial)) / "analysis"

    def _begin_analyses(self) -> None:
        if self.args.analysis_steps is None or not self.is_world_process_zero():
            return
        from .analysis.record import forget, read_numbers

        forget(self.analysis_folder, self.state.global_step if self.state.global_step else -1)
        if not read_numbers(self.analysis_folder):
            self._analyse(pictures=True)

    def _analyse(self, pictures: bool) -> None:
        """On one process: the others wait for it at the next step."""
        if self.args.analysis_steps is None or self.teacher is None or not self.is_world_process_zero():
            return
        from .analysis.record import probe_rows, record

        dataset: Any = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        numbers = record(self, probe_rows(dataset, self.args.analysis_examples), self.analysis_folder, pictures)
        # All of them are in the file; a log of fifty numbers hides the rest.
        shown = [name for name in numbers if name == "s2t_accuracy" or not name.startswith(("s2t_", "probe_"))]
        should_log = self.control.should_log
        self.log({f"analysis_{name}": numbers[name] for name in shown})
        # A callback of transformers takes any log for that of the step, which would be left out.
        self.control.should_log = should_log
        self._running.restart_clock()

    # ---- Checkpoints

    def _auxiliary_modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        if self.projectors is not None:
            modules["projectors"] = self.projectors
        if self.adversary is not None:
            modules[self._critic_name] = self.adversary.critic
        return modules

    @property
    def _critic_name(self) -> str:
        return "discriminator" if self.args.method_row.matching == "gan" else "transport_critics"

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in [`~transformers.Trainer`]; a checkpoint of another run is refused before anything is touched."""
        if self.train_dataset is None:
            raise UserError("train_dataset=None: pass the examples to train on")
        # Both may have changed since the trainer was made.
        check_steps(self.args, self.train_dataset)
        self._data = None
        if self.model is not None:  # as it is between the trials of a search
            check_trainable(self.model)
            # Which every checkpoint says: it must not fail only there.
            self._trajectory()
        trial = args[0] if args else kwargs.get("trial")
        if resume_from_checkpoint is None and trial is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if resume_from_checkpoint in ("last", "true", "True"):
            resume_from_checkpoint = True
        folder = Path(super()._get_output_dir(trial))
        with ExitStack() as stack:
            begun = self._on_main(lambda: self._begin(folder, resume_from_checkpoint, stack))
            checkpoint, self._run_id, self.skipped_steps, self._changed_settings = begun
            self._begun[str(folder)] = self._run_id
            if checkpoint is not None:
                finished = self._finished_at(checkpoint)
                if finished is not None:
                    return finished
            if self.is_world_process_zero():
                self._forget_earlier(checkpoint is not None)
            result = super().train(checkpoint, *args, **kwargs)
            if not self.state.global_step and not hasattr(self.train_dataset, "__len__"):
                raise UserError(
                    "no step was taken: train_dataset is a stream that gave no batch; pass one with examples"
                )
            self._check_finite()
        # Of steps that were left out Trainer knows nothing.
        return result._replace(training_loss=result.metrics["train_loss"])

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on the main process; what it returns or refuses is so on all of them."""
        answer: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                answer[0] = work()
            except UserError as error:
                answer[1] = str(error)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def _begin(
        self, folder: Path, resume: str | bool | None, stack: ExitStack
    ) -> tuple[str | None, str | None, int, bool]:
        """
        Takes the folder until `stack` ends, and finds what to go on from.

        Returns the checkpoint, the run's id, the steps that it has left out, and whether settings have changed.
        """
        stack.enter_context(held(folder))
        recover(folder)
        if not resume:
            if getattr(self.args, "overwrite_output_dir", False):
                forget_run(folder)
            # Training again is this trainer's own affair.
            if noted(folder).get("run_id") is None or noted(folder)["run_id"] != self._begun.get(str(folder)):
                check_fresh(folder)
            run = uuid.uuid4().hex
            note(folder, run_id=run)
            return None, run, 0, False
        checkpoint = last_checkpoint(folder) if resume is True else Path(str(resume))
        saved, changed = self._check_checkpoint(checkpoint)
        if checkpoint.parent.resolve() != folder.resolve():
            check_no_other(folder, saved.get("run_id"))
        note(folder, run_id=saved.get("run_id"))
        return str(checkpoint), saved.get("run_id"), saved.get("skipped_steps", 0), changed

    def _check_checkpoint(self, checkpoint: Path) -> tuple[dict[str, Any], bool]:
        """What is written in a checkpoint that this run can go on from, and whether with other settings."""
        if getattr(self.model, "_hf_peft_config_loaded", False):
            raise UserError(
                f"resume_from_checkpoint={str(checkpoint)!r}: transformers loads no weights of an adapter made by"
                " add_adapter; pass the model without its adapter, and peft_config"
            )
        shapes = {
            name: {key: list(value.shape) for key, value in module.state_dict().items()}
            for name, module in self._auxiliary_modules().items()
        }
        needed = [checkpoint_files.DISCRIMINATOR_OPTIMIZER_NAME] if self._trains_critic else []
        needed += ["scaler.pt"] if self.accelerator.scaler is not None else []
        # Where every node has files of its own, this one hasn't those of the others.
        ranks = 0 if self.args.save_on_each_node else self.accelerator.num_processes
        saved = check_checkpoint(checkpoint, self._facts, shapes, needed, ranks)
        if "settings" in saved:
            return saved, bool(check_settings(checkpoint, saved["settings"], self._trajectory(), self.args))
        logger.warning("%s is of an earlier version, without settings that could be compared", checkpoint)
        return saved, False

    def _trajectory(self) -> dict[str, Any]:
        """What a checkpoint says of the settings that decide what becomes of the student."""
        self._data = self._data or fingerprint(self.train_dataset)
        found = trajectory(self.args, self.accelerator.num_processes, self._data, active_adapter(self.model))
        student_dtype = str(next(self.model.parameters()).dtype)
        found |= {"student_dtype": student_dtype, "per_device_train_batch_size": self._train_batch_size}
        return without_secrets(found)

    def _forget_earlier(self, resumed: bool) -> None:
        """Deletes what an earlier run left in the output folder and this one may not write again."""
        from .analysis.record import forget

        folder = Path(str(self.args.output_dir))
        # A folder that has a result is complete, and this one now isn't.
        for name in (RESULT_NAME, "alignment.png"):
            (folder / name).unlink(missing_ok=True)
        if not resumed:
            forget(folder / "analysis", -1)
            if os.path.realpath(getattr(self.model, "name_or_path", "")) != os.path.realpath(folder):
                (folder / "chat_template.jinja").unlink(missing_ok=True)

    def _finished_at(self, checkpoint: str) -> TrainOutput | None:
        """
        Loads a checkpoint that was saved after a run's last step, which may have been stopped before the final save.

        Trainer would do one step more before it notices that there is none to do.
        """
        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        steps, epochs = self.args.max_steps, self.args.num_train_epochs
        if state.global_step < steps if steps > 0 else (state.epoch or 0) < epochs:
            return None
        logger.warning(
            "%s was saved after the last of %d steps: nothing is left to train", checkpoint, state.global_step
        )
        self.state = state
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    def _check_finite(self) -> None:
        """Raises a [`NonFiniteLossError`] on every rank for what was not finite on one: terms, gradients, weights."""
        self._running.check(self.accelerator)
        found = self.accelerator.gather(spoilt(self._trained(), self.accelerator.device).unsqueeze(0))
        self._refuse_spoilt(found.any(0))

    def _trained(self) -> dict[str, list[nn.Parameter]]:
        """What a run trains, by its part."""
        parts = {"the student": [weight for weight in self.model.parameters() if weight.requires_grad]}
        named = self._auxiliary_modules().items()
        return parts | {f"the {name.replace('_', ' ')}": list(module.parameters()) for name, module in named}

    def _refuse_spoilt(self, found: Tensor) -> None:
        names = [name for name, bad in zip(self._trained(), found.tolist()) if bad]
        if names:
            raise NonFiniteLossError(
                f"weights of {', '.join(names)} are NaN or infinite after step {self.state.global_step}, and aren't"
                f" saved; {REMEDY}"
            )

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As in [`~transformers.Trainer`]; weights that are NaN or infinite aren't saved."""
        # On this process alone: of several, one may be asked to save.
        self._refuse_spoilt(spoilt(self._trained(), self.accelerator.device))
        super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with saved_for_others(self):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir if output_dir is not None else self.args.output_dir
            if self._facts["adapter"]:
                # PEFT saves none, and that of the base may stop at other tokens.
                save_generation_config(self.model, str(folder))
            facts = {**self._facts, "run_id": self._run_id, "skipped_steps": self.skipped_steps}
            if self._staging is not None:
                facts["settings"] = self._trajectory()
            checkpoint_files.save_auxiliary(str(folder), self._auxiliary_modules(), facts)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.adversary is not None and self.adversary.optimizer is not None and self.args.should_save:
            path = os.path.join(output_dir, checkpoint_files.DISCRIMINATOR_OPTIMIZER_NAME)
            torch.save(self.adversary.state_dict(), path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoint_files.load_auxiliary(resume_from_checkpoint, self._auxiliary_modules())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer: Any = self.optimizer
        kept = rates(optimizer, self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._changed_settings:
            set_rates(optimizer, self.lr_scheduler, kept)
        if checkpoint is not None and self._trains_critic:
            assert self.adversary is not None and self.adversary.optimizer is not None
            kept = rates(self.adversary.optimizer, self.adversary.scheduler)
            path = os.path.join(checkpoint, checkpoint_files.DISCRIMINATOR_OPTIMIZER_NAME)
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self.adversary.load_state_dict(state)
            if self._changed_settings:
                set_rates(self.adversary.optimizer, self.adversary.scheduler, kept)

    def load_trained(self, folder: str | Path) -> None:
        """
        Takes student, projectors and discriminator as a run saved them, to look at; to go on training, resume instead.

        Args:
            folder (`str` or `Path`): The output folder of a run with the same settings, or a checkpoint in it.
        """
        checkpoint_files.check_facts(folder, self._facts, "folder=")
        self._load_from_checkpoint(str(folder))
        state = Path(folder) / "trainer_state.json"
        if state.is_file():
            self.state = TrainerState.load_from_json(str(state))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        checkpoint_files.load_auxiliary(str(self.state.best_model_checkpoint), self._auxiliary_modules())

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes beside and renames, so that a full disk or a kill never leaves half a checkpoint under its name."""
        self._check_finite()
        run_dir = Path(super()._get_output_dir(trial))
        staging = run_dir / checkpoint_files.STAGING_NAME
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish_checkpoint(staging / name, run_dir / name)
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            last = checkpoint_files.checkpoints(run_dir)
            kept = f"the last good one is {last[-1]}" if last else "there is no earlier one"
            raise UserError(
                f"{name} could not be saved ({type(error).__name__}: {error}); {kept}: free space or choose another"
                " output_dir, then go on with resume_from_checkpoint"
            ) from error
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = str(run_dir / Path(best).name)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoint_files.rotate(run_dir, self.args.save_total_limit, best, self._run_id)
        self._running.restart_clock()

    def _finish_checkpoint(self, staged: Path, final: Path) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staged.parent:
            # The state was written while the checkpoint still had its temporary place.
            self.state.best_model_checkpoint = str(final.parent / Path(best).name)
            self.state.save_to_json(str(staged / "trainer_state.json"))
        checkpoint_files.publish(staged, final)
        shutil.rmtree(staged.parent)


class _Tokenize:
    """Tokenizes a dataset for both models unless that has been done, and keeps what was cut or skipped."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        args: DSKDConfig,
        reports: dict[str, TokenizationReport],
        vocabulary_map: Tensor | None = None,
    ):
        self.student, self.teacher, self.args, self.reports = student, teacher, args, reports
        options = args.prompt_style, options_of(args.chat_template_kwargs)
        tokenizers = {"student": student, **({} if teacher is None else {"teacher": teacher})}
        self.frames = {name: answer_frame(tokenizer, *options) for name, tokenizer in tokenizers.items()}
        self.partners = None if vocabulary_map is None else _Partners(student, teacher, vocabulary_map)

    def __call__(self, dataset: Any, split: str) -> Any:
        if dataset is not None and is_tokenized(dataset):
            both = {"": self.student, "teacher_": self.teacher}
            both = {prefix: tokenizer for prefix, tokenizer in both.items() if tokenizer is not None}
            dataset = check_tokenized(dataset, split, both, self.args.max_length)
        elif dataset is not None:
            written = self.args.method_row.text == "teacher" and split == "train"
            dataset, report = tokenize_dataset(
                dataset,
                self.student,
                self.teacher,
                # A response that the teacher had no room to end doesn't end for the student either.
                finished_column="finished" if written else None,
                # The teacher writes the last answer; the released code has no other.
                train_on="last" if written or self.args.as_published else self.args.train_on,
                on_bad_row=self.args.on_bad_row,
                max_length=self.args.max_length,
                prompt_style=self.args.prompt_style,
                chat_template_kwargs=options_of(self.args.chat_template_kwargs),
                prompt_column=self.args.prompt_column,
                response_column=self.args.response_column,
                skip_long_prompts=self.args.skip_long_prompts,
                num_proc=self.args.dataset_num_proc,
                description=split,
            )
            if report is not None:
                self.reports[split] = report
                logger.log(logging.WARNING if report.remarkable else logging.INFO, "%s: %s", split, report)
        check_columns(self.args, dataset, split)
        columns = getattr(dataset, "column_names", None) or []
        if dataset is not None and self.partners is not None and "partners" not in columns:
            options = {"desc": f"Aligning {split}"} if hasattr(dataset, "__len__") else {}
            dataset = dataset.map(self.partners, **options)
        return dataset

    @property
    def both(self) -> tuple[Any, Any]:
        return self.student, self.teacher

    @property
    def ends(self) -> tuple[int, int]:
        """The token at which an answer of the student, and one of the teacher, stops."""
        return self.frames["student"].end[-1], self.frames["teacher"].end[-1]


class _Partners:
    """Finds the teacher's token for each of the student's by edit distance (`min_edit`), once per example."""

    def __init__(self, student: Any, teacher: Any, vocabulary_map: Tensor):
        self.student, self.teacher, self.vocabulary_map = student, teacher, vocabulary_map

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        found: list[int] = []
        before = 0
        for (start, stop), (first, last) in zip(answer_spans(row), answer_spans(row, "teacher_")):
            ids, teacher_ids = row["input_ids"][start:stop], row["teacher_input_ids"][first:last]
            places = partners(ids, teacher_ids, self.student, self.teacher, self.vocabulary_map)
            found += [place + before if place >= 0 else -1 for place in places]
            before += last - first
        return {"partners": found}


def _reads_same_tokens(student_tokenizer: Any, teacher_tokenizer: Any, dataset: Any) -> bool:
    """Whether both models get the same tokens; of a dataset without a length the first row answers for all."""
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if dataset is None or not same_vocabulary(student_tokenizer, teacher_tokenizer):
        return False
    rows = dataset if hasattr(dataset, "__len__") else dataset.take(1)
    # Templates can differ even with one vocabulary.
    return all(row["input_ids"] == row["teacher_input_ids"] for row in rows)


def _rows(model: Any, config: Any) -> int:
    """Tokens that a model's head knows; some have more than their tokenizer."""
    return config.get_text_config().vocab_size if isinstance(model, str) else lm_head(model).weight.shape[0]


def _short_name(name: str | None) -> str | None:
    """A model's name without the folder it happens to lie in: a run may move to another machine."""
    return name if name is None or not os.path.isdir(name) else Path(name).resolve().name


def _wrap_with_adapter(model: Any, peft_config: Any, args: DSKDConfig) -> Any:
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
