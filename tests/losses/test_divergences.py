import pytest
import torch

from hf_dskd.losses.divergences import divergence_function
from hf_dskd.methods import DIVERGENCES


def plain(name, z, v, skew=0.1, alpha=0.5, w=0.5):
    """One row in float64 from probabilities alone. z [V] student logits, v [V] teacher logits."""
    q, p = torch.softmax(z, 0), torch.softmax(v, 0)
    kl = lambda a, b: (a * (a / b).log()).sum()  # noqa: E731
    m = w * p + (1 - w) * q
    found = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "symmetric_kl": (kl(p, q) + kl(q, p)) / 2,
        "total_variation": (p - q).abs().sum() / 2,
        "js": w * kl(p, m) + (1 - w) * kl(q, m),
        "skewed_forward_kl": kl(p, skew * p + (1 - skew) * q),
        "skewed_reverse_kl": kl(q, (1 - skew) * p + skew * q),
    }
    if name in found:
        return found[name]
    order = p.argsort()
    tail, mass = [], 0.0
    for i in order.tolist():
        mass += p[i].item()
        if mass < alpha:
            tail.append(i)
    gap = (p - q).abs().detach()
    tail_gap = gap[tail].sum()
    w = 1 - tail_gap / gap.sum()
    return w * kl(p, q) + (1 - w) * kl(q, p)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_value_and_gradient_match_the_plain_formula(name, dtype, tolerance):
    torch.manual_seed(0)
    z, v = torch.randn(5, 37, dtype=torch.float64) * 3, torch.randn(5, 37, dtype=torch.float64) * 3
    reference_z, reference_v = z.clone().requires_grad_(), v.clone().requires_grad_()
    reference = torch.stack([plain(name, a, b) for a, b in zip(reference_z, reference_v)])
    reference.sum().backward()
    ours_z, ours_v = z.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()
    ours = divergence_function(name)(ours_z, ours_v)
    ours.sum().backward()
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), reference, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours_z.grad.double(), reference_z.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours_v.grad.double(), reference_v.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_between_equals_and_finite_at_extremes(name):
    z = torch.tensor([[40.0, -200.0, 3.0, 0.0]], requires_grad=True)
    divergence = divergence_function(name)
    assert divergence(z, z.detach()).abs().item() < 1e-6
    # Two distributions that are each certain of another token, in bf16 as well.
    for dtype in (torch.float32, torch.bfloat16):
        value = divergence(z.to(dtype), torch.tensor([[-200.0, 40.0, 0.0, 3.0]], dtype=dtype))
        assert value.dtype == torch.float32 and torch.isfinite(value).all()
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "name, parameter, argument, value",
    [
        ("skewed_forward_kl", "skew_lambda", "skew", 0.4),
        ("skewed_reverse_kl", "skew_lambda", "skew", 0.4),
        ("adaptive_kl", "adaptive_kl_alpha", "alpha", 0.8),
        ("js", "js_weight", "w", 0.2),
        ("js", "js_weight", "w", 0.9),
    ],
)
def test_parameters_are_used(name, parameter, argument, value):
    torch.manual_seed(1)
    z, v = torch.randn(4, 9, dtype=torch.float64) * 2, torch.randn(4, 9, dtype=torch.float64) * 2
    plain_z, our_z = z.clone().requires_grad_(), z.clone().requires_grad_()
    expected = torch.stack([plain(name, a, b, **{argument: value}) for a, b in zip(plain_z, v)])
    actual = divergence_function(name)(our_z, v, **{parameter: value})
    torch.testing.assert_close(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    torch.testing.assert_close(our_z.grad, plain_z.grad)
    assert not torch.allclose(actual, divergence_function(name)(z, v), rtol=1e-3)


def test_js_with_a_weight_near_an_end_is_a_kl():
    torch.manual_seed(2)
    z, v = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    small = 1e-6
    forward, reverse = (divergence_function("js")(z, v, js_weight=w) / small for w in (small, 1 - small))
    torch.testing.assert_close(forward, divergence_function("forward_kl")(z, v), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reverse, divergence_function("reverse_kl")(z, v), rtol=1e-4, atol=1e-6)
