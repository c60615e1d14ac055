"""
Dual-space distillation (arXiv 2603.22056, Eqs. 1 to 9): student and teacher are compared in both hidden spaces.

Everything here works on response rows. Axes: B examples, R positions of an example's response (padded to the longest
of the batch), N response rows of the whole batch packed together, d_s and d_t hidden sizes, V_s and V_t vocabularies.
Terms come back as *sums per example* `[B]`; only the trainer knows by how many tokens to divide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..alignment.cross_model import unit_std
from ..alignment.weights import AlignmentWeights, TiledAttention
from ..kernels.linear_divergence import RowFunction, linear_rows
from ..models.causal_lm import answer_positions
from .divergences import DivergenceFunction, precise


if TYPE_CHECKING:
    from ..models.causal_lm import LMHead
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
        chunks (`[B, R]`, *optional*): Chunk of the token to be predicted, -1 outside the response.
        partners (`[B, R]`, *optional*): Which response token of the other model stands for it, -1 for none.
        places (`[B, R]`, *optional*): Which answer of the row it belongs to, and where in it; -1 outside the response.
        silent (`[B, R]`, bool, *optional*): Whether it stands before the text of an answer, or closes it.
    """

    hidden: Tensor
    input_embedding: Tensor
    target_embedding: Tensor
    targets: Tensor
    mask: Tensor
    statistics_mask: Tensor | None
    chunks: Tensor | None = None
    partners: Tensor | None = None
    places: Tensor | None = None
    silent: Tensor | None = None

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
        return sum_by_example(rows, self.mask)

    def padded(self, rows: Tensor) -> Tensor:
        """Packed row values `[N]` as `[B, R]`, 0 where there is no row."""
        return torch.zeros(self.mask.shape, dtype=rows.dtype, device=rows.device).masked_scatter(self.mask, rows)

    def unpacked(self, rows: Tensor) -> Tensor:
        """Packed rows `[N, d]` as `[B, R, d]`, 0 where there is no row."""
        padded = rows.new_zeros(*self.mask.shape, rows.shape[-1])
        return padded.index_put(self.mask.nonzero(as_tuple=True), rows)


def sum_by_example(rows: Tensor, mask: Tensor) -> Tensor:
    """Sums values `[N]` of the rows that `mask` `[B, R]` marks by example, `[B]`."""
    example = mask.nonzero()[:, 0]
    return torch.zeros(len(mask), dtype=rows.dtype, device=rows.device).index_add(0, example, rows)


def response_states(
    hidden: Tensor,
    input_ids: Tensor,
    labels: Tensor,
    embedding: Tensor,
    chunks: Tensor | None = None,
    partners: Tensor | None = None,
    gathered: bool = False,
    places: Tensor | None = None,
    silent: Tensor | None = None,
) -> ResponseStates:
    """
    Gathers the rows that predict a response token, so that nothing after this point sees a prompt or padding.

    Args:
        hidden (`torch.Tensor` of shape `[B, S, d]`, or `[B, R, d]` with `gathered`): Last hidden state.
        input_ids (`torch.Tensor` of shape `[B, S]`): Tokens.
        labels (`torch.Tensor` of shape `[B, S]`): Tokens with -100 on prompt and padding, not shifted.
        embedding (`torch.Tensor` of shape `[V, d]`): Input embedding; used as a constant.
        chunks, partners (`torch.Tensor` of shape `[B, S]`, *optional*): Of each token, -1 where there is none.
        gathered (`bool`, *optional*, defaults to `False`):
            `hidden` has only the rows that predict a response token, as a teacher's.
        places (`torch.Tensor` of shape `[B, S]`, *optional*), silent (`[B, S]`, bool, *optional*):
            Of each token, as [`~hf_dskd.data.collator.DualCollator`] has them.
    """

    def of_targets(values: Tensor | None, nothing: int = -1) -> Tensor | None:
        return None if values is None else values[:, 1:].gather(1, rows).masked_fill(~mask, nothing)

    rows, mask = answer_positions(labels)
    inputs = input_ids.gather(1, rows)
    targets = labels[:, 1:].gather(1, rows).masked_fill(~mask, 0)
    embedding = embedding.detach()
    if not gathered:
        hidden = hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return ResponseStates(
        hidden=hidden,
        input_embedding=F.embedding(inputs, embedding),
        target_embedding=F.embedding(targets, embedding),
        targets=targets,
        mask=mask,
        statistics_mask=mask,
        chunks=of_targets(chunks),
        partners=of_targets(partners),
        places=of_targets(places),
        silent=of_targets(silent, 0),
    )


def published_states(
    hidden: Tensor, input_ids: Tensor, targets: Tensor, embedding: Tensor, chunks: Tensor | None = None
) -> ResponseStates:
    """
    The same view as the released code builds it: every position stays, those outside the response embed token 0, and
    standard deviations run over all of them.

    `targets` `[B, S]` are already shifted: `targets[:, i]` is the token after `input_ids[:, i]`, or -100. `chunks`
    `[B, S]` are those of the *input* tokens, by which that code aligns
    (see [`~hf_dskd.alignment.chunked.input_chunks`]).
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
        chunks=chunks,
    )


def queries_and_keys(
    student: ResponseStates, teacher: ResponseStates, projectors: Projectors, *, scale_queries: bool = False
) -> tuple[Tensor, Tensor]:
    """
    Queries `[B, R_s, 2 d_t]` and keys `[B, R_t, 2 d_t]` (Eqs. 1 and 2).

    Keys have unit standard deviation. `scale_queries` gives queries the same, so that a discriminator can't tell them
    by scale alone.
    """
    pairs = precise(torch.cat([student.input_embedding, student.target_embedding], -1))
    if student.statistics_mask is None:
        # As released: every position has a query.
        queries = projectors.query(pairs)
    else:
        queries = student.unpacked(projectors.query(student.packed(pairs)))
    keys = unit_std(
        precise(torch.cat([teacher.input_embedding, teacher.target_embedding], -1)), teacher.statistics_mask
    )
    if scale_queries:
        queries = unit_std(precise(queries), student.statistics_mask)
    return queries, keys


def token_cross_entropy(states: ResponseStates, logits: Tensor) -> Tensor:
    """Cross entropy with the response per row `[N]`, in nats, of packed `logits` `[N, V]`."""
    return F.cross_entropy(precise(logits), states.packed(states.targets), reduction="none")


def teacher_labels(predictions: Tensor, teacher: ResponseStates, t2s: Tensor, label_map: Tensor) -> Tensor:
    """
    The teacher's own prediction as a token of the student, `[B, R_s]`; -100 where the student has no such token.

    Args:
        predictions (`torch.Tensor` of shape `[N_t]`): The teacher's likeliest token at each of its rows.
        teacher ([`ResponseStates`]): Its view of the batch.
        t2s (`torch.Tensor` of shape `[B, R_s, R_t]`): One teacher position for each student position, or none.
        label_map (`torch.Tensor` of shape `[V_t]`): The student's token for each of the teacher's, -1 for none.
    """
    labels = teacher.padded(label_map[predictions]).gather(1, t2s.argmax(-1))
    return labels.masked_fill((labels < 0) | (t2s.sum(-1) == 0), IGNORE)


def response_rows(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross entropy (`ce`) with `targets` `[n]`, and where the likeliest token is the target (`correct`)."""
    return {
        "ce": F.cross_entropy(logits, targets, reduction="none"),
        "correct": (logits.argmax(-1) == targets).to(logits.dtype),
    }


def student_space_rows(divergence: DivergenceFunction, correctness_mask: bool = True) -> RowFunction:
    """
    Terms of student space per row (arXiv 2603.22056, Eqs. 6 and 7), from the student's and the projected teacher's
    logits.

    Args:
        divergence: Of raw `(student_logits, teacher_logits)`, per row.
        correctness_mask (`bool`, *optional*, defaults to `True`):
            Count the divergence only where the projected teacher's argmax is its label.

    Returns:
        A function of both logits `[n, V_s]`, `targets` `[n]`, the projected teacher's `labels` `[n]`, and which rows
        are `paired` `[n]` with one.
    """

    def terms(
        student: Tensor, projected: Tensor, targets: Tensor, labels: Tensor, paired: Tensor
    ) -> dict[str, Tensor]:
        target = projected.detach()
        correct = (target.argmax(-1) == labels) & paired
        t2s_kd = divergence(student, target)
        return {
            **response_rows(student, targets),
            "t2s_ce": F.cross_entropy(projected, labels, reduction="none") * paired,
            "t2s_kd": t2s_kd * (correct if correctness_mask else paired),
            "t2s_correct": correct.to(target.dtype),
            "t2s_rows": paired.to(target.dtype),
        }

    return terms


def teacher_space_rows(divergence: DivergenceFunction) -> RowFunction:
    """
    Terms of teacher space per row (arXiv 2603.22056, Eq. 8), from the projected student's and the teacher's logits
    `[n, V_t]` and which rows are `paired` `[n]` with a student position.
    """

    def terms(projected: Tensor, teacher: Tensor, paired: Tensor) -> dict[str, Tensor]:
        teacher = teacher.detach()
        predictions = teacher.argmax(-1)
        agree = (projected.argmax(-1) == predictions) & paired
        return {
            "s2t_kd": divergence(projected, teacher) * paired,
            "s2t_agree": agree.to(teacher.dtype),
            "prediction": predictions,
        }

    return terms


def prediction_rows(logits: Tensor) -> dict[str, Tensor]:
    """The likeliest token of each row."""
    return {"prediction": logits.argmax(-1)}


def dual_space_terms(
    student: ResponseStates,
    teacher: ResponseStates,
    alignment: AlignmentWeights | TiledAttention,
    projectors: Projectors,
    student_head: LMHead,
    teacher_head: LMHead,
    *,
    student_space_divergence: DivergenceFunction | None,
    teacher_space_divergence: DivergenceFunction | None,
    teacher_value: str = "state_and_target",
    label_map: Tensor | None = None,
    correctness_mask: bool = True,
    weights: tuple[dict[str, float], dict[str, float]] | None = None,
    **chunks: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None, Tensor | None]:
    """
    The student's own terms and the distillation terms of DSKD (arXiv 2603.22056, Eqs. 4 to 9), as sums per example.

    Where gradients go: `t2s_ce` trains t2s and, through the attention, query; `t2s_kd` the student alone (its target
    is a constant); `s2t_kd` the student's hidden state, s2t and query. Heads used across spaces are constants.
    Positions that the alignment gives no partner count in no distillation term.

    Args:
        student, teacher ([`ResponseStates`]): The two views of the batch.
        alignment ([`~hf_dskd.alignment.weights.AlignmentWeights`]): Of their positions.
        projectors ([`~hf_dskd.projectors.Projectors`]): s2t and t2s.
        student_head, teacher_head ([`~hf_dskd.models.causal_lm.LMHead`]): To logits.
        student_space_divergence, teacher_space_divergence:
            Of raw `(student_logits, teacher_logits)`, per row, temperature inside. `None` leaves that space out.
        teacher_value (`str`, *optional*, defaults to `"state_and_target"`):
            What t2s projects: N_std(h) + N_std(target embedding) (Eq. 5), or the hidden `"state"` alone.
        label_map (`[V_t]`, *optional*):
            The student's token for each of the teacher's. With it the projected teacher's label is the teacher's own
            prediction (DSKDv2, arXiv 2504.11426) instead of the response.
        correctness_mask (`bool`, *optional*, defaults to `True`):
            Count `t2s_kd` only where the projected teacher's argmax is its label.
        weights (two `dict[str, float]`, *optional*):
            Of the terms of student rows and of teacher rows in the loss. With them the gradient is computed along the
            way and terms carry none; without them each term carries its own
            (see [`~hf_dskd.kernels.linear_divergence.linear_rows`], which takes the other arguments).

    Returns:
        The terms of student rows, `[N_s]` each. All terms as sums, `[B]` each: `ce` with the count `correct`, `t2s_ce`
        and `t2s_kd` with the counts `t2s_correct` and `t2s_rows` (student rows), `s2t_kd` with the count `s2t_agree`
        (teacher rows). The weighted sums over student rows and over teacher rows, scalars; `None` without `weights`.
    """
    student_weights, teacher_weights = (None, None) if weights is None else weights
    terms: dict[str, Tensor] = {}
    teacher_total = predictions = None
    teacher_hidden = teacher.packed(teacher.hidden)
    if teacher_space_divergence is not None:
        value = student.unpacked(projectors.s2t(precise(student.packed(student.hidden))))
        teacher_total, rows = linear_rows(
            teacher_space_rows(teacher_space_divergence),
            [teacher.packed(alignment.to_teacher(value)), teacher_hidden],
            [teacher_head.detach()] * 2,
            [teacher.packed(alignment.has_student)],
            weights=teacher_weights,
            **chunks,
        )
        predictions = rows.pop("prediction")
        terms |= {name: teacher.per_example(values) for name, values in rows.items()}

    if student_space_divergence is None:
        student_total, rows = own_rows(student, student_head, student_weights, **chunks)
    else:
        paired, labels = student.mask & alignment.has_teacher, student.targets
        if label_map is not None:
            if predictions is None:
                rows = linear_rows(prediction_rows, [teacher_hidden], [teacher_head.detach()], weights={}, **chunks)[1]
                predictions = rows["prediction"]
            assert isinstance(alignment, AlignmentWeights)
            labels = teacher_labels(predictions, teacher, alignment.t2s, label_map)
            paired, labels = paired & (labels != IGNORE), labels.clamp(min=0)
        value = precise(teacher.hidden)
        if teacher_value == "state_and_target":
            # N_std(h^t) + N_std(e^t_target): the teacher's state and the very token that it predicts.
            value = unit_std(value, teacher.statistics_mask) + unit_std(
                precise(teacher.target_embedding), teacher.statistics_mask
            )
        value = teacher.unpacked(projectors.t2s(teacher.packed(value)))
        student_total, rows = linear_rows(
            student_space_rows(student_space_divergence, correctness_mask),
            [student.packed(student.hidden), student.packed(alignment.to_student(value))],
            [student_head, student_head.detach()],
            [student.packed(values) for values in (student.targets, labels, paired)],
            weights=student_weights,
            **chunks,
        )
    # In one order on every process: ranks add their logs up by place.
    own = {name: student.per_example(values) for name, values in rows.items()}
    return rows, own | terms, student_total, teacher_total


def own_rows(
    student: ResponseStates, head: LMHead, weights: dict[str, float] | None, **chunks: Any
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The student alone: see [`response_rows`] and [`~hf_dskd.kernels.linear_divergence.linear_rows`]."""
    hidden, targets = student.packed(student.hidden), student.packed(student.targets)
    return linear_rows(response_rows, [hidden], [head], [targets], weights=weights, **chunks)
