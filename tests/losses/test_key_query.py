import pytest
import torch

from hf_dskd.losses.conditional_transport import TransportCritics, transport_cost
from hf_dskd.losses.key_query import (
    Discriminator,
    discriminator_loss,
    generator_loss,
    mmd,
    moment_matching,
    row_noise,
    squared_distances,
)
from hf_dskd.training.published import published_key_query_loss


def test_architecture_is_highway_linear_leaky_linear():
    network = Discriminator(6, hidden_size=4, dropout=0.0).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    g = x @ network.highway.weight.T + network.highway.bias
    y = torch.sigmoid(g) * g.clamp_min(0) + (1 - torch.sigmoid(g)) * x
    h = y @ network.linear1.weight.T + network.linear1.bias
    h = torch.where(h > 0, h, 0.1 * h)
    torch.testing.assert_close(network(x), (h @ network.linear2.weight.T + network.linear2.bias)[:, 0])


def test_losses_match_equation_14():
    query_logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    key_logits = torch.randn(7, dtype=torch.float64)
    d_query, d_key = torch.sigmoid(query_logits), torch.sigmoid(key_logits)
    query_loss, key_loss = discriminator_loss(query_logits, key_logits)
    torch.testing.assert_close(query_loss, -d_query.log())
    torch.testing.assert_close(key_loss, -(1 - d_key).log())
    torch.testing.assert_close(generator_loss(query_logits, "minimax"), d_query.log())
    torch.testing.assert_close(generator_loss(query_logits, "non_saturating"), -(1 - d_query).log())
    # Both push D(q) down, towards what keys have.
    for kind in ("minimax", "non_saturating"):
        (gradient,) = torch.autograd.grad(generator_loss(query_logits, kind).sum(), query_logits)
        assert (gradient > 0).all()


def test_non_saturating_gradient_is_large_where_minimax_fades():
    sure = torch.tensor([12.0], requires_grad=True)
    (minimax,) = torch.autograd.grad(generator_loss(sure, "minimax").sum(), sure)
    (non_saturating,) = torch.autograd.grad(generator_loss(sure, "non_saturating").sum(), sure)
    assert minimax.item() < 1e-4 and non_saturating.item() > 0.99


def test_dropout_follows_the_noise_and_draws_nothing():
    network = Discriminator(8, hidden_size=4, dropout=0.5).train()
    x = torch.randn(4, 8)
    before = torch.get_rng_state()
    noise = row_noise(torch.arange(4), 8, seed=3)
    torch.testing.assert_close(network(x, noise), network(x, noise), rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(network(x, noise), network(x, row_noise(torch.arange(4), 8, seed=4)))
    torch.testing.assert_close(network(x, torch.ones(4, 8)) * 0, torch.zeros(4))
    assert not torch.equal(network(x, noise), network(x))
    torch.testing.assert_close(network.eval()(x, noise), network(x))


def test_noise_is_uniform_and_a_function_of_the_row():
    noise = row_noise(torch.arange(3000) * 2**20, 64, seed=7)
    assert 0 <= noise.min() and noise.max() < 1
    histogram = torch.histc(noise, 20, 0, 1) / noise.numel()
    torch.testing.assert_close(histogram, torch.full((20,), 0.05), rtol=0.03, atol=0)
    # Neighbours in either direction, and of the next seed, are unrelated.
    for other in (noise.roll(1, 0), noise.roll(1, 1), row_noise(torch.arange(3000) * 2**20, 64, seed=8)):
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.01
    some = row_noise(torch.tensor([5 * 2**20, 2 * 2**20]), 64, seed=7)
    torch.testing.assert_close(some, noise[[5, 2]], rtol=0, atol=0)
    assert (row_noise(torch.tensor([-1, -(2**40)]), 64, seed=7).std(1) > 0.2).all()


def test_published_loss_pushes_queries_as_minimax_does_and_reverses():
    network = Discriminator(6, hidden_size=4, dropout=0.0)
    queries = torch.randn(2, 3, 6, requires_grad=True)
    keys = torch.randn(2, 5, 6, requires_grad=True)
    loss = published_key_query_loss(network, queries, keys, (None, None))
    loss.backward()
    assert keys.grad is None
    copy = queries.detach().clone().requires_grad_()
    generator_loss(network(copy.view(-1, 6)), "minimax").mean().backward()
    torch.testing.assert_close(queries.grad, copy.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_in_float32_inside_autocast(dtype):
    network = Discriminator(8, dropout=0.0)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=dtype):
        assert network(x.to(dtype)).dtype == torch.float32


# ---- Without a discriminator


LENGTHS = ((5, 3), (1, 4), (2, 1), (1, 1))  # queries and keys of each example


def padded_features(lengths=LENGTHS, size=7, dtype=torch.float64, seed=0):
    """Queries [B, R_s, d], keys [B, R_t, d] and their masks; what is padding holds NaN."""
    g = torch.Generator().manual_seed(seed)
    sides = []
    for side, shift in ((0, 0.5), (1, 0.0)):
        values = torch.full((len(lengths), max(pair[side] for pair in lengths), size), float("nan"), dtype=dtype)
        mask = torch.zeros(values.shape[:2], dtype=torch.bool)
        for i, pair in enumerate(lengths):
            values[i, : pair[side]] = torch.randn(pair[side], size, generator=g, dtype=torch.float64).to(dtype) + shift
            mask[i, : pair[side]] = True
        sides.append((values, mask))
    (queries, query_mask), (keys, key_mask) = sides
    return queries, keys, query_mask, key_mask


def plain_moments(queries, keys):
    """Of one example's queries [n, d] and keys [m, d]."""
    total = 0.0
    for j in range(queries.shape[1]):
        q, k = queries[:, j], keys[:, j]
        q_mean, k_mean = q.sum() / len(q), k.sum() / len(k)
        q_std = ((q - q_mean) ** 2).sum().div(len(q)).sqrt() if len(q) > 1 else 0.0
        k_std = ((k - k_mean) ** 2).sum().div(len(k)).sqrt() if len(k) > 1 else 0.0
        total = total + (q_mean - k_mean) ** 2 + (q_std - k_std) ** 2
    return len(queries) * total / queries.shape[1]


def plain_mmd(queries, keys):
    rows = [*queries, *keys]
    pairs = [((x - y) ** 2).sum().item() for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
    h = sum(pairs) / len(pairs)

    def mean_kernel(xs, ys):
        factors = (0.25, 0.5, 1, 2, 4)
        values = [torch.exp(-((x - y) ** 2).sum() / (c * h)) / 5 for x in xs for y in ys for c in factors]
        return sum(values) / (len(xs) * len(ys))

    squared = mean_kernel(queries, queries) + mean_kernel(keys, keys) - 2 * mean_kernel(queries, keys)
    return len(queries) * squared


STATISTICS = {moment_matching: plain_moments, mmd: plain_mmd}


def transport(queries, keys, query_mask, key_mask):
    """Of small networks, which are the same at every call."""
    critics = TransportCritics(queries.shape[-1], 5, 0.0, seed=3)
    critics = critics.to(torch.promote_types(queries.dtype, torch.float32))
    return transport_cost(critics, queries, keys, query_mask, key_mask)


EVERY = (*STATISTICS, transport)


@pytest.mark.parametrize("function", STATISTICS)
def test_statistic_matches_plain_loops(function):
    queries, keys, query_mask, key_mask = padded_features()
    queries.requires_grad_()
    keys.requires_grad_()
    actual = function(queries, keys, query_mask, key_mask)
    expected = torch.stack(
        [STATISTICS[function](q[m], k[n].detach()) for q, k, m, n in zip(queries, keys, query_mask, key_mask)]
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)  # each example's gradient on its own
    (gradient,) = torch.autograd.grad(actual @ weights, queries)
    (expected_gradient,) = torch.autograd.grad(expected @ weights, queries)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)
    assert (gradient[~query_mask] == 0).all()
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(function(queries, keys, query_mask, key_mask).sum(), keys)


@pytest.mark.parametrize("function", EVERY)
def test_statistic_of_an_example_knows_nothing_of_its_neighbours(function):
    queries, keys, query_mask, key_mask = padded_features()
    whole = function(queries, keys, query_mask, key_mask)
    turned = function(queries.flip(0), keys.flip(0), query_mask.flip(0), key_mask.flip(0))
    torch.testing.assert_close(turned.flip(0), whole)
    for i, (n, m) in enumerate(LENGTHS):
        alone = function(queries[i, None, :n], keys[i, None, :m], query_mask[i, None, :n], key_mask[i, None, :m])
        torch.testing.assert_close(alone[0], whole[i])


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (0, 0)])
def test_statistic_without_rows_is_zero(function, lengths):
    queries, keys, query_mask, key_mask = padded_features((lengths, (2, 2)))
    queries.requires_grad_()
    values = function(queries, keys, query_mask, key_mask)
    (gradient,) = torch.autograd.grad(values.sum(), queries)
    assert values[0] == 0 and values[1] > 0
    assert (gradient[0] == 0).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("function", STATISTICS)
def test_statistic_is_zero_where_rows_are_equal(function):
    row = torch.randn(1, 1, 6) * 3 + 100
    queries, keys = row.expand(1, 4, 6).clone().requires_grad_(), row.expand(1, 3, 6)
    value = function(queries, keys, torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value.sum(), queries)
    assert abs(value.item()) < 1e-5
    assert gradient.abs().max() < 1e-2


@pytest.mark.parametrize("function", EVERY)
def test_statistic_takes_bfloat16_inside_autocast(function):
    queries, keys, query_mask, key_mask = padded_features(dtype=torch.bfloat16)
    queries.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = function(queries, keys, query_mask, key_mask)
    expected = function(queries.double(), keys.double(), query_mask, key_mask)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(torch.autograd.grad(actual.sum(), queries)[0]).all()


def test_mmd_is_never_negative_and_sees_what_moments_do_not():
    g = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (1, 400, 4), generator=g) * 2.0 - 1
    bell = torch.randn(1, 400, 4, generator=g)
    signs, bell = ((x - x.mean(1)) / x.std(1) for x in (signs, bell))
    mask = torch.ones(1, 400, dtype=torch.bool)
    assert moment_matching(signs, bell, mask, mask) / 400 < 1e-6
    same = mmd(bell[:, :200], bell[:, 200:], mask[:, :200], mask[:, 200:]) / 200
    other = mmd(signs[:, :200], bell[:, 200:], mask[:, :200], mask[:, 200:]) / 200
    assert 0 <= same < other / 2


def test_distances_keep_their_precision_far_from_the_origin():
    x, y = torch.randn(1, 5, 8) + 1000, torch.randn(1, 4, 8) + 1000
    expected = (x.double().unsqueeze(2) - y.double().unsqueeze(1)).square().sum(-1)
    actual = squared_distances(x, y, x.mean(1, keepdim=True))
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)
