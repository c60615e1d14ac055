"""From two last hidden states to the training loss: which terms a method has, and how they are weighted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adversary import Features, matching_term, published_matching_term
from .alignment.chunked import chunk_mask, exact_pairs, identity_mask, mean_weights, same_places
from .alignment.cross_model import cross_model_attention
from .alignment.weights import AlignmentWeights, TiledAttention
from .kernels.linear_divergence import linear_rows
from .losses.divergences import DivergenceFunction, divergence_function
from .losses.dual_space import ResponseStates, dual_space_terms, own_rows, queries_and_keys, response_rows
from .losses.likelihood import boundary_after, boundary_probability, likelihood_matching
from .losses.logits import mapped_kd, packed_partners, rows_at_places, shared_prefix_kd, uld
from .losses.temperature import Temperatures, schedule_factor, with_temperature
from .losses.terms import TERMS


if TYPE_CHECKING:
    from .config import DSKDConfig
    from .models.causal_lm import LMHead
    from .projectors import Projectors

# Scores of a batch, of which a matrix and its copies take about 1.5 GB: one response of 8,192 tokens on both sides.
TILED_ABOVE = 2**26


@dataclass
class Terms:
    """
    What one batch contributes.

    Attributes:
        student: Sums that are divided by student response tokens, `[B]` each.
        teacher: Sums that are divided by teacher response tokens, `[B]` each.
        student_tokens, teacher_tokens: Response tokens per example, `[B]`.
        student_loss, teacher_loss: The weighted terms of the batch, to be divided by the same; scalars that carry the
            gradient. What the terms above carry is of no account.
        ce_rows: The student's cross entropy at each response token, packed `[N_s]`.
        features: Detached queries and keys of the response tokens for the critic; `None` without one.
        added: What the student's model adds to its own loss (see [`hf_dskd.models.hidden_states`]), a scalar with its
            gradient; `None` where it adds nothing.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    student_tokens: Tensor
    student_loss: Tensor
    teacher_loss: Tensor | None = None
    teacher_tokens: Tensor | None = None
    ce_rows: Tensor | None = None
    features: Features | None = None
    added: Tensor | None = None


@dataclass(frozen=True)
class PairConstants:
    """
    What a method must know of the pair of vocabularies.

    Attributes:
        label_map: The student's token for the same bytes as each of the teacher's, `[V_t]`, -1 for none.
        vocabulary_map: The student's token nearest to each of the teacher's by edit distance, `[V_t]`, -1 for none.
        boundary_tokens: Which tokens begin with whitespace or end the text, `[V_s]` and `[V_t]`.
    """

    label_map: Tensor | None = None
    vocabulary_map: Tensor | None = None
    boundary_tokens: tuple[Tensor, Tensor] | None = None


def chunk_options(config: DSKDConfig, device: torch.device) -> dict[str, Any]:
    """How [`~hf_dskd.kernels.linear_divergence.linear_rows`] is to work on `device`."""
    # With a schedule the losses change in every step, and would be compiled again.
    compiled = device.type == "cuda" and config.temperature_schedule == "constant"
    return {"memory_mb": config.loss_memory_mb, "compiled": compiled}


def student_terms(config: DSKDConfig, states: ResponseStates, head: LMHead) -> Terms:
    """Cross entropy and accuracy of the student alone."""
    loss, rows = own_rows(states, head, {"ce": 1.0}, **chunk_options(config, states.hidden.device))
    assert loss is not None
    return Terms(
        student={name: states.per_example(values) for name, values in rows.items()},
        teacher={},
        student_tokens=states.counts,
        student_loss=loss,
        ce_rows=rows["ce"],
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
    on_policy: bool = False,
    only: str | None = None,
    attention: Tensor | None = None,
) -> Terms:
    """
    Every term of the configured method.

    The critic's dropout is a function of `example_ids` `[B]` (by default their places in the batch) and `seed`. Its
    own loss is not here: it has an optimizer of its own, and its parameters must not receive a gradient in the
    student's backward pass. `progress` (0 to 1) is how much of the training is done; `on_policy` says that the
    responses are the student's own. With `only`, no other term has a weight in the loss. `attention` `[B]` is the
    divergence of the models' own attention (see [`hf_dskd.losses.attention`]), one more term of any method.
    """
    student_weights, teacher_weights = weights(config, on_policy, only)
    attention_rate = student_weights.pop("attention", 0.0)
    terms = _method_terms(
        config,
        student,
        teacher,
        student_head,
        teacher_head,
        projectors,
        critic,
        example_ids,
        seed,
        constants or PairConstants(),
        progress,
        (student_weights, teacher_weights),
    )
    if attention is None:
        return terms
    return replace(
        terms,
        student={**terms.student, "attention": attention},
        student_loss=terms.student_loss + attention_rate * attention.sum(),
    )


def _method_terms(
    config: DSKDConfig,
    student: ResponseStates,
    teacher: ResponseStates,
    student_head: LMHead,
    teacher_head: LMHead,
    projectors: Projectors | None,
    critic: nn.Module | None,
    example_ids: Tensor | None,
    seed: int,
    constants: PairConstants,
    progress: float,
    rates: tuple[dict[str, float], dict[str, float]],
) -> Terms:
    """What the method's row of the table asks for; `rates` as [`weights`] gives them."""
    row, chunks = config.method_row, chunk_options(config, student.hidden.device)
    student_weights, teacher_weights = rates
    counts: dict[str, Any] = {"student_tokens": student.counts, "teacher_tokens": teacher.counts}
    if row.spaces == ("likelihood",):
        sums, alm, ce_rows = _likelihood_terms(config, student, teacher, student_head, teacher_head, constants, chunks)
        return Terms(
            student=sums,
            teacher={"alm": alm},
            student_loss=student_weights["ce"] * sums["ce"].sum(),
            teacher_loss=teacher_weights["alm"] * alm.sum(),
            ce_rows=ce_rows,
            **counts,
        )
    if not row.dual_space:
        divergence = space_divergence(config, "logits", progress)
        loss, rows = _logit_rows(
            row.spaces[0],
            student,
            teacher,
            student_head,
            teacher_head,
            divergence,
            constants.vocabulary_map,
            temperatures(config, "logits", progress).teacher,
            weights=student_weights,
            **chunks,
        )
        assert loss is not None
        return Terms(
            student={name: student.per_example(values) for name, values in rows.items()},
            teacher={},
            student_loss=loss,
            ce_rows=rows["ce"],
            **counts,
        )

    assert projectors is not None
    queries = keys = None
    if row.has_queries:
        queries, keys = queries_and_keys(student, teacher, projectors, scale_queries=config.scale_queries)
    # The matching loss is not one of rows.
    kq_rate = student_weights.pop("kq", 0.0)
    rows, terms, student_loss, teacher_loss = dual_space_terms(
        student,
        teacher,
        aligned(row.alignment, student, teacher, queries, keys),
        projectors,
        student_head,
        teacher_head,
        student_space_divergence=space_divergence(config, "student", progress) if "student" in row.spaces else None,
        teacher_space_divergence=space_divergence(config, "teacher", progress) if "teacher" in row.spaces else None,
        teacher_value=row.teacher_value,
        label_map=constants.label_map if row.label == "teacher" else None,
        # The released code masks nothing where the vocabulary is one.
        correctness_mask=config.correctness_mask and not (config.as_published and row.same_vocabulary),
        weights=(student_weights, teacher_weights),
        **chunks,
    )
    assert student_loss is not None
    student_sums = {name: values for name, values in terms.items() if name not in TEACHER_TERMS}
    features = None
    if row.matching is not None:
        assert queries is not None and keys is not None
        if config.as_published:
            loss = published_matching_term(row.matching, critic, queries, keys, seed)
            # One number for the batch, not a sum over tokens: that is the released code's scale.
            matching = (loss / len(queries)).expand(len(queries))
        else:
            if example_ids is None:
                example_ids = torch.arange(len(queries), device=queries.device)
            matching, features = matching_term(
                row.matching, critic, config, student, teacher, queries, keys, example_ids, seed
            )
        student_sums["kq"] = matching
        student_loss = student_loss + kq_rate * matching.sum()
    return Terms(
        student=student_sums,
        teacher={name: values for name, values in terms.items() if name in TEACHER_TERMS},
        student_loss=student_loss,
        teacher_loss=teacher_loss,
        ce_rows=rows["ce"],
        features=features,
        **counts,
    )


def aligned(
    alignment: str | None,
    student: ResponseStates,
    teacher: ResponseStates,
    queries: Tensor | None,
    keys: Tensor | None,
) -> AlignmentWeights | TiledAttention:
    """An alignment through attention, chunks or places; attention over very long responses is computed in tiles."""
    scores = student.mask.numel() * teacher.mask.shape[1]
    if queries is None or keys is None or scores <= TILED_ABOVE:
        return AlignmentWeights(*alignment_weights(alignment, student, teacher, queries, keys))
    chunks = (student.chunks, teacher.chunks) if alignment == "chunk_attention" else (None, None)
    return TiledAttention(queries, keys, student.mask, teacher.mask, *chunks)


def alignment_weights(
    alignment: str | None,
    student: ResponseStates,
    teacher: ResponseStates,
    queries: Tensor | None,
    keys: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """An alignment through attention, chunks or places as weights: t2s `[B, R_s, R_t]` and s2t `[B, R_t, R_s]`."""
    if alignment == "identity" and student.places is not None and teacher.places is not None:
        return mean_weights(same_places(student.places, teacher.places))
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


def _logit_rows(
    space: str,
    student: ResponseStates,
    teacher: ResponseStates,
    student_head: LMHead,
    teacher_head: LMHead,
    divergence: DivergenceFunction,
    vocabulary_map: Tensor | None,
    teacher_temperature: float,
    **options: Any,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The student's own terms and `kd`, its divergence from the row of the teacher that stands for it."""
    if space == "mapped_logits":
        assert student.partners is not None
        partners = packed_partners(student.partners, student.mask, teacher.mask)
    else:
        partners = rows_at_places(_places(student), _places(teacher), student.mask, teacher.mask)
    teacher_hidden = teacher.packed(teacher.hidden)
    if len(teacher_hidden):
        teacher_hidden = teacher_hidden[partners.clamp(min=0)]
    else:
        teacher_hidden = teacher_hidden.new_zeros(len(partners), teacher_hidden.shape[1])

    def terms(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, paired: Tensor) -> dict[str, Tensor]:
        if space == "mapped_logits":
            assert vocabulary_map is not None
            kd = mapped_kd(
                student_logits, teacher_logits, paired, vocabulary_map, targets, divergence, teacher_temperature
            )
        elif space == "sorted_logits":
            kd = uld(student_logits, teacher_logits) * paired
        else:
            kd = shared_prefix_kd(student_logits, teacher_logits, divergence) * paired
        return {**response_rows(student_logits, targets), "kd": kd}

    return linear_rows(
        terms,
        [student.packed(student.hidden), teacher_hidden],
        [student_head, teacher_head.detach()],
        [student.packed(student.targets), partners >= 0],
        **options,
    )


def _likelihood_terms(
    config: DSKDConfig,
    student: ResponseStates,
    teacher: ResponseStates,
    student_head: LMHead,
    teacher_head: LMHead,
    constants: PairConstants,
    options: dict[str, Any],
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The student's own terms per example, `alm` per example, and the student's cross entropy per row."""
    assert student.chunks is not None and teacher.chunks is not None
    chunks = [student.chunks, teacher.chunks]
    if student.silent is not None and teacher.silent is not None:
        # The end is no text, and a teacher that wasn't trained on this data may hardly expect it: matched, it would
        # teach the student to go on. The cross entropy teaches the end.
        chunks = [student.chunks.masked_fill(student.silent, -1), teacher.chunks.masked_fill(teacher.silent, -1)]
    own, theirs = (
        likelihood_rows(
            states, head, None if constants.boundary_tokens is None else constants.boundary_tokens[i], options
        )
        for i, (states, head) in enumerate(((student, student_head), (teacher, teacher_head.detach())))
    )
    boundaries = [
        boundary_after(rows["boundary"], states.mask) if "boundary" in rows else None
        for rows, states in ((own, student), (theirs, teacher))
    ]
    values = likelihood_matching(
        student.padded(-own["ce"]),
        teacher.padded(-theirs["ce"]),
        *chunks,
        divergence=config.alm_divergence,
        temperature=config.alm_temperature,
        bias_threshold=config.alm_bias_threshold,
        student_boundary=boundaries[0],
        teacher_boundary=boundaries[1],
    )
    # Binary divergences shrink as 1/τ. Times τ they stay nats, whose limit is a log(a/b) + b − a for the surprisals a
    # of the teacher and b of the student, so that `kd_rate` weighs them against the cross entropy at any τ.
    alm = values * config.alm_temperature
    return {name: student.per_example(own[name]) for name in ("ce", "correct")}, alm, own["ce"].detach()


def _places(states: ResponseStates) -> Tensor:
    """Place of each row in the response, -1 where there is none; one response where nothing else is known."""
    if states.places is not None:
        return states.places
    return (states.mask.cumsum(1) - 1).masked_fill(~states.mask, -1)


def likelihood_rows(
    states: ResponseStates, head: LMHead, boundary_mask: Tensor | None, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Cross entropy per row and, with `boundary_mask` `[V]`, the probability of such a token (`boundary`)."""

    def terms(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        rows = response_rows(logits, targets)
        return rows if boundary_mask is None else {**rows, "boundary": boundary_probability(logits, boundary_mask)}

    # A chunk's likelihood is not linear in those of its tokens: the gradient has to wait for the backward pass.
    return linear_rows(
        terms, [states.packed(states.hidden)], [head], [states.packed(states.targets)], weights=None, **options
    )[1]


TEACHER_TERMS = frozenset(term.name for term in TERMS.values() if term.per == "teacher_tokens")


def weights(
    config: DSKDConfig, on_policy: bool = False, only: str | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """
    Weights of the terms in the loss (arXiv 2603.22056, Eqs. 9 and 16): of those per student token and per
    teacher token.

    On the student's own samples (`on_policy`) its cross entropy has no weight: it would learn them as they are. With
    `only`, the name of a term, all others have none.
    """
    row = config.method_row
    if not row.needs_teacher:
        return {"ce": 1.0}, {}
    student: dict[str, float]
    teacher: dict[str, float]
    student, teacher = {"ce": 0.0 if on_policy else 1.0 - config.kd_rate}, {}
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
    if config.attention_kd_rate:
        student["attention"] = config.attention_kd_rate
    if only is not None:
        student, teacher = (
            {name: weight * (name == only) for name, weight in side.items()} for side in (student, teacher)
        )
    return student, teacher


def total_loss(
    config: DSKDConfig, terms: Terms, student_tokens: Tensor | float, teacher_tokens: Tensor | float
) -> Tensor:
    """
    The training loss, a scalar: each term's sum divided by the response tokens of the *global* batch.

    What a model adds to its own loss is already a mean.
    `teacher_tokens` divides the terms in teacher space; as published those are divided by `student_tokens` too.
    """
    loss = terms.student_loss / student_tokens
    if terms.teacher_loss is not None:
        loss = loss + terms.teacher_loss / (student_tokens if config.as_published else teacher_tokens)
    return loss if terms.added is None else loss + terms.added


def weighted_loss(
    config: DSKDConfig, totals: Mapping[str, float], student_tokens: float, teacher_tokens: float
) -> float:
    """The loss of terms summed over many batches, by their names."""
    loss = 0.0
    for weighted, tokens in zip(weights(config), (student_tokens, teacher_tokens)):
        for name, weight in weighted.items():
            loss += weight * totals[name] / tokens
    return loss
