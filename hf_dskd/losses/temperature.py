"""Temperatures: where they divide logits, how a divergence is scaled in return, and how they change in training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .divergences import DivergenceFunction, divergence_function, precise


if TYPE_CHECKING:
    from ..config import DSKDConfig


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

    It is multiplied by [`Temperatures.factor`] of `scaling`.
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


def temperatures(config: DSKDConfig, space: str, progress: float = 0.0) -> Temperatures:
    """Returns those of both models' logits in `space`, after `progress` (0 to 1) of the training."""
    student = config.student_temperature or config.kd_temperature
    teacher = config.teacher_temperature or config.kd_temperature
    if space == "teacher" and config.teacher_space_temperature is not None:
        student = teacher = config.teacher_space_temperature
    ratio = (config.final_kd_temperature or config.kd_temperature) / config.kd_temperature
    factor = schedule_factor(config.temperature_schedule, ratio, progress)
    return Temperatures(student * factor, teacher * factor)


def space_divergence(config: DSKDConfig, space: str, progress: float = 0.0) -> DivergenceFunction:
    """
    Returns the divergence of raw logits in `space`, with its parameters and its temperatures at `progress` (0 to 1).

    `space` is `"student"`, `"teacher"`, or `"logits"` for methods with neither.
    """
    name = {"student": config.student_space_divergence, "teacher": config.teacher_space_divergence}.get(space)
    divergence = divergence_function(name or config.divergence, config)
    return with_temperature(divergence, temperatures(config, space, progress), config.temperature_scaling)
