"""
Alignments, and values of one model's positions as seen from the other's.

Axes: B examples, R_s and R_t positions of an example's response for student and teacher, in the order of the response
and padded on the right, d width of the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .cross_model import attention_scores, attention_weights, cross_model_attention


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


class Side(NamedTuple):
    """One model's part of a [`TiledAttention`]."""

    states: Tensor  # queries or keys, [B, R, 2 d_t]
    mask: Tensor  # which positions take part, [B, R]
    chunks: Tensor | None = None  # ids [B, R], where only positions of one chunk attend to each other


@dataclass(frozen=True)
class TiledAttention:
    """
    The attention of [`~hf_dskd.alignment.cross_model.cross_model_attention`] for responses whose scores are too many.

    Scores are computed for some rows at a time, and again in the backward pass: twice for the two directions where
    the matrix would hold them for both, but never `[R_s, R_t]` of them.

    Args:
        student, teacher ([`Side`]): Queries and keys.
        scores_at_once (`int`, *optional*, defaults to `2**24`): How many scores of the batch exist at a time.
    """

    student: Side
    teacher: Side
    scores_at_once: int = 2**24

    def to_student(self, value: Tensor) -> Tensor:
        """Teacher positions' values `[B, R_t, d]` at student positions, `[B, R_s, d]`."""
        return self._attend(self.student, self.teacher, value)

    def to_teacher(self, value: Tensor) -> Tensor:
        """Student positions' values `[B, R_s, d]` at teacher positions, `[B, R_t, d]`."""
        return self._attend(self.teacher, self.student, value)

    @property
    def has_teacher(self) -> Tensor:
        """Student positions with a partner, `[B, R_s]`."""
        return _has_partner(self.student, self.teacher)

    @property
    def has_student(self) -> Tensor:
        """Teacher positions with a partner, `[B, R_t]`."""
        return _has_partner(self.teacher, self.student)

    @property
    def t2s(self) -> Tensor:
        """The whole matrix `[B, R_s, R_t]`, for pictures."""
        return self.to_student(_unit_rows(self.teacher.states))

    @property
    def s2t(self) -> Tensor:
        """The whole matrix `[B, R_t, R_s]`, for pictures."""
        return self.to_teacher(_unit_rows(self.student.states))

    def _attend(self, rows: Side, columns: Side, value: Tensor) -> Tensor:
        batch, length = rows.mask.shape
        step = max(self.scores_at_once // max(batch * columns.mask.shape[1], 1), 1)
        parts = []
        for start in range(0, length, step):
            here = slice(start, start + step)
            allowed = rows.mask[:, here].unsqueeze(2) & columns.mask.unsqueeze(1)
            if rows.chunks is not None and columns.chunks is not None:
                allowed = allowed & chunk_mask(rows.chunks[:, here], columns.chunks)
            given = rows.states[:, here], columns.states, allowed, value
            parts.append(checkpoint(_attention, *given, use_reentrant=False))  # type: ignore[arg-type]
        return torch.cat(parts, 1)


def _unit_rows(values: Tensor) -> Tensor:
    size = values.shape[1]
    return torch.eye(size, device=values.device).expand(len(values), size, size)


def _attention(rows: Tensor, columns: Tensor, allowed: Tensor, value: Tensor) -> Tensor:
    return attention_weights(attention_scores(rows, columns, allowed), allowed).to(value.dtype) @ value


def _has_partner(side: Side, other: Side) -> Tensor:
    """Which positions `[B, R]` may attend to one of the other side's."""
    if side.chunks is None or other.chunks is None:
        return side.mask & other.mask.any(1, keepdim=True)
    # Place 0 is for positions in no chunk.
    size = int(max(side.chunks.max(), other.chunks.max())) + 2
    there = torch.zeros(len(side.mask), size, dtype=torch.bool, device=side.mask.device)
    there.scatter_(1, torch.where(other.mask, other.chunks, -1).long() + 1, True)
    there[:, 0] = False
    return side.mask & there.gather(1, side.chunks.long().clamp(min=-1) + 1)


def chunk_mask(student_chunks: Tensor, teacher_chunks: Tensor) -> Tensor:
    """
    Pairs positions of the same chunk (arXiv 2603.22056, Eqs. 10 and 11): ids `[B, R_s]` and `[B, R_t]` as those of
    [`~hf_dskd.alignment.spans.chunk_ids`], -1 where there is no token, which is in no chunk.

    Returns:
        `torch.Tensor` of shape `[B, R_s, R_t]`, bool.
    """
    students = student_chunks.unsqueeze(2)
    return (students == teacher_chunks.unsqueeze(1)) & (students >= 0)


def exact_pairs(mask: Tensor) -> Tensor:
    """
    Keeps of a [`chunk_mask`] the chunks of one token on each side: the two cover the same bytes after the same text.

    This is the exact token alignment of DSKDv2 (arXiv 2504.11426). A row or column has at most one true value.
    """
    return mask & (mask.sum(2, keepdim=True) == 1) & (mask.sum(1, keepdim=True) == 1)


def mean_weights(mask: Tensor) -> tuple[Tensor, Tensor]:
    """
    Weights of the mean over the partners of a position, as in DSKD-CLP (arXiv 2603.22056, Eqs. 10 to 12).

    The paper prints softmax(M), which also gives weight to positions outside the chunk; this is M divided by the sums
    of its rows, as the released code has it.

    Args:
        mask (`torch.Tensor` of shape `[B, R_s, R_t]`, bool): Which positions are partners.

    Returns:
        `t2s` of shape `[B, R_s, R_t]` and `s2t` of shape `[B, R_t, R_s]`, float32. Rows sum to 1, or are 0 where a
        position has no partner.
    """
    t2s, s2t = (
        pairs / pairs.sum(2, keepdim=True).clamp_min(1) for pairs in (mask.float(), mask.float().transpose(1, 2))
    )
    return t2s, s2t


def identity_mask(student_mask: Tensor, teacher_mask: Tensor) -> Tensor:
    """Pairs each position with the same position of the other model, `[B, R_s, R_t]`, where both hold a token."""
    same = torch.eye(student_mask.shape[1], teacher_mask.shape[1], dtype=torch.bool, device=student_mask.device)
    return same & student_mask.unsqueeze(2) & teacher_mask.unsqueeze(1)


def input_chunks(chunks: Tensor, mask: Tensor) -> Tensor:
    """
    Chunk ids of the token that a position reads instead of the one that it predicts, as the released code aligns them.

    The first position reads the last token of the prompt, which is a chunk of its own, 0. The others read the token
    that the position before them predicts; its chunk id is raised by 1.

    Args:
        chunks (`torch.Tensor` of shape `[B, R]`): Chunk ids of the predicted tokens.
        mask (`torch.Tensor` of shape `[B, R]`): Which positions hold a token; the others get -1.
    """
    return F.pad(chunks[:, :-1] + 1, (1, 0)).masked_fill(~mask, -1)


def by_attention(
    student: Positions, teacher: Positions, queries: Tensor, keys: Tensor, in_chunks: bool = False
) -> AlignmentWeights | TiledAttention:
    """
    Aligns by cross-model attention (arXiv 2603.22056, Eqs. 1 to 3), in tiles where responses are very long.

    Like every alignment it takes the two views of a batch, and queries `[B, R_s, 2 d_t]` and keys `[B, R_t, 2 d_t]`,
    which are `None` where the alignment's row needs none.
    """
    if student.mask.numel() * teacher.mask.shape[1] > TILED_ABOVE:
        chunks = (student.chunks, teacher.chunks) if in_chunks else (None, None)
        return TiledAttention(Side(queries, student.mask, chunks[0]), Side(keys, teacher.mask, chunks[1]))
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
        return AlignmentWeights(*mean_weights(chunk_mask(student.places, teacher.places)))
    return AlignmentWeights(*mean_weights(identity_mask(student.mask, teacher.mask)))


def _same_chunk(student: Positions, teacher: Positions) -> Tensor:
    assert student.chunks is not None and teacher.chunks is not None
    return chunk_mask(student.chunks, teacher.chunks)
