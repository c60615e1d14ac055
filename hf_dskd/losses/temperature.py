"""Temperatures: where they divide logits, how a divergence is scaled in return, and how they change in training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .divergences import DivergenceFunction, precise


@dataclass(frozen=True)
class Temperatures:
    """What each side's logits are divided by."""

    student: float
    teacher: float

    def factor(self, scaling: str) -> float:
        """
        What a divergence is multiplied by: 1 for `"none"`; τ_student τ_teacher for `"tau_squared"`.

        Gradients of a divergence shrink as 1 / τ²; with the factor they keep their size (Hinton et al., arXiv
        1503.02531), and so does the balance with the cross entropy.
        """
        return self.student * self.teacher if scaling == "tau_squared" else 1.0


def with_temperature(
    divergence: DivergenceFunction, temperatures: Temperatures, scaling: str = "none"
) -> DivergenceFunction:
    """
    `divergence` as a function of *raw* logits `[..., V]`: each side is divided once, in float32 (float64 stays).

    Args:
        divergence: Of `(student_logits, teacher_logits)`, one value in nats per row.
        temperatures ([`Temperatures`]): Of the two sides.
        scaling (`str`, *optional*, defaults to `"none"`): See [`Temperatures.factor`].
    """
    factor = temperatures.factor(scaling)

    def softened(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student, teacher = precise(student_logits), precise(teacher_logits)
        return factor * divergence(student / temperatures.student, teacher / temperatures.teacher)

    return softened


def schedule_factor(kind: str, end_ratio: float, progress: float) -> float:
    """
    What a quantity is multiplied by when `progress` (0 to 1, clamped) of the training is done.

    `"constant"` is 1 throughout; `"linear"` and `"cosine"` go from 1 to `end_ratio`.
    """
    if kind == "constant":
        return 1.0
    progress = min(max(progress, 0.0), 1.0)
    if kind == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return 1.0 + (end_ratio - 1.0) * progress
