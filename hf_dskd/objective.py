"""From two last hidden states to the training loss: which terms a method has, and how they are weighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .adversary import Features, matching_term, published_matching_term
from .alignment.chunked import chunk_mask, exact_pairs, identity_mask, mean_weights
from .alignment.cross_model import cross_model_attention
from .losses.divergences import DivergenceFunction, divergence_function
from .losses.dual_space import ResponseStates, dual_space_terms, queries_and_keys, token_cross_entropy
from .losses.likelihood import boundary_after, boundary_probability, likelihood_matching
from .losses.logits import mapped_kd, packed_partners, paired_rows, shared_prefix_kd, uld
from .losses.temperature import Temperatures, schedule_factor, with_temperature


if TYPE_CHECKING:
    from .config import DSKDConfig
    from .models import LMHead
    from .projectors import Projectors


@dataclass
class Terms:
    """
    What one batch contributes.

    Attributes:
        student: Sums that are divided by student response tokens, `[B]` each. Those in the loss carry a gradient.
        teacher: Sums that are divided by teacher response tokens, `[B]` each.
        student_tokens, teacher_tokens: Response tokens per example, `[B]`.
        features: Detached queries and keys of the response tokens for the critic; `None` without one.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    student_tokens: Tensor
    teacher_tokens: Tensor | None = None
    features: Features | None = None


@dataclass(frozen=True)
class PairConstants:
    """
    What a method must know of the pair of vocabularies.

    Attributes:
        label_map: The student's token for the same bytes as each of the teacher's, `[V_t]`, -1 for none.
        vocabulary_map: The student's token nearest to each of the teacher's by edit distance, `[V_t]`, -1 for none.
        boundary_tokens: Which tokens begin with whitespace or end the text, `[V_s]` and `[V_t]`.
        end_tokens: End-of-sequence token of student and teacher.
    """

    label_map: Tensor | None = None
    vocabulary_map: Tensor | None = None
    boundary_tokens: tuple[Tensor, Tensor] | None = None
    end_tokens: tuple[int, int] | None = None


def student_terms(states: ResponseStates, logits: Tensor) -> Terms:
    """Cross entropy and accuracy of the student alone. `logits` are packed `[N_s, V_s]`."""
    correct = logits.detach().argmax(-1) == states.packed(states.targets)
    ce = token_cross_entropy(states, logits)
    return Terms(
        student={"ce": states.per_example(ce), "correct": states.per_example(correct.to(ce.dtype))},
        teacher={},
        student_tokens=states.counts,
    )


def temperatures(config: DSKDConfig, space: str, progress: float) -> Temperatures:
    """Of the student's and the teacher's logits in `space`, after `progress` (0 to 1) of the training."""
    student = config.student_temperature or config.kd_temperature
    teacher = config.teacher_temperature or config.kd_temperature
    if config.as_published:
        # There it divides once more, and in the student space of different vocabularies only.
        student = teacher = config.kd_temperature
        if space == "student" and not config.method_row.same_vocabulary:
            teacher = student * (config.teacher_temperature or 1.0)
    if space == "teacher" and config.teacher_space_temperature is not None:
        student = teacher = config.teacher_space_temperature
    ratio = (config.final_kd_temperature or config.kd_temperature) / config.kd_temperature
    factor = schedule_factor(config.temperature_schedule, ratio, progress)
    return Temperatures(student * factor, teacher * factor)


def space_divergence(config: DSKDConfig, space: str, progress: float = 0.0) -> DivergenceFunction:
    """The divergence of raw logits in `space`: `"student"`, `"teacher"`, or `"logits"` for methods with neither."""
    name = config.divergence
    if space == "student":
        name = config.student_space_divergence or name
    elif space == "teacher":
        # The released code has forward KL there, whatever the divergence is.
        name = config.teacher_space_divergence or ("forward_kl" if config.as_published else name)
    divergence = divergence_function(
        name,
        skew_lambda=config.skew_lambda,
        adaptive_kl_alpha=config.adaptive_kl_alpha,
        js_weight=config.js_weight,
    )
    return with_temperature(divergence, temperatures(config, space, progress), config.temperature_scaling)


def distillation_terms(
    config: DSKDConfig,
    student: ResponseStates,
    teacher: ResponseStates,
    student_head: LMHead,
    teacher_head: LMHead,
    projectors: Projectors | None = None,
    critic: nn.Module | None = None,
    example_ids: Tensor | None = None,
    seed: int = 0,
    constants: PairConstants | None = None,
    progress: float = 0.0,
) -> Terms:
    """
    Every term of the configured method.

    The critic's dropout is a function of `example_ids` `[B]` (by default their places in the batch) and `seed`. Its
    own loss is not here: it has an optimizer of its own, and its parameters must not receive a gradient in the
    student's backward pass. `progress` (0 to 1) is how much of the training is done.
    """
    student_logits = student_head(student.packed(student.hidden))
    terms = student_terms(student, student_logits)
    terms.teacher_tokens = teacher.counts
    constants = constants or PairConstants()
    row = config.method_row
    if not row.dual_space:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher.packed(teacher.hidden))
        if row.spaces == ("likelihood",):
            terms.teacher["alm"] = _likelihood_term(
                config, student, teacher, student_logits, teacher_logits, constants
            )
        else:
            divergence = space_divergence(config, "logits", progress)
            terms.student["kd"] = _logit_term(
                row.spaces[0], student, teacher, student_logits, teacher_logits, divergence, constants.vocabulary_map
            )
        return terms

    assert projectors is not None
    queries = keys = None
    if row.has_queries:
        queries, keys = queries_and_keys(student, teacher, projectors, scale_queries=config.scale_queries)
    t2s_weights, s2t_weights = alignment_weights(row.alignment, student, teacher, queries, keys)
    dual = dual_space_terms(
        student,
        teacher,
        t2s_weights,
        s2t_weights,
        projectors,
        student_head,
        teacher_head,
        student_logits=student_logits,
        student_space_divergence=space_divergence(config, "student", progress) if "student" in row.spaces else None,
        teacher_space_divergence=space_divergence(config, "teacher", progress) if "teacher" in row.spaces else None,
        teacher_value=row.teacher_value,
        label_map=constants.label_map if row.label == "teacher" else None,
        # The released code masks nothing where the vocabulary is one.
        correctness_mask=config.correctness_mask and not (config.as_published and row.same_vocabulary),
    )
    # In the order of `dual`: a set of strings has another one in each process, and ranks add their logs up by place.
    for name, values in dual.items():
        (terms.teacher if name in TEACHER_TERMS else terms.student)[name] = values

    if row.matching is not None:
        assert queries is not None and keys is not None
        if config.as_published:
            loss = published_matching_term(row.matching, critic, queries, keys, seed)
            # One number for the batch, not a sum over tokens: that is the released code's scale.
            terms.student["kq"] = (loss / len(queries)).expand(len(queries))
        else:
            if example_ids is None:
                example_ids = torch.arange(len(queries), device=queries.device)
            terms.student["kq"], terms.features = matching_term(
                row.matching, critic, config, student, teacher, queries, keys, example_ids, seed
            )
    return terms


def alignment_weights(
    alignment: str | None,
    student: ResponseStates,
    teacher: ResponseStates,
    queries: Tensor | None,
    keys: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """An alignment through attention, chunks or places as weights: t2s `[B, R_s, R_t]` and s2t `[B, R_t, R_s]`."""
    if alignment == "identity":
        return mean_weights(identity_mask(student.mask, teacher.mask))
    pairs = None
    if alignment != "cross_model_attention":
        assert student.chunks is not None and teacher.chunks is not None
        pairs = chunk_mask(student.chunks, teacher.chunks)
        if alignment in ("chunk_mean", "chunks"):
            return mean_weights(pairs)
        if alignment == "exact_tokens":
            return mean_weights(exact_pairs(pairs))
    assert queries is not None and keys is not None
    return cross_model_attention(queries, keys, student.mask, teacher.mask, pairs)


def _logit_term(
    space: str,
    student: ResponseStates,
    teacher: ResponseStates,
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: DivergenceFunction,
    vocabulary_map: Tensor | None,
) -> Tensor:
    if space == "mapped_logits":
        assert student.partners is not None and vocabulary_map is not None
        partners = packed_partners(student.partners, student.mask, teacher.mask)
        targets = student.packed(student.targets)
        return student.per_example(
            mapped_kd(student_logits, teacher_logits, partners, vocabulary_map, targets, divergence)
        )
    student_rows, teacher_rows = paired_rows(student.mask, teacher.mask)
    student_logits, teacher_logits = student_logits[student_rows], teacher_logits[teacher_rows]
    if space == "sorted_logits":
        values = uld(student_logits, teacher_logits)
    else:
        values = shared_prefix_kd(student_logits, teacher_logits, divergence)
    example = student.mask.nonzero()[student_rows, 0]
    return torch.zeros(len(student.mask), dtype=values.dtype, device=values.device).index_add(0, example, values)


def _likelihood_term(
    config: DSKDConfig,
    student: ResponseStates,
    teacher: ResponseStates,
    student_logits: Tensor,
    teacher_logits: Tensor,
    constants: PairConstants,
) -> Tensor:
    assert student.chunks is not None and teacher.chunks is not None
    chunks = [student.chunks, teacher.chunks]
    if constants.end_tokens is not None:
        # The end is no text, and a teacher that wasn't trained on this data may hardly expect it: matched, it would
        # teach the student to go on. The cross entropy teaches the end.
        chunks = [
            states.chunks.masked_fill(states.targets == end, -1)  # type: ignore[union-attr]
            for states, end in zip((student, teacher), constants.end_tokens)
        ]
    boundaries: list[Tensor | None] = [None, None]
    if constants.boundary_tokens is not None:
        boundaries = [
            boundary_after(boundary_probability(logits, tokens), states.mask)
            for logits, tokens, states in zip(
                (student_logits, teacher_logits), constants.boundary_tokens, (student, teacher)
            )
        ]
    values = likelihood_matching(
        student.padded(-token_cross_entropy(student, student_logits)),
        teacher.padded(-token_cross_entropy(teacher, teacher_logits)),
        *chunks,
        divergence=config.alm_divergence,
        temperature=config.alm_temperature,
        bias_threshold=config.alm_bias_threshold,
        student_boundary=boundaries[0],
        teacher_boundary=boundaries[1],
    )
    # Binary divergences shrink as 1/τ. Times τ they stay nats, whose limit is a log(a/b) + b − a for the surprisals a
    # of the teacher and b of the student, so that `kd_rate` weighs them against the cross entropy at any τ.
    return values * config.alm_temperature


TEACHER_TERMS = frozenset({"s2t_kd", "s2t_agree", "alm"})


def weights(config: DSKDConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Weights of the terms in the loss (paper A, Eqs. 9 and 16): of those per student token and per teacher token."""
    row = config.method_row
    if not row.needs_teacher:
        return {"ce": 1.0}, {}
    student, teacher = {"ce": 1.0 - config.kd_rate}, {}
    if "student" in row.spaces:
        student |= {"t2s_ce": config.kd_rate, "t2s_kd": config.kd_rate}
    if "teacher" in row.spaces:
        teacher["s2t_kd"] = config.kd_rate
    if row.spaces == ("likelihood",):
        teacher["alm"] = config.kd_rate
    elif not row.dual_space:
        student["kd"] = config.kd_rate
    if row.matching is not None:
        student["kq"] = config.kq_rate
    return student, teacher


def total_loss(
    config: DSKDConfig,
    terms: Terms,
    student_tokens: Tensor | float,
    teacher_tokens: Tensor | float,
    on_policy: bool = False,
) -> Tensor:
    """
    The training loss, a scalar: each term's sum divided by the response tokens of the *global* batch.

    `teacher_tokens` divides the terms in teacher space; as published those are divided by `student_tokens` too. On the
    student's own samples (`on_policy`) its cross entropy has no weight: it would learn them as they are.
    """
    student_weights, teacher_weights = weights(config)
    if on_policy:
        student_weights["ce"] = 0.0
    loss = torch.stack([weight * terms.student[name].sum() for name, weight in student_weights.items()]).sum()
    loss = loss / student_tokens
    for name, weight in teacher_weights.items():
        divisor = student_tokens if config.as_published else teacher_tokens
        loss = loss + weight * terms.teacher[name].sum() / divisor
    return loss
