import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_dskd.analysis.distributions import pca
from hf_dskd.losses.conditional_transport import TransportCritics
from hf_dskd.losses.key_query import Discriminator
from hf_dskd.losses.projectors import Projectors, least_squares
from hf_dskd.models.causal_lm import LMHead


def heads(rows=60, to=5, of=8, rank=None, seed=0, dtype=torch.float64, scales=(1.0, 1.0)):
    """Two heads of 10 more tokens than are shared, and the shared tokens' ids in no particular order."""
    g = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(rows + 10, size, generator=g, dtype=torch.float64) for size in (to, of)]
    if rank is not None:
        matrices[0] = matrices[0][:, :rank] @ torch.randn(rank, to, generator=g, dtype=torch.float64)
    ids = [torch.randperm(rows + 10, generator=g)[:rows] for _ in range(2)]
    to_head, from_head = (LMHead(matrix.to(dtype), scale=scale) for matrix, scale in zip(matrices, scales))
    return to_head, ids[0], from_head, ids[1]


def shared_rows(head, ids):
    return head.weight[ids].double() * head.scale


# Wider than the other, narrower, with fewer shared tokens than dimensions, and with linearly dependent columns.
SHAPES = {
    "to_narrow": {"to": 5, "of": 8},
    "to_wide": {"to": 8, "of": 5},
    "few_tokens": {"rows": 6, "to": 8, "of": 5},
    "rank_deficient": {"to": 7, "of": 5, "rank": 3},
    "scaled": {"scales": (0.25, 3.0)},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_least_squares_equals_lstsq(shape):
    to_head, to_ids, from_head, from_ids = heads(**SHAPES[shape])
    a, b = shared_rows(to_head, to_ids), shared_rows(from_head, from_ids)  # [n, d_to], [n, d_from]
    expected = torch.linalg.lstsq(a, b, driver="gelsd").solution
    solution, residual = least_squares(to_head, to_ids, from_head, from_ids)
    assert solution.dtype == torch.float64
    torch.testing.assert_close(solution, expected, rtol=1e-7, atol=1e-9)
    # A residual comes from a difference of squares: half of the digits where there is none.
    assert residual == pytest.approx(float((a @ expected - b).norm() / b.norm()), rel=1e-9, abs=1e-7)
    assert (residual < 1e-7) == (shape == "few_tokens")
    if shape not in ("few_tokens", "rank_deficient"):
        chunked, chunked_residual = least_squares(to_head, to_ids, from_head, from_ids, rows=7)
        torch.testing.assert_close(chunked, solution, rtol=1e-9, atol=1e-9)
        assert chunked_residual == pytest.approx(residual, abs=1e-9)


def test_no_copy_of_a_whole_head():
    """Nothing larger than a chunk of a head or the square of its width is ever made, in whatever precision."""
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(value.numel() for value in tree_leaves(out) if isinstance(value, torch.Tensor))
            return out

    arguments = heads(rows=400, to=6, of=9, dtype=torch.float32)
    # A chunk of the wider head, or the square of its width.
    for rows, largest in ((7, 9 * 9), (50, 50 * 9)):
        made.clear()
        with Sizes():
            least_squares(*arguments, rows=rows)
        assert max(made) <= largest
    assert max(made) == 50 * 9


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_a_linear_image_is_found(dtype, tolerance):
    """Where the teacher's head is the student's times a matrix, t2s is that matrix and both spaces agree."""
    g = torch.Generator().manual_seed(0)
    student_size, teacher_size, tokens = 5, 8, 40
    student = torch.randn(70, student_size, generator=g).to(dtype)
    image = torch.randn(student_size, teacher_size, generator=g)
    teacher = torch.randn(90, teacher_size, generator=g)
    student_ids, teacher_ids = torch.randperm(70, generator=g)[:tokens], torch.randperm(90, generator=g)[:tokens]
    teacher[teacher_ids] = 2.0 * student[student_ids].float() @ image
    # Logits: 3 W_t h in the teacher, 0.5 W_s t2s(h) in the student.
    student_head, teacher_head = LMHead(student, scale=0.5), LMHead(teacher.to(dtype), scale=3.0)
    projectors = Projectors(student_size, teacher_size)
    query = projectors.query.weight.clone()
    residuals = projectors.init_from_heads(student_head, teacher_head, student_ids, teacher_ids)
    assert torch.equal(projectors.query.weight, query) and not projectors.t2s.bias.any()
    assert set(residuals) == {"t2s", "s2t"}
    assert all(residual < tolerance / 4 for residual in residuals.values())
    assert projectors.t2s.weight.dtype == torch.float32 and projectors.t2s.weight.requires_grad
    torch.testing.assert_close(projectors.t2s.weight.detach(), 12.0 * image, rtol=tolerance, atol=tolerance)
    hidden = torch.randn(4, teacher_size, generator=g)
    logits = LMHead(teacher, scale=3.0)(hidden)[:, teacher_ids]
    projected = LMHead(student.float(), scale=0.5)(projectors.t2s(hidden))[:, student_ids]
    torch.testing.assert_close(projected, logits, rtol=0, atol=tolerance * float(logits.abs().max()))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: Projectors(4, 6, seed=1).s2t.weight,
        lambda: Discriminator(4, 8, seed=1).linear1.weight,
        lambda: TransportCritics(4, 8, seed=1).critic1.linear1.weight,
        lambda: pca(torch.arange(12.0).view(3, 4), torch.ones(2, 4))[0],
    ],
    ids=["projectors", "discriminator", "transport critics", "pca"],
)
def test_no_device_is_seeded(draw, monkeypatch):
    """`torch.manual_seed` would seed every GPU, and the student's dropout would depend on what is made beside it."""

    def seeded(seed):
        raise AssertionError("every device was seeded")

    monkeypatch.setattr(torch, "manual_seed", seeded)
    first = draw()
    torch.rand(1)
    assert torch.equal(first, draw())


def test_seed():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = Projectors(4, 6, seed=1), Projectors(4, 6, seed=1), Projectors(4, 6, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]) and not torch.equal(value, other.state_dict()[name])
    without = Projectors(4, 6, seed=1, has_query=False).state_dict()
    assert set(first.state_dict()) - set(without) == {"query.weight", "query.bias"}
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in without.items())
