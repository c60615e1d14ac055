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


def row_noise(rows: Tensor, width: int, seed: int) -> Tensor:
    """
    Uniform numbers in [0, 1) as a function of row and seed alone.

    A random generator would give a row other numbers when the batch is cut up otherwise, on another rank, or after a
    resume; a hash (SplitMix64's finaliser) of row, column and seed doesn't.

    Args:
        rows (`torch.Tensor` of shape `[N]`, int64): A name for each row, such as one made of example and position.
        width (`int`): Numbers per row.
        seed (`int`): Another one gives other numbers.

    Returns:
        `torch.Tensor` of shape `[N, width]`, float32.
    """
    columns = torch.arange(width, device=rows.device)
    x = rows.unsqueeze(1) * -7046029254386353131 + columns * -4417276706812531889 + seed * 1442695040888963407 % 2**62
    # Right shifts are arithmetic on signed integers: mask what they drag in.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    x = x ^ ((x >> 31) & (2**33 - 1))
    return ((x >> 40) & (2**24 - 1)).float() / 2**24


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

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Tensor:
        """
        Logits of D, `[N]`, of features `[N, d]`, in float32.

        `noise` `[N, d]` in [0, 1) decides what is dropped in training mode (see [`row_noise`]); without it nothing is.
        The discriminator draws no random numbers itself, which would shift those of the student beside it.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.highway.weight.dtype)
            gate = self.highway(features)
            open_share = torch.sigmoid(gate)
            hidden = open_share * F.relu(gate) + (1 - open_share) * features
            if self.training and self.dropout > 0 and noise is not None:
                hidden = hidden * (noise >= self.dropout) / (1 - self.dropout)
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
    discriminator: Discriminator, queries: Tensor, keys: Tensor, noise: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """
    The matching loss as the released code computes it, a scalar.

    BCE(D(q), 1) + BCE(D(k), 0) as means over *every* position `[B, S, d]`, prompt and padding included, with the
    gradient reversed at the queries and none at the keys. `noise` is the dropout's, of queries and of keys.
    """
    query_logits = discriminator(_ReverseGradient.apply(queries), noise[0])
    query_loss, key_loss = discriminator_loss(query_logits, discriminator(keys.detach(), noise[1]))
    return query_loss.mean() + key_loss.mean()
