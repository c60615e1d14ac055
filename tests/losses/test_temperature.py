import math

import pytest
import torch

from hf_dskd.losses.divergences import divergence_function
from hf_dskd.losses.temperature import Temperatures, schedule_factor, with_temperature
from hf_dskd.methods import DIVERGENCES


def gradient_of(name, z, v, tau, scaling="none"):
    """Of the divergence with respect to raw student logits z [N, V]."""
    z = z.clone().requires_grad_()
    with_temperature(divergence_function(name), Temperatures(tau, tau), scaling)(z, v).sum().backward()
    return z.grad


def logits(seed=0):
    torch.manual_seed(seed)
    return torch.randn(4, 23, dtype=torch.float64) * 3, torch.randn(4, 23, dtype=torch.float64) * 3


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 4.0])
def test_gradients_of_both_kls_match_their_closed_forms(tau):
    z, v = logits()
    q, p = torch.softmax(z / tau, -1), torch.softmax(v / tau, -1)
    torch.testing.assert_close(gradient_of("forward_kl", z, v, tau), (q - p) / tau)
    gap = z - v
    reverse = q / tau**2 * (gap - (q * gap).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient_of("reverse_kl", z, v, tau), reverse)


@pytest.mark.parametrize("tau, tolerance", [(1e3, 2e-3), (1e4, 2e-4)])
def test_both_kls_tend_to_the_same_gradient_at_large_temperature(tau, tolerance):
    z, v = logits()
    gap = z - v
    limit = (gap - gap.mean(-1, keepdim=True)) / z.shape[-1]
    for name in ("forward_kl", "reverse_kl"):
        error = (gradient_of(name, z, v, tau, "tau_squared") - limit).norm() / limit.norm()
        # The first term that the limit leaves out falls as 1/τ.
        assert error < 10 * tolerance
        assert error > 1e-2 * tolerance


@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_side_is_divided_once(name):
    z, v = logits(1)
    divergence = divergence_function(name)
    ours = with_temperature(divergence, Temperatures(2.0, 3.0), "tau_squared")(z, v)
    torch.testing.assert_close(ours, 6.0 * divergence(z / 2.0, v / 3.0))
    torch.testing.assert_close(
        with_temperature(divergence, Temperatures(2.0, 3.0))(z, v), divergence(z / 2.0, v / 3.0)
    )


def test_adaptive_weights_are_those_of_the_softened_distributions():
    z, v = logits(2)
    tau = 2.0
    ours = with_temperature(divergence_function("adaptive_kl"), Temperatures(tau, tau))(z, v)
    for row in range(len(z)):
        q, p = torch.softmax(z[row] / tau, 0), torch.softmax(v[row] / tau, 0)
        head, mass = 0.0, 0.0
        for i in p.argsort().tolist():
            mass += p[i]
            head += (p[i] - q[i]).abs() if mass >= 0.5 else 0.0
        weight = head / (p - q).abs().sum()
        expected = weight * (p * (p / q).log()).sum() + (1 - weight) * (q * (q / p).log()).sum()
        torch.testing.assert_close(ours[row], expected)


def test_division_is_in_float32_for_bf16_logits():
    z, v = (x.bfloat16() for x in logits())
    divergence = with_temperature(divergence_function("forward_kl"), Temperatures(3.0, 3.0))
    value = divergence(z, v)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), divergence(z.double(), v.double()), rtol=1e-5, atol=1e-6)


def test_factor():
    assert Temperatures(2.0, 2.0).factor("tau_squared") == 4.0
    assert Temperatures(2.0, 3.0).factor("tau_squared") == 6.0
    assert Temperatures(2.0, 3.0).factor("none") == 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_go_from_one_to_the_end_ratio(kind):
    assert schedule_factor(kind, 0.25, 0.0) == 1.0
    assert schedule_factor(kind, 0.25, 1.0) == pytest.approx(0.25)
    assert schedule_factor(kind, 0.25, 0.5) == pytest.approx(0.625)
    assert schedule_factor(kind, 0.25, -1.0) == 1.0
    assert schedule_factor(kind, 0.25, 2.0) == pytest.approx(0.25)
    expected = {"linear": 0.75, "cosine": 0.5 + 0.5 * math.cos(math.pi / 4)}[kind]
    assert schedule_factor(kind, 0.0, 0.25) == pytest.approx(expected)


def test_constant_schedule():
    assert schedule_factor("constant", 0.25, 0.7) == 1.0
