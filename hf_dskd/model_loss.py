"""What a model adds to the cross entropy in the loss of its own: of routers, of an adapter's orthogonality."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .models import base_causal_lm


logger = logging.getLogger(__name__)


def _zero(*args: Any, **kwargs: Any) -> Tensor:
    """In place of a cross entropy of logits; in float32, and new for every call, for models and PEFT add to it."""
    logits = kwargs["logits"] if "logits" in kwargs else args[0]
    return torch.zeros((), device=logits.device)


@contextmanager
def no_cross_entropy(model: nn.Module, zero: Callable[..., Tensor] = _zero) -> Iterator[None]:
    """
    Inside, a model that gets labels returns as its loss only what it adds to the cross entropy.

    `zero` is what is called in the place of that. It is always the same function: torch.compile would notice others.
    """
    plain: Any = base_causal_lm(model)
    before = plain.__dict__.get("_loss_function")
    plain.loss_function = zero
    try:
        yield
    finally:
        del plain._loss_function
        if before is not None:
            plain.loss_function = before


def adds_to_loss(model: nn.Module) -> bool:
    """
    Whether a model adds anything to the cross entropy. Costs one forward pass of four tokens.

    Of a model that computes its cross entropy by itself no such thing can be taken: that is said.
    """
    plain = base_causal_lm(model)
    if "labels" not in inspect.signature(plain.forward).parameters:
        return False
    ids = torch.arange(1, 5, device=plain.device).unsqueeze(0)
    was_training = model.training
    left_out: list[None] = []

    def zero(*args: Any, **kwargs: Any) -> Tensor:
        left_out.append(None)
        return _zero(*args, **kwargs)

    model.eval()
    with torch.no_grad(), no_cross_entropy(model, zero):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
    model.train(was_training)
    if left_out:
        return bool(output.loss != 0)
    expected = nn.functional.cross_entropy(output.logits[0, -4:-1].float(), ids[0, 1:])
    if not torch.isclose(output.loss.float(), expected, rtol=0.01):
        logger.warning(
            "%s has a loss of its own, %.4g where the cross entropy is %.4g, which can't be told apart: what it adds"
            " isn't trained",
            *(type(plain).__name__, float(output.loss), float(expected)),
        )
    return False
