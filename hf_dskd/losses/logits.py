"""
Losses between next-token distributions, without hidden states: one vocabulary, sorted probabilities, a mapped one.

Axes: B examples, R positions of a response, N student and M teacher response rows packed together, P paired rows,
V_s and V_t vocabularies. Logits come already divided by their temperatures; values are per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.linear_divergence import linear_rows
from .cross_entropy import response_rows
from .divergences import DivergenceFunction, precise
from .objective import Objective, Step, Terms
from .states import ResponseStates
from .temperature import temperatures
from .terms import TERMS


# With 150,000 tokens this much on each adds 1.5e-7, the rounding of float32; its logarithm is −27.6.
TARGET_FLOOR = 1e-12


class Logits(Objective):
    """
    Compares the student's logits with those of the teacher's position that stands for it: `kd`.

    A method of this family says how two logits are compared, and which position stands for which.
    """

    terms = (TERMS["ce"], TERMS["correct"], TERMS["kd"])

    def compare(self, step: Step) -> Callable[..., Tensor]:
        """
        Returns the function that compares rows of logits.

        It takes `student_logits` `[n, V_s]`, `teacher_logits` `[n, V_t]`, the student's `targets` `[n]` and which rows
        are `paired` `[n]` with one of the teacher, and returns `[n]`. Rows are independent.
        """
        raise NotImplementedError

    def partners(self, student: ResponseStates, teacher: ResponseStates) -> Tensor:
        """Finds the teacher's packed row for each of the student's, `[N_s]`, -1 for none: the i-th for the i-th."""
        own, theirs = (
            (states.mask.cumsum(1) - 1).masked_fill(~states.mask, -1) if states.places is None else states.places
            for states in (student, teacher)
        )
        return rows_at_places(own, theirs, student.mask, teacher.mask)

    def __call__(self, student: ResponseStates, teacher: ResponseStates, step: Step) -> Terms:
        partners, compare = self.partners(student, teacher), self.compare(step)
        teacher_hidden = teacher.packed(teacher.hidden)
        if len(teacher_hidden):
            teacher_hidden = teacher_hidden[partners.clamp(min=0)]
        else:
            teacher_hidden = teacher_hidden.new_zeros(len(partners), teacher_hidden.shape[1])

        def terms(own: Tensor, theirs: Tensor, targets: Tensor, paired: Tensor) -> dict[str, Tensor]:
            return {**response_rows(own, targets), "kd": compare(own, theirs, targets, paired)}

        loss, rows = linear_rows(
            terms,
            [student.packed(student.hidden), teacher_hidden],
            [student.head, teacher.head.detach()],
            [student.packed(student.targets), partners >= 0],
            weights=self.weights(step),
            **self.chunks(student.hidden.device),
        )
        assert loss is not None
        return Terms(
            {name: student.per_example(values) for name, values in rows.items()},
            *(student.counts, loss, None, teacher.counts, rows["ce"]),
        )


class SharedVocabulary(Logits):
    """f(p, q) of two models with one tokenizer (arXiv 1503.02531): `kd`."""

    def compare(self, step: Step) -> Callable[..., Tensor]:
        divergence = self.divergence("logits", step)
        return lambda own, theirs, targets, paired: shared_prefix_kd(own, theirs, divergence) * paired


class SortedProbabilities(Logits):
    """L1 distance of sorted probabilities (arXiv 2402.12030): `uld`."""

    def compare(self, step: Step) -> Callable[..., Tensor]:
        return lambda own, theirs, targets, paired: uld(own, theirs) * paired


class MappedVocabulary(Logits):
    """f(M p, q), tokens and vocabularies mapped by least edit distance (arXiv 2401.10491): `min_edit`."""

    def __init__(self, config: Any, pair: Any, device: torch.device):
        super().__init__(config, pair, device)
        self.vocabulary_map: Tensor = pair.vocabulary_map.to(device)

    def partners(self, student: ResponseStates, teacher: ResponseStates) -> Tensor:
        """Packs the partners that were found by edit distance when the data was tokenized."""
        assert student.partners is not None
        return packed_partners(student.partners, student.mask, teacher.mask)

    def compare(self, step: Step) -> Callable[..., Tensor]:
        divergence, vocabulary_map = self.divergence("logits", step), self.vocabulary_map
        temperature = temperatures(self.config, "logits", step.progress).teacher

        def rows(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, paired: Tensor) -> Tensor:
            return mapped_kd(student_logits, teacher_logits, paired, vocabulary_map, targets, divergence, temperature)

        return rows


def shared_prefix_kd(student_logits: Tensor, teacher_logits: Tensor, divergence: DivergenceFunction) -> Tensor:
    """
    Divergence of two models with one tokenizer, per row `[N]`; the teacher's logits `[N, V_t]` are a constant.

    Models of one family pad the same vocabulary to different sizes. Both distributions are those over the first
    min(V_s, V_t) tokens, renormalised.
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    return divergence(student_logits[..., :shared], teacher_logits[..., :shared].detach())


def rows_at_places(
    student_places: Tensor, teacher_places: Tensor, student_mask: Tensor, teacher_mask: Tensor
) -> Tensor:
    """
    Pairs the i-th token of an answer of the student with the i-th of the same answer of the teacher.

    The places `[B, R]` of tokens rise along an example, -1 for one that has no partner; the masks say which rows are
    real. Returns, int64 `[N]`, for each packed row of the student that of the packed teacher, or -1 where there is
    none, as where the teacher's answer is shorter.
    """
    student, teacher = (
        torch.where(places < 0, -1, places + 2**40 * torch.arange(len(places), device=places.device).unsqueeze(1))[
            mask
        ]
        for places, mask in ((student_places, student_mask), (teacher_places, teacher_mask))
    )
    rows = (teacher >= 0).nonzero()[:, 0]
    if not len(rows):
        return torch.full_like(student, -1)
    found = rows[torch.searchsorted(teacher[rows], student).clamp_max(len(rows) - 1)]
    return torch.where((teacher[found] == student) & (student >= 0), found, -1)


def uld(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """
    Universal Logit Distillation (arXiv 2402.12030): Σ_k |q_(k) − p_(k)| over probabilities sorted in descending order,
    per row `[N]`, between 0 and 2; the teacher's logits `[N, V_t]` are a constant.

    The smaller vocabulary is filled up with zeros. The paper and the released code have no temperature. Computed in
    float32 (float64 stays float64).
    """
    # Stable: 16-bit logits are often equal, and which of them gets which gradient must not vary.
    q = precise(student_logits).softmax(-1).sort(dim=-1, descending=True, stable=True).values
    p = precise(teacher_logits.detach()).softmax(-1).sort(dim=-1, descending=True).values
    shared = min(q.shape[-1], p.shape[-1])
    # Of the two rests one is empty.
    return (q[..., :shared] - p[..., :shared]).abs().sum(-1) + q[..., shared:].sum(-1) + p[..., shared:].sum(-1)


def packed_partners(partner: Tensor, student_mask: Tensor, teacher_mask: Tensor) -> Tensor:
    """
    Teacher positions per example as rows of the packed teacher, per packed student row `[N]`; -1 stays -1.

    `partner` `[B, R_s]` has for each student position the place of its partner among the teacher's response rows of
    that example, or -1 (see [`~hf_dskd.alignment.min_edit.partners`]); the masks say which positions are response
    rows.
    """
    counts = teacher_mask.sum(1)
    first = (counts.cumsum(0) - counts).unsqueeze(1)
    return torch.where(partner >= 0, partner + first, -1)[student_mask]


def mapped_target(
    teacher_logits: Tensor,
    paired: Tensor,
    vocabulary_map: Tensor,
    targets: Tensor,
    student_vocabulary: int,
    temperature: float = 1.0,
) -> Tensor:
    """
    What minimum-edit-distance distillation teaches, as log-probabilities `[N, V_s]` (FuseLLM, arXiv 2401.10491).

    A `paired` row `[N]` gets the distribution of its partner, `teacher_logits` `[N, V_t]`, carried over by
    `vocabulary_map` `[V_t]`: each student token has the sum of the probabilities of the teacher's tokens that map to
    it; those that map to nothing (-1) are left out of the teacher's softmax. The released code takes the largest of
    their logits instead, which hands the others' mass to unrelated tokens. A row without a partner gets its response
    token of `targets` `[N]` alone.

    Divided by `temperature`, no entry is below the logarithm of `TARGET_FLOOR`, so that every divergence is finite and
    adding up the floors changes none of them by more than rounding. A floor before the temperature would become
    `TARGET_FLOOR^(1/τ)`, which outweighs the rest of the target in a large vocabulary. Reverse KL charges 27.6 nats
    for a token that the target rules out.
    """
    nothing = vocabulary_map < 0
    p = precise(teacher_logits.detach()).masked_fill(nothing, -torch.inf).softmax(-1)
    nowhere = p.new_zeros(len(p), student_vocabulary)
    carried = nowhere.index_add(1, vocabulary_map.masked_fill(nothing, 0), p)
    alone = nowhere.scatter(1, targets.unsqueeze(1), 1.0)
    target = torch.where(paired.unsqueeze(1), carried, alone).log()
    return target.clamp(min=temperature * math.log(TARGET_FLOOR))


def mapped_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    paired: Tensor,
    vocabulary_map: Tensor,
    targets: Tensor,
    divergence: DivergenceFunction,
    temperature: float = 1.0,
) -> Tensor:
    """
    Divergence from the teacher's distribution over the student's vocabulary, per row `[N]`.

    Of `student_logits` `[N, V_s]`, with their gradient, and of what [`mapped_target`] makes of the other arguments;
    `divergence` divides the teacher's side by `temperature`.
    """
    target = mapped_target(teacher_logits, paired, vocabulary_map, targets, student_logits.shape[-1], temperature)
    return divergence(student_logits, target)
