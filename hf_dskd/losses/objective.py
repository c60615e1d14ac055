"""What every objective has: from both models' states of a batch to the terms of a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .divergences import DivergenceFunction
from .states import ResponseStates
from .temperature import space_divergence
from .terms import TERMS, Term


if TYPE_CHECKING:
    from ..config import DSKDConfig
    from ..models.causal_lm import LMHead
    from .matching import Features, Matching
    from .projectors import Projectors


@dataclass(frozen=True)
class Step:
    """
    When a loss is computed.

    Attributes:
        progress: How much of the training is done, 0 to 1: temperatures may follow it.
        seed: Of the dropout of critics.
        on_policy: The responses are the student's own samples.
        training: Critics drop out.
        only: The one term that has a weight in the loss; by default all have theirs.
    """

    progress: float = 0.0
    seed: int = 0
    on_policy: bool = False
    training: bool = False
    only: str | None = None


@dataclass
class Terms:
    """
    What one batch contributes.

    Attributes:
        sums: Of each term (see [`hf_dskd.losses.terms`]), `[B]` each. What gradient they carry is of no account.
        student_tokens, teacher_tokens: Response tokens per example, `[B]`.
        student_loss, teacher_loss: The weighted terms of the batch, to be divided by the same; scalars that carry the
            gradient.
        ce_rows: The student's cross entropy at each response token, packed `[N_s]`.
        features: Detached queries and keys of the response tokens for the critic; `None` without one.
        added: What the student's model adds to its own loss (see [`hf_dskd.models.hidden_states`]), a scalar with its
            gradient; `None` where it adds nothing.
    """

    sums: dict[str, Tensor]
    student_tokens: Tensor
    student_loss: Tensor
    teacher_loss: Tensor | None = None
    teacher_tokens: Tensor | None = None
    ce_rows: Tensor | None = None
    features: Features | None = None
    added: Tensor | None = None


class Objective:
    """
    The loss of a method; a subclass names its terms and computes them.

    It makes its own constants, on `device`, of the tokenizers, configurations and sizes of a
    [`~hf_dskd.training.pair.Pair`].

    Attributes:
        terms (`tuple[Term]`): What it computes, in the order of their weights.
        projectors ([`~hf_dskd.losses.projectors.Projectors`], *optional*): Trained beside the student.
        matching ([`~hf_dskd.losses.matching.Matching`], *optional*): Of queries to keys.
        fits (`bool`): Whether it reads a sample of the text before training (see [`~Objective.fit`]).
        fitted (`Mapping[str, float]`): The constants that it took from there, by name.
    """

    terms: tuple[Term, ...] = (TERMS["ce"], TERMS["correct"])
    projectors: Projectors | None = None
    matching: Matching | None = None
    fits = False
    fitted: Mapping[str, float] = MappingProxyType({})

    def __init__(self, config: DSKDConfig, pair: Any, device: torch.device):
        self.config, self.row = config, config.method_row

    def start(self, student_head: LMHead, teacher_head: LMHead) -> None:
        """Initializes what depends on the models' weights; called once, when they are there."""

    def fit(self, sample: Sequence[tuple[ResponseStates, ResponseStates]]) -> dict[str, float]:
        """Fits constants by name on responses of the text: the student's without hidden states, the teacher's."""
        return {}

    def take(self, fitted: Mapping[str, float]) -> None:
        """Takes constants that were fitted here, on another process, or before the run was resumed."""

    def __call__(self, student: ResponseStates, teacher: ResponseStates, step: Step) -> Terms:
        """Computes the terms of a batch from both models' states of its responses."""
        raise NotImplementedError

    def weights(self, step: Step) -> dict[str, float]:
        """Weighs the terms at a step (see [`weights`])."""
        return weights(self.config, self.terms, step)

    def divergence(self, space: str, step: Step) -> DivergenceFunction:
        """Returns the divergence of raw logits in a space at a step, with its temperatures."""
        return space_divergence(self.config, space, step.progress)

    def chunks(self, device: torch.device) -> dict[str, Any]:
        """Says how [`~hf_dskd.kernels.linear_divergence.linear_rows`] is to work on `device`."""
        # With a schedule the losses change in every step, and would be compiled again.
        compiled = device.type == "cuda" and self.config.temperature_schedule == "constant"
        return {"memory_mb": self.config.loss_memory_mb, "compiled": compiled}

    @property
    def critic(self) -> nn.Module | None:
        """The networks that are trained against the queries."""
        return None if self.matching is None else self.matching.critic


def weights(config: DSKDConfig, terms: tuple[Term, ...], step: Step) -> dict[str, float]:
    """
    Weighs terms in the loss (arXiv 2603.22056, Eqs. 9 and 16), by their names, at a step that may be `on_policy` or
    have `only` one; numbers that are no loss have no weight.
    """
    found = {"ce": 1.0}
    if config.method_row.needs_teacher:
        # On its own samples the student's cross entropy would learn them as they are.
        found = {"ce": 0.0 if step.on_policy else 1.0 - config.kd_rate}
    found |= {term.name: getattr(config, term.rate) for term in terms if term.rate is not None}
    return {name: weight * (step.only in (None, name)) for name, weight in found.items()}


def total_loss(terms: Terms, student_tokens: Tensor | float, teacher_tokens: Tensor | float) -> Tensor:
    """
    Adds up the training loss, a scalar: each term's sum divided by the response tokens of the *global* batch.

    What a model adds to its own loss is already a mean.
    """
    loss = terms.student_loss / student_tokens
    if terms.teacher_loss is not None:
        loss = loss + terms.teacher_loss / teacher_tokens
    return loss if terms.added is None else loss + terms.added


def weighted_loss(found: Mapping[str, float], totals: Mapping[str, float]) -> float:
    """Adds up the loss of terms that were summed over many batches: `found` are their weights, by name."""
    # Terms of the student's tokens first, as in the loss of a batch.
    names = sorted(found, key=lambda name: TERMS[name].per)
    return sum((found[name] * totals[name] / totals[TERMS[name].per] for name in names), 0.0)
