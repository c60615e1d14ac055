"""
Every deviation of the code released with arXiv 2603.22056, which `as_published=True` reproduces.

Beside what is here: its batches are padded to `max_length` + 1 (see [`padded_length`]), it learns the last answer of a
conversation, and it never trains a discriminator or transport critics.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..alignment.weights import input_chunks
from ..losses.conditional_transport import TransportCritics, transport_cost
from ..losses.key_query import Discriminator, discriminator_loss, row_noise
from ..losses.matching import Matching
from ..losses.objective import Terms, total_loss
from ..losses.states import IGNORE, ResponseStates
from .distiller import Distiller


if TYPE_CHECKING:
    from ..config import DSKDConfig


def padded_length(config: DSKDConfig) -> int | None:
    """
    Returns the length that every batch is padded to, `None` for that of its longest sequence.

    The released code's losses depend on it. The last position has no next token, hence one more.
    """
    return config.max_length + 1 if config.as_published else None


def published_settings(config: DSKDConfig) -> DSKDConfig:
    """Returns the settings with which the formulas are those of the released code."""
    found, row, tau = copy(config), config.method_row, config.kd_temperature
    found.student_temperature = found.teacher_temperature = tau
    if row.dual_space and not row.same_vocabulary:
        # The teacher's divides once more, in the student space of different vocabularies only.
        found.teacher_temperature = tau * (config.teacher_temperature or 1.0)
    if config.teacher_space_temperature is None:
        found.teacher_space_temperature = tau
    # It has forward KL in teacher space, whatever the divergence is, and masks nothing where the vocabulary is one.
    found.teacher_space_divergence = config.teacher_space_divergence or "forward_kl"
    found.correctness_mask = config.correctness_mask and not row.same_vocabulary
    return found


class PublishedDistiller(Distiller):
    """A [`~hf_dskd.training.distiller.Distiller`] that computes what the released code does."""

    exact_means = False
    trains_critic = False

    def __init__(self, config: DSKDConfig, *args: Any, **options: Any):
        super().__init__(published_settings(config), *args, **options)
        if self.matching is not None:
            self.objective.matching = PublishedMatching(self.matching)

    def states(self, side: str, hidden: Tensor | None, batch: dict[str, Any]) -> ResponseStates:
        """Keeps every position of the padded sequences."""
        prefix, head, embedding = self._model(side)
        ids, labels = batch[f"{prefix}input_ids"], batch[f"{prefix}labels"]
        hidden = embedding.new_zeros((*ids.shape, 0)) if hidden is None else hidden
        chunks = batch.get(f"{prefix}chunk_ids") if self.config.method_row.needs_chunks else None
        if chunks is not None:
            chunks = input_chunks(chunks[:, 1:], labels[:, 1:] != IGNORE)
        more = {"head": head, "example_ids": batch.get("example_ids")}
        return published_states(hidden[:, :-1], ids[:, :-1], labels[:, 1:], embedding, chunks, **more)

    def _teacher_hidden(self, batch: dict[str, Any]) -> Tensor:
        # Those of the prompt and of the padding too.
        run: Any = self.teacher
        return run(batch["teacher_input_ids"], batch["teacher_attention_mask"])

    def loss(self, terms: Terms, student_tokens: Tensor | float, teacher_tokens: Tensor | float) -> Tensor:
        """Divides the terms in teacher space by the student's tokens too."""
        return total_loss(terms, student_tokens, student_tokens)


def published_states(
    hidden: Tensor, input_ids: Tensor, targets: Tensor, embedding: Tensor, chunks: Tensor | None = None, **more: Any
) -> ResponseStates:
    """
    Views a batch as the released code does: every position stays, those outside the response embed token 0, and
    standard deviations run over all of them.

    `targets` `[B, S]` are already shifted: `targets[:, i]` is the token after `input_ids[:, i]`, or -100. `chunks`
    `[B, S]` are those of the *input* tokens, by which that code aligns
    (see [`~hf_dskd.alignment.weights.input_chunks`]).
    """
    mask = targets != IGNORE
    embedding = embedding.detach()
    targets = targets.masked_fill(~mask, 0)
    return ResponseStates(
        hidden=hidden,
        input_embedding=F.embedding(input_ids.masked_fill(~mask, 0), embedding),
        target_embedding=F.embedding(targets, embedding),
        targets=targets,
        mask=mask,
        statistics_mask=None,
        chunks=chunks,
        **more,
    )


class PublishedMatching(Matching):
    """The matching loss of the released code: one number for the batch, not a sum over tokens."""

    def __init__(self, matching: Matching):
        self.matching, self.critic = matching, matching.critic

    def scores(self, rows: Tensor) -> Tensor | None:
        return self.matching.scores(rows)

    def __call__(
        self, student: ResponseStates, teacher: ResponseStates, queries: Tensor, keys: Tensor, seed: int
    ) -> tuple[Tensor, None]:
        loss = published_matching_term(self.critic, queries, keys, seed)
        return (loss / len(queries)).expand(len(queries)), None


def published_matching_term(critic: Any, queries: Tensor, keys: Tensor, seed: int) -> Tensor:
    """
    Computes the matching loss of the released code, a scalar, of a discriminator or transport critics (it has no
    other); `queries` and `keys` `[B, S, 2 d_t]` are those of every position.
    """

    def noise(features: Tensor, width: int) -> Tensor:
        positions = torch.arange(features[..., 0].numel(), device=features.device)
        return row_noise(positions, width, seed).view(*features.shape[:2], width)

    width = queries.shape[-1]
    if isinstance(critic, TransportCritics):
        return published_transport_loss(critic, queries, keys, (noise(queries, 2 * width), noise(keys, 2 * width)))
    return published_key_query_loss(critic, queries, keys, (noise(queries, width), noise(keys, width)))


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient has the opposite sign."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def published_key_query_loss(
    discriminator: Discriminator, queries: Tensor, keys: Tensor, noise: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """
    The matching loss as the released code computes it, a scalar.

    BCE(D(q), 1) + BCE(D(k), 0) as means over *every* position `[B, S, d]`, prompt and padding included, with the
    gradient reversed at the queries and none at the keys. `noise` is the dropout's, of queries and of keys.
    """
    query_logits = discriminator(ReverseGradient.apply(queries), noise[0])
    query_loss, key_loss = discriminator_loss(query_logits, discriminator(keys.detach(), noise[1]))
    return query_loss.mean() + key_loss.mean()


def published_transport_loss(
    critics: TransportCritics,
    queries: Tensor,
    keys: Tensor,
    noise: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """
    The matching loss as the released code computes it, a scalar.

    Minus the cost, as a mean over *every* position of `queries` and `keys` `[B, S, d]`, prompt and padding included,
    with the gradient reversed before all four networks. So the query projector minimises the cost, and the networks'
    gradients would maximise it, the navigators' included (the released code applies none of them). `noise` is the
    dropout's.
    """
    every_query, every_key = (
        torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) for values in (queries, keys)
    )
    queries, keys = ReverseGradient.apply(queries), ReverseGradient.apply(keys)
    rows = [None if numbers is None else numbers.flatten(0, 1) for numbers in noise]
    return -transport_cost(critics, queries, keys, every_query, every_key, (rows[0], rows[1])).mean()
