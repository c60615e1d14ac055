"""
Divergences between two next-token distributions, one value per row.

Every function takes `student_logits` and `teacher_logits` of shape `[..., V]` that are *already divided by their
temperatures*, works in float32 (float64 stays float64), and returns nats of shape `[...]`. The formulas are in
[`hf_dskd.methods.DIVERGENCES`], with p the teacher's and q the student's distribution.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..methods import DIVERGENCES


DivergenceFunction = Callable[[Tensor, Tensor], Tensor]


def precise(values: Tensor) -> Tensor:
    """float32, or float64 where the input is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the last axis, in float32 unless the input is float64."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight_of_p: float) -> Tensor:
    """log(w p + (1 − w) q), exact where one of the two underflows."""
    return torch.logaddexp(log_p + math.log(weight_of_p), log_q + math.log1p(-weight_of_p))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p ‖ q): makes the student cover whatever the teacher thinks possible."""
    return _kl(log_probabilities(teacher_logits), log_probabilities(student_logits))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(q ‖ p): makes the student avoid whatever the teacher thinks impossible."""
    return _kl(log_probabilities(student_logits), log_probabilities(teacher_logits))


def symmetric_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """½ KL(p ‖ q) + ½ KL(q ‖ p)."""
    log_p, log_q = log_probabilities(teacher_logits), log_probabilities(student_logits)
    return 0.5 * (_kl(log_p, log_q) + _kl(log_q, log_p))


def js(student_logits: Tensor, teacher_logits: Tensor, *, js_weight: float = 0.5) -> Tensor:
    """
    Jensen-Shannon divergence, w KL(p ‖ m) + (1 − w) KL(q ‖ m) with m = w p + (1 − w) q; at most log 2.

    `js_weight` is w, between 0 and 1. Near 0 this is w times the forward KL, near 1 it is 1 − w times the reverse.
    """
    log_p, log_q = log_probabilities(teacher_logits), log_probabilities(student_logits)
    log_m = _log_mixture(log_p, log_q, js_weight)
    return js_weight * _kl(log_p, log_m) + (1 - js_weight) * _kl(log_q, log_m)


def skewed_forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, skew_lambda: float = 0.1) -> Tensor:
    """KL(p ‖ λ p + (1 − λ) q); finite even where q vanishes."""
    log_p, log_q = log_probabilities(teacher_logits), log_probabilities(student_logits)
    return _kl(log_p, _log_mixture(log_p, log_q, skew_lambda))


def skewed_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, skew_lambda: float = 0.1) -> Tensor:
    """KL(q ‖ (1 − λ) p + λ q); finite even where p vanishes."""
    log_p, log_q = log_probabilities(teacher_logits), log_probabilities(student_logits)
    return _kl(log_q, _log_mixture(log_q, log_p, skew_lambda))


def adaptive_kl(student_logits: Tensor, teacher_logits: Tensor, *, adaptive_kl_alpha: float = 0.5) -> Tensor:
    """
    Forward and reverse KL, weighted by where the two distributions differ.

    The tail are the teacher's least probable tokens, as many as have less than `adaptive_kl_alpha` of its mass
    together; the head is the rest. The weights carry no gradient. Where the distributions are equal both KLs are 0
    and the weight doesn't matter.
    """
    log_p, log_q = log_probabilities(teacher_logits), log_probabilities(student_logits)
    with torch.no_grad():
        p, order = log_p.exp().sort(dim=-1)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        tail = p.cumsum(-1) < adaptive_kl_alpha
        tail_gap = (gap * tail).sum(-1)
        total_gap = gap.sum(-1)
        head_weight = torch.where(total_gap > 0, (total_gap - tail_gap) / total_gap.clamp_min(1e-30), 0.5)
    return head_weight * _kl(log_p, log_q) + (1 - head_weight) * _kl(log_q, log_p)


def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """½ Σ|p − q|, at most 1; where p = q its gradient is taken to be 0."""
    p, q = log_probabilities(teacher_logits).exp(), log_probabilities(student_logits).exp()
    return 0.5 * (p - q).abs().sum(-1)


def divergence_function(name: str, config: Any = None) -> DivergenceFunction:
    """
    Returns the divergence called `name` in [`~hf_dskd.methods.DIVERGENCES`], its keyword-only parameters (such as
    `skew_lambda`) read from `config`; without one they have their defaults.
    """
    divergence = DIVERGENCES[name].load()
    if config is None:
        return divergence
    parameters = inspect.signature(divergence).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    return partial(divergence, **{name: getattr(config, name) for name in names})
