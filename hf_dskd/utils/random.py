"""Random numbers that leave those of everybody else as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """
    Draws inside, on the CPU, what `seed` says; afterwards everything goes on as if nothing had been drawn.

    `torch.manual_seed` would reseed every device, and `fork_rng` brings back only those that it is told of: the
    student's dropout on a GPU would depend on whether a discriminator was made beside it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
