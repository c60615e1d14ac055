"""
Alignments known from the text alone: chunk means, exact tokens, and the same tokens.

Axes: B examples, R_s and R_t positions of an example's response for student and teacher, in the order of the response
and padded on the right. Chunk ids are those of [`~hf_dskd.alignment.spans.chunk_ids`], -1 where there is no token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_mask(student_chunks: Tensor, teacher_chunks: Tensor) -> Tensor:
    """
    Which pairs of positions lie in the same chunk (arXiv 2603.22056, Eqs. 10 and 11).

    Args:
        student_chunks (`torch.Tensor` of shape `[B, R_s]`), teacher_chunks (`torch.Tensor` of shape `[B, R_t]`):
            Chunk ids. A position without a token is in no chunk.

    Returns:
        `torch.Tensor` of shape `[B, R_s, R_t]`, bool.
    """
    students = student_chunks.unsqueeze(2)
    return (students == teacher_chunks.unsqueeze(1)) & (students >= 0)


def exact_pairs(mask: Tensor) -> Tensor:
    """
    Keeps the chunks of one token on each side: the two cover the same bytes after the same text.

    This is the exact token alignment of DSKDv2 (arXiv 2504.11426).

    Args:
        mask (`torch.Tensor` of shape `[B, R_s, R_t]`, bool): From [`chunk_mask`].

    Returns:
        `torch.Tensor` of shape `[B, R_s, R_t]`, bool, with at most one true value in each row and column.
    """
    return mask & (mask.sum(2, keepdim=True) == 1) & (mask.sum(1, keepdim=True) == 1)


def mean_weights(mask: Tensor) -> tuple[Tensor, Tensor]:
    """
    Weights of the mean over the partners of a position, as in DSKD-CLP (arXiv 2603.22056, Eqs. 10 to 12).

    The paper prints softmax(M), which also gives weight to positions outside the chunk; this is M divided by the sums
    of its rows, as the released code has it.

    Args:
        mask (`torch.Tensor` of shape `[B, R_s, R_t]`, bool):
            From [`chunk_mask`], [`exact_pairs`] or [`identity_mask`].

    Returns:
        `t2s` of shape `[B, R_s, R_t]` and `s2t` of shape `[B, R_t, R_s]`, float32. Rows sum to 1, or are 0 where a
        position has no partner.
    """
    pairs = mask.float()
    t2s = pairs / pairs.sum(2, keepdim=True).clamp_min(1)
    pairs = pairs.transpose(1, 2)
    s2t = pairs / pairs.sum(2, keepdim=True).clamp_min(1)
    return t2s, s2t


def identity_mask(student_mask: Tensor, teacher_mask: Tensor) -> Tensor:
    """
    Pairs each position with the same position of the other model, for models that share a tokenizer.

    Args:
        student_mask (`torch.Tensor` of shape `[B, R_s]`), teacher_mask (`torch.Tensor` of shape `[B, R_t]`):
            Which positions hold a token.

    Returns:
        `torch.Tensor` of shape `[B, R_s, R_t]`, bool.
    """
    same = torch.eye(student_mask.shape[1], teacher_mask.shape[1], dtype=torch.bool, device=student_mask.device)
    return same & student_mask.unsqueeze(2) & teacher_mask.unsqueeze(1)


def same_places(student_places: Tensor, teacher_places: Tensor) -> Tensor:
    """
    Pairs the i-th token of an answer with the i-th token of the same answer of the other model.

    Args:
        student_places (`torch.Tensor` of shape `[B, R_s]`), teacher_places (`torch.Tensor` of shape `[B, R_t]`):
            As [`~hf_dskd.data.collator.DualCollator`] has them, -1 where there is no token.

    Returns:
        `torch.Tensor` of shape `[B, R_s, R_t]`, bool.
    """
    return chunk_mask(student_places, teacher_places)


def input_chunks(chunks: Tensor, mask: Tensor) -> Tensor:
    """
    Chunk ids of the token that a position reads instead of the one that it predicts, as the released code aligns them.

    The first position reads the last token of the prompt, which is a chunk of its own, 0. The others read the token
    that the position before them predicts; its chunk id is raised by 1.

    Args:
        chunks (`torch.Tensor` of shape `[B, R]`): Chunk ids of the predicted tokens.
        mask (`torch.Tensor` of shape `[B, R]`): Which positions hold a token.

    Returns:
        `torch.Tensor` of shape `[B, R]`, -1 where `mask` is false.
    """
    return F.pad(chunks[:, :-1] + 1, (1, 0)).masked_fill(~mask, -1)
