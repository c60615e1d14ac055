import pytest
import torch

from hf_dskd.losses.key_query import (
    Discriminator,
    discriminator_loss,
    generator_loss,
    published_key_query_loss,
    row_noise,
)


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


def test_initialisation_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Discriminator(8, seed=5)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


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


def test_trained_discriminator_separates_what_differs():
    torch.manual_seed(0)
    network = Discriminator(8, hidden_size=16, dropout=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    queries, keys = torch.randn(64, 8) + 1, torch.randn(64, 8) - 1
    losses = []
    for _ in range(60):
        query_loss, key_loss = discriminator_loss(network(queries), network(keys))
        loss = query_loss.mean() + key_loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert (network(queries) > 0).float().mean() > 0.9 and (network(keys) < 0).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_in_float32_inside_autocast(dtype):
    network = Discriminator(8, dropout=0.0)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=dtype):
        assert network(x.to(dtype)).dtype == torch.float32
