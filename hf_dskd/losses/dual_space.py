"""
Dual-space distillation (paper A, Eqs. 1 to 9): student and teacher are compared in both hidden spaces.

Everything here works on response rows. Axes: B examples, R positions of an example's response (padded to the longest
of the batch), N response rows of the whole batch packed together, d_s and d_t hidden sizes, V_s and V_t vocabularies.
Terms come back as *sums per example* `[B]`; only the trainer knows by how many tokens to divide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..alignment.cross_model import cross_model_attention, unit_std
from .divergences import DivergenceFunction


if TYPE_CHECKING:
    from ..models import LMHead
    from ..projectors import Projectors

IGNORE = -100


@dataclass(frozen=True)
class ResponseStates:
    """
    One model's view of the responses of a batch.

    Attributes:
        hidden (`[B, R, d]`): Last hidden state at the positions that predict a response token.
        input_embedding (`[B, R, d]`): Of the token at that position; carries no gradient.
        target_embedding (`[B, R, d]`): Of the token to be predicted; carries no gradient.
        targets (`[B, R]`): The token to be predicted; 0 where `mask` is false.
        mask (`[B, R]`): Which rows are real.
        statistics_mask (`[B, R]`, *optional*):
            Which rows enter standard deviations; `None` is all of the batch together, padding included.
    """

    hidden: Tensor
    input_embedding: Tensor
    target_embedding: Tensor
    targets: Tensor
    mask: Tensor
    statistics_mask: Tensor | None

    @property
    def counts(self) -> Tensor:
        """Response tokens per example, `[B]`."""
        return self.mask.sum(1)

    def packed(self, values: Tensor) -> Tensor:
        """The real rows of `values` `[B, R, ...]` as `[N, ...]`."""
        return values[self.mask]

    def row_names(self, example_ids: Tensor) -> Tensor:
        """A number for each packed row `[N]`, made of its example's id and its place in the response."""
        example, place = self.mask.nonzero(as_tuple=True)
        return example_ids[example] * 2**20 + place

    def per_example(self, rows: Tensor) -> Tensor:
        """Sums packed row values `[N]` by example, `[B]`."""
        example = self.mask.nonzero()[:, 0]
        return torch.zeros(len(self.mask), dtype=rows.dtype, device=rows.device).index_add(0, example, rows)


def response_states(hidden: Tensor, input_ids: Tensor, labels: Tensor, embedding: Tensor) -> ResponseStates:
    """
    Gathers the rows that predict a response token, so that nothing after this point sees a prompt or padding.

    Args:
        hidden (`torch.Tensor` of shape `[B, S, d]`): Last hidden state.
        input_ids (`torch.Tensor` of shape `[B, S]`): Tokens.
        labels (`torch.Tensor` of shape `[B, S]`): Tokens with -100 on prompt and padding, not shifted.
        embedding (`torch.Tensor` of shape `[V, d]`): Input embedding; used as a constant.
    """
    targets = labels[:, 1:]
    valid = targets != IGNORE
    longest = max(int(valid.sum(1).max()), 1)
    # A stable sort of "is not a response" brings the response rows to the front, in order.
    rows = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)[:, :longest]
    mask = valid.gather(1, rows)
    inputs = input_ids.gather(1, rows)
    targets = targets.gather(1, rows).masked_fill(~mask, 0)
    embedding = embedding.detach()
    return ResponseStates(
        hidden=hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])),
        input_embedding=F.embedding(inputs, embedding),
        target_embedding=F.embedding(targets, embedding),
        targets=targets,
        mask=mask,
        statistics_mask=mask,
    )


def published_states(hidden: Tensor, input_ids: Tensor, targets: Tensor, embedding: Tensor) -> ResponseStates:
    """
    The same view as the released code builds it: every position stays, those outside the response embed token 0, and
    standard deviations run over all of them.

    `targets` `[B, S]` are already shifted: `targets[:, i]` is the token after `input_ids[:, i]`, or -100.
    """
    mask = targets != IGNORE
    embedding = embedding.detach()
    targets = targets.masked_fill(~mask, 0)
    return ResponseStates(
        hidden=hidden,
        input_embedding=F.embedding(input_ids.masked_fill(~mask, 0), embedding),
        target_embedding=F.embedding(targets, embedding),
        targets=targets,
        mask=mask,
        statistics_mask=None,
    )


def queries_and_keys(
    student: ResponseStates, teacher: ResponseStates, projectors: Projectors, *, scale_queries: bool = False
) -> tuple[Tensor, Tensor]:
    """
    Queries `[B, R_s, 2 d_t]` and keys `[B, R_t, 2 d_t]` (Eqs. 1 and 2).

    Keys have unit standard deviation. `scale_queries` gives queries the same, so that a discriminator can't tell them
    by scale alone.
    """
    queries = projectors.query(_precise(torch.cat([student.input_embedding, student.target_embedding], -1)))
    keys = unit_std(
        _precise(torch.cat([teacher.input_embedding, teacher.target_embedding], -1)), teacher.statistics_mask
    )
    if scale_queries:
        queries = unit_std(_precise(queries), student.statistics_mask)
    return queries, keys


def token_cross_entropy(states: ResponseStates, logits: Tensor) -> Tensor:
    """Cross entropy with the response per row `[N]`, in nats, of packed `logits` `[N, V]`."""
    return F.cross_entropy(_precise(logits), states.packed(states.targets), reduction="none")


def dual_space_terms(
    student: ResponseStates,
    teacher: ResponseStates,
    queries: Tensor,
    keys: Tensor,
    projectors: Projectors,
    student_head: LMHead,
    teacher_head: LMHead,
    *,
    student_logits: Tensor,
    student_space_divergence: DivergenceFunction,
    teacher_space_divergence: DivergenceFunction,
    temperature: float = 1.0,
    correctness_mask: bool = True,
) -> dict[str, Tensor]:
    """
    The three distillation terms of DSKD with cross-model attention (Eqs. 3 to 9), as sums per example.

    Where gradients go: `t2s_ce` trains t2s and query; `t2s_kd` the student alone (its target is a constant);
    `s2t_kd` the student's hidden state, s2t and query. Heads used across spaces are constants.

    Args:
        student, teacher ([`ResponseStates`]): The two views of the batch.
        queries (`[B, R_s, 2 d_t]`), keys (`[B, R_t, 2 d_t]`): From [`queries_and_keys`].
        projectors ([`~hf_dskd.projectors.Projectors`]): s2t and t2s.
        student_head, teacher_head ([`~hf_dskd.models.LMHead`]): To logits.
        student_logits (`[N_s, V_s]`): The student's own, packed, with their gradient.
        student_space_divergence, teacher_space_divergence: Of `(student_logits, teacher_logits)`, per row.
        temperature (`float`, *optional*, defaults to `1.0`): Divides both logits, once. No τ² factor.
        correctness_mask (`bool`, *optional*, defaults to `True`):
            Count `t2s_kd` only where the projected teacher's argmax is the response token.

    Returns:
        `dict[str, torch.Tensor]` of shape `[B]` each: `t2s_ce` and `t2s_kd` (student rows), `s2t_kd` (teacher rows),
        and the counts `t2s_correct` (student rows) and `s2t_agree` (teacher rows), which carry no gradient.
    """
    t2s_attention, s2t_attention = cross_model_attention(queries, keys, student.mask, teacher.mask)

    # N_std(h^t) + N_std(e^t_target): the teacher's state and the very token that it predicts (Eq. 5).
    teacher_value = unit_std(_precise(teacher.hidden), teacher.statistics_mask) + unit_std(
        _precise(teacher.target_embedding), teacher.statistics_mask
    )
    t2s_value = projectors.t2s(teacher_value)
    s2t_value = projectors.s2t(_precise(student.hidden))
    t2s_hidden = student.packed(t2s_attention.to(t2s_value.dtype) @ t2s_value)
    s2t_hidden = teacher.packed(s2t_attention.to(s2t_value.dtype) @ s2t_value)

    projected_teacher_logits = student_head.detach()(t2s_hidden)
    t2s_ce = token_cross_entropy(student, projected_teacher_logits)
    target_logits = projected_teacher_logits.detach()
    correct = target_logits.argmax(-1) == student.packed(student.targets)
    t2s_kd = student_space_divergence(_precise(student_logits) / temperature, _precise(target_logits) / temperature)
    if correctness_mask:
        t2s_kd = t2s_kd * correct

    with torch.no_grad():
        teacher_logits = teacher_head(teacher.packed(teacher.hidden))
    projected_student_logits = teacher_head.detach()(s2t_hidden)
    s2t_kd = teacher_space_divergence(
        _precise(projected_student_logits) / temperature, _precise(teacher_logits) / temperature
    )
    agree = projected_student_logits.detach().argmax(-1) == teacher_logits.argmax(-1)

    return {
        "t2s_ce": student.per_example(t2s_ce),
        "t2s_kd": student.per_example(t2s_kd),
        "s2t_kd": teacher.per_example(s2t_kd),
        "t2s_correct": student.per_example(correct.to(t2s_kd.dtype)),
        "s2t_agree": teacher.per_example(agree.to(t2s_kd.dtype)),
    }


def _precise(values: Tensor) -> Tensor:
    """float32, or float64 where the input is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
