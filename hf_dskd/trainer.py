"""When things happen: steps, optimizers, checkpoints, ranks, logs. What is computed is in `training/distiller`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from .analysis.callback import AnalysisCallback
from .config import DSKDConfig
from .data.kinds import as_dataset, as_datasets
from .data.vocabulary import same_vocabulary
from .errors import UserError
from .evaluation.in_training import Evaluations
from .hub.identity import identity
from .hub.publishing import Publishing
from .losses.objective import Step
from .losses.projectors import Projectors
from .models.causal_lm import lm_head
from .teacher.source import TeacherSource, open_source
from .training.adversary import Adversary
from .training.arguments import check_args, check_callbacks, check_functions, check_given, settle
from .training.checkpoint import Checkpoints
from .training.distiller import Distiller
from .training.pair import Pair
from .training.prepare import Preparation, check_steps
from .training.published import PublishedDistiller
from .words import ARGUMENTS, understands


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig
    from transformers import EvalPrediction

logger = logging.getLogger(__name__)


# Settings that go into what the trials of a search share.
PREPARED_ONCE = (
    "method alignment as_published max_length prompt_style chat_template_kwargs prompt_column response_column"
    " skip_long_prompts on_bad_row train_on teacher_cache load_teacher_in_4bit teacher_device teacher_dtype output_dir"
    " bpm_segmentation"
).split()


def bits_per_byte(metrics: dict[str, float]) -> float:
    """Measures a trial: comparable between methods and weights of their terms, as a sum of metrics isn't."""
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
        distiller ([`~hf_dskd.training.distiller.Distiller`]): What enters the loss, and the loss; for analyses.
        projectors ([`~hf_dskd.losses.projectors.Projectors`] or `None`): float32, outside the student.
        adversary ([`~hf_dskd.training.adversary.Adversary`] or `None`): The discriminator with its optimizer.
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
        # What can be refused is refused first; models are loaded last.
        train_dataset = as_dataset(train_dataset, "train_dataset")
        eval_dataset = as_datasets(eval_dataset, "eval_dataset")
        check_functions(data_collator=data_collator, compute_metrics=compute_metrics)
        check_functions(preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        check_callbacks(callbacks)
        check_given(args, model, eval_dataset, data_collator, compute_metrics, optimizers)
        self._pair = pair = Pair(
            *(args, model, teacher_model, processing_class, teacher_processing_class),
            peft_config=peft_config,
            quantization_config=quantization_config,
            teacher_quantization_config=teacher_quantization_config,
        )
        trains = train_dataset is not None
        pair.check_student(trains)
        self._identity = identity(pair.student.name, bool(pair.adapters), args.method, pair.student.config.model_type)
        self._origins = {side.role: side.origin for side in (pair.student, pair.teacher) if side is not None}
        if args.push_to_hub:
            self._check_hub(args)
        self._preparation = preparation = Preparation(pair, pair.open_cache(args.teacher_cache))
        self.tokenization_reports = preparation.reports
        train_dataset, eval_dataset = preparation.begin(train_dataset, eval_dataset, data_collator)
        student = pair.load_student()
        pair.check_loaded(student, optimizers[0], trains)
        self.teacher: TeacherSource | None = None
        if args.method_row.needs_teacher:
            self.teacher = open_source(preparation.cache, pair.load_teacher, args.device)
        settle(args)
        super().__init__(
            model=student,
            args=args,
            data_collator=preparation.collator() if data_collator is None else data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=pair.student.tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # compute_loss divides by the tokens of the global batch itself. The first name is read by transformers from
        # 5.19 on, the second before.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.teacher_processing_class = pair.tokenizers[1]
        self._prepare_pair(student)
        self._facts = {**pair.facts, "adapter": hasattr(student, "peft_config")}
        self.add_callback(AnalysisCallback(self))

    def _prepare_pair(self, student: Any) -> None:
        """Makes what belongs to one student, on its device: hooks, objective, projectors, discriminator."""
        args = self.args
        dataset: Any = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        same_tokens = bool(args.attention_kd_rate) and _reads_same_tokens(*self._pair.tokenizers, dataset)
        kind = PublishedDistiller if args.as_published else Distiller
        self.distiller = kind(
            *(args, student, self.teacher, self._pair),
            device=self.accelerator.device,
            collate=lambda rows: self.data_collator(rows),
            autocast=self._autocast,
            same_tokens=same_tokens,
        )
        if self.distiller.objective.fits:
            # Ranks may see other streams, and sums on other devices differ.
            self.distiller.objective.take(self._on_main(lambda: self.distiller.fit(dataset)))
        self.projectors: Projectors | None = self.distiller.projectors
        matching = self.distiller.matching
        self.adversary = None if matching is None or matching.critic is None else Adversary(matching, args)

    # ---- Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """
        Computes the method's loss on one micro-batch, divided by the response tokens of the global batch.

        With `return_outputs` also `{"logits": [B, S, V_s]}`, the student's.
        """
        views = self.distiller.views(model, inputs)
        with self._autocast():
            terms = self.distiller.terms(views, self.step(model.training))
            outputs = {"logits": lm_head(self.model)(views.hidden)} if return_outputs else None

        if num_items_in_batch is None:
            counts = (
                terms.student_tokens,
                terms.student_tokens if terms.teacher_tokens is None else terms.teacher_tokens,
            )
            loss = self.distiller.loss(terms, counts[0].sum().clamp_min(1), counts[1].sum().clamp_min(1))
        else:
            assert self._items is not None
            ranks = self.accelerator.num_processes
            if terms.added is not None:
                # A mean over the micro-batches of all ranks: Trainer's sum would weigh more with every one of them.
                terms = replace(terms, added=terms.added / (self.current_gradient_accumulation_steps * ranks))
            # Every rank divides by the tokens of all ranks; data parallelism then averages the gradients.
            loss = self.distiller.loss(terms, self._items[0], self._items[1]) * ranks

        if model.training:
            self.running_log.watch(self.state.global_step, inputs.get("example_ids"), terms.sums)
            self.running_log.add(
                student_tokens=terms.student_tokens.sum(),
                **{name: value.sum() for name, value in terms.sums.items()},
            )
            if terms.teacher_tokens is not None:
                self.running_log.add(teacher_tokens=terms.teacher_tokens.sum())
            if terms.added is not None:
                self.running_log.watch(self.state.global_step, None, {"aux": terms.added})
                self.running_log.add(aux=terms.added * self.accelerator.num_processes)
            if self.adversary is not None and terms.features is not None:
                self.adversary.keep(terms.features)
        else:
            self._note_evaluated(views.student, terms, inputs)
        return (loss, outputs) if outputs is not None else loss

    def step(self, training: bool) -> Step:
        """Tells losses when they are computed; every step has a seed of its own, the same one after a resume."""
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return Step(progress, self._dropout_seed(), training and self._on_policy, training)

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
        """Loads a new student for a trial, with projectors and discriminator of its own."""
        # The old one may hold as much memory as the new one needs.
        self.model = self.model_wrapped = self.optimizer = None  # type: ignore
        self.distiller = self.projectors = self.adversary = None  # type: ignore
        student: Any = super().call_model_init(trial)
        if self.place_model_on_device:
            self._move_model_to_device(student, self.args.device)
        self.model = student
        self._prepare_pair(student)
        return student

    # ---- Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every loss term, norms, learning rates, accuracies and speed to what Trainer logs while training."""
        if "loss" in logs:
            logs.update(self.running_log.drain(self.accelerator) | self._learning_rates)
        if self.skipped_steps and ("loss" in logs or "train_loss" in logs):
            self._note_skipped(logs)
        if "train_loss" in logs:
            # Once, when a resumed run has those that it began with.
            logs.update(self.distiller.objective.fitted)
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
    """Tells whether both models get the same tokens; of a dataset without a length by its first row."""
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if dataset is None or not same_vocabulary(student_tokenizer, teacher_tokenizer):
        return False
    rows = dataset if hasattr(dataset, "__len__") else dataset.take(1)
    # Templates can differ even with one vocabulary.
    return all(row["input_ids"] == row["teacher_input_ids"] for row in rows)
