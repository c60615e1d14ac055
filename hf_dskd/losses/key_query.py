"""
Matching the distribution of queries to that of keys.

By a discriminator (arXiv 2603.22056, Eq. 14), whose features are packed rows `[N, d]` of response tokens: min over
P_Q, max over D of E_q[log D(q)] + E_k[log(1 − D(k))], D(x) the probability that x is a query. Or without one: by the
first two moments, or the maximum mean discrepancy, of the rows of each example. (Eq. 15 is in
`conditional_transport.py`.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.random import cpu_seed


def row_noise(rows: Tensor, width: int, seed: int) -> Tensor:
    """
    Uniform numbers in [0, 1), float32 `[N, width]`, as a function of seed and of `rows` `[N]` (int64), a name for
    each.

    A random generator would give a row other numbers when the batch is cut up otherwise, on another rank, or after a
    resume; a hash (SplitMix64's finaliser) of row, column and seed doesn't.
    """
    columns = torch.arange(width, device=rows.device)
    x = rows.unsqueeze(1) * -7046029254386353131 + columns * -4417276706812531889 + seed * 1442695040888963407 % 2**62
    # Right shifts are arithmetic on signed integers: mask what they drag in.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    x = x ^ ((x >> 31) & (2**33 - 1))
    return ((x >> 40) & (2**24 - 1)).float() / 2**24


def highway(linear: nn.Linear, features: Tensor, dropout: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """
    y = σ(g) relu(g) + (1 − σ(g)) x of features x `[..., d]`, g = W x + b, as in the code released with arXiv
    2603.22056.

    Then dropout: what has `noise` `[..., d]` in [0, 1) below `dropout` is 0, the rest scaled up; `None` drops nothing.
    """
    gate = linear(features)
    open_share = torch.sigmoid(gate)
    hidden = open_share * F.relu(gate) + (1 - open_share) * features
    if dropout > 0 and noise is not None:
        hidden = hidden * (noise >= dropout) / (1 - dropout)
    return hidden


class Discriminator(nn.Module):
    """
    Tells queries from keys, `[..., d]` with d = 2 d_t: [`highway`] → dropout → linear → LeakyReLU(0.1) → linear.

    Dropout is applied in training mode only; the initialisation is drawn from a source of its own.
    """

    def __init__(self, feature_size: int, hidden_size: int = 768, dropout: float = 0.1, seed: int = 0):
        super().__init__()
        self.dropout = dropout
        with cpu_seed(seed):
            self.highway = nn.Linear(feature_size, feature_size)
            self.linear1 = nn.Linear(feature_size, hidden_size)
            self.linear2 = nn.Linear(hidden_size, 1)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Tensor:
        """
        Logits of D, `[N]`, of features `[N, d]`, in float32.

        `noise` `[N, d]`, in [0, 1), decides what is dropped in training mode (see [`row_noise`]); without it, nothing.
        The discriminator draws no random numbers itself, which would shift those of the student beside it.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.highway.weight.dtype)
            hidden = highway(self.highway, features, self.dropout if self.training else 0.0, noise)
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


def squared_distances(x: Tensor, y: Tensor, centre: Tensor) -> Tensor:
    """
    ‖x_i − y_j‖² of rows `[B, n, d]` and `[B, m, d]`, as `[B, n, m]`, never below 0, by inner products.

    `centre` `[B, 1, d]` is subtracted from both: it changes no distance, but rounding is relative to what remains.
    """
    x, y = x - centre, y - centre
    squares = x.square().sum(-1).unsqueeze(2) + y.square().sum(-1).unsqueeze(1)
    return (squares - 2 * x @ y.transpose(1, 2)).clamp_min(0)


def moment_matching(queries: Tensor, keys: Tensor, query_mask: Tensor, key_mask: Tensor) -> Tensor:
    """
    Distance of the first two moments of queries from those of keys: the plain alternative to a discriminator.

    Of each example, (mean_q − mean_k)² + (std_q − std_k)² in every dimension, averaged over dimensions and multiplied
    by its number of queries: `[B]`, 0 without queries or without keys. Standard deviations divide by n, so that one
    row has one: 0. Of `queries` `[B, R_s, d]` and `keys` `[B, R_t, d]` (constants) the masks say which rows take part.
    """
    query_mean, query_std = _moments(queries, query_mask)
    key_mean, key_std = _moments(keys.detach(), key_mask)
    distance = ((query_mean - key_mean).square() + (query_std - key_std).square()).mean(-1)
    return distance * query_mask.sum(1) * key_mask.any(1)


def _moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[B, d]` over the rows of each example."""
    values, count = _real_rows(values, mask), mask.sum(1, keepdim=True).clamp_min(1)
    mean = values.sum(1) / count
    deviations = (values - mean.unsqueeze(1)) * mask.unsqueeze(2)
    variance = deviations.square().sum(1) / count
    # Where all rows are equal, the root's gradient is infinite: it is taken of 1 there instead.
    spread = variance > 0
    return mean, torch.where(spread, variance, 1.0).sqrt() * spread


def mmd(
    queries: Tensor,
    keys: Tensor,
    query_mask: Tensor,
    key_mask: Tensor,
    bandwidths: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
) -> Tensor:
    """
    Squared maximum mean discrepancy between queries and keys (Gretton et al., "A Kernel Two-Sample Test", JMLR 2012,
    Eq. 5: the biased estimate, which is never negative), `[B]`: of each example, times its number of queries.

    The kernel is the mean of exp(−‖x − y‖² / (c h)) over c in `bandwidths`. h is the mean squared distance between two
    different rows of the example, queries and keys together, and a constant in the backward pass. The other arguments
    are those of [`moment_matching`].
    """
    with torch.autocast(queries.device.type, enabled=False):
        rows = torch.cat([_real_rows(queries, query_mask), _real_rows(keys.detach(), key_mask)], 1)
        mask = torch.cat([query_mask, key_mask], 1).unsqueeze(2)
        count, query_count, key_count = mask.sum(1, keepdim=True), query_mask.sum(1), key_mask.sum(1)
        with torch.no_grad():
            centre = rows.sum(1, keepdim=True) / count.clamp_min(1)
            spread = ((rows - centre) * mask).square().sum((1, 2), keepdim=True)
            # Σ_i Σ_j ‖x_i − x_j‖² = 2 n Σ_i ‖x_i − mean‖². The floor bounds the gradient where all rows are equal.
            bandwidth = (2 * spread / (count - 1).clamp_min(1)).clamp_min(1e-6)
        distances = squared_distances(rows, rows, centre) / bandwidth
        kernel = torch.stack([torch.exp(-distances / factor) for factor in bandwidths]).mean(0)
        # +1/n for a query and −1/m for a key: the quadratic form is the squared distance between the two means.
        query_shares = query_mask.to(rows.dtype) / query_count.clamp_min(1).unsqueeze(1)
        key_shares = key_mask.to(rows.dtype) / key_count.clamp_min(1).unsqueeze(1)
        shares = torch.cat([query_shares, -key_shares], 1)
        squared = torch.einsum("bi,bij,bj->b", shares, kernel, shares)
        return squared * query_count * (key_count > 0)


def _real_rows(values: Tensor, mask: Tensor) -> Tensor:
    """`values` in float32 (float64 where they are), with 0 in the rows that take no part."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.where(mask.unsqueeze(2), values, torch.zeros_like(values))
