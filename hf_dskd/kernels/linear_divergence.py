"""
From hidden states and language-model heads straight to losses of one value per row.

Logits are the largest tensors of distillation: 4 x 512 positions over 152,000 tokens are 1.2 GB in float32, and a
divergence written plainly holds about ten of them. Here the rows are taken in chunks: the matrix products run over a
chunk, whose logits lie in a buffer that is used again for the next one; the losses run over tiles of it that fit into
a cache, in float32; and the gradient of the logits replaces them in the buffer, so that nothing of size
`[rows, vocabulary]` outlives its chunk.

Axes: N rows (response tokens of the whole batch, packed), d hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UserError


if TYPE_CHECKING:
    from ..models.causal_lm import LMHead

# Takes float32 logits `[n, V_k]` and then rows `[n, ...]` of what else it needs; gives terms of shape `[n]`.
RowFunction = Callable[..., dict[str, Tensor]]

# A float32 copy of all logits of a tile, in bytes. On a CPU a tile's dozen copies should stay in its caches; a GPU
# needs enough rows to be busy.
TILE_BYTES = {"cpu": 2**21, "cuda": 2**26}
# Such copies alive at once, measured over all divergences.
TILE_COPIES = 12


def linear_rows(
    function: RowFunction,
    hidden: Sequence[Tensor],
    heads: Sequence[LMHead],
    rows: Sequence[Tensor] = (),
    *,
    weights: Mapping[str, float] | None = None,
    memory_mb: float = 512,
    compiled: bool = False,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """
    Losses of logits that never exist as a whole.

    Args:
        function (`Callable`):
            From logits `[n, V_k]` in float32, one of each head, and the `[n, ...]` slices of `rows`, to terms `[n]`.
            It must treat rows independently, and follow the restrictions of [`torch.func.grad`].
        hidden (sequence of `torch.Tensor` of shape `[N, d_k]`): What each head is applied to.
        heads (sequence of [`~hf_dskd.models.causal_lm.LMHead`]): To logits; one that is trainable gets its gradient.
        rows (sequence of `torch.Tensor` of shape `[N, ...]`, *optional*): Passed on to `function`; constants.
        weights (`dict[str, float]`, *optional*):
            Weight of each term in the loss; those left out have none. With it the gradient is computed in the forward
            pass and the logits only once. Without it, terms carry gradients of their own, and the backward pass
            computes the logits again.
        memory_mb (`float`, *optional*, defaults to 512): Budget for a chunk of logits and the work on it, in MB.
        compiled (`bool`, *optional*, defaults to `False`): Runs the losses through `torch.compile`.

    Returns:
        The weighted sum of all terms, a scalar (`None` without `weights`), and the terms, of shape `[N]` each; with
        `weights` those carry no gradient.

    Raises:
        UserError: If `memory_mb` can't hold one row.
    """
    tensors: list[Tensor | None] = []
    dtypes = []
    for states, head in zip(hidden, heads, strict=True):
        device = states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtypes.append(torch.get_autocast_dtype(device) if autocast else head.weight.dtype)
        tensors += [states, head.weight, head.bias]
    plan = _Plan(
        function=function,
        heads=tuple(heads),
        transforms=tuple((head.scale, head.softcap) for head in heads),
        dtypes=tuple(dtypes),
        rows=tuple(rows),
        weights=None if weights is None else dict(weights),
        sizes=chunk_sizes([len(head.weight) for head in heads], dtypes, hidden[0].device.type, memory_mb),
        compiled=compiled,
    )
    # The terms' names are known after the first tile; the function below fills them in.
    names: list[str] = []
    total, *terms = _LinearRows.apply(plan, names, *tensors)
    return (None if weights is None else total), dict(zip(names, terms, strict=True))


def chunk_sizes(
    vocabularies: Sequence[int], dtypes: Sequence[torch.dtype], device: str, memory_mb: float
) -> tuple[int, int]:
    """
    Rows of a chunk and of a tile within `memory_mb`.

    Raises:
        UserError: If not even one row fits.
    """
    logits = sum(size * dtype.itemsize for size, dtype in zip(vocabularies, dtypes))
    copy = sum(size * max(dtype.itemsize, 4) for size, dtype in zip(vocabularies, dtypes))
    memory, one_row = memory_mb * 1e6, logits + TILE_COPIES * copy
    if memory < one_row:
        tokens = " and ".join(f"{size:,}" for size in vocabularies)
        raise UserError(
            f"loss_memory_mb={memory_mb:g} can't hold one row of logits over {tokens} tokens: set it"
            f" to {math.ceil(one_row / 1e6)} or more (512 is the default)"
        )
    # At most half of the budget goes to the tile.
    tile = int(min(TILE_BYTES.get(device, TILE_BYTES["cuda"]), memory / 2 / TILE_COPIES) // copy)
    tile = max(tile, 1)
    chunk = int((memory - tile * TILE_COPIES * copy) // logits)
    # Whole tiles.
    return (chunk // tile * tile if chunk > tile else max(chunk, 1)), tile


@dataclass(frozen=True)
class _Plan:
    """What `_LinearRows` needs beside the tensors that may carry a gradient."""

    function: RowFunction
    heads: tuple[LMHead, ...]
    transforms: tuple[tuple[float, float | None], ...]
    dtypes: tuple[torch.dtype, ...]
    rows: tuple[Tensor, ...]
    weights: dict[str, float] | None
    sizes: tuple[int, int]
    compiled: bool


class _LinearRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, names: list[str], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[2:]
        # Without weights the gradient has to wait for the backward pass.
        wanted = needed if plan.weights is not None else [False] * len(needed)
        terms, gradients = _sweep(plan, tensors, wanted, plan.weights or {})
        names.extend(terms)
        ctx.set_materialize_grads(False)
        if plan.weights is None:
            ctx.plan, ctx.names = plan, names
            ctx.save_for_backward(*tensors)
            return (torch.zeros(()), *terms.values())
        ctx.plan = None
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*terms.values())
        chosen = [terms[name].sum() * weight for name, weight in plan.weights.items()]
        return (torch.stack(chosen).sum() if chosen else torch.zeros(()), *terms.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        if ctx.plan is not None:
            weights = {name: weight for name, weight in zip(ctx.names, upstream[1:]) if weight is not None}
            _, gradients = _sweep(ctx.plan, ctx.saved_tensors, ctx.needs_input_grad[2:], weights)
            return (None, None, *gradients)
        scale = upstream[0]
        return (None, None, *(None if g is None else g.mul_(scale) for g in ctx.saved_tensors))


def _sweep(
    plan: _Plan, tensors: Sequence[Any], wanted: Sequence[bool], weights: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """
    Goes over all chunks.

    Args:
        plan (`_Plan`): What to compute.
        tensors: Hidden states `[N, d]`, weight `[V, d]` and bias `[V]` of each head in turn.
        wanted: Which of them need a gradient.
        weights: Of each term in what the gradient is of: a number, or one for each row `[N]`.

    Returns:
        The terms, `[N]` each, and the gradients of `tensors`.
    """
    states = tensors[0::3]
    count, device = len(states[0]), states[0].device
    chunk, tile = plan.sizes
    needs = tuple(any(wanted[3 * k : 3 * k + 3]) for k in range(len(states)))
    # Sums over rows are kept in float32; a row of the hidden states' gradient is written once.
    gradients: list[Tensor | None] = [
        torch.zeros_like(
            tensor, dtype=tensor.dtype if i % 3 == 0 else torch.promote_types(tensor.dtype, torch.float32)
        )
        if need
        else None
        for i, (tensor, need) in enumerate(zip(tensors, wanted))
    ]
    # Filled and not gathered: a small tensor kept from every tile breaks up the heap that tiles use again and again.
    collected: dict[str, Tensor] = {}
    run = _compiled_tile() if plan.compiled else _tile

    def slices(start: int, stop: int) -> tuple[list[Tensor], dict[str, Any]]:
        """Of the rows and the weights; filled up to a whole tile where a compiled function wants one shape."""
        missing = tile - (stop - start) if plan.compiled else 0

        def part(values: Tensor) -> Tensor:
            values = values[start:stop]
            return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values

        return (
            [part(row) for row in plan.rows],
            {name: part(weight) if isinstance(weight, Tensor) else weight for name, weight in weights.items()},
        )

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        matrices = [head.weight.to(dtype) for head, dtype in zip(plan.heads, plan.dtypes)]
        biases = [None if head.bias is None else head.bias.to(dtype) for head, dtype in zip(plan.heads, plan.dtypes)]
        size = max(min(chunk, count), 1)
        buffers = [matrix.new_zeros(size + (-size % tile if plan.compiled else 0), len(matrix)) for matrix in matrices]
        # Without any row there are still terms, of no rows.
        for start in range(0, max(count, 1), size):
            inputs = [values[start : start + size].to(dtype) for values, dtype in zip(states, plan.dtypes)]
            n = len(inputs[0])
            for x, matrix, bias, buffer in zip(inputs, matrices, biases, buffers):
                if bias is None:
                    torch.mm(x, matrix.T, out=buffer[:n])
                else:
                    torch.addmm(bias, x, matrix.T, out=buffer[:n])
            for first in range(0, max(n, 1), tile):
                last = min(first + tile, n)
                raws = [buffer[first : first + tile if plan.compiled else last] for buffer in buffers]
                rows, scales = slices(start + first, start + last)
                terms, slopes = run(plan.function, plan.transforms, needs, scales, raws, rows)
                for name, values in terms.items():
                    if name not in collected:
                        collected[name] = values.new_empty(count)
                    collected[name][start + first : start + last] = values[: last - first]
                for raw, slope in zip((raw for raw, need in zip(raws, needs) if need), slopes):
                    raw.copy_(slope)
            for k, need in enumerate(needs):
                if not need:
                    continue
                slope, (to_states, to_weight, to_bias) = buffers[k][:n], gradients[3 * k : 3 * k + 3]
                if to_states is not None:
                    to_states[start : start + n] = slope @ matrices[k]
                if to_weight is not None and to_weight.dtype == slope.dtype:
                    to_weight.addmm_(slope.T, inputs[k])
                elif to_weight is not None:
                    to_weight += slope.T @ inputs[k]
                if to_bias is not None:
                    to_bias += slope.sum(0, dtype=to_bias.dtype)
    results = [gradient if gradient is None else gradient.to(t.dtype) for gradient, t in zip(gradients, tensors)]
    return collected, results


def _tile(
    function: RowFunction,
    transforms: tuple[tuple[float, float | None], ...],
    needs: tuple[bool, ...],
    weights: dict[str, Any],
    raws: list[Tensor],
    rows: list[Tensor],
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Terms of a few rows, and the gradients of the weighted terms in those of the products `raws` that need one."""

    def weighted(*products: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = [transformed(product, *transform) for product, transform in zip(products, transforms)]
        terms = function(*logits, *rows)
        return torch.stack([(terms[name] * weight).sum() for name, weight in weights.items()]).sum(), terms

    if not any(needs) or not weights:
        return function(*(transformed(raw, *transform) for raw, transform in zip(raws, transforms)), *rows), ()
    chosen = tuple(k for k, need in enumerate(needs) if need)
    slopes, terms = torch.func.grad(weighted, argnums=chosen, has_aux=True)(*raws)
    return terms, slopes


def transformed(product: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits in float32 (float64 stays) of hidden @ head: what models do after it."""
    logits = product.to(torch.promote_types(product.dtype, torch.float32))
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


@cache
def _compiled_tile() -> Callable:
    return torch.compile(_tile)
