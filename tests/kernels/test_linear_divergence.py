"""Losses from hidden states and heads, against the same losses of whole logits."""

from functools import partial

import pytest
import torch

from hf_dskd import UserError
from hf_dskd.kernels import linear_divergence as module
from hf_dskd.kernels.linear_divergence import chunk_sizes, linear_rows
from hf_dskd.losses.divergences import divergence_function
from hf_dskd.losses.dual_space import student_space_rows
from hf_dskd.losses.logits import uld
from hf_dskd.methods import DIVERGENCES
from hf_dskd.models.causal_lm import LMHead


N, D, V = 13, 6, 41
WEIGHTS = {"ce": 0.3, "t2s_ce": 0.5, "t2s_kd": 0.7}
HEADS = {"plain": {}, "softcap": {"softcap": 4.0}, "scale": {"scale": 0.25}, "both": {"softcap": 3.0, "scale": 1.5}}


def make(dtype=torch.float64, seed=0):
    """Hidden states of the student and the projected teacher, head, bias, and rows of targets, labels, paired."""
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((N, D), (N, D), (V, D), (V,))]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    rows = [torch.randint(0, V, (N,), generator=g) for _ in range(2)] + [torch.rand(N, generator=g) > 0.3]
    return leaves, rows


def plain(function, hidden, heads, rows):
    """Logits `[N, V]` as a whole, in the order in which a model computes them."""
    logits = []
    for states, head in zip(hidden, heads):
        value = states @ head.weight.T  # [N, V]
        value = (value if head.bias is None else value + head.bias) * head.scale
        logits.append(value if head.softcap is None else head.softcap * torch.tanh(value / head.softcap))
    return function(*logits, *rows)


def weighted(terms, weights=WEIGHTS):
    return sum(weight * terms[name].sum() for name, weight in weights.items())


def row_budget(rows, vocabularies=(V, V), dtype=torch.float64):
    """A memory of chunks of about `rows` rows, in tiles of one."""
    logits = sum(vocabularies) * dtype.itemsize
    return (rows * logits + module.TILE_COPIES * logits * max(1, 4 / dtype.itemsize)) / 1e6


BUDGETS = {"one row": row_budget(1), "five rows": row_budget(5), "all": 512}


class TestTheSameAsWholeLogits:
    @pytest.mark.parametrize("name", DIVERGENCES)
    @pytest.mark.parametrize("budget", BUDGETS)
    @pytest.mark.parametrize("in_forward", [True, False])
    def test_every_divergence(self, name, budget, in_forward):
        function = student_space_rows(divergence_function(name))
        (h, v, weight, bias), rows = make()
        head = LMHead(weight, bias)
        heads = [head, head.detach()]
        expected = plain(function, [h, v], heads, rows)
        total, terms = linear_rows(
            function, [h, v], heads, rows, weights=WEIGHTS if in_forward else None, memory_mb=BUDGETS[budget]
        )
        torch.testing.assert_close(terms, {key: value.to(terms[key].dtype) for key, value in expected.items()})
        if in_forward:
            torch.testing.assert_close(total, weighted(expected))
            assert not any(value.requires_grad for value in terms.values())
        else:
            assert total is None
            total = weighted(terms)
        leaves = [h, v, weight, bias]
        torch.testing.assert_close(
            torch.autograd.grad(3.0 * total, leaves), torch.autograd.grad(3.0 * weighted(expected), leaves)
        )

    @pytest.mark.parametrize("transform", HEADS)
    @pytest.mark.parametrize("has_bias", [True, False])
    @pytest.mark.parametrize("frozen", [True, False])
    def test_every_head(self, transform, has_bias, frozen):
        function = student_space_rows(divergence_function("forward_kl"), correctness_mask=False)
        (h, v, weight, bias), rows = make()
        head = LMHead(weight, bias if has_bias else None, **HEADS[transform])
        head = head.detach() if frozen else head
        heads = [head, head.detach()]
        total, _ = linear_rows(function, [h, v], heads, rows, weights=WEIGHTS, memory_mb=row_budget(4))
        leaves = [h, v] + ([] if frozen else [weight] + ([bias] if has_bias else []))
        expected = weighted(plain(function, [h, v], heads, rows))
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves))

    def test_two_vocabularies_and_a_constant_side(self):
        (projected, teacher, weight, _), _ = make()
        heads = [LMHead(weight).detach(), LMHead(torch.cat([weight, weight[:7]])).detach()]

        def function(logits, theirs):
            return {"kd": uld(logits, theirs)}

        total, terms = linear_rows(
            function, [projected, teacher], heads, weights={"kd": 2.0}, memory_mb=row_budget(3, (V, V + 7))
        )
        expected = 2.0 * plain(function, [projected, teacher], heads, [])["kd"]
        torch.testing.assert_close(2.0 * terms["kd"], expected)
        gradients = torch.autograd.grad(total, [projected, teacher])
        torch.testing.assert_close(gradients[0], torch.autograd.grad(expected.sum(), projected)[0])
        assert not gradients[1].any()


class TestPrecision:
    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_float32(self, name):
        results = []
        for dtype in (torch.float64, torch.float32):
            (h, v, weight, _), rows = make(dtype)
            head = LMHead(weight)
            function = student_space_rows(divergence_function(name))
            total, _ = linear_rows(function, [h, v], [head, head.detach()], rows, weights=WEIGHTS, memory_mb=0.02)
            results.append([total, *torch.autograd.grad(total, [h, v, weight])])
        for expected, actual in zip(*results):
            difference = (actual.double() - expected).norm() / expected.norm()
            assert difference < 1e-5 and actual.dtype == torch.float32

    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_bfloat16_differs_by_the_rounding_of_the_logits_alone(self, name):
        """The same bf16 logits in float64 give the same losses: nothing between is rounded to 16 bits."""
        (h, v, weight, _), rows = make(torch.bfloat16)
        head = LMHead(weight)
        function = student_space_rows(divergence_function(name))
        _, terms = linear_rows(function, [h, v], [head, head.detach()], rows, weights=WEIGHTS)
        logits = [(states @ weight.T).double() for states in (h, v)]
        expected = function(*logits, *rows)
        for key, value in terms.items():
            torch.testing.assert_close(value.double(), expected[key].double(), rtol=1e-5, atol=1e-6)

    def test_the_head_s_gradient_is_summed_in_float32(self):
        """Rows that cancel in pairs but for a small rest, which bf16 sums would lose."""
        torch.manual_seed(0)
        h = torch.randn(1, D).repeat(400, 1).bfloat16()
        weight = torch.randn(V, D).bfloat16().requires_grad_()
        targets = torch.zeros(400, dtype=torch.long)

        def function(logits, targets):
            return {"ce": torch.nn.functional.cross_entropy(logits, targets, reduction="none")}

        total, _ = linear_rows(
            function,
            [h],
            [LMHead(weight)],
            [targets],
            weights={"ce": 1.0},
            memory_mb=row_budget(1, (V,), torch.bfloat16),
        )
        (gradient,) = torch.autograd.grad(total, weight)
        slope = torch.softmax((h[:1] @ weight.T).float(), -1).detach()  # [1, V]
        slope[0, 0] -= 1
        expected = 400 * slope.bfloat16().double().T @ h[:1].double()
        assert gradient.dtype == torch.bfloat16
        # One rounding at the end; 400 additions in bf16 stop growing at 256 times the first.
        torch.testing.assert_close(gradient.double(), expected, rtol=2**-7, atol=1e-2)

    def test_autocast_decides_the_matrix_products(self):
        (h, v, weight, _), rows = make(torch.float32)
        head = LMHead(weight)
        function = student_space_rows(divergence_function("forward_kl"))
        with torch.autocast("cpu", torch.bfloat16):
            total, terms = linear_rows(function, [h, v], [head, head.detach()], rows, weights=WEIGHTS)
            later, _ = linear_rows(function, [h, v], [head, head.detach()], rows), None
        rounded = LMHead(weight.detach().bfloat16())
        expected = linear_rows(function, [h.bfloat16(), v.bfloat16()], [rounded] * 2, rows, weights=WEIGHTS)
        torch.testing.assert_close(terms, expected[1])
        gradients = torch.autograd.grad(total, [h, v, weight])
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        # Recomputed outside of autocast, in the precision of the forward pass.
        again = torch.autograd.grad(weighted(later[1]), [h, v, weight])
        torch.testing.assert_close(again, gradients, rtol=1e-2, atol=1e-2)


class TestRows:
    @pytest.mark.parametrize("in_forward", [True, False])
    def test_none(self, in_forward):
        (h, v, weight, _), rows = make()
        head = LMHead(weight)
        total, terms = linear_rows(
            student_space_rows(divergence_function("forward_kl")),
            [h[:0], v[:0]],
            [head, head.detach()],
            [row[:0] for row in rows],
            weights=WEIGHTS if in_forward else None,
        )
        assert {len(value) for value in terms.values()} == {0}
        total = weighted(terms) if total is None else total
        assert total == 0
        for gradient in torch.autograd.grad(total, [h, v, weight]):
            assert not gradient.any()

    def test_a_second_backward_pass_is_refused_rather_than_wrong(self):
        (h, v, weight, _), rows = make()
        function = student_space_rows(divergence_function("forward_kl"))
        total, _ = linear_rows(function, [h, v], [LMHead(weight)] * 2, rows, weights=WEIGHTS)
        total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (2 * total).backward()

    @pytest.mark.parametrize("rows", [3, 7, 13, 14])
    def test_compiled_tiles_have_one_shape(self, rows, monkeypatch):
        shapes, tile = set(), module._tile

        def spy(function, transforms, needs, weights, raws, extras):
            shapes.add(tuple(tuple(raw.shape) for raw in raws))
            return tile(function, transforms, needs, weights, raws, extras)

        monkeypatch.setattr(module, "_compiled_tile", lambda: spy)
        monkeypatch.setitem(module.TILE_BYTES, "cpu", 4 * 2 * V * 8)
        (h, v, weight, _), extras = make()
        head, function = LMHead(weight), student_space_rows(divergence_function("forward_kl"))
        arguments = [h, v], [head, head.detach()], extras
        outputs = []
        for compiled in (False, True):
            memory = row_budget(rows) + row_budget(1)
            total, terms = linear_rows(function, *arguments, weights=WEIGHTS, memory_mb=memory, compiled=compiled)
            later = linear_rows(function, *arguments, memory_mb=memory, compiled=compiled)[1]
            outputs.append(
                [*torch.autograd.grad(total, [h, v, weight]), *torch.autograd.grad(weighted(later), [h, v, weight])]
                + list(terms.values())
            )
        torch.testing.assert_close(*outputs)
        assert len(shapes) == 1

    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_torch_compile_traces_every_divergence_as_one_graph(self, name, monkeypatch):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(module._tile, backend=backend, fullgraph=True)
        monkeypatch.setattr(module, "_compiled_tile", lambda: compiled)
        (h, v, weight, _), rows = make()
        head = LMHead(weight)
        results = []
        for _ in range(2):
            # Made anew in each step, as training does.
            function = student_space_rows(partial(divergence_function(name)))
            for flag in (False, True):
                total, _ = linear_rows(function, [h, v], [head, head.detach()], rows, weights=WEIGHTS, compiled=flag)
                results.append(torch.autograd.grad(total, [h, v, weight]))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0])
        assert len(graphs) == 1


class TestMemory:
    def test_a_chunk_and_a_tile_fit_the_budget(self):
        for memory in (20, 100, 512, 4000):
            for vocabularies in ((50257, 50257), (151936, 151936), (32000,)):
                for dtype in (torch.float32, torch.bfloat16):
                    if memory == 20 and vocabularies[0] > 100_000:
                        continue
                    chunk, tile = chunk_sizes(vocabularies, [dtype] * len(vocabularies), "cpu", memory)
                    used = sum(vocabularies) * (chunk * dtype.itemsize + module.TILE_COPIES * tile * 4)
                    assert 1 <= tile <= chunk and used <= memory * 1e6
        assert chunk_sizes([50257] * 2, [torch.float32] * 2, "cpu", 512)[0] > 1000

    def test_a_budget_below_one_row_names_what_is_needed(self):
        with pytest.raises(UserError, match=r"loss_memory_mb=2 can't hold one row of logits over 151,936 and 151,936"):
            chunk_sizes([151936] * 2, [torch.float32] * 2, "cpu", 2)
        needed = 16
        with pytest.raises(UserError, match=f"to {needed} or more"):
            chunk_sizes([151936] * 2, [torch.float32] * 2, "cpu", needed - 1)
        assert chunk_sizes([151936] * 2, [torch.float32] * 2, "cpu", needed) == (1, 1)

    def test_no_tensor_of_all_rows_and_the_vocabulary_is_made(self):
        """Every allocation during forward and backward is smaller than half of [N, V]."""
        from torch.utils._python_dispatch import TorchDispatchMode

        rows, vocabulary = 512, 2048
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal largest
                output = function(*args, **(kwargs or {}))
                for value in output if isinstance(output, (tuple, list)) else (output,):
                    if isinstance(value, torch.Tensor):
                        largest = max(largest, value.untyped_storage().nbytes())
                return output

        torch.manual_seed(0)
        h, v = (torch.randn(rows, 8, requires_grad=True) for _ in range(2))
        head = LMHead(torch.randn(vocabulary, 8, requires_grad=True))
        targets = torch.randint(0, vocabulary, (rows,))
        for in_forward in (True, False):
            largest = 0
            with Watch():
                total, terms = linear_rows(
                    student_space_rows(divergence_function("adaptive_kl")),
                    [h, v],
                    [head, head.detach()],
                    [targets, targets, targets > 0],
                    weights=WEIGHTS if in_forward else None,
                    memory_mb=2,
                )
                (weighted(terms) if total is None else total).backward()
            # The largest are a buffer of a chunk and the gradient of the head.
            assert 0 < largest < rows * vocabulary * 4 / 2
