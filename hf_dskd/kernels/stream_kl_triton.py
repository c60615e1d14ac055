# mypy: disallow-untyped-defs=False
"""
GPU kernels of [`~hf_dskd.kernels.stream_kl.stream_kl`], in Triton.

Logits S_i = scale_i Q_i K_iᵀ exist one tile at a time, in float32 registers. The forward pass goes once over the keys
and keeps the KL and both log-sum-exps of a row; the backward pass computes the tiles again from those (StreamKL,
arXiv 2606.20005). Kernels count in powers of two: log2(e) is part of the scale, and only results are turned back into
nats.

A program reads tiles that all its pairs may use without any mask ("full"), then those that the causal frontier or the
end of the keys cuts ("edge").

Axes: B examples, H query heads, H_i key heads of side i, N_Q queries, N_K keys, d_i size of a head, W splits of the
keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


MAX_HEAD_DIM = 256
# A forward pass or a query gradient with fewer programs than this splits the keys among several (the paper tunes it
# over 128 and 256), each of which gets a multiple of `SPLIT_STEP` keys, which every tile divides.
TARGET_PROGRAMS = 256
SPLIT_STEP = 128
# The two gradients of a side are computed together if there are this many times more tiles of 128 keys than of 32
# queries. Not tuned: in the paper (Fig. 12) it pays off up to 32 queries for 64K to 512K keys.
FUSED_RATIO = 128
# Tile sizes and launch options in place of tuned ones.
TILES: dict[str, int] | None = {"BLOCK_Q": 32, "BLOCK_K": 32} if triton.knobs.runtime.interpret else None
# Of shared memory, which Hopper has; smaller GPUs refuse the larger tiles by themselves when tuned.
SHARED_BYTES = 227 * 1024

LOG2_E = math.log2(math.e)
_LN_2 = tl.constexpr(math.log(2))
# Maxima start at -1e30 and hidden logits are -2e30: finite, so that their differences are no NaN, and so far apart
# that exp2 makes 0 of a hidden logit before any visible one has come.
_LOWEST = tl.constexpr(-1e30)
_HIDDEN = tl.constexpr(-2e30)


# ---- Choice of tiles


def _configs(*choices: tuple[int, int, int, int]) -> list[triton.Config]:
    return [
        triton.Config({"BLOCK_Q": queries, "BLOCK_K": keys}, num_warps=warps, num_stages=stages)
        for queries, keys, warps, stages in choices
    ]


# Queries, keys, warps, stages. 64 rows or more of the resident tile are what a warp group's matrix instruction takes;
# the smaller tiles are for few rows, float32 and heads of 256.
QUERY_CONFIGS = _configs(
    (128, 128, 8, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 32, 8, 2),
    (64, 128, 4, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 1),
    (64, 32, 4, 2),
    (32, 32, 4, 2),
    (32, 32, 8, 2),
    (16, 128, 4, 3),
    (16, 64, 4, 2),
    (16, 32, 2, 2),
)
KEY_CONFIGS = _configs(
    (128, 128, 8, 2),
    (64, 128, 8, 2),
    (64, 128, 8, 3),
    (128, 64, 4, 2),
    (64, 64, 4, 2),
    (32, 128, 8, 2),
    (32, 64, 4, 2),
    (32, 32, 4, 2),
    (32, 32, 8, 2),
    (16, 128, 4, 3),
    (16, 64, 4, 2),
    (16, 32, 2, 2),
)


def _pruned(resident: str, streamed: str, rows: str) -> dict[str, Callable]:
    """Leaves out what can't fit into shared memory or be filled by `N_Q`, and small tiles where larger ones fit."""

    def prune(configs: list[triton.Config], arguments: dict[str, Any], **options: Any) -> list[triton.Config]:
        arguments = {**arguments, **options}
        sizes = [arguments[f"D_PAD_{side}"] * arguments[f"q_{side}"].element_size() for side in "ab"]
        queries = max(16, triton.next_power_of_2(arguments["n_q"]))
        half = arguments["q_a"].element_size() == arguments["q_b"].element_size() == 2

        def fits(config: triton.Config) -> bool:
            tiles = config.kwargs[resident] + config.num_stages * config.kwargs[streamed]
            area = config.kwargs["BLOCK_Q"] * config.kwargs["BLOCK_K"]
            # float32 products run without matrix instructions: larger tiles don't fit into the registers.
            return tiles * sum(sizes) <= SHARED_BYTES and (half or area <= 32 * 32)

        kept = [
            config for config in configs if fits(config) and min(queries, 32) <= config.kwargs["BLOCK_Q"] <= queries
        ]
        largest = max(config.kwargs[rows] for config in kept)
        return [config for config in kept if 2 * config.kwargs[rows] >= largest]

    return {"early_config_prune": prune}


TUNED_BY = ["D_a", "D_b", "CAUSAL", "query_bucket", "key_bucket"]


# ---- Parts of kernels


@triton.jit
def _head(base, stride_b, stride_h, example, head):
    """Where a head of a `[B, H, N, d]` tensor begins; it may lie beyond 2^31 elements."""
    return base + tl.cast(example, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h


@triton.jit
def _tile(head, stride, start, keep, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Rows from `start` on, `[BLOCK, D_PAD]`; 0 in rows that aren't kept `[BLOCK]` and beyond the head's size."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, D_PAD)[None, :]
    mask = keep[:, None]
    if D != D_PAD:
        mask = mask & (column < D)
    return tl.load(head + tl.cast(start, tl.int64) * stride + (row * stride + column), mask=mask, other=0.0)


@triton.jit
def _kept(column, n_k, key_mask):
    """Keys that exist and aren't padding."""
    keep = column < n_k
    if key_mask is not None:
        keep = keep & (tl.load(key_mask + column, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _visible(row, column, keep, n_q, n_k, query_segments, key_segments, CUT: tl.constexpr):
    """Pairs that count, for rows, columns and kept columns that broadcast; `CUT` by the causal frontier."""
    visible = keep & (row >= 0)
    if CUT:
        visible = visible & (column <= row + (n_k - n_q))
    if query_segments is not None:
        of_row = tl.load(query_segments + row, mask=row < n_q, other=0)
        of_column = tl.load(key_segments + column, mask=column < n_k, other=0)
        visible = visible & (of_row == of_column)
    return visible


@triton.jit
def _finite(x):
    """0 for NaN and infinity, which times the 0 of a hidden pair would be NaN in rows that can't see them."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def _slope(x_a, x_b, kl, TO_FIRST: tl.constexpr):
    """Of the KL by the logits of side a, from log2 of both probabilities."""
    p_a = tl.exp2(x_a)
    if TO_FIRST:
        slope = p_a * ((x_a - x_b) * _LN_2 - kl)
    else:
        slope = p_a - tl.exp2(x_b)
    return slope


@triton.jit
def _results(m_1, l_1, m_2, l_2, acc):
    """KL and both log-sum-exps in nats; 0 and -inf for rows without keys."""
    # A visible NaN or infinity makes `acc` NaN, so that a row of nothing but -inf isn't taken for one without keys.
    empty = (l_1 == 0.0) & (l_2 == 0.0) & (acc == 0.0)
    sum_1 = tl.where(empty, 1.0, l_1)
    sum_2 = tl.where(empty, 1.0, l_2)
    log_1 = tl.log2(sum_1)
    log_2 = tl.log2(sum_2)
    kl = (acc / sum_1 + log_2 - log_1) * _LN_2
    lse_1 = tl.where(empty, -float("inf"), (m_1 + log_1) * _LN_2)
    lse_2 = tl.where(empty, -float("inf"), (m_2 + log_2) * _LN_2)
    return kl, lse_1, lse_2


@triton.jit
def _merged(m_1, l_1, m_2, l_2, acc, new_m_1, new_l_1, new_m_2, new_l_2, new_acc):
    """Two sets of sums `acc` = Σ 2^(S1 - m1) ((S1 - m1) - (S2 - m2)) and `l_i` = Σ 2^(Si - mi), at common maxima."""
    top_1 = tl.maximum(m_1, new_m_1)
    top_2 = tl.maximum(m_2, new_m_2)
    a_1 = tl.exp2(m_1 - top_1)
    b_1 = tl.exp2(new_m_1 - top_1)
    moved = a_1 * (acc + l_1 * ((m_1 - top_1) - (m_2 - top_2)))
    new_moved = b_1 * (new_acc + new_l_1 * ((new_m_1 - top_1) - (new_m_2 - top_2)))
    l_2 = tl.exp2(m_2 - top_2) * l_2 + tl.exp2(new_m_2 - top_2) * new_l_2
    return top_1, a_1 * l_1 + b_1 * new_l_1, top_2, l_2, moved + new_moved


# ---- Forward


@triton.jit
def _forward_step(
    start, row, q_a, q_b, k_a, k_b, stride_ka_n, stride_kb_n, key_mask, query_segments, key_segments,
    m_1, l_1, m_2, l_2, acc, n_q, n_k, c_a, c_b, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    D_a: tl.constexpr, D_b: tl.constexpr, D_PAD_a: tl.constexpr, D_PAD_b: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    column = start + tl.arange(0, BLOCK_K)
    keep = _kept(column, n_k, key_mask)
    s_1 = tl.dot(q_a, tl.trans(_tile(k_a, stride_ka_n, start, keep, D_a, D_PAD_a, BLOCK_K)), input_precision="ieee")
    s_2 = tl.dot(q_b, tl.trans(_tile(k_b, stride_kb_n, start, keep, D_b, D_PAD_b, BLOCK_K)), input_precision="ieee")
    if EDGE or key_mask is not None or query_segments is not None:
        visible = _visible(
            row[:, None], column[None, :], keep[None, :], n_q, n_k, query_segments, key_segments, CAUSAL and EDGE
        )
        s_1 = tl.where(visible, s_1 * c_a, _HIDDEN)
        s_2 = tl.where(visible, s_2 * c_b, _HIDDEN)
        top_1 = tl.maximum(m_1, tl.max(s_1, 1))
        top_2 = tl.maximum(m_2, tl.max(s_2, 1))
        x_1 = s_1 - top_1[:, None]
        x_2 = s_2 - top_2[:, None]
    else:
        # The product with the scale is part of the subtraction.
        top_1 = tl.maximum(m_1, tl.max(s_1, 1) * c_a)
        top_2 = tl.maximum(m_2, tl.max(s_2, 1) * c_b)
        x_1 = tl.fma(s_1, c_a, -top_1[:, None])
        x_2 = tl.fma(s_2, c_b, -top_2[:, None])
    p_1 = tl.exp2(x_1)
    a_1 = tl.exp2(m_1 - top_1)
    acc = a_1 * (acc + l_1 * ((m_1 - top_1) - (m_2 - top_2))) + tl.sum(p_1 * (x_1 - x_2), 1)
    l_1 = a_1 * l_1 + tl.sum(p_1, 1)
    l_2 = tl.exp2(m_2 - top_2) * l_2 + tl.sum(tl.exp2(x_2), 1)
    return top_1, l_1, top_2, l_2, acc


@triton.autotune(
    QUERY_CONFIGS, TUNED_BY, prune_configs_by=_pruned("BLOCK_Q", "BLOCK_K", "BLOCK_Q"), cache_results=True
)
@triton.jit
def _forward_kernel(
    q_a, k_a, q_b, k_b, key_mask, query_segments, key_segments, out_0, out_1, out_2, out_3, out_4,
    stride_qa_b, stride_qa_h, stride_qa_n, stride_ka_b, stride_ka_h, stride_ka_n,
    stride_qb_b, stride_qb_h, stride_qb_n, stride_kb_b, stride_kb_h, stride_kb_n,
    heads, group_a, group_b, n_q, n_k, keys_per_split, c_a, c_b, query_bucket, key_bucket,
    CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    D_a: tl.constexpr, D_b: tl.constexpr, D_PAD_a: tl.constexpr, D_PAD_b: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """
    Grid (B H T_Q, W). Side a is 1 and b is 2. Writes the KL and both log-sum-exps, or with `SPLIT` m1, l1, m2, l2, acc
    of its split, `[W, B, H, N_Q]` each.
    """
    tiles = tl.cdiv(n_q, BLOCK_Q)
    which = tl.program_id(0) // tiles
    split = tl.program_id(1)
    # The last queries see most keys: they begin first.
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q
    example = which // heads
    head = which % heads
    row = first + tl.arange(0, BLOCK_Q)
    exists = row < n_q
    q_1 = _tile(_head(q_a, stride_qa_b, stride_qa_h, example, head), stride_qa_n, first, exists, D_a, D_PAD_a, BLOCK_Q)
    q_2 = _tile(_head(q_b, stride_qb_b, stride_qb_h, example, head), stride_qb_n, first, exists, D_b, D_PAD_b, BLOCK_Q)
    k_1 = _head(k_a, stride_ka_b, stride_ka_h, example, head // group_a)
    k_2 = _head(k_b, stride_kb_b, stride_kb_h, example, head // group_b)
    if key_mask is not None:
        key_mask += tl.cast(example, tl.int64) * n_k
    if query_segments is not None:
        query_segments += tl.cast(example, tl.int64) * n_q
        key_segments += tl.cast(example, tl.int64) * n_k

    low = split * keys_per_split
    high = tl.minimum(n_k, low + keys_per_split)
    full = high
    if CAUSAL:
        high = tl.minimum(high, first + BLOCK_Q + n_k - n_q)
        full = tl.minimum(full, first + 1 + n_k - n_q)
    full = tl.maximum(low, tl.maximum(full, 0) // BLOCK_K * BLOCK_K)
    m_1 = tl.full((BLOCK_Q,), _LOWEST, tl.float32)
    m_2 = tl.full((BLOCK_Q,), _LOWEST, tl.float32)
    l_1 = tl.zeros((BLOCK_Q,), tl.float32)
    l_2 = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(low, full, BLOCK_K):
        m_1, l_1, m_2, l_2, acc = _forward_step(
            start, row, q_1, q_2, k_1, k_2, stride_ka_n, stride_kb_n, key_mask, query_segments, key_segments,
            m_1, l_1, m_2, l_2, acc, n_q, n_k, c_a, c_b, CAUSAL, False, D_a, D_b, D_PAD_a, D_PAD_b, BLOCK_K,
        )  # fmt: skip
    for start in range(full, high, BLOCK_K):
        m_1, l_1, m_2, l_2, acc = _forward_step(
            start, row, q_1, q_2, k_1, k_2, stride_ka_n, stride_kb_n, key_mask, query_segments, key_segments,
            m_1, l_1, m_2, l_2, acc, n_q, n_k, c_a, c_b, CAUSAL, True, D_a, D_b, D_PAD_a, D_PAD_b, BLOCK_K,
        )  # fmt: skip

    if SPLIT:
        out = (tl.cast(split, tl.int64) * (tl.num_programs(0) // tiles) + which) * n_q + row
        tl.store(out_0 + out, m_1, mask=exists)
        tl.store(out_1 + out, l_1, mask=exists)
        tl.store(out_2 + out, m_2, mask=exists)
        tl.store(out_3 + out, l_2, mask=exists)
        tl.store(out_4 + out, acc, mask=exists)
    else:
        kl, lse_1, lse_2 = _results(m_1, l_1, m_2, l_2, acc)
        out = tl.cast(which, tl.int64) * n_q + row
        tl.store(out_0 + out, kl, mask=exists)
        tl.store(out_1 + out, lse_1, mask=exists)
        tl.store(out_2 + out, lse_2, mask=exists)


@triton.jit
def _merge_kernel(partial, kl, lse_1, lse_2, rows, splits, BLOCK: tl.constexpr):
    """Grid (rows / BLOCK). From `[5, W, rows]`, the sums of all splits, to results `[rows]`."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < rows
    part = tl.cast(splits, tl.int64) * rows
    m_1 = tl.full((BLOCK,), _LOWEST, tl.float32)
    m_2 = tl.full((BLOCK,), _LOWEST, tl.float32)
    l_1 = tl.zeros((BLOCK,), tl.float32)
    l_2 = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        here = partial + tl.cast(split, tl.int64) * rows + row
        m_1, l_1, m_2, l_2, acc = _merged(
            m_1, l_1, m_2, l_2, acc,
            tl.load(here, mask=exists, other=0.0),
            tl.load(here + part, mask=exists, other=0.0),
            tl.load(here + 2 * part, mask=exists, other=0.0),
            tl.load(here + 3 * part, mask=exists, other=0.0),
            tl.load(here + 4 * part, mask=exists, other=0.0),
        )  # fmt: skip
    value, value_1, value_2 = _results(m_1, l_1, m_2, l_2, acc)
    tl.store(kl + row, value, mask=exists)
    tl.store(lse_1 + row, value_1, mask=exists)
    tl.store(lse_2 + row, value_2, mask=exists)


# ---- Backward: of side a, which is 1 (`TO_FIRST`) or 2; its log-sum-exps are base 2


@triton.jit
def _query_step(
    start, row, q_a, q_b, k_a, k_b, stride_ka_n, stride_kb_n, key_mask, query_segments, key_segments,
    kl, lse_a, lse_b, dq, n_q, n_k, c_a, c_b, CAUSAL: tl.constexpr, EDGE: tl.constexpr, TO_FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    D_a: tl.constexpr, D_b: tl.constexpr, D_PAD_a: tl.constexpr, D_PAD_b: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    column = start + tl.arange(0, BLOCK_K)
    keep = _kept(column, n_k, key_mask)
    keys = _tile(k_a, stride_ka_n, start, keep, D_a, D_PAD_a, BLOCK_K)
    keys_b = _tile(k_b, stride_kb_n, start, keep, D_b, D_PAD_b, BLOCK_K)
    x_a = tl.fma(tl.dot(q_a, tl.trans(keys), input_precision="ieee"), c_a, -lse_a[:, None])
    x_b = tl.fma(tl.dot(q_b, tl.trans(keys_b), input_precision="ieee"), c_b, -lse_b[:, None])
    ds = _slope(x_a, x_b, kl[:, None], TO_FIRST)
    if EDGE or key_mask is not None or query_segments is not None:
        visible = _visible(
            row[:, None], column[None, :], keep[None, :], n_q, n_k, query_segments, key_segments, CAUSAL and EDGE
        )
        ds = tl.where(visible, ds, 0.0)
    if (CAUSAL and EDGE) or query_segments is not None:
        keys = _finite(keys)
    return tl.dot(ds.to(DTYPE), keys.to(DTYPE), dq, input_precision="ieee")


@triton.autotune(
    QUERY_CONFIGS, TUNED_BY + ["TO_FIRST"], prune_configs_by=_pruned("BLOCK_Q", "BLOCK_K", "BLOCK_Q"),
    cache_results=True,
)  # fmt: skip
@triton.jit
def _query_kernel(
    q_a, k_a, q_b, k_b, key_mask, query_segments, key_segments, grad_kl, kl, lse_a, lse_b, dq,
    stride_qa_b, stride_qa_h, stride_qa_n, stride_ka_b, stride_ka_h, stride_ka_n,
    stride_qb_b, stride_qb_h, stride_qb_n, stride_kb_b, stride_kb_h, stride_kb_n,
    heads, group_a, group_b, n_q, n_k, keys_per_split, c_a, c_b, scale_a, query_bucket, key_bucket,
    CAUSAL: tl.constexpr, TO_FIRST: tl.constexpr, DTYPE: tl.constexpr,
    D_a: tl.constexpr, D_b: tl.constexpr, D_PAD_a: tl.constexpr, D_PAD_b: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (B H T_Q, W). Writes the gradient of Q_a, `[W, B, H, N_Q, d_a]`, one part for each split."""
    tiles = tl.cdiv(n_q, BLOCK_Q)
    which = tl.program_id(0) // tiles
    split = tl.program_id(1)
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q
    example = which // heads
    head = which % heads
    row = first + tl.arange(0, BLOCK_Q)
    exists = row < n_q
    tile_a = _tile(
        _head(q_a, stride_qa_b, stride_qa_h, example, head), stride_qa_n, first, exists, D_a, D_PAD_a, BLOCK_Q
    )
    tile_b = _tile(
        _head(q_b, stride_qb_b, stride_qb_h, example, head), stride_qb_n, first, exists, D_b, D_PAD_b, BLOCK_Q
    )
    head_a = _head(k_a, stride_ka_b, stride_ka_h, example, head // group_a)
    head_b = _head(k_b, stride_kb_b, stride_kb_h, example, head // group_b)
    if key_mask is not None:
        key_mask += tl.cast(example, tl.int64) * n_k
    if query_segments is not None:
        query_segments += tl.cast(example, tl.int64) * n_q
        key_segments += tl.cast(example, tl.int64) * n_k
    at = tl.cast(which, tl.int64) * n_q + row
    row_kl = tl.load(kl + at, mask=exists, other=0.0)
    row_lse_a = tl.load(lse_a + at, mask=exists, other=0.0)
    row_lse_b = tl.load(lse_b + at, mask=exists, other=0.0)

    low = split * keys_per_split
    high = tl.minimum(n_k, low + keys_per_split)
    full = high
    if CAUSAL:
        high = tl.minimum(high, first + BLOCK_Q + n_k - n_q)
        full = tl.minimum(full, first + 1 + n_k - n_q)
    full = tl.maximum(low, tl.maximum(full, 0) // BLOCK_K * BLOCK_K)
    sums = tl.zeros((BLOCK_Q, D_PAD_a), tl.float32)
    for start in range(low, full, BLOCK_K):
        sums = _query_step(
            start, row, tile_a, tile_b, head_a, head_b, stride_ka_n, stride_kb_n, key_mask, query_segments,
            key_segments, row_kl, row_lse_a, row_lse_b, sums, n_q, n_k, c_a, c_b, CAUSAL, False, TO_FIRST, DTYPE,
            D_a, D_b, D_PAD_a, D_PAD_b, BLOCK_K,
        )  # fmt: skip
    for start in range(full, high, BLOCK_K):
        sums = _query_step(
            start, row, tile_a, tile_b, head_a, head_b, stride_ka_n, stride_kb_n, key_mask, query_segments,
            key_segments, row_kl, row_lse_a, row_lse_b, sums, n_q, n_k, c_a, c_b, CAUSAL, True, TO_FIRST, DTYPE,
            D_a, D_b, D_PAD_a, D_PAD_b, BLOCK_K,
        )  # fmt: skip

    # The gradient of a row is a factor of the whole row: out of the loop, and no reason to underflow.
    weight = tl.load(grad_kl + at, mask=exists, other=0.0) * scale_a
    column = tl.arange(0, D_PAD_a)[None, :]
    out = (tl.cast(split, tl.int64) * (tl.num_programs(0) // tiles) + which) * n_q + row
    tl.store(dq + out[:, None] * D_a + column, sums * weight[:, None], mask=exists[:, None] & (column < D_a))


@triton.jit
def _key_step(
    start, column, keep, keys_a, keys_b, q_a, q_b, stride_qa_n, stride_qb_n, key_mask, query_segments, key_segments,
    grad_kl, kl, lse_a, lse_b, dq, dk, n_q, n_k, c_a, c_b, scale_a, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    FUSED: tl.constexpr, TO_FIRST: tl.constexpr, DTYPE: tl.constexpr,
    D_a: tl.constexpr, D_b: tl.constexpr, D_PAD_a: tl.constexpr, D_PAD_b: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, BLOCK_Q)
    exists = row < n_q
    queries = _tile(q_a, stride_qa_n, start, exists, D_a, D_PAD_a, BLOCK_Q)
    queries_b = _tile(q_b, stride_qb_n, start, exists, D_b, D_PAD_b, BLOCK_Q)
    weight = tl.load(grad_kl + row, mask=exists, other=0.0)
    row_kl = tl.load(kl + row, mask=exists, other=0.0)
    row_lse_a = tl.load(lse_a + row, mask=exists, other=0.0)
    row_lse_b = tl.load(lse_b + row, mask=exists, other=0.0)
    # Keys are the rows of these tiles: then the first factor of the product below is where it was computed.
    x_a = tl.fma(tl.dot(keys_a, tl.trans(queries), input_precision="ieee"), c_a, -row_lse_a[None, :])
    x_b = tl.fma(tl.dot(keys_b, tl.trans(queries_b), input_precision="ieee"), c_b, -row_lse_b[None, :])
    ds = _slope(x_a, x_b, row_kl[None, :], TO_FIRST) * weight[None, :]
    # Keys beyond the end have no gradient to spoil, but in the fused kernel queries have.
    if EDGE or FUSED or key_mask is not None or query_segments is not None:
        visible = _visible(
            row[None, :], column[:, None], keep[:, None], n_q, n_k, query_segments, key_segments, CAUSAL and EDGE
        )
        ds = tl.where(visible, ds, 0.0)
    if (CAUSAL and EDGE) or query_segments is not None:
        queries = _finite(queries)
    ds = ds.to(DTYPE)
    if FUSED:
        safe = keys_a
        if (CAUSAL and EDGE) or query_segments is not None:
            safe = _finite(keys_a)
        part = tl.dot(tl.trans(ds), safe.to(DTYPE), input_precision="ieee") * scale_a
        size = tl.arange(0, D_PAD_a)[None, :]
        at = dq + tl.cast(start, tl.int64) * D_a + (tl.arange(0, BLOCK_Q)[:, None] * D_a + size)
        tl.atomic_add(at, part, mask=exists[:, None] & (size < D_a), sem="relaxed")
    return tl.dot(ds, queries.to(DTYPE), dk, input_precision="ieee")


@triton.autotune(
    KEY_CONFIGS, TUNED_BY + ["TO_FIRST", "FUSED"], prune_configs_by=_pruned("BLOCK_K", "BLOCK_Q", "BLOCK_K"),
    reset_to_zero=["dq"], cache_results=True,
)  # fmt: skip
@triton.jit
def _key_kernel(
    q_a, k_a, q_b, k_b, key_mask, query_segments, key_segments, grad_kl, kl, lse_a, lse_b, dq, dk,
    stride_qa_b, stride_qa_h, stride_qa_n, stride_ka_b, stride_ka_h, stride_ka_n,
    stride_qb_b, stride_qb_h, stride_qb_n, stride_kb_b, stride_kb_h, stride_kb_n,
    heads, group_a, group_b, n_q, n_k, c_a, c_b, scale_a, query_bucket, key_bucket,
    CAUSAL: tl.constexpr, FUSED: tl.constexpr, TO_FIRST: tl.constexpr, DTYPE: tl.constexpr,
    D_a: tl.constexpr, D_b: tl.constexpr, D_PAD_a: tl.constexpr, D_PAD_b: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """
    Grid (B H_a T_K). Writes the gradient of K_a, `[B, H_a, N_K, d_a]`, summed over the query heads of its group; with
    `FUSED` adds that of Q_a to `dq`, `[B, H, N_Q, d_a]` in float32.
    """
    tiles = tl.cdiv(n_k, BLOCK_K)
    which = tl.program_id(0) // tiles
    # The first keys are seen by most queries: they begin first.
    first = tl.program_id(0) % tiles * BLOCK_K
    key_heads = heads // group_a
    example = which // key_heads
    key_head = which % key_heads
    if key_mask is not None:
        key_mask += tl.cast(example, tl.int64) * n_k
    if query_segments is not None:
        query_segments += tl.cast(example, tl.int64) * n_q
        key_segments += tl.cast(example, tl.int64) * n_k
    column = first + tl.arange(0, BLOCK_K)
    keep = _kept(column, n_k, key_mask)
    keys_a = _tile(
        _head(k_a, stride_ka_b, stride_ka_h, example, key_head), stride_ka_n, first, keep, D_a, D_PAD_a, BLOCK_K
    )

    low = 0
    full = 0
    if CAUSAL:
        low = tl.maximum(first + n_q - n_k, 0) // BLOCK_Q * BLOCK_Q
        # From here on even the last key of the tile is seen.
        full = tl.maximum(first + BLOCK_K - 1 + n_q - n_k, 0)
        full = tl.minimum(tl.cdiv(full, BLOCK_Q), tl.cdiv(n_q, BLOCK_Q)) * BLOCK_Q
    sums = tl.zeros((BLOCK_K, D_PAD_a), tl.float32)
    for member in range(group_a):
        head = key_head * group_a + member
        keys_b = _tile(
            _head(k_b, stride_kb_b, stride_kb_h, example, head // group_b),
            stride_kb_n, first, keep, D_b, D_PAD_b, BLOCK_K,
        )  # fmt: skip
        head_a = _head(q_a, stride_qa_b, stride_qa_h, example, head)
        head_b = _head(q_b, stride_qb_b, stride_qb_h, example, head)
        rows = tl.cast(example * heads + head, tl.int64) * n_q
        if CAUSAL:
            for start in range(low, full, BLOCK_Q):
                sums = _key_step(
                    start, column, keep, keys_a, keys_b, head_a, head_b, stride_qa_n, stride_qb_n, key_mask,
                    query_segments, key_segments, grad_kl + rows, kl + rows, lse_a + rows, lse_b + rows,
                    dq + rows * D_a, sums, n_q, n_k, c_a, c_b, scale_a, CAUSAL, True, FUSED, TO_FIRST, DTYPE,
                    D_a, D_b, D_PAD_a, D_PAD_b, BLOCK_Q,
                )  # fmt: skip
        for start in range(full, n_q, BLOCK_Q):
            sums = _key_step(
                start, column, keep, keys_a, keys_b, head_a, head_b, stride_qa_n, stride_qb_n, key_mask,
                query_segments, key_segments, grad_kl + rows, kl + rows, lse_a + rows, lse_b + rows,
                dq + rows * D_a, sums, n_q, n_k, c_a, c_b, scale_a, CAUSAL, False, FUSED, TO_FIRST, DTYPE,
                D_a, D_b, D_PAD_a, D_PAD_b, BLOCK_Q,
            )  # fmt: skip

    # A NaN in a query meets the zeros of hidden keys, too.
    sums = tl.where(keep[:, None], sums * scale_a, 0.0)
    size = tl.arange(0, D_PAD_a)[None, :]
    out = tl.cast(which, tl.int64) * n_k + column
    tl.store(dk + out[:, None] * D_a + size, sums, mask=(column < n_k)[:, None] & (size < D_a))


# ---- Launches


def forward(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    scale_1: float,
    scale_2: float,
    causal: bool,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    KL and log-sum-exps of the rows of two attention distributions.

    Args:
        q1, q2 (`torch.Tensor` of shape `[B, H, N_Q, d_i]`): Queries; float16, bfloat16 or float32, any strides.
        k1, k2 (`torch.Tensor` of shape `[B, H_i, N_K, d_i]`): Keys in the dtype of their side; H is a multiple of H_i.
        scale_1, scale_2 (`float`): What logits are multiplied with.
        causal (`bool`): Query i sees keys j <= i + N_K - N_Q only.
        key_mask (`torch.Tensor` of shape `[B, N_K]`, bool, *optional*): False where a key is padding.
        query_segments (`torch.Tensor` of shape `[B, N_Q]`, int32, *optional*): A row sees keys of its segment only.
        key_segments (`torch.Tensor` of shape `[B, N_K]`, int32, *optional*): Those of the keys.

    Returns:
        KL(P_1 ‖ P_2), LSE_1 and LSE_2 of shape `[B, H, N_Q]` in nats, float32; 0, -inf and -inf in rows without keys.
    """
    shape, n_k = q1.shape[:3], k1.shape[2]
    kl, lse_1, lse_2 = (q1.new_empty(shape, dtype=torch.float32) for _ in range(3))
    if kl.numel() == 0 or n_k == 0:
        return kl.zero_(), lse_1.fill_(-math.inf), lse_2.fill_(-math.inf)
    # The kernel takes the maximum before it multiplies with the scale.
    q1, scale_1 = (q1, scale_1) if scale_1 >= 0 else (-q1, -scale_1)
    q2, scale_2 = (q2, scale_2) if scale_2 >= 0 else (-q2, -scale_2)
    splits, keys_per_split = _splits(shape, n_k)
    partial = kl.new_empty(5, splits, kl.numel()) if splits > 1 else None
    # Without splits the last two stand for nothing.
    outputs = (kl, lse_1, lse_2, lse_2, lse_2) if partial is None else partial.unbind()
    tensors, sizes, constants = _arguments(q1, k1, q2, k2, causal, key_mask, query_segments, key_segments)
    _launch(
        _forward_kernel,
        lambda tiles: (shape[0] * shape[1] * triton.cdiv(shape[2], tiles["BLOCK_Q"]), splits),
        *(*tensors, *outputs, *sizes, keys_per_split, scale_1 * LOG2_E, scale_2 * LOG2_E),
        *_buckets(shape, n_k),
        **constants,
        SPLIT=splits > 1,
    )
    if partial is not None:
        block = 128
        with torch.cuda.device_of(kl):
            _merge_kernel[(triton.cdiv(kl.numel(), block),)](
                partial, kl, lse_1, lse_2, kl.numel(), splits, BLOCK=block
            )
    return kl, lse_1, lse_2


def backward(
    grad_kl: Tensor,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    kl: Tensor,
    lse1: Tensor,
    lse2: Tensor,
    scale_1: float,
    scale_2: float,
    causal: bool,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    deterministic: bool,
) -> tuple[Tensor | None, ...]:
    """
    Gradients of `q1`, `k1`, `q2` and `k2`.

    Args:
        grad_kl (`torch.Tensor` of shape `[B, H, N_Q]`): Gradient of each row's KL.
        kl, lse1, lse2 (`torch.Tensor` of shape `[B, H, N_Q]`): What [`forward`] returned.
        needs (`tuple[bool, bool, bool, bool]`): Which of the four are wanted.
        deterministic (`bool`): Whether atomic additions, which make sums depend on the order of programs, are out.
        q1, k1, q2, k2, scale_1, scale_2, causal, key_mask, query_segments, key_segments: As in [`forward`].

    Returns:
        Contiguous gradients in the dtypes of the inputs, `None` where none is wanted.
    """
    rest = causal, key_mask, query_segments, key_segments
    saved = grad_kl.float().contiguous(), kl.contiguous()
    # In powers of two once, and not in every tile.
    lse1, lse2 = lse1.contiguous() * LOG2_E, lse2.contiguous() * LOG2_E
    first = _side_gradients(
        *saved, lse1, lse2, (q1, k1, q2, k2), (scale_1, scale_2), rest, needs[:2], True, deterministic
    )
    second = _side_gradients(
        *saved, lse2, lse1, (q2, k2, q1, k1), (scale_2, scale_1), rest, needs[2:], False, deterministic
    )
    return (*first, *second)


def _side_gradients(
    grad_kl: Tensor,
    kl: Tensor,
    lse_a: Tensor,
    lse_b: Tensor,
    sides: tuple[Tensor, Tensor, Tensor, Tensor],
    scales: tuple[float, float],
    rest: tuple[bool, Tensor | None, Tensor | None, Tensor | None],
    needs: tuple[bool, ...],
    to_first: bool,
    deterministic: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Of queries and keys of side a, the first of `sides`."""
    q_a, k_a = sides[:2]
    need_q, need_k = needs
    shape, n_k, size = kl.shape, k_a.shape[2], q_a.shape[3]
    if shape.numel() == 0 or n_k == 0:
        return (torch.zeros_like(q_a) if need_q else None), (torch.zeros_like(k_a) if need_k else None)
    tensors, sizes, constants = _arguments(*sides, *rest)
    # A probability times the gradient of its row is often too small for float16.
    constants |= {"TO_FIRST": to_first, "DTYPE": tl.float32 if q_a.dtype == torch.float32 else tl.bfloat16}
    scaled = scales[0] * LOG2_E, scales[1] * LOG2_E, scales[0], *_buckets(shape, n_k)
    fused = (
        need_q and need_k and not deterministic and triton.cdiv(shape[2], 32) * FUSED_RATIO <= triton.cdiv(n_k, 128)
    )
    dq = dk = None
    if need_q and not fused:
        splits, keys_per_split = _splits(shape, n_k)
        part = torch.float32 if splits > 1 else q_a.dtype
        parts = q_a.new_empty(splits, *shape, size, dtype=part)
        _launch(
            _query_kernel,
            lambda tiles: (shape[0] * shape[1] * triton.cdiv(shape[2], tiles["BLOCK_Q"]), splits),
            *(*tensors, grad_kl, kl, lse_a, lse_b, parts, *sizes, keys_per_split, *scaled),
            **constants,
        )
        dq = parts[0] if splits == 1 else parts.sum(0).to(q_a.dtype)
    if need_k:
        dk = torch.empty(k_a.shape, dtype=k_a.dtype, device=k_a.device)
        # Zeroed again between the runs of tuning: without `FUSED` it must be a tensor of no worth.
        total = q_a.new_zeros(*shape, size, dtype=torch.float32) if fused else dk
        _launch(
            _key_kernel,
            lambda tiles: (k_a.shape[0] * k_a.shape[1] * triton.cdiv(n_k, tiles["BLOCK_K"]),),
            *(*tensors, grad_kl, kl, lse_a, lse_b, total, dk, *sizes, *scaled),
            **constants,
            FUSED=fused,
        )
        if fused:
            dq = total.to(q_a.dtype)
    return dq, dk


def _arguments(
    q_a: Tensor,
    k_a: Tensor,
    q_b: Tensor,
    k_b: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
) -> tuple[list[Tensor | None], list[int], dict[str, Any]]:
    """What all kernels take: tensors, then strides and sizes, then constants."""
    sides = [_readable(tensor) for tensor in (q_a, k_a, q_b, k_b)]
    masks = [None if mask is None else mask.contiguous() for mask in (key_mask, query_segments, key_segments)]
    if masks[0] is not None:
        masks[0] = masks[0].view(torch.uint8)
    heads, n_q, n_k = q_a.shape[1], q_a.shape[2], k_a.shape[2]
    sizes = [stride for tensor in sides for stride in tensor.stride()[:3]]
    sizes += [heads, heads // k_a.shape[1], heads // k_b.shape[1], n_q, n_k]
    constants: dict[str, Any] = {"CAUSAL": causal}
    for side, tensor in (("a", q_a), ("b", q_b)):
        constants[f"D_{side}"] = tensor.shape[3]
        # The least that a matrix product takes.
        constants[f"D_PAD_{side}"] = max(16, triton.next_power_of_2(tensor.shape[3]))
    return [*sides, *masks], sizes, constants


def _readable(tensor: Tensor) -> Tensor:
    """A head's numbers must lie side by side, and offsets within a tile fit into 32 bits."""
    return tensor if tensor.stride(3) == 1 and tensor.stride(2) < 2**23 else tensor.contiguous()


def _splits(shape: torch.Size, n_k: int) -> tuple[int, int]:
    """How many programs share the keys of a tile of queries, and how many keys each gets."""
    programs = shape[0] * shape[1] * triton.cdiv(shape[2], 128)
    wanted = max(1, TARGET_PROGRAMS // programs)
    keys = triton.cdiv(triton.cdiv(n_k, wanted), SPLIT_STEP) * SPLIT_STEP
    return triton.cdiv(n_k, keys), keys


def _buckets(shape: torch.Size, n_k: int) -> tuple[int, int]:
    """Lengths rounded up to a power of two, which tiles are tuned for."""
    return max(16, triton.next_power_of_2(shape[2])), max(16, triton.next_power_of_2(n_k))


def _launch(kernel: Any, grid: Callable, *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(arguments[0]):
        if TILES is None:
            kernel[grid](*arguments, **constants)
        else:
            kernel.fn[grid](*arguments, **constants, **TILES)
