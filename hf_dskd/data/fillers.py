"""The examples with which ranks fill up the last batch of an epoch, so that all of them step together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset


def first_examples(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """
    Takes the first `count` examples of a batch as [`DualCollator`] makes it; as many or more leave it as it is.

    For none it is the first one without a response, which counts nowhere: a rank must have something to run.
    """
    size = len(batch["labels"])
    if count >= size:
        return batch
    first = {name: value[: max(count, 1)] for name, value in batch.items()}
    if count < 1:
        first = without_responses(first, torch.ones_like(first["labels"][:, 0], dtype=torch.bool))
    if "teacher_states" in batch:
        # A cache's states are padded to the longest response of the batch.
        longest = int((first["teacher_labels"][:, 1:] != -100).sum(1).max())
        first["teacher_states"] = first["teacher_states"][:, : max(longest, 1)]
    return first


def without_responses(batch: dict[str, Tensor], which: Tensor) -> dict[str, Tensor]:
    """Makes a batch in which the examples that `which` `[B]` marks have no response, and count nowhere."""
    rows, changed = which.unsqueeze(1), dict(batch)
    for name, value in batch.items():
        if name.endswith("labels"):
            changed[name] = value.masked_fill(rows, -100)
        elif name.endswith(("byte_ends", "chunk_ids", "partners", "places")):
            changed[name] = value.masked_fill(rows, -1)
        elif name.endswith("silent"):
            changed[name] = value.masked_fill(rows, False)
    return changed


def without_fillers(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Makes a batch in which what a [`FilledStream`] has put at its end has no response."""
    return without_responses(batch, batch["example_ids"] < 0) if "example_ids" in batch else batch


class FilledStream(IterableDataset):
    """
    A stream of tokenized rows whose last batch is whole on every rank, filled up by itself instead of by accelerate.

    Of a stream nobody knows beforehand where it ends. Fillers have the id -1; `multiple` is how many examples all
    ranks hold at a time.
    """

    def __init__(self, stream: Iterable[dict[str, Any]], multiple: int):
        self.stream, self.multiple = stream, multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, row = 0, {}
        for row in self.stream:
            count += 1
            yield row
        for _ in range(-count % self.multiple):
            yield {**row, "example_id": -1, "response_bytes": 0}

    def set_epoch(self, epoch: int) -> None:
        """Passes on which pass over the data begins."""
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)
