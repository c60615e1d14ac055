"""When things happen: steps, optimizers, checkpoints, ranks, logs. What is computed is in `objective`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from .adversary import Adversary
from .alignment.chunked import input_chunks
from .analysis.callback import AnalysisCallback
from .attention_capture import AttentionPairs
from .config import DSKDConfig
from .data.kinds import as_dataset, as_datasets
from .data.vocabulary import same_vocabulary, shared_tokens
from .errors import UserError
from .evaluation.in_training import Evaluations
from .hub.identity import identity
from .hub.publishing import Publishing
from .losses.attention import attention_kl, chunk_attention_kl
from .losses.conditional_transport import TransportCritics
from .losses.dual_space import IGNORE, ResponseStates, published_states, response_states
from .losses.key_query import Discriminator
from .losses.likelihood import boundary_tokens
from .models.causal_lm import check_head, check_student_head, hidden_size, input_embedding, lm_head
from .models.generation import check_generation_config
from .models.hidden_states import LastHiddenState
from .objective import (
    PairConstants,
    Terms,
    distillation_terms,
    student_terms,
    total_loss,
)
from .projectors import Projectors
from .running_log import RunningLog
from .teacher.source import TeacherSource, open_source
from .training.arguments import check_args, check_collator, check_given, check_optimized
from .training.checkpoint import Checkpoints
from .training.compatibility import check_trainable
from .training.pair import Pair
from .training.prepare import Preparation, check_steps
from .training.steps import StepCallback
from .words import ARGUMENTS, understands


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig
    from transformers import EvalPrediction

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


class DSKDTrainer(Publishing, Evaluations, Checkpoints):
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
        teacher ([`~hf_dskd.teacher.source.TeacherSource`] or `None`)
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
        args = DSKDConfig("dskd_output") if args is None else args
        check_args(args)
        row = args.method_row
        # What can be refused is refused first; models are loaded last.
        train_dataset = as_dataset(train_dataset, "train_dataset")
        eval_dataset = as_datasets(eval_dataset, "eval_dataset")
        check_given(
            args,
            model,
            eval_dataset,
            data_collator,
            compute_metrics,
            preprocess_logits_for_metrics,
            callbacks,
            optimizers,
            peft_config,
            quantization_config,
            teacher_quantization_config,
        )
        self._pair = pair = Pair(
            args,
            model,
            teacher_model,
            processing_class,
            teacher_processing_class,
            peft_config=peft_config,
            quantization_config=quantization_config,
            teacher_quantization_config=teacher_quantization_config,
        )
        pair.check_student(trains=train_dataset is not None)
        self._identity = identity(pair.student.name, bool(pair.adapters), args.method, pair.student.config.model_type)
        self._origins = {side.role: side.origin for side in (pair.student, pair.teacher) if side is not None}
        if args.push_to_hub:
            self._check_hub(args)
        cache = pair.open_cache(args.teacher_cache)
        self._preparation = Preparation(pair, cache)
        self.tokenization_reports = self._preparation.reports
        train_dataset, eval_dataset = self._preparation.begin(train_dataset, eval_dataset)
        if train_dataset is not None:
            check_steps(args, train_dataset)
        if data_collator is not None:
            check_collator(data_collator, train_dataset, row.needs_teacher)
        self._preparation.fill(train_dataset, eval_dataset)

        student = pair.load_student()
        if train_dataset is not None:
            check_trainable(student)
            check_optimized(optimizers[0], student)
        if args.on_policy_fraction:
            check_generation_config(student, "the student")
        self.teacher: TeacherSource | None = None
        if row.needs_teacher:
            self.teacher = open_source(cache, pair.load_teacher, args.device)
        if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
            # Reentrant checkpointing needs an input that requires a gradient, which a frozen embedding doesn't give.
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if args.world_size > 1 and args.accelerator_config.dispatch_batches is None:  # type: ignore[union-attr]
            # One rank would cut the batches of all out of its own, which are padded to lengths of their own.
            args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
        super().__init__(
            model=student,
            args=args,
            data_collator=self._preparation.collator() if data_collator is None else data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=pair.student.tokenizer,
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
        self.teacher_processing_class = pair.tokenizers[1]
        teacher = pair.teacher if row.needs_teacher else None
        sizes = hidden_size(pair.student.config), None if teacher is None else hidden_size(teacher.config)
        self._prepare_pair(student, sizes)
        composition = {key: value for key, value in asdict(row).items() if key not in ("summary", "source")}
        self._facts = {
            "method": args.method,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in composition.items()},
            "as_published": args.as_published,
            "student": pair.student.short_name,
            "teacher": None if teacher is None else teacher.short_name,
            "student_hidden_size": sizes[0],
            "teacher_hidden_size": sizes[1],
            "adapter": hasattr(student, "peft_config"),
        }
        self.running_log = RunningLog(self.accelerator.device)
        self._learning_rates: dict[str, float] = {}
        self._begun: dict[str, str | None] = {}
        self._evaluated: list[Tensor] = []
        self.samples: list[dict[str, Any]] = []
        self.add_callback(StepCallback(self))
        self.add_callback(AnalysisCallback(self))

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
            if args.attention_kd_rate and self.teacher is not None:
                layers, heads = args.attention_layers, args.attention_relation_heads
                self._attention = AttentionPairs(student, self.teacher.model, layers, heads, args.max_length)
        dataset: Any = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        self._same_tokens = self._attention is not None and _reads_same_tokens(
            self._pair.student.tokenizer, self._pair.tokenizers[1], dataset
        )
        self.projectors: Projectors | None = None
        self.adversary: Adversary | None = None
        self._constants = PairConstants()
        width, teacher_width = sizes
        if self.teacher is None or teacher_width is None:
            return
        self._constants = self._pair_constants(self._pair.vocabulary_map)
        if row.dual_space:
            self.projectors = Projectors(width, teacher_width, seed=args.seed, has_query=row.has_queries)
            if row.projector_init == "pseudo_inverse":
                shared = shared_tokens(*self._pair.tokenizers, self._pair.ends)
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

    def _pair_constants(self, vocabulary_map: Tensor | None) -> PairConstants:
        """What the method's losses read of the two vocabularies."""
        assert self.teacher is not None
        row, device, rows = self.args.method_row, self.accelerator.device, self.teacher.head.weight.shape[0]
        label_map = boundary = None
        if row.label == "teacher":
            label_map = torch.full((rows,), -1, dtype=torch.int64)
            student_ids, teacher_ids = shared_tokens(*self._pair.tokenizers, self._pair.ends)
            label_map[teacher_ids] = student_ids
            label_map = label_map.to(device)
        if row.spaces == ("likelihood",) and self.args.alm_bias_threshold is not None:
            student_rows = lm_head(self.model).weight.shape[0]
            boundary = (
                boundary_tokens(self._pair.student.tokenizer, student_rows).to(device),
                boundary_tokens(self._pair.tokenizers[1], rows).to(device),
            )
        if vocabulary_map is not None:
            vocabulary_map = vocabulary_map.to(device)
        return PairConstants(label_map, vocabulary_map, boundary)

    # ---- Loss

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
            named = terms.student | terms.teacher
            self.running_log.watch(self.state.global_step, inputs.get("example_ids"), named)
            self.running_log.add(
                student_tokens=terms.student_tokens.sum(),
                **{name: value.sum() for name, value in named.items()},
            )
            if terms.teacher_tokens is not None:
                self.running_log.add(teacher_tokens=terms.teacher_tokens.sum())
            if terms.added is not None:
                self.running_log.watch(self.state.global_step, None, {"aux": terms.added})
                self.running_log.add(aux=terms.added * self.accelerator.num_processes)
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
        if self.args.as_published:
            # Its losses read the prompts and the padding too, which a cache doesn't have.
            run: Any = self.teacher
            teacher_hidden = run(inputs["teacher_input_ids"], inputs["teacher_attention_mask"])
        else:
            teacher_hidden = self.teacher.states(inputs)
        return student, self._states(teacher_hidden, inputs, "teacher_", self.teacher.embedding, gathered=True)

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
        if self._pair.load_again is None:
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
        model_init: Any = self._pair.load_again
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
            logs.update(self.running_log.drain(self.accelerator) | self._learning_rates)
        if self.skipped_steps and ("loss" in logs or "train_loss" in logs):
            self._note_skipped(logs)
        super().log(logs, start_time)

    def _note_skipped(self, logs: dict[str, float]) -> None:
        """Takes the steps that were left out from what Trainer counted."""
        logs["skipped_steps"] = self.skipped_steps
        if "train_loss" in logs:
            self.running_log.drain(self.accelerator)
            logs["train_loss"] = self.running_log.mean_loss if self.running_log.mean_loss is not None else math.nan
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]


def _reads_same_tokens(student_tokenizer: Any, teacher_tokenizer: Any, dataset: Any) -> bool:
    """Whether both models get the same tokens; of a dataset without a length the first row answers for all."""
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if dataset is None or not same_vocabulary(student_tokenizer, teacher_tokenizer):
        return False
    rows = dataset if hasattr(dataset, "__len__") else dataset.take(1)
    # Templates can differ even with one vocabulary.
    return all(row["input_ids"] == row["teacher_input_ids"] for row in rows)
