"""
An alignment at work: values of one model's positions as seen from the other's.

Axes: B examples, R_s and R_t positions of an example's response for student and teacher, d width of the values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .chunked import chunk_mask, exact_pairs, identity_mask, mean_weights, same_places
from .cross_model import cross_model_attention


# Scores of a batch, of which a matrix and its copies take about 1.5 GB: one response of 8,192 tokens on both sides.
TILED_ABOVE = 2**26


class Positions(Protocol):
    """What an alignment reads of one model's responses (see [`~hf_dskd.losses.states.ResponseStates`])."""

    @property
    def mask(self) -> Tensor: ...
    @property
    def chunks(self) -> Tensor | None: ...
    @property
    def places(self) -> Tensor | None: ...


@dataclass(frozen=True)
class AlignmentWeights:
    """
    An alignment as two matrices of weights, whose rows sum to 1, or to 0 where a position has no partner.

    Args:
        t2s (`torch.Tensor` of shape `[B, R_s, R_t]`): What each student position takes from teacher positions.
        s2t (`torch.Tensor` of shape `[B, R_t, R_s]`): The reverse.
    """

    t2s: Tensor
    s2t: Tensor

    def to_student(self, value: Tensor) -> Tensor:
        """Teacher positions' values `[B, R_t, d]` at student positions, `[B, R_s, d]`."""
        return self.t2s.to(value.dtype) @ value

    def to_teacher(self, value: Tensor) -> Tensor:
        """Student positions' values `[B, R_s, d]` at teacher positions, `[B, R_t, d]`."""
        return self.s2t.to(value.dtype) @ value

    @property
    def has_teacher(self) -> Tensor:
        """Student positions with a partner, `[B, R_s]`."""
        return self.t2s.sum(-1) > 0

    @property
    def has_student(self) -> Tensor:
        """Teacher positions with a partner, `[B, R_t]`."""
        return self.s2t.sum(-1) > 0


@dataclass(frozen=True)
class TiledAttention:
    """
    The attention of [`~hf_dskd.alignment.cross_model.cross_model_attention`] for responses whose scores are too many.

    Scores are computed for some rows at a time, and again in the backward pass: twice for the two directions where
    the matrix would hold them for both, but never `[R_s, R_t]` of them.

    Args:
        queries (`torch.Tensor` of shape `[B, R_s, 2 d_t]`), keys (`torch.Tensor` of shape `[B, R_t, 2 d_t]`):
            Of student and teacher positions.
        query_mask (`torch.Tensor` of shape `[B, R_s]`), key_mask (`torch.Tensor` of shape `[B, R_t]`):
            Which positions take part.
        query_chunks (`torch.Tensor` of shape `[B, R_s]`), key_chunks (`torch.Tensor` of shape `[B, R_t]`, *optional*):
            Chunk ids: only positions of one chunk attend to each other.
        scores_at_once (`int`, *optional*, defaults to `2**24`): How many scores of the batch exist at a time.
    """

    queries: Tensor
    keys: Tensor
    query_mask: Tensor
    key_mask: Tensor
    query_chunks: Tensor | None = None
    key_chunks: Tensor | None = None
    scores_at_once: int = 2**24

    def to_student(self, value: Tensor) -> Tensor:
        """Teacher positions' values `[B, R_t, d]` at student positions, `[B, R_s, d]`."""
        sides = (self.queries, self.query_mask, self.query_chunks), (self.keys, self.key_mask, self.key_chunks)
        return self._attend(*sides, value)

    def to_teacher(self, value: Tensor) -> Tensor:
        """Student positions' values `[B, R_s, d]` at teacher positions, `[B, R_t, d]`."""
        sides = (self.keys, self.key_mask, self.key_chunks), (self.queries, self.query_mask, self.query_chunks)
        return self._attend(*sides, value)

    @property
    def has_teacher(self) -> Tensor:
        """Student positions with a partner, `[B, R_s]`."""
        return _has_partner(self.query_mask, self.key_mask, self.query_chunks, self.key_chunks)

    @property
    def has_student(self) -> Tensor:
        """Teacher positions with a partner, `[B, R_t]`."""
        return _has_partner(self.key_mask, self.query_mask, self.key_chunks, self.query_chunks)

    @property
    def t2s(self) -> Tensor:
        """The whole matrix `[B, R_s, R_t]`, for pictures."""
        return self.to_student(_unit_rows(self.keys))

    @property
    def s2t(self) -> Tensor:
        """The whole matrix `[B, R_t, R_s]`, for pictures."""
        return self.to_teacher(_unit_rows(self.queries))

    def _attend(self, rows: tuple, columns: tuple, value: Tensor) -> Tensor:
        of_rows, row_mask, row_chunks = rows
        of_columns, column_mask, column_chunks = columns
        batch, length = of_rows.shape[:2]
        step = max(self.scores_at_once // max(batch * of_columns.shape[1], 1), 1)
        parts = []
        for start in range(0, length, step):
            here = slice(start, start + step)
            allowed = row_mask[:, here].unsqueeze(2) & column_mask.unsqueeze(1)
            if row_chunks is not None:
                allowed = allowed & (row_chunks[:, here].unsqueeze(2) == column_chunks.unsqueeze(1))
            parts.append(
                checkpoint(_attention, of_rows[:, here], of_columns, allowed, value, use_reentrant=False)  # type: ignore[arg-type]
            )
        return torch.cat(parts, 1)


def _unit_rows(values: Tensor) -> Tensor:
    size = values.shape[1]
    return torch.eye(size, device=values.device).expand(len(values), size, size)


def _attention(rows: Tensor, columns: Tensor, allowed: Tensor, value: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        dtype = torch.promote_types(rows.dtype, torch.float32)
        scores = rows.to(dtype) @ columns.to(dtype).transpose(1, 2) / math.sqrt(rows.shape[-1])
        weights = torch.softmax(scores.masked_fill(~allowed, -1e5), -1) * allowed.any(2, keepdim=True)
    return weights.to(value.dtype) @ value


def _has_partner(mask: Tensor, others: Tensor, chunks: Tensor | None, other_chunks: Tensor | None) -> Tensor:
    """Which positions `[B, R]` may attend to one of the others `[B, R']`."""
    if chunks is None or other_chunks is None:
        return mask & others.any(1, keepdim=True)
    # Place 0 is for positions in no chunk.
    size = int(max(chunks.max(), other_chunks.max())) + 2
    there = torch.zeros(len(mask), size, dtype=torch.bool, device=mask.device)
    there.scatter_(1, torch.where(others, other_chunks, -1).long() + 1, True)
    there[:, 0] = False
    return mask & there.gather(1, chunks.long().clamp(min=-1) + 1)


def by_attention(
    student: Positions, teacher: Positions, queries: Tensor, keys: Tensor, in_chunks: bool = False
) -> AlignmentWeights | TiledAttention:
    """
    Aligns by cross-model attention (arXiv 2603.22056, Eqs. 1 to 3), in tiles where responses are very long.

    Like every alignment it takes the two views of a batch, and queries `[B, R_s, 2 d_t]` and keys `[B, R_t, 2 d_t]`,
    which are `None` where the alignment's row needs none.
    """
    chunks = (student.chunks, teacher.chunks) if in_chunks else (None, None)
    if student.mask.numel() * teacher.mask.shape[1] > TILED_ABOVE:
        return TiledAttention(queries, keys, student.mask, teacher.mask, *chunks)
    pairs = _same_chunk(student, teacher) if in_chunks else None
    return AlignmentWeights(*cross_model_attention(queries, keys, student.mask, teacher.mask, pairs))


def by_attention_in_chunks(
    student: Positions, teacher: Positions, queries: Tensor, keys: Tensor
) -> AlignmentWeights | TiledAttention:
    """Aligns by attention inside chunks of the same bytes (Eq. 13)."""
    return by_attention(student, teacher, queries, keys, in_chunks=True)


def by_chunk(student: Positions, teacher: Positions, *_: Tensor | None) -> AlignmentWeights:
    """Aligns each position with all of its chunk alike (Eqs. 10 to 12)."""
    return AlignmentWeights(*mean_weights(_same_chunk(student, teacher)))


def by_exact_token(student: Positions, teacher: Positions, *_: Tensor | None) -> AlignmentWeights:
    """Aligns tokens of exactly the same bytes (arXiv 2504.11426)."""
    return AlignmentWeights(*mean_weights(exact_pairs(_same_chunk(student, teacher))))


def by_place(student: Positions, teacher: Positions, *_: Tensor | None) -> AlignmentWeights:
    """Aligns the i-th token of an answer with the i-th of the same answer, of one vocabulary."""
    if student.places is not None and teacher.places is not None:
        return AlignmentWeights(*mean_weights(same_places(student.places, teacher.places)))
    return AlignmentWeights(*mean_weights(identity_mask(student.mask, teacher.mask)))


def _same_chunk(student: Positions, teacher: Positions) -> Tensor:
    assert student.chunks is not None and teacher.chunks is not None
    return chunk_mask(student.chunks, teacher.chunks)
