"""
Dual-space distillation (arXiv 2603.22056, Eqs. 1 to 9): student and teacher are compared in both hidden spaces.

Everything here works on response rows. Axes: B examples, R positions of an example's response (padded to the longest
of the batch), N response rows of the whole batch packed together, d_s and d_t hidden sizes, V_s and V_t vocabularies.
Terms come back as *sums per example* `[B]`; only the trainer knows by how many tokens to divide.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..alignment.cross_model import unit_std
from ..data.vocabulary import shared_tokens
from ..kernels.linear_divergence import RowFunction, linear_rows
from ..methods import ALIGNMENTS, MATCHINGS
from ..models.causal_lm import hidden_size
from .cross_entropy import own_rows, response_rows
from .divergences import DivergenceFunction, precise
from .objective import Objective, Step, Terms
from .projectors import Projectors
from .states import IGNORE, ResponseStates
from .terms import TERMS


if TYPE_CHECKING:
    from ..alignment.weights import AlignmentWeights, TiledAttention
    from ..config import DSKDConfig
    from ..models.causal_lm import LMHead

logger = logging.getLogger(__name__)
STUDENT_SPACE, TEACHER_SPACE = ("t2s_ce", "t2s_kd", "t2s_correct", "t2s_rows"), ("s2t_kd", "s2t_agree")


class DualSpace(Objective):
    """
    DSKD with any alignment and matching (arXiv 2603.22056, Eqs. 9 and 16).

    Where gradients go: `t2s_ce` trains t2s and, through the attention, query; `t2s_kd` the student alone (its target
    is a constant); `s2t_kd` the student's hidden state, s2t and query. Heads used across spaces are constants.
    Positions that the alignment gives no partner count in no distillation term.
    """

    projectors: Projectors

    def __init__(self, config: DSKDConfig, pair: Any, device: torch.device):
        super().__init__(config, pair, device)
        row = self.row
        names = [*("ce", "correct"), *(STUDENT_SPACE if "student" in row.spaces else ())]
        names += ["kq"] if row.matching is not None else []
        names += TEACHER_SPACE if "teacher" in row.spaces else ()
        self.terms = tuple(TERMS[name] for name in names)
        self.shared = None
        if row.label == "teacher" or row.projector_init == "pseudo_inverse":
            tokenizer, teacher_tokenizer = pair.tokenizers
            self.shared = shared_tokens(tokenizer, teacher_tokenizer, pair.ends)
        self.label_map: Tensor | None = None
        if row.label == "teacher":
            assert self.shared is not None
            student_ids, teacher_ids = self.shared
            self.label_map = torch.full((pair.teacher.rows,), -1, dtype=torch.int64)
            self.label_map[teacher_ids] = student_ids
            self.label_map = self.label_map.to(device)
        width, teacher_width = hidden_size(pair.student.config), hidden_size(pair.teacher.config)
        self.projectors = Projectors(width, teacher_width, seed=config.seed, has_query=row.has_queries).to(device)
        if row.matching is not None:
            self.matching = MATCHINGS[row.matching].load()(config, 2 * teacher_width, config.seed + 1, device)

    def start(self, student_head: LMHead, teacher_head: LMHead) -> None:
        """Sets the projectors from the two heads, where the method has them so."""
        if self.row.projector_init == "pseudo_inverse":
            assert self.shared is not None
            residuals = self.projectors.init_from_heads(student_head, teacher_head, *self.shared)
            logger.info("projectors from the heads over %d shared tokens: %s", len(self.shared[0]), residuals)

    def __call__(self, student: ResponseStates, teacher: ResponseStates, step: Step) -> Terms:
        queries, keys = self.queries_and_keys(student, teacher)
        alignment = ALIGNMENTS[str(self.row.alignment)].load()(student, teacher, queries, keys)
        terms = self.compare(student, teacher, alignment, step)
        if self.matching is not None:
            assert queries is not None and keys is not None
            terms.sums["kq"], terms.features = self.matching(student, teacher, queries, keys, step.seed)
            terms.student_loss = terms.student_loss + self.weights(step)["kq"] * terms.sums["kq"].sum()
        return terms

    def queries_and_keys(
        self, student: ResponseStates, teacher: ResponseStates
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Makes queries and keys (see [`queries_and_keys`]); `None` for an alignment without."""
        if not self.row.has_queries:
            return None, None
        return queries_and_keys(student, teacher, self.projectors, scale_queries=self.config.scale_queries)

    def compare(
        self,
        student: ResponseStates,
        teacher: ResponseStates,
        alignment: AlignmentWeights | TiledAttention,
        step: Step,
    ) -> Terms:
        """Computes the terms of both spaces under an alignment, the method's or another."""
        row, rates = self.row, self.weights(step)
        # The matching's weight isn't of rows.
        weights = tuple(
            {name: rate for name, rate in rates.items() if name in names}
            for names in (("ce", *STUDENT_SPACE), TEACHER_SPACE)
        )
        rows, sums, student_loss, teacher_loss = dual_space_terms(
            *(student, teacher, alignment, self.projectors),
            student_space_divergence=self.divergence("student", step) if "student" in row.spaces else None,
            teacher_space_divergence=self.divergence("teacher", step) if "teacher" in row.spaces else None,
            teacher_value=row.teacher_value,
            label_map=self.label_map,
            correctness_mask=self.config.correctness_mask,
            weights=weights,
            **self.chunks(student.hidden.device),
        )
        assert student_loss is not None
        return Terms(sums, student.counts, student_loss, teacher_loss, teacher.counts, rows["ce"])


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


def teacher_labels(predictions: Tensor, teacher: ResponseStates, t2s: Tensor, label_map: Tensor) -> Tensor:
    """
    The teacher's own prediction as a token of the student, `[B, R_s]`; -100 where the student has no such token.

    Of `predictions` `[N_t]`, the teacher's likeliest tokens, `t2s` `[B, R_s, R_t]` names one teacher position for each
    of the student, or none; `label_map` `[V_t]` has the student's token for each of the teacher's, or -1.
    """
    labels = teacher.padded(label_map[predictions]).gather(1, t2s.argmax(-1))
    return labels.masked_fill((labels < 0) | (t2s.sum(-1) == 0), IGNORE)


def student_space_rows(divergence: DivergenceFunction, correctness_mask: bool = True) -> RowFunction:
    """
    Terms of student space per row (arXiv 2603.22056, Eqs. 6 and 7), as a function of the student's and the projected
    teacher's logits `[n, V_s]`, `targets` `[n]`, the projected teacher's `labels` `[n]`, and which rows are `paired`
    `[n]`.

    `divergence` is of raw `(student_logits, teacher_logits)`, per row. With `correctness_mask` it counts only where
    the projected teacher's argmax is its label.
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


def dual_space_terms(
    student: ResponseStates,
    teacher: ResponseStates,
    alignment: AlignmentWeights | TiledAttention,
    projectors: Projectors,
    *,
    student_space_divergence: DivergenceFunction | None,
    teacher_space_divergence: DivergenceFunction | None,
    teacher_value: str = "state_and_target",
    label_map: Tensor | None = None,
    correctness_mask: bool = True,
    weights: Sequence[dict[str, float] | None] = (None, None),
    **chunks: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None, Tensor | None]:
    """
    Computes the student's own terms and the distillation terms of DSKD (arXiv 2603.22056, Eqs. 4 to 9).

    Args:
        student, teacher ([`ResponseStates`]): The two views of the batch, with their heads.
        alignment ([`~hf_dskd.alignment.weights.AlignmentWeights`]): Of their positions.
        projectors ([`Projectors`]): s2t and t2s.
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
    sums: dict[str, Tensor] = {}
    teacher_total = predictions = labels = None
    if teacher_space_divergence is not None:
        terms = teacher_space_rows(teacher_space_divergence)
        teacher_total, rows = _in_teacher_space(terms, student, teacher, alignment, projectors, weights[1], **chunks)
        predictions = rows.pop("prediction")
        sums = {name: teacher.per_example(values) for name, values in rows.items()}
    if student_space_divergence is None:
        student_total, rows = own_rows(student, weights[0], **chunks)
    else:
        if label_map is not None:
            if predictions is None:
                predictions = teacher_predictions(teacher, **chunks)
            labels = teacher_labels(predictions, teacher, alignment.t2s, label_map)
        terms = student_space_rows(student_space_divergence, correctness_mask)
        student_total, rows = _in_student_space(
            *(terms, student, teacher, alignment, projectors, labels, teacher_value, weights[0]), **chunks
        )
    # In one order on every process: ranks add their logs up by place.
    own = {name: student.per_example(values) for name, values in rows.items()}
    return rows, own | sums, student_total, teacher_total


def teacher_predictions(teacher: ResponseStates, **chunks: Any) -> Tensor:
    """Returns the teacher's likeliest token at each of its rows, `[N_t]`."""

    def terms(logits: Tensor) -> dict[str, Tensor]:
        return {"prediction": logits.argmax(-1)}

    hidden = teacher.packed(teacher.hidden)
    return linear_rows(terms, [hidden], [teacher.head.detach()], weights={}, **chunks)[1]["prediction"]


def _in_teacher_space(
    terms: RowFunction,
    student: ResponseStates,
    teacher: ResponseStates,
    alignment: AlignmentWeights | TiledAttention,
    projectors: Projectors,
    weights: dict[str, float] | None,
    **chunks: Any,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The student's states projected into the teacher's space, and compared there (Eq. 8); terms `[N_t]`."""
    value = student.unpacked(projectors.s2t(precise(student.packed(student.hidden))))
    return linear_rows(
        terms,
        [teacher.packed(alignment.to_teacher(value)), teacher.packed(teacher.hidden)],
        [teacher.head.detach()] * 2,
        [teacher.packed(alignment.has_student)],
        weights=weights,
        **chunks,
    )


def _in_student_space(
    terms: RowFunction,
    student: ResponseStates,
    teacher: ResponseStates,
    alignment: AlignmentWeights | TiledAttention,
    projectors: Projectors,
    labels: Tensor | None,
    teacher_value: str,
    weights: dict[str, float] | None,
    **chunks: Any,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The teacher's states projected into the student's space, and compared there (Eqs. 4 to 7); terms `[N_s]`."""
    paired = student.mask & alignment.has_teacher
    if labels is None:
        labels = student.targets
    else:
        paired, labels = paired & (labels != IGNORE), labels.clamp(min=0)
    value = precise(teacher.hidden)
    if teacher_value == "state_and_target":
        # N_std(h^t) + N_std(e^t_target): the teacher's state and the very token that it predicts.
        value = unit_std(value, teacher.statistics_mask) + unit_std(
            precise(teacher.target_embedding), teacher.statistics_mask
        )
    value = teacher.unpacked(projectors.t2s(teacher.packed(value)))
    return linear_rows(
        terms,
        [student.packed(student.hidden), student.packed(alignment.to_student(value))],
        [student.head, student.head.detach()],
        [student.packed(values) for values in (student.targets, labels, paired)],
        weights=weights,
        **chunks,
    )
