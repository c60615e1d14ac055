"""
Matching the distribution of queries to that of keys with a discriminator (paper A, Eq. 14).

    min over P_Q, max over D:  E_q[log D(q)] + E_k[log(1 − D(k))]

D(x) is the probability that x is a query. Features are rows `[N, d]` of response tokens only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Discriminator(nn.Module):
    """
    Tells queries from keys: highway → dropout → linear → LeakyReLU(0.1) → linear.

    With g = W_h x + b_h the highway is y = σ(g) relu(g) + (1 − σ(g)) x, as in the code released with paper A.

    Args:
        feature_size (`int`): d, width of queries and keys (2 d_t).
        hidden_size (`int`, *optional*, defaults to `768`): Width of the layer before the output.
        dropout (`float`, *optional*, defaults to `0.1`): Applied in training mode only.
        seed (`int`, *optional*, defaults to `0`): Of the initialisation, drawn from a source of its own.
    """

    def __init__(self, feature_size: int, hidden_size: int = 768, dropout: float = 0.1, seed: int = 0):
        super().__init__()
        self.dropout = dropout
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.highway = nn.Linear(feature_size, feature_size)
            self.linear1 = nn.Linear(feature_size, hidden_size)
            self.linear2 = nn.Linear(hidden_size, 1)

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """
        Logits of D, `[N]`, of features `[N, d]`, in float32.

        `generator` is where the dropout mask comes from, so that a discriminator doesn't shift the random numbers of
        the student beside it.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.highway.weight.dtype)
            gate = self.highway(features)
            open_share = torch.sigmoid(gate)
            hidden = open_share * F.relu(gate) + (1 - open_share) * features
            if self.training and self.dropout > 0:
                keep = torch.rand(hidden.shape, generator=generator, device=hidden.device) >= self.dropout
                hidden = hidden * keep / (1 - self.dropout)
            return self.linear2(F.leaky_relu(self.linear1(hidden), 0.1)).squeeze(-1)


def discriminator_loss(query_logits: Tensor, key_logits: Tensor) -> tuple[Tensor, Tensor]:
    """
    −log D(q) per query `[N_q]` and −log(1 − D(k)) per key `[N_k]`: what the discriminator minimises (Eq. 14, max D).
    """
    return F.softplus(-query_logits), F.softplus(key_logits)


def generator_loss(query_logits: Tensor, adversarial_loss: str = "minimax") -> Tensor:
    """
    What the query projector minimises, per query `[N_q]`.

    `"minimax"` is log D(q), Eq. 14 as printed; its gradient fades where the discriminator is sure.
    `"non_saturating"` is −log(1 − D(q)), which has the same fixed point and its gradient where minimax has none.
    """
    if adversarial_loss == "minimax":
        return -F.softplus(-query_logits)
    return F.softplus(query_logits)


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def published_key_query_loss(
    discriminator: Discriminator, queries: Tensor, keys: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """
    The matching loss as the released code computes it, a scalar.

    BCE(D(q), 1) + BCE(D(k), 0) as means over *every* position `[B, S, d]`, prompt and padding included, with the
    gradient reversed at the queries and none at the keys.
    """
    query_logits = discriminator(_ReverseGradient.apply(queries), generator)
    query_loss, key_loss = discriminator_loss(query_logits, discriminator(keys.detach(), generator))
    return query_loss.mean() + key_loss.mean()
