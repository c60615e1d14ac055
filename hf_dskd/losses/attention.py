"""
Attention distillation: the student's attention is to be the teacher's, KL(P_t‖P_s) of the rows of two layers.

P = softmax(scale · Q Kᵀ) is never built: memory is linear in the length (StreamKL, arXiv 2606.20005). With as many
heads in both layers, head h is compared with head h. Otherwise heads are not averaged, since a mixture is no softmax:
both sides' heads are concatenated and split anew into as many *relation heads* (MiniLMv2, arXiv 2012.15828), whose
scores are sums of the heads' own.

Axes: B examples, H heads, H_k heads of the keys (fewer with grouped queries), N tokens, d head size, C chunks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.stream_kl import stream_kl
from .dual_space import IGNORE


@dataclass(frozen=True)
class AttentionInputs:
    """
    What one layer's attention weights are made of: softmax(scale · queries keysᵀ).

    Attributes:
        queries (`[B, H, N, d]`): After position embedding, if the model rotates them.
        keys (`[B, H_k, N, d]`): Likewise; not repeated for the heads that share them.
        scale (`float`): Factor on the scores, such as 1/√d.
    """

    queries: Tensor
    keys: Tensor
    scale: float


def head_shape(inputs: AttentionInputs) -> tuple[int, int]:
    """Number and size of the heads of a layer's queries."""
    return inputs.queries.shape[1], inputs.queries.shape[3]


def common_heads(student: tuple[int, int], teacher: tuple[int, int], relation_heads: int | None = None) -> int:
    """
    Into how many heads the queries and keys of the student and of the teacher are split for comparison.

    `student` and `teacher` are number and size of their queries' heads (see [`head_shape`]). `relation_heads` is for
    both; `None` keeps the heads where both have the same number, and takes the greatest common divisor otherwise, so
    that every relation head is made of whole heads. A [`UserError`] where it doesn't divide the width of both.
    """
    if relation_heads is None:
        return math.gcd(student[0], teacher[0])
    for side, (heads, size) in (("student", student), ("teacher", teacher)):
        if heads * size % relation_heads:
            raise UserError(
                f"attention_relation_heads={relation_heads} doesn't divide the {heads} x {size} numbers of the"
                f" {side}'s queries: choose a divisor of {math.gcd(student[0] * student[1], teacher[0] * teacher[1])}"
            )
    return relation_heads


def relation(inputs: AttentionInputs, heads: int) -> AttentionInputs:
    """
    The same layer with its heads concatenated and split anew into `heads` (MiniLMv2, arXiv 2012.15828, §3.1).

    Scores are divided by the root of the new head size where they were by that of the old. A relation head made of g
    whole heads has the sum of their scores, divided by √g.
    """
    own = inputs.queries.shape[1]
    if heads == own:
        return inputs
    keys = inputs.keys.repeat_interleave(own // inputs.keys.shape[1], dim=1)

    def split(values: Tensor) -> Tensor:
        return values.transpose(1, 2).reshape(len(values), values.shape[2], heads, -1).transpose(1, 2)

    return AttentionInputs(split(inputs.queries), split(keys), inputs.scale * math.sqrt(heads / own))


def attention_kl(
    pairs: Sequence[tuple[AttentionInputs, AttentionInputs]],
    labels: Tensor,
    attention_mask: Tensor,
    relation_heads: int | None = None,
) -> Tensor:
    """
    KL of the teacher's attention from the student's, of models that read the same tokens: nats `[B]`, the mean over
    heads and layers summed over the rows of an example; 0 for one without a response.

    A row is a position that predicts a response token; its keys are that position and all before it, the prompt's
    among them. The teacher is a constant. `pairs` has the student's layer and the teacher's, `labels` `[B, N]` tokens
    with -100 on prompt and padding, not shifted, `attention_mask` `[B, N]` 0 on padding; for `relation_heads` see
    [`common_heads`].
    """
    predicts = labels[:, 1:] != IGNORE
    ends = torch.arange(1, labels.shape[1], device=labels.device)
    last = (ends * predicts).amax(1)
    span = last - torch.where(predicts, ends, last.unsqueeze(1) + 1).amin(1) + 1
    key_count, row_count = torch.stack([last.amax(), span.amax()]).clamp_min(1).tolist()
    # With the last row of every example at the right end, rows see keys as causal attention aligned at the end has
    # it, and no row of a prompt is computed but for shorter responses of the batch.
    places = last.unsqueeze(1) + torch.arange(-key_count, 0, device=labels.device)
    key_mask, places = places >= 0, places.clamp_min(0)
    row_mask = (key_mask & predicts.gather(1, places))[:, -row_count:]
    key_mask = key_mask & attention_mask.gather(1, places).bool()

    def at(values: Tensor, places: Tensor) -> Tensor:
        return values.gather(2, places[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))

    def rows_and_keys(inputs: AttentionInputs) -> AttentionInputs:
        return AttentionInputs(at(inputs.queries, places[:, -row_count:]), at(inputs.keys, places), inputs.scale)

    kl = torch.stack(
        [_row_kl(rows_and_keys(own), rows_and_keys(theirs), key_mask, relation_heads) for own, theirs in pairs]
    )
    return kl.mean(0).masked_fill(~row_mask, 0).sum(1)


def chunk_attention_kl(
    pairs: Sequence[tuple[AttentionInputs, AttentionInputs]],
    student_chunks: Tensor,
    teacher_chunks: Tensor,
    relation_heads: int | None = None,
) -> Tensor:
    """
    KL of the teacher's attention from the student's, of models that read other tokens: over chunks of the response.
    Nats `[B]`, the mean over heads and layers summed over the student's response tokens; 0 for an example without a
    response.

    A chunk has one row and one column: the means of the queries and of the keys of the positions that *predict* its
    tokens. It sees itself and the chunks before it, no prompt. Both models have read the same text where a chunk
    begins. A row counts as often as the student has tokens in its chunk, so that the sum is one over the student's
    response tokens. The teacher is a constant. Where every token is a chunk this is [`attention_kl`], but for the
    prompt's keys.

    `student_chunks` `[B, N_s]` and `teacher_chunks` `[B, N_t]` have the chunk of each token (see
    [`~hf_dskd.alignment.spans.chunk_ids`]), -1 outside the response, not shifted; the others are as in
    [`attention_kl`].
    """
    sides = [chunks[:, 1:] for chunks in (student_chunks, teacher_chunks)]
    count = max(int(torch.stack([chunks.max() for chunks in sides]).max()) + 1, 1)
    tokens = [_sum_by_chunk(torch.ones_like(side)[:, None, :, None].float(), side, count) for side in sides]
    mask = (tokens[0] > 0) & (tokens[1] > 0)

    def means(values: Tensor, side: int) -> Tensor:
        return _sum_by_chunk(values[:, :, :-1], sides[side], count) / tokens[side].clamp_min(1)

    def pooled(inputs: AttentionInputs, side: int) -> AttentionInputs:
        return AttentionInputs(means(inputs.queries, side), means(inputs.keys, side), inputs.scale)

    kl = torch.stack(
        [_row_kl(pooled(own, 0), pooled(theirs, 1), mask[:, 0, :, 0], relation_heads) for own, theirs in pairs]
    )
    return (kl.mean(0) * (tokens[0] * mask)[:, 0, :, 0]).sum(1)


def _row_kl(
    student: AttentionInputs, teacher: AttentionInputs, key_mask: Tensor, relation_heads: int | None
) -> Tensor:
    """KL(P_t‖P_s) of each row `[B, rows]`, in nats, the mean over heads; 0 where a row has no key."""
    heads = common_heads(head_shape(student), head_shape(teacher), relation_heads)
    student, teacher = relation(student, heads), relation(teacher, heads)
    # Norms and autocast may leave one of the four in another precision.
    tensors = [teacher.queries.detach(), teacher.keys.detach(), student.queries, student.keys]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return stream_kl(
        *(tensor.to(dtype) for tensor in tensors),
        scale_1=teacher.scale,
        scale_2=student.scale,
        causal=True,
        key_mask=key_mask,
        reduction="none",
    ).mean(1)


def _sum_by_chunk(values: Tensor, chunks: Tensor, count: int) -> Tensor:
    """Sums `values` `[B, H, N, d]` by their `chunks` `[B, N]`, -1 for none: `[B, H, count, d]`, float32 or better."""
    batch, heads, length, size = values.shape
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    # The first slot of every example takes what is in no chunk.
    slots = chunks + 1 + (count + 1) * torch.arange(batch, device=chunks.device).unsqueeze(1)
    rows = values.transpose(1, 2).reshape(batch * length, heads * size)
    sums = rows.new_zeros(batch * (count + 1), heads * size).index_add(0, slots.flatten(), rows)
    return sums.view(batch, count + 1, heads, size)[:, 1:].transpose(1, 2)
