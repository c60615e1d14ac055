"""
How far two sets of vectors are apart: queries `[n, d]` and keys `[m, d]`, or any other two.

Everything is computed in float64, and what is drawn at random comes from a generator of its own. Rows of one example
are alike, because its text is; with `groups` (the example of each row) the tests treat whole examples as the
independent observations, which they are, and not rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.key_query import squared_distances
from ..utils.random import cpu_seed


MOST_ROWS = 1000


def mmd(
    x: Tensor,
    y: Tensor,
    x_groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    *,
    permutations: int = 1000,
    most_rows: int = MOST_ROWS,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Squared maximum mean discrepancy (Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, Eq. 3: the unbiased
    estimate, which is about 0 and may be negative for equal distributions), and how likely one as large is by chance.

    The kernel is exp(−‖a − b‖² / 2σ²), σ the median distance between two different rows of both sets together. So the
    bandwidth follows the data, and a discrepancy is relative to their spread.

    The p-value is that of a permutation test, one sided: the share of relabellings, the true one included, whose
    discrepancy is as large. Without groups all rows are dealt out anew; with groups the two sides of an example change
    places or stay. g examples have 2^(g−1) different relabellings at most, so that few examples can't give a small p.

    Args:
        x (`torch.Tensor` of shape `[n, d]`), y (`torch.Tensor` of shape `[m, d]`): At least two rows each.
        x_groups (`torch.Tensor` of shape `[n]`), y_groups (`torch.Tensor` of shape `[m]`, *optional*):
            Example of each row, int64.
        permutations (`int`, *optional*, defaults to `1000`): Relabellings of the one kernel matrix.
        most_rows (`int`, *optional*, defaults to `1000`): Of a side; a random sample of larger sets.

    Returns:
        `tuple[float, float]`: squared discrepancy and p-value.
    """
    generator = torch.Generator().manual_seed(seed)
    x, x_groups = _sample(x, x_groups, most_rows, generator)
    y, y_groups = _sample(y, y_groups, most_rows, generator)
    rows = torch.cat([x, y]).double()
    distances = squared_distances(rows[None], rows[None], rows.mean(0)[None, None])[0]
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    # If most rows coincide, the kernel says whether two do.
    bandwidth = distances[first, second].median().clamp_min(torch.finfo(torch.float64).tiny)
    kernel = torch.exp(-distances / (2 * bandwidth)).fill_diagonal_(0)

    sides = torch.zeros(len(rows), dtype=torch.float64)
    sides[: len(x)] = 1
    if x_groups is None or y_groups is None:
        drawn = [sides[torch.randperm(len(rows), generator=generator)] for _ in range(permutations)]
        relabelled = torch.stack(drawn, 1)
    else:
        names, index = torch.cat([x_groups, y_groups]).unique(return_inverse=True)
        swapped = torch.randint(2, (len(names), permutations), generator=generator)[index]
        relabelled = torch.where(swapped == 1, 1 - sides[:, None], sides[:, None])
    values = _unbiased(kernel, torch.cat([sides[:, None], relabelled], 1))
    # Equal relabellings may differ by rounding.
    larger = int((values[1:] >= values[0] - 1e-12).sum())
    return float(values[0]), (1 + larger) / (1 + permutations)


def _unbiased(kernel: Tensor, sides: Tensor) -> Tensor:
    """Discrepancy `[k]` under k labellings `[N, k]` (1 is x, 0 is y) of a kernel `[N, N]` with a diagonal of zeros."""
    n = sides.sum(0)
    m = len(sides) - n
    within_x = (sides * (kernel @ sides)).sum(0)
    from_x = kernel.sum(0) @ sides
    within_y = kernel.sum() - 2 * from_x + within_x
    across = from_x - within_x
    # A side may get a single row where an example has rows on one side only.
    pairs_x, pairs_y = (n * (n - 1)).clamp_min(1), (m * (m - 1)).clamp_min(1)
    return within_x / pairs_x + within_y / pairs_y - 2 * across / (n * m).clamp_min(1)


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 256, seed: int = 0) -> float:
    """
    Sliced 2-Wasserstein distance (Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures", 2015).

    The root of the mean, over random directions, of the squared distance between the two projections. In one dimension
    that is ∫ (F⁻¹(u) − G⁻¹(u))² du over the quantile functions, exact for sets of different sizes. It is in the unit
    of the vectors; for y = x + δ it is about ‖δ‖ / √d, the root mean square of δ over dimensions. `projections` is the
    number of directions.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64), dim=0)
    x, y = ((values.double() @ directions).sort(0).values for values in (x, y))
    n, m = len(x), len(y)
    # Where one of the quantile functions jumps, times n m to stay exact.
    jumps = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()
    widths = jumps.diff().double() / (n * m)
    gaps = x[jumps[:-1] // m] - y[jumps[:-1] // n]
    return float((widths @ gaps.square()).mean().sqrt())


def moment_gaps(x: Tensor, y: Tensor) -> dict[str, float]:
    """
    Gaps between the first two moments, relative to the standard deviation s of `y`.

    s² is the mean over dimensions of the variance of `y`. Variances divide by the number of rows.

    Returns:
        `dict[str, float]`: `mean_gap`, the root mean square over dimensions of the difference of means, over s;
        `variance_gap`, that of the difference of variances, over s²; `mean_cosine`, the cosine between the two means.
    """
    x, y = x.double(), y.double()
    variance = y.var(0, correction=0)
    mean_difference = x.mean(0) - y.mean(0)
    variance_difference = x.var(0, correction=0) - variance
    scale = variance.mean()
    return {
        "mean_gap": float((mean_difference.square().mean() / scale).sqrt()),
        "variance_gap": float(variance_difference.square().mean().sqrt() / scale),
        "mean_cosine": float(F.cosine_similarity(x.mean(0), y.mean(0), dim=0)),
    }


def auc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative, a tie counting one half."""
    return _pairs_in_order(positive, negative) / (len(positive) * len(negative))


def _pairs_in_order(positive: Tensor, negative: Tensor) -> float:
    positive, negative = positive.double(), negative.double().sort().values
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return float(below.sum()) / 2


def linear_probe_auc(
    x: Tensor,
    y: Tensor,
    x_groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    *,
    folds: int = 5,
    most_rows: int = MOST_ROWS,
    seed: int = 0,
) -> float:
    """
    How well a freshly trained linear classifier tells `x` from `y`: 0.5 if it can't, 1 if it always does.

    [`logistic_regression`] by cross-validation, on dimensions standardised with the training folds' statistics. The
    result is [`auc`] over all pairs of held-out rows that lie in the same fold, where one model scored both. With
    groups, folds are made of whole examples, both sides together: the probe never knows the text that it is tested on.

    `x`, `y`, groups, `most_rows` and `seed` are those of [`mmd`]. Without groups, folds are of single rows; of groups
    there are two or more, and at most as many `folds`.
    """
    generator = torch.Generator().manual_seed(seed)
    x, x_groups = _sample(x, x_groups, most_rows, generator)
    y, y_groups = _sample(y, y_groups, most_rows, generator)
    if x_groups is None or y_groups is None:
        folds_of = [torch.randperm(len(rows), generator=generator) % folds for rows in (x, y)]
    else:
        names, index = torch.cat([x_groups, y_groups]).unique(return_inverse=True)
        folds = min(folds, len(names))
        folds_of = list((torch.randperm(len(names), generator=generator) % folds)[index].split([len(x), len(y)]))
    rows, labels = torch.cat([x, y]).double(), torch.cat([torch.ones(len(x)), torch.zeros(len(y))]).double()
    in_order, pairs = 0.0, 0
    for fold in range(folds):
        held_out = torch.cat(folds_of) == fold
        train = rows[~held_out]
        mean, std = train.mean(0), train.std(0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        weight, bias = logistic_regression((train - mean) / std, labels[~held_out])
        scores, of_x = (rows[held_out] - mean) / std @ weight + bias, labels[held_out] == 1
        in_order += _pairs_in_order(scores[of_x], scores[~of_x])
        pairs += int(of_x.sum()) * int((~of_x).sum())
    return in_order / pairs


def logistic_regression(rows: Tensor, labels: Tensor, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """
    Weight `[d]` and bias `[]` that minimise Σ −log p(label | row) + λ/2 ‖w‖², by L-BFGS in float64.

    Rows `[n, d]` are standardised features, labels `[n]` 1 or 0, and the `penalty` λ is on the weight alone.
    """
    rows, labels = rows.detach().double(), labels.double()
    weight = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        nats = F.binary_cross_entropy_with_logits(rows @ weight + bias, labels, reduction="sum")
        value = nats + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def pca(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """
    Both sets on the first two principal axes of the two together, for a picture.

    The mean of all rows is the origin, and each axis points to where its largest coordinate is positive. There are
    two dimensions or more.

    Returns:
        Points `[n, 2]` and `[m, 2]`, float64, and the share of the variance along each axis.
    """
    rows = torch.cat([x, y]).cpu().double()
    rows = rows - rows.mean(0)
    with cpu_seed(0):
        _, spread, axes = torch.svd_lowrank(rows, q=min(32, *rows.shape), niter=8)
    axes = axes[:, :2]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    first, second = (spread[:2].square() / rows.square().sum()).tolist()
    points = rows @ axes
    return points[: len(x)], points[len(x) :], (first, second)


def distribution_metrics(
    queries: Tensor,
    keys: Tensor,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    query_scores: Tensor | None = None,
    key_scores: Tensor | None = None,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """
    Everything here about queries and keys.

    Args:
        queries (`torch.Tensor` of shape `[n, d]`), keys (`torch.Tensor` of shape `[m, d]`): The two sets.
        query_groups (`torch.Tensor` of shape `[n]`), key_groups (`torch.Tensor` of shape `[m]`, *optional*):
            Example of each row, int64.
        query_scores (`torch.Tensor` of shape `[n]`), key_scores (`torch.Tensor` of shape `[m]`, *optional*):
            What the run's discriminator makes of them, higher for what it takes for a query.

    Returns:
        `dict[str, float]`: `mmd` and `mmd_p_value` (see [`mmd`]), `sliced_wasserstein`, `mean_gap`, `variance_gap` and
        `mean_cosine` (see [`moment_gaps`]), `linear_probe_auc` unless all rows are of one example, and with scores
        `discriminator_auc`: 1 if it tells every query from every key, 0.5 if it guesses, below if it is mistaken.
    """
    discrepancy, p_value = mmd(queries, keys, query_groups, key_groups, seed=seed)
    numbers = {
        "mmd": discrepancy,
        "mmd_p_value": p_value,
        "sliced_wasserstein": sliced_wasserstein(queries, keys, seed=seed),
        **moment_gaps(queries, keys),
    }
    if query_groups is None or len(query_groups.unique()) > 1:
        numbers["linear_probe_auc"] = linear_probe_auc(queries, keys, query_groups, key_groups, seed=seed)
    if query_scores is not None and key_scores is not None:
        numbers["discriminator_auc"] = auc(query_scores, key_scores)
    return numbers


def _sample(
    rows: Tensor, groups: Tensor | None, most: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """At most so many rows, drawn without replacement, with their groups."""
    if len(rows) <= most:
        return rows, groups
    chosen = torch.randperm(len(rows), generator=generator)[:most].sort().values
    return rows[chosen], None if groups is None else groups[chosen]
