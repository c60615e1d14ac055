"""The order of the training examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor
from torch.utils.data import Sampler


if TYPE_CHECKING:
    from datasets import Dataset


class EpochSampler(Sampler[int]):
    """
    A random order that is a function of seed and epoch alone.

    transformers 4.57 replays the order of the first epoch when it resumes in the middle of a later one; and a sampler
    that draws from the global generator gives two methods different data.

    `epoch` is called when an epoch begins, or is resumed: which one it is.
    """

    def __init__(self, size: int, seed: int, epoch: Callable[[], int]):
        self.size, self.seed, self.epoch = size, seed, epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        yield from torch.randperm(self.size, generator=generator).tolist()


class LengthGroupedEpochSampler(EpochSampler):
    """
    A random order in which neighbours are similar in length; as [`EpochSampler`]'s, of seed and epoch alone.

    Examples that lie in one batch are padded to its longest, and ranks wait for the one with the longest batch. So
    what all ranks hold at a time comes from one stretch of a window sorted by length. These groups are then shuffled,
    so that lengths neither rise nor fall over an epoch and the micro-batches of an optimizer step differ in length.
    The group of the longest example is first: memory that won't do is found out at once. What doesn't fill a group
    is last and drawn without regard to length, so that dropping it drops no kind of example.

    Args:
        lengths (`torch.Tensor` of shape `[N]`): What to group by, an integer per example; see [`example_lengths`].
        group_size (`int`): Examples that all ranks hold at a time: batch size per device times ranks.
        window (`int`, *optional*, defaults to `50`): Groups sorted together. More pads less and mixes less.
    """

    def __init__(self, lengths: Tensor, group_size: int, seed: int, epoch: Callable[[], int], window: int = 50):
        super().__init__(len(lengths), seed, epoch)
        self.lengths, self.group_size, self.window = lengths, group_size, window

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = torch.randperm(self.size, generator=generator)
        # In the first window the longest example of all comes to lie in the first group.
        longest = int(self.lengths.argmax())
        order[order == longest] = int(order[0])
        order[0] = longest
        whole = self.size - self.size % self.group_size
        windows = [*order[:whole].split(self.group_size * self.window), order[whole:]]
        windows = [part[self.lengths[part].argsort(descending=True, stable=True)] for part in windows]
        groups = torch.cat(windows[:-1]).view(-1, self.group_size)
        shuffled = torch.randperm(max(len(groups) - 1, 0), generator=generator) + 1
        yield from torch.cat([groups[:1].flatten(), groups[shuffled].flatten(), windows[-1]]).tolist()


def example_lengths(dataset: Dataset) -> Tensor:
    """Counts both models' tokens (prompt and response) of each row of [`tokenize_dataset`], int64 `[N]`."""
    import pyarrow.compute

    lengths = torch.zeros(len(dataset), dtype=torch.int64)
    for column in {"input_ids", "teacher_input_ids"} & set(dataset.column_names):
        # Arrow counts them without making a list of every row; in blocks, as a shuffled dataset is copied in reading.
        blocks = dataset.select_columns(column).with_format("arrow").iter(10_000)
        counts = [pyarrow.compute.list_value_length(block[column]).to_numpy() for block in blocks]
        lengths += torch.from_numpy(numpy.concatenate(counts))
    return lengths
