"""The order of the training examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """
    A random order that is a function of seed and epoch alone.

    transformers 4.57 replays the order of the first epoch when it resumes in the middle of a later one; and a sampler
    that draws from the global generator gives two methods different data.

    Args:
        size (`int`): Examples.
        seed (`int`): Another one gives other orders.
        epoch (`Callable[[], int]`): Called when an epoch begins, or is resumed: which one it is.
    """

    def __init__(self, size: int, seed: int, epoch: Callable[[], int]):
        self.size, self.seed, self.epoch = size, seed, epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        yield from torch.randperm(self.size, generator=generator).tolist()
