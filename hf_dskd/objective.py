"""From two last hidden states to the training loss: which terms a method has, and how they are weighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adversary import Features
from .losses.divergences import divergence_function
from .losses.dual_space import ResponseStates, dual_space_terms, queries_and_keys, token_cross_entropy
from .losses.key_query import generator_loss, published_key_query_loss, row_noise


if TYPE_CHECKING:
    from .config import DSKDConfig
    from .losses.key_query import Discriminator
    from .models import LMHead
    from .projectors import Projectors


@dataclass
class Terms:
    """
    What one batch contributes.

    Attributes:
        student: Sums over student response tokens, `[B]` each. Those in the loss carry a gradient.
        teacher: Sums over teacher response tokens, `[B]` each.
        student_tokens, teacher_tokens: Response tokens per example, `[B]`.
        features: Detached queries `[N_s, 2 d_t]` and keys `[N_t, 2 d_t]` of the response tokens, for the
            discriminator; `None` without matching.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    student_tokens: Tensor
    teacher_tokens: Tensor | None = None
    features: Features | None = None


def student_terms(states: ResponseStates, logits: Tensor) -> Terms:
    """Cross entropy and accuracy of the student alone. `logits` are packed `[N_s, V_s]`."""
    correct = logits.detach().argmax(-1) == states.packed(states.targets)
    ce = token_cross_entropy(states, logits)
    return Terms(
        student={"ce": states.per_example(ce), "correct": states.per_example(correct.to(ce.dtype))},
        teacher={},
        student_tokens=states.counts,
    )


def distillation_terms(
    config: DSKDConfig,
    student: ResponseStates,
    teacher: ResponseStates,
    student_head: LMHead,
    teacher_head: LMHead,
    projectors: Projectors,
    discriminator: Discriminator | None = None,
    example_ids: Tensor | None = None,
    seed: int = 0,
) -> Terms:
    """
    Every term of the configured method.

    The discriminator's dropout is a function of `example_ids` `[B]` (by default their places in the batch) and `seed`.
    Its own loss is not here: it has an optimizer of its own, and its parameters must not receive a gradient in the
    student's backward pass.
    """
    student_logits = student_head(student.packed(student.hidden))
    terms = student_terms(student, student_logits)
    terms.teacher_tokens = teacher.counts

    divergence = divergence_function(
        config.divergence, skew_lambda=config.skew_lambda, adaptive_kl_alpha=config.adaptive_kl_alpha
    )
    queries, keys = queries_and_keys(student, teacher, projectors, scale_queries=config.scale_queries)
    dual = dual_space_terms(
        student,
        teacher,
        queries,
        keys,
        projectors,
        student_head,
        teacher_head,
        student_logits=student_logits,
        student_space_divergence=divergence,
        teacher_space_divergence=divergence_function("forward_kl") if config.as_published else divergence,
        temperature=config.kd_temperature,
        correctness_mask=config.correctness_mask,
    )
    for name in ("s2t_kd", "s2t_agree"):
        terms.teacher[name] = dual.pop(name)
    terms.student.update(dual)

    if discriminator is not None:
        if example_ids is None:
            example_ids = torch.arange(len(queries), device=queries.device)
        if config.as_published:
            rows = [torch.arange(values[..., 0].numel(), device=values.device) for values in (queries, keys)]
            noise = [row_noise(r, keys.shape[-1], seed).view(*v.shape) for r, v in zip(rows, (queries, keys))]
            loss = published_key_query_loss(discriminator, queries, keys, (noise[0], noise[1]))
            # One number for the batch, not a sum over tokens: that is the released code's scale.
            terms.student["kq"] = (loss / len(queries)).expand(len(queries))
        else:
            query_rows, names = student.packed(queries), student.row_names(example_ids)
            logits = discriminator(query_rows, row_noise(names, query_rows.shape[-1], seed))
            terms.student["kq"] = student.per_example(generator_loss(logits, config.adversarial_loss))
            terms.features = Features(
                query_rows.detach().float(),
                teacher.packed(keys).detach().float(),
                names,
                teacher.row_names(example_ids),
            )
    return terms


def weights(config: DSKDConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Weights of the terms in the loss (paper A, Eqs. 9 and 16): of those per student token and per teacher token."""
    if not config.method_row.needs_teacher:
        return {"ce": 1.0}, {}
    student = {"ce": 1.0 - config.kd_rate, "t2s_ce": config.kd_rate, "t2s_kd": config.kd_rate}
    if config.method_row.matching is not None:
        student["kq"] = config.kq_rate
    return student, {"s2t_kd": config.kd_rate}


def total_loss(
    config: DSKDConfig, terms: Terms, student_tokens: Tensor | float, teacher_tokens: Tensor | float
) -> Tensor:
    """
    The training loss, a scalar: each term's sum divided by the response tokens of the *global* batch.

    `teacher_tokens` divides the terms in teacher space; as published those are divided by `student_tokens` too.
    """
    student_weights, teacher_weights = weights(config)
    loss = torch.stack([weight * terms.student[name].sum() for name, weight in student_weights.items()]).sum()
    loss = loss / student_tokens
    for name, weight in teacher_weights.items():
        divisor = student_tokens if config.as_published else teacher_tokens
        loss = loss + weight * terms.teacher[name].sum() / divisor
    return loss
