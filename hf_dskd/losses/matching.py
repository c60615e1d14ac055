"""
Key-query matching: what the student's pass contributes, and what the networks that are trained against it minimize.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .conditional_transport import TransportCritics, transport_cost
from .key_query import Discriminator, discriminator_loss, generator_loss, mmd, moment_matching, row_noise
from .states import ResponseStates


if TYPE_CHECKING:
    from ..config import DSKDConfig


class Features(NamedTuple):
    """
    Queries and keys of a micro-batch, in float32 and without gradient.

    Attributes:
        queries (`[B, R_s, d]`), keys (`[B, R_t, d]`): Padded to the longest response.
        query_mask (`[B, R_s]`), key_mask (`[B, R_t]`): Which rows are real.
        query_names (`[N_s]`), key_names (`[N_t]`): A number for each real row, in order.
    """

    queries: Tensor
    keys: Tensor
    query_mask: Tensor
    key_mask: Tensor
    query_names: Tensor
    key_names: Tensor

    @classmethod
    def of(cls, student: ResponseStates, teacher: ResponseStates, queries: Tensor, keys: Tensor) -> Features:
        """Keeps queries and keys of both views of a batch."""
        masks, names = (student.mask, teacher.mask), (student.row_names, teacher.row_names)
        return cls(queries.detach().float(), keys.detach().float(), *masks, *names)

    def noise(self, width: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draws the dropout's, of real queries `[N_s, width]` and keys `[N_t, width]`."""
        # Negative names keep the noise of a key apart from that of a query at the same place.
        return row_noise(self.query_names, width, seed), row_noise(-1 - self.key_names, width, seed)


class Matching:
    """
    Makes queries like keys, of `size` 2 d_t; a subclass says how, and what is trained against it, if anything is.

    Attributes:
        critic (`torch.nn.Module`, *optional*): Trained against the queries by an optimizer of its own.
        kind (*optional*): Its class, of `(size, hidden_size, dropout, seed)`, initialized from `seed` on `device`.
    """

    critic: nn.Module | None = None
    kind: type[nn.Module] | None = None

    def __init__(self, config: DSKDConfig, size: int, seed: int, device: torch.device):
        self.config = config
        if self.kind is not None:
            widths = size, config.discriminator_hidden_size
            self.critic = self.kind(*widths, config.discriminator_dropout, seed=seed).to(device)

    def __call__(
        self, student: ResponseStates, teacher: ResponseStates, queries: Tensor, keys: Tensor, seed: int
    ) -> tuple[Tensor, Features | None]:
        """
        Computes what the query projector minimizes, of queries `[B, R_s, 2 d_t]` and keys `[B, R_t, 2 d_t]`, padded.

        With the examples' ids `seed` decides the dropout of the critic. Returns sums over student response tokens
        `[B]`, and [`Features`] for the critic, `None` without one.
        """
        raise NotImplementedError

    def critic_loss(
        self, features: Features, query_count: Tensor, key_count: Tensor, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Computes a micro-batch's share of what the critic minimizes, and sums for the log.

        `query_count` and `key_count` are those of the global batch, `seed` is that of the dropout.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Lists the critic's parameters, for its optimizer."""
        return [] if self.critic is None else [{"params": list(self.critic.parameters())}]

    def scores(self, rows: Tensor) -> Tensor | None:
        """Says how much rows `[N, 2 d_t]` look like queries to the critic, `[N]`; `None` if it can't tell."""
        return None


class MomentMatching(Matching):
    """The first two moments, without anything to train."""

    statistic = staticmethod(moment_matching)

    def __call__(
        self, student: ResponseStates, teacher: ResponseStates, queries: Tensor, keys: Tensor, seed: int
    ) -> tuple[Tensor, Features | None]:
        return self.statistic(queries, keys, student.mask, teacher.mask), None


class DiscrepancyMatching(MomentMatching):
    """The maximum mean discrepancy instead of the moments."""

    statistic = staticmethod(mmd)


class AdversarialMatching(Matching):
    """A discriminator (arXiv 2603.22056, Eq. 14)."""

    critic: Discriminator
    kind = Discriminator

    def __call__(
        self, student: ResponseStates, teacher: ResponseStates, queries: Tensor, keys: Tensor, seed: int
    ) -> tuple[Tensor, Features | None]:
        features = Features.of(student, teacher, queries, keys)
        logits = self.critic(student.packed(queries), row_noise(features.query_names, queries.shape[-1], seed))
        return student.per_example(generator_loss(logits, self.config.adversarial_loss)), features

    def critic_loss(
        self, features: Features, query_count: Tensor, key_count: Tensor, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        query_noise, key_noise = features.noise(features.queries.shape[-1], seed)
        query_logits = self.critic(features.queries[features.query_mask], query_noise)
        key_logits = self.critic(features.keys[features.key_mask], key_noise)
        query_loss, key_loss = discriminator_loss(query_logits, key_logits)
        return query_loss.sum() / query_count + key_loss.sum() / key_count, {
            "discriminator_query_loss": query_loss.detach().sum(),
            "query_as_query": (query_logits > 0).sum(),
            "discriminator_key_loss": key_loss.detach().sum(),
            "key_as_key": (key_logits < 0).sum(),
        }

    def scores(self, rows: Tensor) -> Tensor | None:
        return self.critic(rows)


class TransportMatching(Matching):
    """Conditional transport (arXiv 2603.22056, Eq. 15)."""

    critic: TransportCritics
    kind = TransportCritics

    def __call__(
        self, student: ResponseStates, teacher: ResponseStates, queries: Tensor, keys: Tensor, seed: int
    ) -> tuple[Tensor, Features | None]:
        features = Features.of(student, teacher, queries, keys)
        noise = features.noise(2 * queries.shape[-1], seed)
        cost = transport_cost(self.critic, queries, keys.detach(), student.mask, teacher.mask, noise)
        return cost * student.counts, features

    def critic_loss(
        self, features: Features, query_count: Tensor, key_count: Tensor, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        noise = features.noise(2 * features.queries.shape[-1], seed)
        cost = transport_cost(self.critic, *features[:4], noise)
        cost = (cost * features.query_mask.sum(1)).sum()
        return cost / query_count, {"transport_cost": cost.detach()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        # Navigators minimize the cost, critics maximize it.
        ascending = {"params": self.critic.ascending(), "maximize": True}
        return [{"params": self.critic.descending()}, ascending]
