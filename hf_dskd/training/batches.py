"""From tokenized data to the batches of a step: loaders, samplers, the student's own answers, what a step counts."""

from __future__ import annotations

from collections.abc import Sized
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import get_mixed_precision_context_manager
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler
from transformers import Trainer

from ..data.fillers import FilledStream, first_examples, without_fillers
from ..data.sampler import EpochSampler, LengthGroupedEpochSampler, example_lengths
from .on_policy import is_on_policy, on_policy_batch


if TYPE_CHECKING:
    from ..config import DSKDConfig
    from ..teacher.source import TeacherSource
    from .pair import Pair
    from .prepare import Preparation


class Batches(Trainer):
    """What [`~hf_dskd.DSKDTrainer`] makes of datasets; a part of it."""

    args: DSKDConfig
    teacher: TeacherSource | None
    _pair: Pair
    _preparation: Preparation
    # Response tokens of the global batch: the student's, the teacher's.
    _items: Tensor | None = None
    _on_policy = False

    def _autocast(self) -> AbstractContextManager:
        """Does as `accelerator.autocast`, which in accelerate 1.10 stays on for good after an error inside it."""
        return get_mixed_precision_context_manager(self.accelerator.native_amp, self.accelerator.autocast_handler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in [`~transformers.Trainer`]; a dataset that isn't tokenized yet is tokenized first."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._preparation.later(eval_dataset, "eval_dataset", "eval")
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
        """Returns a stream for several ranks, or `dataset` as it is."""
        ranks = self.accelerator.num_processes
        if dataset is None or isinstance(dataset, str) or hasattr(dataset, "__len__") or ranks == 1:
            return dataset
        return FilledStream(dataset, batch_size * (1 if self.accelerator.split_batches else ranks))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in [`~transformers.Trainer`]; a dataset that isn't tokenized yet is tokenized first."""
        return super().get_test_dataloader(self._preparation.later(test_dataset, "test_dataset", "test"))

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
            batches = [self._answered_by_student(batch, index) for index, batch in enumerate(batches)]
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

    def _answered_by_student(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        model: Any = self.accelerator.unwrap_model(self.model)
        seed = (self.args.seed + 1) * 1_000_003 + self.state.global_step * 1_009
        return on_policy_batch(
            batch,
            model,
            *self._pair.tokenizers,
            self.data_collator,
            max_length=self.args.max_length,
            generation_config=model.generation_config,
            seed=(seed + index) * 64 + self.accelerator.process_index,
            autocast=self._autocast(),
            align=self._preparation.partners,
            frames=self._pair.frames,
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Counts response tokens of the global batch: all micro-batches of the step, all ranks, both tokenizers."""
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
