"""Distances of two sets of vectors: closed forms, plain loops, and tests that hold their level."""

import itertools
import math

import pytest
import torch

from hf_dskd.analysis.distributions import (
    auc,
    distribution_metrics,
    linear_probe_auc,
    logistic_regression,
    mmd,
    moment_gaps,
    pca,
    sliced_wasserstein,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share_below(z):
    """Φ(z)"""
    return (1 + math.erf(z / math.sqrt(2))) / 2


def clusters(groups, rows, d, spread, seed):
    """Rows of each group around a centre of its own: `[groups * rows, d]`, and the group of each."""
    centres = spread * normal(groups, d, seed=seed)
    noise = 0.3 * normal(groups, rows, d, seed=seed + 1000)
    return (centres[:, None] + noise).flatten(0, 1), torch.arange(groups).repeat_interleave(rows)


# ---- MMD


def test_mmd_against_loops():
    x, y = normal(5, 3), normal(7, 3, seed=1) * 2 + 1
    rows = [*x, *y]
    distances = sorted(float((a - b).norm()) for a, b in itertools.combinations(rows, 2))
    sigma = distances[(len(distances) - 1) // 2]

    def kernel(a, b):
        return math.exp(-float((a - b).square().sum()) / (2 * sigma**2))

    within = [sum(kernel(a, b) for a, b in itertools.permutations(side, 2)) for side in (x, y)]
    across = sum(kernel(a, b) for a in x for b in y)
    expected = within[0] / 20 + within[1] / 42 - 2 * across / 35
    assert mmd(x, y)[0] == pytest.approx(expected, rel=1e-9)


def test_p_value_against_all_relabellings():
    x, y = normal(4, 2), normal(3, 2, seed=1) + 0.8
    rows = torch.cat([x, y])

    def value(chosen):
        others = [i for i in range(7) if i not in chosen]
        return mmd(rows[list(chosen)], rows[others], permutations=1)[0]

    observed = mmd(x, y)[0]
    larger = [value(chosen) >= observed - 1e-12 for chosen in itertools.combinations(range(7), 4)]
    assert 0.05 < sum(larger) / 35 < 0.6
    assert mmd(x, y, permutations=4000)[1] == pytest.approx(sum(larger) / 35, abs=0.03)


def test_p_value_against_all_swaps_of_examples():
    (x, x_groups), (y, y_groups) = (clusters(5, 3, 2, 1.0, seed=7), clusters(5, 2, 2, 1.0, seed=8))
    y = y + 0.7
    observed = mmd(x, y)[0]
    larger = 0
    for swaps in itertools.product([False, True], repeat=5):
        swapped = torch.tensor(swaps)
        first = torch.cat([x[~swapped[x_groups]], y[swapped[y_groups]]])
        second = torch.cat([x[swapped[x_groups]], y[~swapped[y_groups]]])
        larger += mmd(first, second, permutations=1)[0] >= observed - 1e-12
    assert 2 < larger < 24
    assert mmd(x, y, x_groups, y_groups, permutations=4000)[1] == pytest.approx(larger / 32, abs=0.03)


def test_tokens_of_an_example_are_no_independent_observations():
    """Every example has a centre of its own: to count its rows one by one finds differences that there aren't."""
    by_rows, by_examples = [], []
    for seed in range(40):
        x, groups = clusters(12, 6, 3, 1.0, seed=seed)
        y, _ = clusters(12, 6, 3, 1.0, seed=seed + 100)
        by_rows.append(mmd(x, y, permutations=99)[1])
        by_examples.append(mmd(x, y, groups, groups, permutations=99)[1])
    assert sum(p <= 0.05 for p in by_rows) > 25
    assert sum(p <= 0.05 for p in by_examples) < 7


def test_a_difference_is_found_and_none_where_there_is_none():
    value, p = mmd(normal(60, 4), normal(80, 4, seed=1) + 1)
    assert value > 0.1 and p == 1 / 1001
    (x, groups), (y, _) = (clusters(12, 6, 3, 0.3, seed=s) for s in (1, 2))
    assert mmd(x, y + 2, groups, groups)[1] < 0.01
    # Few examples can't be sure.
    (x, groups), (y, _) = (clusters(2, 30, 3, 0.3, seed=s) for s in (1, 2))
    assert mmd(x, y + 9)[1] < 0.01
    assert mmd(x, y + 9, groups, groups)[1] == pytest.approx(0.5, abs=0.05)
    value, p = mmd(x, x)
    assert -0.05 < value < 0 and p > 0.9
    # Rows that coincide.
    value, p = mmd(torch.zeros(4, 3), torch.zeros(5, 3))
    assert value == pytest.approx(0) and p == 1


def test_large_sets_are_sampled():
    x, y = normal(300, 2), normal(200, 2, seed=1) + 1
    assert mmd(x, y, most_rows=300) == mmd(x, y)
    sampled = mmd(x, y, most_rows=100)
    assert sampled != mmd(x, y) and sampled == mmd(x, y, most_rows=100)
    assert sampled[0] == pytest.approx(mmd(x, y)[0], rel=0.3)
    assert mmd(x, y, most_rows=100, seed=1)[0] != sampled[0]


# ---- Wasserstein


def test_equal_sets_are_at_distance_0():
    x = normal(50, 6)
    # Every point three times is the same distribution.
    assert sliced_wasserstein(x, x.flip(0).repeat(3, 1)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(5, 7), (6, 4), (1, 3), (8, 8)])
def test_unequal_sizes_against_copies(n, m):
    """n and m points are as n m points each, which are paired in their order."""
    x, y = normal(n, 1), normal(m, 1, seed=1) * 2
    pairs = zip(
        sorted(float(value) for value in x for _ in range(m)), sorted(float(value) for value in y for _ in range(n))
    )
    expected = math.sqrt(sum((a - b) ** 2 for a, b in pairs) / (n * m))
    assert sliced_wasserstein(x, y, projections=3) == pytest.approx(expected, rel=1e-12)


def test_distance_is_the_root_mean_square_over_directions():
    x, y = normal(9, 3), normal(9, 3, seed=1) + 1
    directions = torch.randn(3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    squares = []
    for direction in directions.T:
        a, b = ((values @ direction / direction.norm()).sort().values for values in (x, y))
        squares.append(float((a - b).square().mean()))
    assert sliced_wasserstein(x, y, projections=4, seed=5) == pytest.approx(math.sqrt(sum(squares) / 4))


# ---- Moments


def test_moments_by_hand():
    x = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    y = torch.tensor([[-1.0, 4.0], [1.0, 4.0], [3.0, 4.0]])
    # Means (1, 1) and (1, 4), variances (1, 0) and (8/3, 0); s² is 4/3.
    numbers = moment_gaps(x, y)
    assert numbers["mean_gap"] == pytest.approx(math.sqrt(9 / 2 / (4 / 3)))
    assert numbers["variance_gap"] == pytest.approx(math.sqrt((5 / 3) ** 2 / 2) / (4 / 3))
    assert numbers["mean_cosine"] == pytest.approx(5 / math.sqrt(2 * 17))


# ---- AUC


def test_auc_against_loops():
    generator = torch.Generator().manual_seed(0)
    # Few values, many ties.
    x, y = torch.randint(6, (40,), generator=generator) + 1.0, torch.randint(6, (30,), generator=generator) * 1.0
    expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in x for b in y) / 1200
    assert auc(x, y) == pytest.approx(expected) and 0.5 < expected < 0.9
    assert auc(y, x) == pytest.approx(1 - expected)
    assert auc(x.exp(), y.exp()) == auc(x, y)


def test_logistic_regression_is_at_its_minimum():
    rows, labels = normal(40, 3), (normal(40, seed=1) > 0).double()
    weight, bias = logistic_regression(rows, labels, penalty=0.7)
    error = torch.sigmoid(rows @ weight + bias) - labels
    torch.testing.assert_close(rows.T @ error + 0.7 * weight, torch.zeros(3, dtype=torch.float64), atol=1e-4, rtol=0)
    assert abs(float(error.sum())) < 1e-4 and weight.abs().max() > 0.05


@pytest.mark.parametrize("gap", [0.5, 2.0])
def test_probe_of_shifted_gaussians(gap):
    shift = torch.tensor([gap, 0.0, 0.0, 0.0])
    value = linear_probe_auc(normal(1000, 4) + shift, normal(1000, 4, seed=1))
    assert value == pytest.approx(share_below(gap / math.sqrt(2)), abs=0.025)


def test_probe_of_equal_distributions_guesses():
    values = [linear_probe_auc(normal(150, 4, seed=s), normal(100, 4, seed=s + 50)) for s in range(5)]
    assert sum(values) / 5 == pytest.approx(0.5, abs=0.04)
    # More dimensions than rows: it could learn all that it trains on by heart.
    assert linear_probe_auc(normal(60, 200), normal(60, 200, seed=1)) == pytest.approx(0.5, abs=0.15)


def test_probe_is_tested_on_other_examples():
    """Every example and side has a centre of its own, which tells only of the examples that were trained on."""
    x, groups = clusters(10, 12, 40, 1.0, seed=0)
    y, _ = clusters(10, 12, 40, 1.0, seed=50)
    assert linear_probe_auc(x, y) > 0.99
    assert 0.25 < linear_probe_auc(x, y, groups, groups) < 0.75
    # Names of groups are of no account, but which rows share one is.
    assert linear_probe_auc(x, y, groups * 7 + 3, groups * 7 + 3) == linear_probe_auc(x, y, groups, groups)
    assert linear_probe_auc(x, y + 3, groups, groups) > 0.99


def test_probe_standardises():
    x, y = normal(80, 3), normal(90, 3, seed=1) + 0.5
    unit = torch.tensor([1e-4, 1.0, 1e5], dtype=torch.float64)
    expected = linear_probe_auc(x, y)
    assert linear_probe_auc(x * unit + 9, y * unit + 9) == pytest.approx(expected, abs=1e-3)
    # A dimension without any spread.
    flat = [torch.cat([values, torch.ones(len(values), 1)], 1) for values in (x, y)]
    assert linear_probe_auc(*flat) == pytest.approx(expected, abs=1e-6)
    # Two examples make two folds.
    groups = torch.tensor([4] * 30 + [9] * 30)
    assert linear_probe_auc(x[:60] + 5, y[:60] - 5, groups, groups) == 1


# ---- Projection


def test_projection_against_the_covariance():
    x, y = normal(200, 60) * torch.linspace(5, 1, 60), normal(100, 60, seed=1) + 2
    rows = torch.cat([x, y])
    spread, axes = torch.linalg.eigh(torch.cov(rows.T))
    x2, _, explained = pca(x, y)
    assert list(explained) == pytest.approx((spread.flip(0)[:2] / spread.sum()).tolist(), rel=1e-3)
    expected = (x - rows.mean(0)) @ axes.flip(1)[:, :2]
    torch.testing.assert_close(x2.abs(), expected.abs(), atol=0.1, rtol=0)


def test_projection_has_one_sign():
    x, y = normal(20, 8), normal(30, 8, seed=1) + 1
    x2, y2, _ = pca(x, y)
    other_x2, other_y2, _ = pca(x.flip(0), y.flip(0))
    swapped_y2, swapped_x2, _ = pca(y, x)
    for one, other in ((other_x2.flip(0), x2), (other_y2.flip(0), y2), (swapped_x2, x2), (swapped_y2, y2)):
        torch.testing.assert_close(one, other)


# ---- Together


def test_everything_together():
    (x, groups), (y, _) = (clusters(6, 10, 4, 0.5, seed=s) for s in (1, 2))
    x, y = x.float(), (y + 1).float()
    numbers = distribution_metrics(x, y, groups, groups, x[:, 0], y[:, 0])
    discrepancy, p_value = mmd(x, y, groups, groups)
    assert numbers == {
        "mmd": discrepancy,
        "mmd_p_value": p_value,
        "sliced_wasserstein": sliced_wasserstein(x, y),
        "linear_probe_auc": linear_probe_auc(x, y, groups, groups),
        "discriminator_auc": auc(x[:, 0], y[:, 0]),
        **moment_gaps(x, y),
    }
    assert all(type(value) is float and math.isfinite(value) for value in numbers.values())


def test_one_example_has_nothing_held_out():
    groups = torch.zeros(20, dtype=torch.int64)
    numbers = distribution_metrics(normal(20, 3), normal(20, 3, seed=1) + 9, groups, groups)
    assert "linear_probe_auc" not in numbers and "discriminator_auc" not in numbers
    assert numbers["mmd_p_value"] == 1
    assert distribution_metrics(normal(20, 3), normal(20, 3, seed=1) + 9)["linear_probe_auc"] == 1


def test_no_random_number_of_others_is_drawn():
    before = torch.get_rng_state()
    x, y = normal(60, 5), normal(50, 5, seed=1)
    with torch.no_grad():
        first = distribution_metrics(x, y), [part.tolist() for part in pca(x, y)[:2]]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert first == (distribution_metrics(x, y), [part.tolist() for part in pca(x, y)[:2]])


def test_bf16_is_as_good_as_its_numbers():
    x, y = normal(40, 5).bfloat16(), (normal(50, 5, seed=1) + 1).bfloat16()
    assert distribution_metrics(x, y) == distribution_metrics(x.double(), y.double())
