"""
A model's last hidden states, and what it adds to the cross entropy in a loss of its own.

What it adds is of routers, or of an adapter's orthogonality.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .causal_lm import backbone, base_causal_lm


logger = logging.getLogger(__name__)


class LastHiddenState:
    """
    Catches the last hidden state of a model whose forward is called as a whole.

    Under DistributedDataParallel a forward pass must go through the wrapper, which returns logits; asking for
    `output_hidden_states` would keep every layer. The hook is set once, so that torch.compile traces it.

    Args:
        model (`torch.nn.Module`): A causal language model, plain or with an adapter, not wrapped yet.
        padding_free (`bool`, *optional*, defaults to `False`):
            Run the real tokens of a batch as one row without padding, in which each example's positions begin anew.
            The model is tried at once, where it is and under the autocast that is on: it must keep the examples apart.

    Attributes:
        added (`torch.Tensor`, *optional*):
            What the model added to its own loss on the last batch (see [`adds_to_loss`]), a scalar in nats.

    Raises:
        UserError: If `padding_free` and the model with its attention implementation can't.
    """

    def __init__(self, model: nn.Module, padding_free: bool = False):
        self.value: Tensor | None = None
        self.added: Tensor | None = None
        body = backbone(model)
        body.register_forward_hook(self._store)
        # Logits are of no use here: ask for those of one position where the model can be asked.
        accepts = inspect.signature(base_causal_lm(model).forward).parameters
        self._arguments: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in accepts:
            self._arguments["logits_to_keep"] = 1
        self._adds_to_loss = adds_to_loss(model)
        self.padding_free = padding_free
        if padding_free:
            self._check_packing(model, "position_ids" in accepts)

    def _store(self, module: nn.Module, args: Any, output: Any) -> None:
        self.value = output[0]

    def __call__(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """
        Runs `model` (wrapped or not) and returns its last hidden state `[B, S, d]`.

        Where `attention_mask` is 0, it is 0 if `padding_free`, and otherwise whatever the model makes of padding.
        """
        if self.padding_free:
            return self._packed(model, input_ids, attention_mask)
        return self._run(model, input_ids=input_ids, attention_mask=attention_mask)

    def _packed(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask.flatten().nonzero().squeeze(1)
        positions = (attention_mask.cumsum(1) - 1).flatten()
        # Without a mask: transformers then tells the examples apart by where positions begin anew.
        packed = self._run(
            model, input_ids=input_ids.flatten()[real].unsqueeze(0), position_ids=positions[real].unsqueeze(0)
        )[0]
        hidden = packed.new_zeros(input_ids.numel(), packed.shape[-1]).index_copy(0, real, packed)
        return hidden.view(*input_ids.shape, -1)

    def _run(self, model: nn.Module, **inputs: Tensor) -> Tensor:
        if self._adds_to_loss:
            self.added = self._run_with_loss(model, inputs)
        else:
            model(**inputs, **self._arguments)
        hidden, self.value = self.value, None
        assert hidden is not None
        # PEFT's prompt tuning puts tokens of its own before the text.
        return hidden[:, -inputs["input_ids"].shape[1] :]

    def _run_with_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        from accelerate.utils import extract_model_from_parallel

        with no_cross_entropy(extract_model_from_parallel(model, keep_torch_compile=False)):
            return model(**inputs, labels=inputs["input_ids"], **self._arguments).loss

    def _check_packing(self, model: nn.Module, takes_positions: bool) -> None:
        """
        Tries a long example before a short one, packed and padded.

        What the first says must not reach the second at all, however little a model that isn't trained yet makes of
        it; and both must be what they are when padded, but for rounding.
        """
        plain = base_causal_lm(model)
        # Neighbours in the vocabulary, the second example among them.
        ids = torch.arange(1, 17, device=plain.device).repeat(2, 1)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        others = torch.stack([ids[0].flip(0), ids[1]])
        was_training = plain.training
        plain.eval()
        problem = "takes no position_ids"
        if takes_positions:
            with torch.no_grad():
                padded = self._run(model, input_ids=ids, attention_mask=mask)
                packed = self._packed(model, ids, mask)
                beside_others = self._packed(model, others, mask)
            scale = padded[mask.bool()].abs().max()
            leak = (packed - beside_others)[1].abs().max() / scale
            difference = (packed - padded)[mask.bool()].abs().max() / scale
            problem = "lets an example see the one before it" if not leak <= 1e-5 else ""
            if not problem and not difference <= 0.05:
                problem = f"gives other states for packed examples than for padded ones (by {difference:.1%})"
        plain.train(was_training)
        if problem:
            raise UserError(
                f"padding_free=True: {type(plain).__name__} with attn_implementation="
                f"{plain.config._attn_implementation!r} {problem}; set padding_free=False"
            )


def _zero(*args: Any, **kwargs: Any) -> Tensor:
    """Stands for a cross entropy of logits; in float32, and new for every call, for models and PEFT add to it."""
    logits = kwargs["logits"] if "logits" in kwargs else args[0]
    return torch.zeros((), device=logits.device)


@contextmanager
def no_cross_entropy(model: nn.Module, zero: Callable[..., Tensor] = _zero) -> Iterator[None]:
    """
    Makes a model that gets labels return as its loss, inside, only what it adds to the cross entropy.

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
    Tells whether a model adds anything to the cross entropy. Costs one forward pass of four tokens.

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
