import pytest
import torch

from hf_dskd.losses.divergences import divergence_function
from hf_dskd.losses.temperature import Temperatures, with_temperature


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


def test_division_is_in_float32_for_bf16_logits():
    z, v = (x.bfloat16() for x in logits())
    divergence = with_temperature(divergence_function("forward_kl"), Temperatures(3.0, 3.0))
    value = divergence(z, v)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), divergence(z.double(), v.double()), rtol=1e-5, atol=1e-6)
