"""Whether what a run trains is finite: gradients before every update, weights before every save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


def largest(tensors: Iterable[Tensor | None]) -> Tensor:
    """Finds the largest magnitude in all `tensors`, a scalar; NaN or infinite where one element is, 0 without any."""
    # Unlike a norm of squares it doesn't overflow where no element does.
    return get_total_norm([tensor.detach() for tensor in tensors if tensor is not None and tensor.numel()], torch.inf)


def largest_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Does as [`largest`], of the gradients."""
    return largest(parameter.grad for parameter in parameters)


def spoilt(parts: Mapping[str, Iterable[nn.Parameter]], device: torch.device) -> Tensor:
    """Tells which of `parts` have a weight that is NaN or infinite, as bools of shape `[len(parts)]`."""
    return torch.stack([~torch.isfinite(largest(weights)).to(device) for weights in parts.values()])
