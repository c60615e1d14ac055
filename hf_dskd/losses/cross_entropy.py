"""The student alone: cross entropy on the responses, and how often it is right."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear_divergence import linear_rows
from .objective import Objective, Step, Terms
from .states import ResponseStates


def response_rows(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross entropy (`ce`) with `targets` `[n]`, and where the likeliest token is the target (`correct`)."""
    return {
        "ce": F.cross_entropy(logits, targets, reduction="none"),
        "correct": (logits.argmax(-1) == targets).to(logits.dtype),
    }


def own_rows(
    student: ResponseStates, weights: dict[str, float] | None, **chunks: Any
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Computes [`response_rows`] by [`~hf_dskd.kernels.linear_divergence.linear_rows`]."""
    hidden, targets = student.packed(student.hidden), student.packed(student.targets)
    return linear_rows(response_rows, [hidden], [student.head], [targets], weights=weights, **chunks)


class CrossEntropy(Objective):
    """−log q(y) of the responses, whoever wrote them; needs no teacher."""

    def __call__(self, student: ResponseStates, teacher: ResponseStates | None, step: Step) -> Terms:
        loss, rows = own_rows(student, self.weights(step), **self.chunks(student.hidden.device))
        assert loss is not None
        return Terms(
            {name: student.per_example(values) for name, values in rows.items()},
            student_tokens=student.counts,
            student_loss=loss,
            ce_rows=rows["ce"],
        )
