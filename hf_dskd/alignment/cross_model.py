"""Cross-model attention (CMA): a soft alignment of two tokenizations of one text (arXiv 2603.22056, Eqs. 1 to 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit_std(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """
    Divides by the standard deviation, one scalar per example.

    The paper's N_std (Eq. 2) leaves open over what the deviation is taken; the released code takes it over the whole
    padded batch, so that an example's loss depends on its neighbours and on the padding. Here it is taken over the
    response tokens of the example itself.

    Args:
        values (`torch.Tensor` of shape `[B, R, d]`): Rows of each example.
        mask (`torch.Tensor` of shape `[B, R]`, *optional*):
            Which rows are response tokens. `None`: one deviation over all of `values`, as the released code has it.
    """
    if mask is None:
        return values / values.std()
    weight = mask.unsqueeze(-1).to(values.dtype)
    count = weight.sum((1, 2), keepdim=True) * values.shape[-1]
    mean = (values * weight).sum((1, 2), keepdim=True) / count.clamp_min(1)
    variance = ((values - mean).square() * weight).sum((1, 2), keepdim=True) / (count - 1).clamp_min(1)
    return torch.where(variance > 0, values * variance.clamp_min(1e-30).rsqrt(), values)


def cross_model_attention(
    queries: Tensor, keys: Tensor, query_mask: Tensor, key_mask: Tensor, pairs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    Attention of each student position over teacher positions, and back, from one matrix of scores.

    Args:
        queries (`torch.Tensor` of shape `[B, R_s, 2 d_t]`), keys (`torch.Tensor` of shape `[B, R_t, 2 d_t]`):
            Of student and teacher positions.
        query_mask (`torch.Tensor` of shape `[B, R_s]`), key_mask (`torch.Tensor` of shape `[B, R_t]`):
            Which positions take part. A position that doesn't gets, and gives, no attention.
        pairs (`torch.Tensor` of shape `[B, R_s, R_t]`, *optional*):
            Which positions may attend to each other: chunk-level attention (CLA, arXiv 2603.22056, Eq. 13; there
            the scores are multiplied by the mask, in its code and here what it excludes gets no weight).

    Returns:
        `t2s` of shape `[B, R_s, R_t]` (rows sum to 1 over teacher positions) and `s2t` of shape `[B, R_t, R_s]`.
    """
    allowed = query_mask.unsqueeze(2) & key_mask.unsqueeze(1)
    if pairs is not None:
        allowed = allowed & pairs
    scores = attention_scores(queries, keys, allowed)
    return attention_weights(scores, allowed), attention_weights(scores.transpose(1, 2), allowed.transpose(1, 2))


def attention_scores(rows: Tensor, columns: Tensor, allowed: Tensor) -> Tensor:
    """Scaled dot products `[B, R, R']`, in float32 at least; next to nothing is left of what isn't `allowed`."""
    with torch.autocast(rows.device.type, enabled=False):
        dtype = torch.promote_types(rows.dtype, torch.float32)
        scores = rows.to(dtype) @ columns.to(dtype).transpose(1, 2) / math.sqrt(rows.shape[-1])
        # A finite fill: a row without any allowed position stays free of NaN, in its gradient too.
        return scores.masked_fill(~allowed, -1e5)


def attention_weights(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the columns of [`attention_scores`]; rows without any `allowed` one are 0."""
    return torch.softmax(scores, dim=-1) * allowed.any(-1, keepdim=True)
