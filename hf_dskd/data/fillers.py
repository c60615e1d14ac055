"""The examples with which ranks fill up the last batch of an epoch, so that all of them step together."""

from __future__ import annotations

import torch
from torch import Tensor


def first_examples(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """
    The first `count` examples of a batch of B; B or more leave it as it is.

    For none it is the first one without a response, which counts nowhere: a rank must have something to run.

    Args:
        batch (`dict[str, torch.Tensor]`): From [`DualCollator`], or with tensors of B rows and `labels` like its.
        count (`int`): How many aren't fillers; less than 1 is none.
    """
    size = len(batch["labels"])
    if count >= size:
        return batch
    first = {name: value[: max(count, 1)] for name, value in batch.items()}
    if count < 1:
        first |= {name: value.new_full(value.shape, -100) for name, value in first.items() if name.endswith("labels")}
        responses = ("byte_ends", "chunk_ids", "partners", "places")
        first |= {name: value.new_full(value.shape, -1) for name, value in first.items() if name.endswith(responses)}
        first |= {name: torch.zeros_like(value) for name, value in first.items() if name.endswith("closing")}
    if "teacher_states" in batch:
        # A cache's states are padded to the longest response of the batch.
        longest = int((first["teacher_labels"][:, 1:] != -100).sum(1).max())
        first["teacher_states"] = first["teacher_states"][:, : max(longest, 1)]
    return first
