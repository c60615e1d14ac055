"""
Matching queries to keys by conditional transport (arXiv 2603.22056, Eq. 15).

Source: Zheng & Zhou, "Exploiting chain rule and Bayes' theorem to compare probability distributions", NeurIPS 2021, as
in the released code. A *navigator* plans how much of each query goes to which key, and back; a *critic* says what that
costs: min over P_Q and navigators, max over critics, of ½ E_q E_{k|q}[c(q, k)] + ½ E_k E_{q|k}[c(q, k)].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.random import cpu_seed
from .key_query import highway, squared_distances


class _Critic(nn.Module):
    """Highway → dropout → linear → LeakyReLU(0.1) → linear, `[..., d] -> [..., h]`, with rows of length 1."""

    def __init__(self, feature_size: int, hidden_size: int):
        super().__init__()
        self.highway = nn.Linear(feature_size, feature_size)
        self.linear1 = nn.Linear(feature_size, hidden_size)
        self.linear2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor, dropout: float, noise: Tensor | None) -> Tensor:
        hidden = highway(self.highway, features, dropout, noise)
        return _unit_length(self.linear2(F.leaky_relu(self.linear1(hidden), 0.1)))


class _Navigator(nn.Module):
    """Linear → LeakyReLU(0.1) → linear, `[..., d] -> [..., h]`, with rows of length 1."""

    def __init__(self, feature_size: int, hidden_size: int):
        super().__init__()
        self.linear1 = nn.Linear(feature_size, hidden_size)
        self.linear2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return _unit_length(self.linear2(F.leaky_relu(self.linear1(features), 0.1)))


def _unit_length(rows: Tensor) -> Tensor:
    return rows / (rows.norm(dim=-1, keepdim=True) + 1e-6)


class TransportCritics(nn.Module):
    """
    The four networks of [`transport_cost`]: critic and navigator 1 of positions, critic and navigator 2 of features.

    Queries and keys have `feature_size` numbers (2 d_t), layers and outputs `hidden_size`. `dropout` is that of the
    critics, in training mode only; the initialisation is drawn from a source of its own.
    """

    def __init__(self, feature_size: int, hidden_size: int = 768, dropout: float = 0.1, seed: int = 0):
        super().__init__()
        self.dropout = dropout
        with cpu_seed(seed):
            self.critic1 = _Critic(feature_size, hidden_size)
            self.navigator1 = _Navigator(feature_size, hidden_size)
            self.critic2 = _Critic(feature_size, hidden_size)
            self.navigator2 = _Navigator(feature_size, hidden_size)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Outputs of critic 1, navigator 1, critic 2 and navigator 2, `[..., h]` each, of features `[..., d]`, float32.

        `noise` `[..., 2 d]` in [0, 1) decides what is dropped in training mode, by critic 1 (first half) and by critic
        2 (see [`~hf_dskd.losses.key_query.row_noise`]); without it nothing is.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.critic1.highway.weight.dtype)
            dropout = self.dropout if self.training else 0.0
            noise1, noise2 = (None, None) if noise is None else noise.chunk(2, dim=-1)
            return (
                self.critic1(features, dropout, noise1),
                self.navigator1(features),
                self.critic2(features, dropout, noise2),
                self.navigator2(features),
            )

    def ascending(self) -> list[nn.Parameter]:
        """The critics' parameters, which maximise the cost."""
        return [*self.critic1.parameters(), *self.critic2.parameters()]

    def descending(self) -> list[nn.Parameter]:
        """The navigators' parameters, which minimise it."""
        return [*self.navigator1.parameters(), *self.navigator2.parameters()]


def transport_cost(
    critics: TransportCritics,
    queries: Tensor,
    keys: Tensor,
    query_mask: Tensor,
    key_mask: Tensor,
    noise: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """
    What transport between the queries and the keys of each example costs (arXiv 2603.22056, Eq. 15).

    Point transport: the cost of query and key is the Euclidean distance of critic 1's outputs, the scores of the plans
    are inner products of navigator 1's. One plan spreads each key over the queries, the other each query over the
    keys; the means of both count half. Head term: the same between *features* of critic 2 and navigator 2, whose
    coordinates are positions. Where the two responses differ in length, the shorter one's coordinates end in zeros.

    Args:
        critics ([`TransportCritics`]): The networks.
        queries (`[B, R_s, d]`), keys (`[B, R_t, d]`): Of student and of teacher positions.
        query_mask (`[B, R_s]`), key_mask (`[B, R_t]`): Which rows take part.
        noise (`[N_s, 2 d]` and `[N_t, 2 d]`, *optional*): The dropout's, for the rows that take part, packed.

    Returns:
        `[B]`: each example's mean, not multiplied by its tokens; never negative, 0 without queries or without keys.
    """
    with torch.autocast(queries.device.type, enabled=False):
        query_outputs = critics(queries[query_mask], noise[0])
        key_outputs = critics(keys[key_mask], noise[1])
        q1, q_plan1, q2, q_plan2 = (_padded(rows, query_mask) for rows in query_outputs)
        k1, k_plan1, k2, k_plan2 = (_padded(rows, key_mask) for rows in key_outputs)
        points = _both_ways(q1, k1, q_plan1 @ k_plan1.transpose(1, 2), query_mask, key_mask)

        longest = max(query_mask.shape[1], key_mask.shape[1])
        q2, q_plan2, k2, k_plan2 = (
            F.pad(rows, (0, 0, 0, longest - rows.shape[1])).transpose(1, 2) for rows in (q2, q_plan2, k2, k_plan2)
        )
        every_feature = torch.ones(q2.shape[:2], dtype=torch.bool, device=q2.device)
        features = _both_ways(q2, k2, q_plan2 @ k_plan2.transpose(1, 2), every_feature, every_feature)
        return (points + features) * (query_mask.any(1) & key_mask.any(1))


def _padded(rows: Tensor, mask: Tensor) -> Tensor:
    """Packed rows `[N, h]` in their places `[B, R, h]`, with 0 elsewhere."""
    return rows.new_zeros(*mask.shape, rows.shape[-1]).masked_scatter(mask.unsqueeze(2), rows)


def _both_ways(x: Tensor, y: Tensor, scores: Tensor, x_mask: Tensor, y_mask: Tensor) -> Tensor:
    """Half the mean cost `[B]` of sending each y to all x, and half of each x to all y; masked points are 0."""
    x_count, y_count = x_mask.sum(1).clamp_min(1), y_mask.sum(1).clamp_min(1)
    centre = (x.sum(1) / x_count.unsqueeze(1)).detach().unsqueeze(1)
    # The floor keeps the root's gradient finite (zero, below it) where two points coincide.
    cost = squared_distances(x, y, centre).clamp_min(1e-12).sqrt()
    allowed = x_mask.unsqueeze(2) & y_mask.unsqueeze(1)
    scores = scores.masked_fill(~allowed, -1e5)
    cost = cost * allowed
    to_x = (cost * torch.softmax(scores, 1)).sum((1, 2)) / y_count
    to_y = (cost * torch.softmax(scores, 2)).sum((1, 2)) / x_count
    return (to_x + to_y) / 2
