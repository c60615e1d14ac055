"""
KL between the rows of two attention distributions that never exist as a whole.

For each query row, P_i = softmax(scale_i Q_i K_iᵀ) of two sides i, and KL(P_1 ‖ P_2) = Σ_j P_1j log(P_1j / P_2j), in
one pass over the keys (StreamKL, arXiv 2606.20005). Logits exist one tile of queries x keys at a time; kept are three
numbers a row, from which the backward pass computes the tiles again. The sums are centred at the running maxima, which
the published form isn't: that one subtracts numbers as large as the logits and may come out below 0.

Here are the public functions, the choice between Triton kernels (GPU) and PyTorch, and the PyTorch form.

Axes: B examples, H heads, H_1 and H_2 heads of keys (grouped-query attention: each serves H / H_i heads in a row), N_Q
queries, N_K keys, d_1 and d_2 sizes of a head.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, check_name


logger = logging.getLogger(__name__)

REDUCTIONS = ("none", "sum", "mean")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Logits of one side in a tile, as float32: on a CPU the few copies that are worked on should stay in its caches; a GPU
# needs enough rows to be busy.
TILE_BYTES = {"cpu": 2**20, "cuda": 2**26}

# exp() is slow on CPUs, most of all where it gives 0; exp2() isn't.
LOG2_E = 1 / math.log(2)
LN_2 = math.log(2)

# Whether causal, the mask of keys `[B, N_K]`, segments of queries `[B, N_Q]` and of keys `[B, N_K]`.
Visible = tuple[bool, Tensor | None, Tensor | None, Tensor | None]


# ---- Public


def stream_kl(
    query_1: Tensor,
    key_1: Tensor,
    query_2: Tensor,
    key_2: Tensor,
    *,
    scale_1: float | None = None,
    scale_2: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
    deterministic: bool | None = None,
) -> Tensor:
    """
    KL(P_1 ‖ P_2), in nats, of each query row, with P_i = softmax(scale_i Q_i K_iᵀ) over the keys that the row sees.

    Side 1 is the teacher in forward KL, and the student in reverse KL. Both sides see the same keys. Gradients go to
    those of the four tensors that require them. Sums are kept in float32 (float64 for float64 inputs) and autocast
    changes nothing. Memory beside inputs and gradients grows with N_Q + N_K. Source: StreamKL (arXiv 2606.20005),
    Eq. 8 to 15, with a centred sum.

    Args:
        query_1 (`torch.Tensor` of shape `[B, H, N_Q, d_1]`): Queries, after rotary embedding where the model has it.
        key_1 (`torch.Tensor` of shape `[B, H_1, N_K, d_1]`): Keys; H is a multiple of H_1.
        query_2 (`torch.Tensor` of shape `[B, H, N_Q, d_2]`): Queries of the other side.
        key_2 (`torch.Tensor` of shape `[B, H_2, N_K, d_2]`): Its keys; H is a multiple of H_2.
        scale_1 (`float`, *optional*): What logits of side 1 are multiplied with; 1/√d_1 by default.
        scale_2 (`float`, *optional*): Of side 2; 1/√d_2 by default.
        causal (`bool`, *optional*, defaults to `False`):
            Query i sees keys j ≤ i + N_K − N_Q only: the last query sees all of them.
        key_mask (`torch.Tensor` of shape `[B, N_K]`, bool, *optional*): False where a key is padding.
        segment_ids (`torch.Tensor` of shape `[B, N]`, integers, *optional*):
            Which of several packed sequences a position is of: a row sees keys of its own only. Where queries and keys
            aren't the same positions, a pair of shapes `[B, N_Q]` and `[B, N_K]`.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"none"`, `"sum"`, or `"mean"` over the rows that see a key.
        deterministic (`bool`, *optional*):
            Whether gradients must be the same bits in every run; what `torch.use_deterministic_algorithms` says by
            default. It costs time on a GPU when there are few queries.

    Returns:
        `torch.Tensor` of shape `[B, H, N_Q]` or a scalar, in float32 (float64 for float64 inputs). A row that sees no
        key is 0, without gradient. NaN or infinity in a query makes its own row NaN, in a key the rows that see it.

    Raises:
        UserError: If shapes, dtypes or devices don't fit, or `reduction` is unknown.
    """
    check_name("reduction=", reduction, REDUCTIONS)
    _check(query_1, key_1, query_2, key_2, key_mask)
    if query_1.shape[1] != query_2.shape[1]:
        raise UserError(
            f"query_1 {_shape(query_1)} and query_2 {_shape(query_2)} have {query_1.shape[1]} and {query_2.shape[1]}"
            " heads: rows are compared head by head, give both the same number"
        )
    kl, lse, _ = torch.ops.hf_dskd.stream_kl(
        query_1,
        key_1,
        query_2,
        key_2,
        _scale(scale_1, query_1),
        _scale(scale_2, query_2),
        causal,
        key_mask,
        *_segments(segment_ids, query_1, key_1),
        torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
    )
    return _reduced(kl, lse, reduction)


def stream_cross_entropy(
    query_1: Tensor,
    key_1: Tensor,
    query_2: Tensor,
    key_2: Tensor,
    *,
    scale_1: float | None = None,
    scale_2: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """
    Cross entropy of a head with the mean attention of a group of teacher heads: LSE(S_2) − Σ_j P̄_1j S_2j, in nats.

    S_2 = scale_2 Q_2 K_2ᵀ and P̄_1 is the mean of the G softmaxes of the group. It is not the KL: the entropy of a
    mixture needs a second pass, whereas this is linear in P̄_1. As the teacher is constant the two differ by a
    constant, and gradients of side 2 are those of KL(P̄_1 ‖ P_2). Read its course, not its value. It runs in PyTorch,
    in memory that grows with N_Q + N_K.

    Args:
        query_1 (`torch.Tensor` of shape `[B, G H, N_Q, d_1]`): Constant; heads hG to hG + G − 1 belong to head h.
        key_1 (`torch.Tensor` of shape `[B, H_1, N_K, d_1]`): Constant; G H is a multiple of H_1.
        query_2 (`torch.Tensor` of shape `[B, H, N_Q, d_2]`): Queries of the student.
        key_2 (`torch.Tensor` of shape `[B, H_2, N_K, d_2]`): Its keys; H is a multiple of H_2.
        scale_1, scale_2, causal, key_mask, segment_ids, reduction: As in [`stream_kl`].

    Returns:
        `torch.Tensor` of shape `[B, H, N_Q]` or a scalar, as in [`stream_kl`].

    Raises:
        UserError: As in [`stream_kl`], and if `query_1` or `key_1` requires a gradient.
    """
    check_name("reduction=", reduction, REDUCTIONS)
    _check(query_1, key_1, query_2, key_2, key_mask)
    if query_1.shape[1] % query_2.shape[1]:
        raise UserError(
            f"query_1 {_shape(query_1)} and query_2 {_shape(query_2)}: {query_1.shape[1]} teacher heads can't be"
            f" averaged in groups for {query_2.shape[1]} heads; the first must be a multiple of the second"
        )
    if torch.is_grad_enabled() and (query_1.requires_grad or key_1.requires_grad):
        raise UserError("stream_cross_entropy has no gradient for side 1: detach query_1 and key_1")
    entropy, lse, _ = torch.ops.hf_dskd.stream_cross_entropy(
        query_1,
        key_1,
        query_2,
        key_2,
        _scale(scale_1, query_1),
        _scale(scale_2, query_2),
        causal,
        key_mask,
        *_segments(segment_ids, query_1, key_1),
    )
    return _reduced(entropy, lse, reduction)


def _check(query_1: Tensor, key_1: Tensor, query_2: Tensor, key_2: Tensor, key_mask: Tensor | None) -> None:
    """Raises a [`UserError`] unless the tensors fit, but for the numbers of query heads."""
    tensors = {"query_1": query_1, "key_1": key_1, "query_2": query_2, "key_2": key_2}
    shapes = ", ".join(f"{name} {_shape(tensor)}" for name, tensor in tensors.items())
    if any(tensor.dim() != 4 for tensor in tensors.values()):
        raise UserError(f"{shapes}: all must be [batch, heads, length, head size]")
    for i, query, key in ((1, query_1, key_1), (2, query_2, key_2)):
        if query.shape[3] != key.shape[3] or query.shape[3] == 0:
            raise UserError(f"{shapes}: query_{i} and key_{i} must have the same head size, above 0")
        if key.shape[1] == 0 or query.shape[1] == 0 or query.shape[1] % key.shape[1]:
            raise UserError(f"{shapes}: heads of query_{i} must be a multiple of those of key_{i}")
        if query.dtype != key.dtype or query.dtype not in DTYPES:
            raise UserError(
                f"query_{i} is {query.dtype} and key_{i} {key.dtype}: both must have one floating point dtype"
            )
    if len({tensor.shape[0] for tensor in tensors.values()}) > 1:
        raise UserError(f"{shapes}: all must have the same batch size")
    if query_1.shape[2] != query_2.shape[2] or key_1.shape[2] != key_2.shape[2]:
        raise UserError(f"{shapes}: both sides must have the same number of queries, and of keys")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise UserError(f"{devices}: move all to one device")
    if key_mask is not None:
        expected = (key_1.shape[0], key_1.shape[2])
        if key_mask.shape != expected or key_mask.dtype != torch.bool or key_mask.device != key_1.device:
            raise UserError(
                f"key_mask {_shape(key_mask)} is {key_mask.dtype} on {key_mask.device}: for {shapes} it must be"
                f" {list(expected)}, torch.bool, on {key_1.device}"
            )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _scale(scale: float | None, query: Tensor) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)


def _segments(
    segment_ids: Tensor | tuple[Tensor, Tensor] | None, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Of queries `[B, N_Q]` and keys `[B, N_K]`, int32."""
    if segment_ids is None:
        return None, None
    pair = (segment_ids, segment_ids) if isinstance(segment_ids, Tensor) else tuple(segment_ids)
    expected = [[tensor.shape[0], tensor.shape[2]] for tensor in (query, key)]
    if [_shape(ids) for ids in pair] != expected or any(ids.device != query.device for ids in pair):
        found = " and ".join(f"{_shape(ids)} on {ids.device}" for ids in pair)
        raise UserError(
            f"segment_ids {found} must be {expected[0]} for the queries and {expected[1]} for the keys, on"
            f" {query.device}: give a pair where the two differ"
        )
    if any(ids.is_floating_point() for ids in pair):
        raise UserError(f"segment_ids are {pair[0].dtype}: give integers")
    return pair[0].int(), pair[1].int()


def _reduced(values: Tensor, lse: Tensor, reduction: str) -> Tensor:
    """LSE, `[B, H, N_Q]`, is −∞ in rows that see no key."""
    if reduction == "none":
        return values
    total = values.sum()
    return total if reduction == "sum" else total / (lse != -math.inf).sum().clamp(min=1)


# ---- Operators, which torch.compile takes as they are


@torch.library.custom_op("hf_dskd::stream_kl", mutates_args=())
def _stream_kl(
    query_1: Tensor,
    key_1: Tensor,
    query_2: Tensor,
    key_2: Tensor,
    scale_1: float,
    scale_2: float,
    causal: bool,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL and the log-sum-exps of both sides, `[B, H, N_Q]`; `deterministic` is for the backward pass."""
    sides = query_1, key_1, query_2, key_2
    visible = causal, key_mask, query_segments, key_segments
    kernels = _kernels(*sides)
    with torch.autocast(query_1.device.type, enabled=False):
        if kernels is None:
            return _forward_tiled(*sides, scale_1, scale_2, *visible)
        kl, lse_1, lse_2 = kernels.forward(*sides, scale_1, scale_2, *visible)
    return kl, lse_1, lse_2


@_stream_kl.register_fake
def _(query_1: Tensor, key_1: Tensor, query_2: Tensor, key_2: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulation_dtype(query_1, query_2)
    kl, lse_1, lse_2 = (query_1.new_empty(query_1.shape[:3], dtype=dtype) for _ in range(3))
    return kl, lse_1, lse_2


@torch.library.custom_op("hf_dskd::stream_kl_backward", mutates_args=())
def _stream_kl_backward(
    grad_kl: Tensor,
    query_1: Tensor,
    key_1: Tensor,
    query_2: Tensor,
    key_2: Tensor,
    kl: Tensor,
    lse_1: Tensor,
    lse_2: Tensor,
    scale_1: float,
    scale_2: float,
    causal: bool,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    needs: list[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the two queries and keys; one that isn't needed is empty."""
    sides = query_1, key_1, query_2, key_2
    visible = causal, key_mask, query_segments, key_segments
    wanted = needs[0], needs[1], needs[2], needs[3]
    kernels = _kernels(*sides)
    with torch.autocast(query_1.device.type, enabled=False):
        if kernels is None:
            found = _backward_tiled(grad_kl, *sides, kl, lse_1, lse_2, scale_1, scale_2, *visible, wanted)
        else:
            found = kernels.backward(
                grad_kl, *sides, kl, lse_1, lse_2, scale_1, scale_2, *visible, wanted, deterministic=deterministic
            )
    return _filled(found, sides)


@_stream_kl_backward.register_fake
def _(
    grad_kl: Tensor, query_1: Tensor, key_1: Tensor, query_2: Tensor, key_2: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = rest[-2]
    sides = query_1, key_1, query_2, key_2
    return _filled([x.new_empty(x.shape) if need else None for x, need in zip(sides, needs)], sides)


def _filled(gradients: Any, sides: tuple[Tensor, ...]) -> Any:
    """An operator can't return `None`; and what it returns must have the strides of its fake."""
    return tuple(x.new_empty(0) if g is None else g.contiguous() for g, x in zip(gradients, sides))


def _save_kl(ctx: Any, inputs: Any, output: Any) -> None:
    *sides, ctx.scale_1, ctx.scale_2, ctx.causal, key_mask, query_segments, key_segments, ctx.deterministic = inputs
    ctx.save_for_backward(*sides, *output, key_mask, query_segments, key_segments)


def _kl_gradients(ctx: Any, grad_kl: Tensor, *_: Any) -> Any:
    *tensors, key_mask, query_segments, key_segments = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    found = torch.ops.hf_dskd.stream_kl_backward(
        grad_kl,
        *tensors,
        ctx.scale_1,
        ctx.scale_2,
        ctx.causal,
        key_mask,
        query_segments,
        key_segments,
        needs,
        ctx.deterministic,
    )
    return (*(g if need else None for g, need in zip(found, needs)), *[None] * 7)


_stream_kl.register_autograd(_kl_gradients, setup_context=_save_kl)


@torch.library.custom_op("hf_dskd::stream_cross_entropy", mutates_args=())
def _stream_cross_entropy(
    query_1: Tensor,
    key_1: Tensor,
    query_2: Tensor,
    key_2: Tensor,
    scale_1: float,
    scale_2: float,
    causal: bool,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy and LSE_2, `[B, H, N_Q]`, and LSE_1, `[B, G H, N_Q]`."""
    with torch.autocast(query_1.device.type, enabled=False):
        return _cross_entropy_tiled(
            query_1, key_1, query_2, key_2, scale_1, scale_2, causal, key_mask, query_segments, key_segments
        )


@_stream_cross_entropy.register_fake
def _(query_1: Tensor, key_1: Tensor, query_2: Tensor, key_2: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulation_dtype(query_1, query_2)
    shapes = query_2.shape[:3], query_2.shape[:3], query_1.shape[:3]
    entropy, lse_2, lse_1 = (query_1.new_empty(shape, dtype=dtype) for shape in shapes)
    return entropy, lse_2, lse_1


@torch.library.custom_op("hf_dskd::stream_cross_entropy_backward", mutates_args=())
def _stream_cross_entropy_backward(
    grad_rows: Tensor,
    query_1: Tensor,
    key_1: Tensor,
    query_2: Tensor,
    key_2: Tensor,
    entropy: Tensor,
    lse_2: Tensor,
    lse_1: Tensor,
    scale_1: float,
    scale_2: float,
    causal: bool,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of `query_2` and `key_2`; one that isn't needed is empty."""
    sides = query_1, key_1, query_2, key_2
    visible = causal, key_mask, query_segments, key_segments
    with torch.autocast(query_1.device.type, enabled=False):
        found = _cross_entropy_backward_tiled(
            grad_rows, *sides, entropy, lse_2, lse_1, scale_1, scale_2, *visible, (needs[0], needs[1])
        )
    return _filled(found, sides[2:])


@_stream_cross_entropy_backward.register_fake
def _(
    grad_rows: Tensor, query_1: Tensor, key_1: Tensor, query_2: Tensor, key_2: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    sides = query_2, key_2
    return _filled([x.new_empty(x.shape) if need else None for x, need in zip(sides, rest[-1])], sides)


def _save_cross_entropy(ctx: Any, inputs: Any, output: Any) -> None:
    *sides, ctx.scale_1, ctx.scale_2, ctx.causal, key_mask, query_segments, key_segments = inputs
    ctx.save_for_backward(*sides, *output, key_mask, query_segments, key_segments)


def _cross_entropy_gradients(ctx: Any, grad_rows: Tensor, *_: Any) -> Any:
    *tensors, key_mask, query_segments, key_segments = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[2:4])
    found = torch.ops.hf_dskd.stream_cross_entropy_backward(
        grad_rows, *tensors, ctx.scale_1, ctx.scale_2, ctx.causal, key_mask, query_segments, key_segments, needs
    )
    return (None, None, *(g if need else None for g, need in zip(found, needs)), *[None] * 6)


_stream_cross_entropy.register_autograd(_cross_entropy_gradients, setup_context=_save_cross_entropy)


def _kernels(query_1: Tensor, key_1: Tensor, query_2: Tensor, key_2: Tensor) -> ModuleType | None:
    """The Triton kernels where they can be had and take these inputs; says once why a GPU goes without them."""
    if query_1.device.type != "cuda":
        return None
    kernels = _triton()
    if kernels is None:
        _say_once("triton isn't installed (pip install 'hf-dskd[gpu]')")
        return None
    size = max(query_1.shape[-1], query_2.shape[-1])
    if size > kernels.MAX_HEAD_DIM:
        _say_once(f"the kernels take head sizes up to {kernels.MAX_HEAD_DIM}, and this one is {size}")
        return None
    if torch.float64 in (query_1.dtype, query_2.dtype):
        _say_once("the kernels don't take float64")
        return None
    return kernels


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from . import stream_kl_triton
    except ImportError:
        return None
    return stream_kl_triton


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("stream_kl runs in plain PyTorch, which is slower: %s", reason)


# ---- In PyTorch: logits and their log-sum-exps count in powers of 2, until a result is turned back into nats


def _forward_tiled(
    query_1: Tensor,
    key_1: Tensor,
    query_2: Tensor,
    key_2: Tensor,
    scale_1: float,
    scale_2: float,
    causal: bool,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    KL, LSE_1 and LSE_2, `[B, H, N_Q]`, in one pass over the keys.

    With running maxima m_i, l_i = Σ_j 2^(S_ij − m_i) and acc = Σ_j 2^(S_1j − m_1) [(S_1j − m_1) − (S_2j − m_2)]:
    KL = acc / l_1 + log2(l_2 / l_1).
    """
    visible = causal, key_mask, query_segments, key_segments
    plan = _Plan.of((query_1, key_1, scale_1), (query_2, key_2, scale_2), visible)
    one, two = plan.sides
    kl, lse_1, lse_2 = (query_1.new_zeros(query_1.shape[:3], dtype=one.dtype) for _ in range(3))
    for block in plan.blocks():
        x_1, x_2 = one.queries(block), two.queries(block)
        m_1 = m_2 = x_1.new_full((*x_1.shape[:3], 1), _lowest(one.dtype))
        l_1 = l_2 = acc = torch.zeros_like(m_1)
        for keys, seen in plan.tiles(block):
            s_1, s_2 = _logits(x_1, one.keys(block, keys), seen), _logits(x_2, two.keys(block, keys), seen)
            top_1 = torch.maximum(m_1, s_1.amax(-1, keepdim=True))
            top_2 = torch.maximum(m_2, s_2.amax(-1, keepdim=True))
            s_1 -= top_1
            s_2 -= top_2
            difference = s_1 - s_2
            p_1, p_2 = s_1.exp2_(), s_2.exp2_()
            moved_1, moved_2 = m_1 - top_1, m_2 - top_2
            fade = moved_1.exp2()
            acc = fade * (acc + l_1 * (moved_1 - moved_2)) + difference.mul_(p_1).sum(-1, keepdim=True)
            l_1 = fade * l_1 + p_1.sum(-1, keepdim=True)
            l_2 = moved_2.exp2() * l_2 + p_2.sum(-1, keepdim=True)
            m_1, m_2 = top_1, top_2
        # Not where l > 0 is false: NaN has to stay.
        values = (acc / l_1 + (l_2 / l_1).log2()).masked_fill_(l_1 == 0, 0.0)
        for target, value in ((kl, values), (lse_1, m_1 + l_1.log2()), (lse_2, m_2 + l_2.log2())):
            _of(target, block).copy_(value * LN_2)
    return kl, lse_1, lse_2


def _backward_tiled(
    grad_kl: Tensor,
    query_1: Tensor,
    key_1: Tensor,
    query_2: Tensor,
    key_2: Tensor,
    kl: Tensor,
    lse_1: Tensor,
    lse_2: Tensor,
    scale_1: float,
    scale_2: float,
    causal: bool,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """
    Gradients of query_1, key_1, query_2 and key_2, from tiles of logits that are computed again.

    With g the gradient of a row's KL and r = log P_1 − log P_2: dS_1 = g P_1 (r − KL) and dS_2 = g (P_2 − P_1).
    """
    visible = causal, key_mask, query_segments, key_segments
    plan = _Plan.of((query_1, key_1, scale_1), (query_2, key_2, scale_2), visible)
    one, two = plan.sides
    sums_1, sums_2 = _Gradients(one, needs[:2]), _Gradients(two, needs[2:])
    for block in plan.blocks():
        x_1, x_2 = one.queries(block), two.queries(block)
        row, z_1, z_2 = (_of(values, block) * LOG2_E for values in (kl, lse_1, lse_2))
        slope = _of(grad_kl, block).masked_fill(~row.isfinite(), math.nan)
        slope_1 = slope * LN_2
        for keys, seen in plan.tiles(block):
            y_1, y_2 = one.keys(block, keys), two.keys(block, keys)
            s_1, s_2 = _logits(x_1, y_1, seen).sub_(z_1), _logits(x_2, y_2, seen).sub_(z_2)
            centred = (s_1 - s_2).sub_(row) if sums_1.needed else None
            p_1, p_2 = s_1.exp2_(), s_2.exp2_()
            if centred is not None:
                sums_1.add(block, keys, seen, centred.mul_(p_1).mul_(slope_1), x_1, y_1)
            if sums_2.needed:
                sums_2.add(block, keys, seen, p_2.sub_(p_1).mul_(slope), x_2, y_2)
    return (*sums_1.results(), *sums_2.results())


def _cross_entropy_tiled(
    query_1: Tensor,
    key_1: Tensor,
    query_2: Tensor,
    key_2: Tensor,
    scale_1: float,
    scale_2: float,
    causal: bool,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Cross entropy and LSE_2, `[B, H, N_Q]`, and LSE_1, `[B, G H, N_Q]`.

    With acc_g = Σ_j 2^(S_gj − m_g) (S_2j − m_2) for each head g of the group: log2 l_2 − mean over g of acc_g / l_g.
    """
    visible = causal, key_mask, query_segments, key_segments
    plan = _Plan.of((query_1, key_1, scale_1), (query_2, key_2, scale_2), visible)
    one, two = plan.sides
    entropy, lse_2 = (query_2.new_zeros(query_2.shape[:3], dtype=two.dtype) for _ in range(2))
    lse_1 = query_1.new_zeros(query_1.shape[:3], dtype=one.dtype)
    for block in plan.blocks():
        group = plan.group(block)
        x_1, x_2 = one.queries(group), two.queries(block)
        m_1, m_2 = (x.new_full((*x.shape[:3], 1), _lowest(two.dtype)) for x in (x_1, x_2))
        l_1 = acc = torch.zeros_like(m_1)
        l_2 = torch.zeros_like(m_2)
        for keys, seen in plan.tiles(block):
            s_1, s_2 = _logits(x_1, one.keys(group, keys), seen), _logits(x_2, two.keys(block, keys), seen)
            top_1 = torch.maximum(m_1, s_1.amax(-1, keepdim=True))
            top_2 = torch.maximum(m_2, s_2.amax(-1, keepdim=True))
            p_1 = s_1.sub_(top_1).exp2_()
            s_2 -= top_2
            p_2 = s_2.exp2()
            fade, moved_2 = (m_1 - top_1).exp2(), m_2 - top_2
            acc = fade * (acc + l_1 * moved_2.repeat_interleave(plan.mixed, 1))
            acc += plan.by_group(p_1).mul(s_2.unsqueeze(2)).sum(-1, keepdim=True).flatten(1, 2)
            l_1 = fade * l_1 + p_1.sum(-1, keepdim=True)
            l_2 = moved_2.exp2() * l_2 + p_2.sum(-1, keepdim=True)
            m_1, m_2 = top_1, top_2
        values = (l_2.log2() - plan.by_group(acc / l_1).mean(2)).masked_fill_(l_2 == 0, 0.0)
        _of(entropy, block).copy_(values * LN_2)
        _of(lse_2, block).copy_((m_2 + l_2.log2()) * LN_2)
        _of(lse_1, group).copy_((m_1 + l_1.log2()) * LN_2)
    return entropy, lse_2, lse_1


def _cross_entropy_backward_tiled(
    grad_rows: Tensor,
    query_1: Tensor,
    key_1: Tensor,
    query_2: Tensor,
    key_2: Tensor,
    entropy: Tensor,
    lse_2: Tensor,
    lse_1: Tensor,
    scale_1: float,
    scale_2: float,
    causal: bool,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of query_2 and key_2: dS_2 = g (P_2 − P̄_1)."""
    visible = causal, key_mask, query_segments, key_segments
    plan = _Plan.of((query_1, key_1, scale_1), (query_2, key_2, scale_2), visible)
    one, two = plan.sides
    sums = _Gradients(two, needs)
    for block in plan.blocks():
        group = plan.group(block)
        x_1, x_2 = one.queries(group), two.queries(block)
        z_1, z_2 = _of(lse_1, group) * LOG2_E, _of(lse_2, block) * LOG2_E
        slope = _of(grad_rows, block).masked_fill(~_of(entropy, block).isfinite(), math.nan)
        for keys, seen in plan.tiles(block):
            y_2 = two.keys(block, keys)
            p_1 = _logits(x_1, one.keys(group, keys), seen).sub_(z_1).exp2_()
            p_2 = _logits(x_2, y_2, seen).sub_(z_2).exp2_()
            sums.add(block, keys, seen, p_2.sub_(plan.by_group(p_1).mean(2)).mul_(slope), x_2, y_2)
    return sums.results()


# ---- Tiles


@dataclass(frozen=True)
class _Block:
    """Some examples, heads and queries."""

    batch: slice
    heads: slice
    rows: slice


@dataclass(frozen=True)
class _Side:
    """
    Queries and keys of a side, of which parts come out in `dtype`.

    Attributes:
        query (`torch.Tensor` of shape `[B, r H_i, N_Q, d]`): r of its heads in a row share one head of keys.
        key (`torch.Tensor` of shape `[B, H_i, N_K, d]`): Their keys.
        scale (`float`): Of the logits.
        dtype (`torch.dtype`): Of logits and sums.
    """

    query: Tensor
    key: Tensor
    scale: float
    dtype: torch.dtype

    @property
    def ratio(self) -> int:
        """r."""
        return self.query.shape[1] // self.key.shape[1]

    def queries(self, block: _Block) -> Tensor:
        """Scaled, `[b, h, n_q, d]`."""
        return self.query[block.batch, block.heads, block.rows].to(self.dtype) * (self.scale * LOG2_E)

    def key_heads(self, block: _Block) -> slice:
        return slice(block.heads.start // self.ratio, (block.heads.stop - 1) // self.ratio + 1)

    def keys(self, block: _Block, keys: slice) -> Tensor:
        """One for each head of queries, `[b, h, n_k, d]`; a single head of keys serves all of them."""
        heads = self.key_heads(block)
        part = self.key[block.batch, heads, keys].to(self.dtype)
        if self.ratio == 1 or part.shape[1] == 1:
            return part
        return part[:, [head // self.ratio - heads.start for head in range(block.heads.start, block.heads.stop)]]


@dataclass(frozen=True)
class _Seen:
    """
    Which keys the rows of a tile see; both attributes broadcast to `[b, h, n_q, n_k]`.

    On a CPU, operations on bits take a tenth of the time of `masked_fill_`, and they rub out NaN as well.

    Attributes:
        bits: All set where a row sees the key, none elsewhere, as integers as wide as a logit.
        floor: What is added to a logit: 0 where a row sees the key.
    """

    bits: Tensor
    floor: Tensor

    @classmethod
    def of(cls, masks: list[Tensor], dtype: torch.dtype) -> _Seen:
        """Where all of some integer masks are set."""
        bits = functools.reduce(torch.bitwise_and, masks)
        return cls(bits, (bits + 1).to(dtype) * (2 * _lowest(dtype)))

    def clear(self, values: Tensor) -> Tensor:
        """Makes those 0 that no row sees."""
        values.view(self.bits.dtype).bitwise_and_(self.bits)
        return values


class _Gradients:
    """Sums of the gradients of a side over tiles; `needs` says whether of the queries and of the keys."""

    def __init__(self, side: _Side, needs: tuple[bool, ...]):
        self.side = side
        self.query, self.key = (
            torch.zeros(x.shape, dtype=side.dtype, device=x.device) if need else None
            for x, need in zip((side.query, side.key), needs)
        )
        self.needed = any(needs)

    def add(self, block: _Block, keys: slice, seen: _Seen | None, slopes: Tensor, x: Tensor, y: Tensor) -> None:
        """Of a tile's logits, `[b, h, n_q, n_k]`, with its scaled queries x and its keys y."""
        if seen is not None:
            # NaN in rows that see no key, whose LSE is −∞, and at keys that a NaN row doesn't see.
            seen.clear(slopes)
            # 0 times NaN would reach rows that don't see it; those that do have it from the slopes.
            x, y = (values.nan_to_num(0.0, 0.0, 0.0) for values in (x, y))
        if self.query is not None:
            self.query[block.batch, block.heads, block.rows] += slopes @ y
        if self.key is not None:
            heads = self.side.key_heads(block)
            share = slopes.mT @ x
            shared = share.shape[1] // (heads.stop - heads.start)
            if shared > 1:
                share = share.unflatten(1, (-1, shared)).sum(2)
            self.key[block.batch, heads, keys] += share

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        # Of the scaled queries that the slopes met, LOG2_E was no part of the logits.
        query = None if self.query is None else self.query.mul_(self.side.scale).to(self.side.query.dtype)
        key = None if self.key is None else self.key.mul_(LN_2).to(self.side.key.dtype)
        return query, key


@dataclass(frozen=True)
class _Plan:
    """
    How rows and keys are cut up, and which keys a row sees.

    Attributes:
        sides: Both.
        visible: As `Visible` says.
        steps (`tuple[int, ...]`):
            Examples, heads, queries and keys of a tile. Heads are one, or whole groups of those that share keys.
        mixed (`int`): G, heads of side 1 to a head of side 2: 1 in the KL.
    """

    sides: tuple[_Side, _Side]
    visible: Visible
    steps: tuple[int, int, int, int]
    mixed: int

    @classmethod
    def of(cls, side_1: tuple[Tensor, Tensor, float], side_2: tuple[Tensor, Tensor, float], visible: Visible) -> _Plan:
        dtype = _accumulation_dtype(side_1[0], side_2[0])
        one, two = _Side(*side_1, dtype), _Side(*side_2, dtype)
        batch, heads, rows, d_2 = two.query.shape
        mixed = one.query.shape[1] // heads
        elements = TILE_BYTES.get(two.query.device.type, TILE_BYTES["cuda"]) // 4 // mixed
        side = max(math.isqrt(elements), 1)
        # The causal frontier is a staircase of blocks of rows: lower steps leave fewer keys that no row sees.
        step_rows = max(min(rows, side // 2 if visible[0] else side), 1)
        step_keys = max(min(two.key.shape[2], 8 * side, elements // step_rows), 1)
        # A tile of logits, and of queries and keys, which may have to be copied.
        each = step_rows * step_keys + (step_rows + step_keys) * (one.query.shape[3] + d_2)
        fit = max(elements // each, 1)
        group = two.ratio if mixed > 1 else math.lcm(one.ratio, two.ratio)
        step_heads = min(fit, heads) // group * group or 1
        step_batch = min(fit // heads, batch) if step_heads == heads else 1
        return cls((one, two), visible, (max(step_batch, 1), step_heads, step_rows, step_keys), mixed)

    def blocks(self) -> Iterator[_Block]:
        """All rows of side 2, some at a time."""
        batches, heads, rows = (
            _slices(size, step) for size, step in zip(self.sides[1].query.shape[:3], self.steps[:3])
        )
        for batch, head, row in itertools.product(batches, heads, rows):
            yield _Block(batch, head, row)

    def group(self, block: _Block) -> _Block:
        """The same rows of side 1, in all heads of the groups."""
        heads = slice(block.heads.start * self.mixed, block.heads.stop * self.mixed)
        return _Block(block.batch, heads, block.rows)

    def by_group(self, values: Tensor) -> Tensor:
        """`[b, h G, ...]` as `[b, h, G, ...]`."""
        return values.unflatten(1, (-1, self.mixed))

    def tiles(self, block: _Block) -> Iterator[tuple[slice, _Seen | None]]:
        """Keys that rows of the block see, some at a time, and which rows see which, if not all see all."""
        causal, key_mask, query_segments, key_segments = self.visible
        two = self.sides[1]
        integers = torch.int64 if two.dtype == torch.float64 else torch.int32
        count = two.key.shape[2]
        # Row i sees keys up to i + offset.
        offset = count - two.query.shape[2]
        if causal:
            count = min(max(block.rows.stop + offset, 0), count)
        for keys in _slices(count, self.steps[3]):
            masks = []
            if key_mask is not None:
                masks.append(key_mask[block.batch, None, None, keys])
            if query_segments is not None and key_segments is not None:
                of_keys = key_segments[block.batch, None, None, keys]
                masks.append(query_segments[block.batch, None, block.rows, None] == of_keys)
            if not all(mask.any() for mask in masks):
                continue
            bits = [-mask.to(integers) for mask in masks]
            if causal and keys.stop - 1 > block.rows.start + offset:
                shape = block.rows.stop - block.rows.start, keys.stop - keys.start
                everything = two.key.new_full(shape, -1, dtype=integers)
                bits.append(everything.tril_(block.rows.start + offset - keys.start))
            yield keys, _Seen.of(bits, two.dtype) if bits else None


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _of(values: Tensor, block: _Block) -> Tensor:
    """Of `[B, H, N_Q]`, a view `[b, h, n_q, 1]`."""
    return values[block.batch, block.heads, block.rows].unsqueeze(-1)


def _logits(x: Tensor, y: Tensor, seen: _Seen | None) -> Tensor:
    """`[b, h, n_q, n_k]`, very low where a row doesn't see the key."""
    s = x @ y.mT
    return s if seen is None else seen.clear(s).add_(seen.floor)


def _lowest(dtype: torch.dtype) -> float:
    """
    A maximum to start from, below any logit; those that aren't seen are twice that.

    Finite, so that there is no ∞ − ∞, and so far apart that 2 to the difference is 0 in rows that saw no key yet.
    """
    return torch.finfo(dtype).min / 4


def _accumulation_dtype(query_1: Tensor, query_2: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(query_1.dtype, query_2.dtype), torch.float32)
