"""KL between attention distributions, tile by tile, against the same numbers from whole matrices in float64."""

import logging
import math
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dskd import UserError
from hf_dskd.kernels import stream_kl as module
from hf_dskd.kernels.stream_kl import stream_cross_entropy, stream_kl


NAMES = ("query_1", "key_1", "query_2", "key_2")
# Heads of queries, of keys 1 and 2; queries, keys; sizes of heads 1 and 2.
SHAPES = {
    "plain": (2, 2, 2, 11, 11, 4, 4),
    "other sizes": (1, 1, 1, 7, 19, 5, 3),
    "more queries": (2, 2, 2, 19, 7, 3, 5),
    "groups of keys 1": (4, 2, 4, 9, 12, 4, 4),
    "groups of both": (6, 3, 2, 9, 12, 4, 3),
    "one head of keys": (4, 1, 1, 10, 10, 4, 4),
    "one query": (2, 1, 2, 1, 21, 4, 4),
}


def make(shape, dtype=torch.float64, batch=2, seed=0, mixed=1):
    """query_1, key_1, query_2, key_2; `mixed` times as many heads of queries 1."""
    heads, heads_1, heads_2, n_q, n_k, d_1, d_2 = shape
    g = torch.Generator().manual_seed(seed)
    sizes = (
        (batch, heads * mixed, n_q, d_1),
        (batch, heads_1, n_k, d_1),
        (batch, heads, n_q, d_2),
        (batch, heads_2, n_k, d_2),
    )
    tensors = [torch.randn(size, generator=g, dtype=torch.float64) for size in sizes]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def visible(batch, n_q, n_k, causal=False, key_mask=None, segments=None):
    """`[B, 1, N_Q, N_K]`: whether row i sees key j."""
    sees = torch.ones(batch, 1, n_q, n_k, dtype=torch.bool)
    for b, i, j in product(range(batch), range(n_q), range(n_k)):
        if causal and j > i + n_k - n_q:
            sees[b, 0, i, j] = False
        if key_mask is not None and not key_mask[b, j]:
            sees[b, 0, i, j] = False
        if segments is not None and segments[0][b, i] != segments[1][b, j]:
            sees[b, 0, i, j] = False
    return sees


def log_probs(query, key, scale, sees):
    """`[B, H, N_Q, N_K]`; what a row doesn't see has next to no probability."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.transpose(2, 3) * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    return torch.log_softmax(logits.masked_fill(~sees, -1e30), -1)


def dense_kl(tensors, sees, scale_1=None, scale_2=None):
    """`[B, H, N_Q]`."""
    query_1, key_1, query_2, key_2 = tensors
    one, two = log_probs(query_1, key_1, scale_1, sees), log_probs(query_2, key_2, scale_2, sees)
    return (one.exp() * (one - two)).masked_fill(~sees, 0.0).sum(-1)


def dense_cross_entropy(tensors, sees, mixed, scale_1=None, scale_2=None):
    """`[B, H, N_Q]`, with the mean of `mixed` heads of side 1."""
    query_1, key_1, query_2, key_2 = tensors
    probs = log_probs(query_1, key_1, scale_1, sees).exp().unflatten(1, (-1, mixed)).mean(2)
    return -(probs * log_probs(query_2, key_2, scale_2, sees)).masked_fill(~sees, 0.0).sum(-1)


def gradients(values, tensors, seed=1):
    """Of a sum that weights every row differently."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((values * weights.to(values.dtype)).sum(), tensors)


def doubled(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.fixture(params=[20 * 4, 2**20], ids=["small tiles", "one tile"])
def tiles(request, monkeypatch):
    monkeypatch.setitem(module.TILE_BYTES, "cpu", request.param)


def masks(name, n_q, n_k):
    """Arguments of the function, and of `visible`. Some rows see no key, and some first tiles are all hidden."""
    g = torch.Generator().manual_seed(5)
    if name == "causal":
        return {"causal": True}, {"causal": True}
    if name in ("key_mask", "causal, key_mask"):
        key_mask = torch.rand(2, n_k, generator=g) > 0.4
        key_mask[0, : n_k // 2] = False
        key_mask[1] = n_k < 2
        arguments = {"key_mask": key_mask, "causal": name != "key_mask"}
        return arguments, arguments
    if name == "segments":
        segments = tuple(torch.randint(0, 3, (2, n), generator=g).sort(-1).values for n in (n_q, n_k))
        return {"segment_ids": segments, "causal": True}, {"segments": segments, "causal": True}
    return {}, {}


class TestAgainstDense:
    @pytest.mark.parametrize("mask", ["none", "causal", "key_mask", "causal, key_mask", "segments"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_values_and_gradients(self, shape, mask, tiles):
        tensors = make(SHAPES[shape])
        n_q, n_k = SHAPES[shape][3:5]
        arguments, of_visible = masks(mask, n_q, n_k)
        values = stream_kl(*tensors, reduction="none", **arguments)
        expected = dense_kl(tensors, visible(2, n_q, n_k, **of_visible))
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(gradients(values, tensors), gradients(expected, tensors))

    @pytest.mark.parametrize("scales", [(0.3, None), (None, 2.0), (0.7, 0.1), (1, 1)])
    def test_scales(self, scales):
        tensors = make(SHAPES["other sizes"])
        values = stream_kl(*tensors, scale_1=scales[0], scale_2=scales[1], reduction="none")
        expected = dense_kl(tensors, visible(2, 7, 19), *scales)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(gradients(values, tensors), gradients(expected, tensors))

    @pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 3), (0, 1, 2, 3)], ids=str)
    def test_gradients_of_what_requires_one(self, needed, tiles, monkeypatch):
        asked = []
        original = module._backward_tiled
        monkeypatch.setattr(module, "_backward_tiled", lambda *args: asked.append(args[-1]) or original(*args))
        tensors = make(SHAPES["groups of both"])
        expected = gradients(dense_kl(tensors, visible(2, 9, 12)), tensors)
        tensors = [tensor.detach().requires_grad_(i in needed) for i, tensor in enumerate(tensors)]
        values = stream_kl(*tensors, reduction="none")
        found = gradients(values, [tensors[i] for i in needed])
        torch.testing.assert_close(found, tuple(expected[i] for i in needed))
        assert asked == [tuple(i in needed for i in range(4))]

    def test_nothing_requires_a_gradient(self):
        assert not stream_kl(*(tensor.detach() for tensor in make(SHAPES["plain"]))).requires_grad
        with torch.no_grad():
            assert not stream_kl(*make(SHAPES["plain"])).requires_grad

    def test_gradcheck(self, tiles):
        tensors = make((2, 1, 2, 4, 5, 2, 3), batch=1)
        key_mask = torch.tensor([[True, True, False, True, True]])

        def function(*tensors):
            return stream_kl(*tensors, causal=True, key_mask=key_mask, reduction="none")

        assert torch.autograd.gradcheck(function, tensors)

    def test_one_tensor_of_segments(self):
        tensors = make(SHAPES["plain"])
        ids = torch.tensor([[0] * 4 + [1] * 7, [3] * 10 + [-1]])
        values = stream_kl(*tensors, segment_ids=ids, reduction="none")
        torch.testing.assert_close(values, dense_kl(tensors, visible(2, 11, 11, segments=(ids, ids))))

    def test_segments_are_sequences_of_their_own(self):
        """Packed into one row, or each alone."""
        tensors = make((2, 1, 2, 13, 13, 4, 4), batch=1)
        ids = torch.tensor([[0] * 5 + [1] * 8])
        packed = stream_kl(*tensors, causal=True, segment_ids=ids, reduction="none")
        alone = [
            stream_kl(*(tensor[:, :, part] for tensor in tensors), causal=True, reduction="none")
            for part in (slice(5), slice(5, 13))
        ]
        torch.testing.assert_close(packed, torch.cat(alone, -1))
        torch.testing.assert_close(gradients(packed, tensors), gradients(torch.cat(alone, -1), tensors))

    @pytest.mark.parametrize("tile", [4, 64, 1000, 5000, 100_000])
    def test_any_size_of_tiles(self, tile, monkeypatch):
        tensors = make((6, 3, 2, 9, 12, 4, 3), batch=3)
        expected = stream_kl(*tensors, causal=True, reduction="none")
        expected_gradients = gradients(expected, tensors)
        monkeypatch.setitem(module.TILE_BYTES, "cpu", tile)
        values = stream_kl(*tensors, causal=True, reduction="none")
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(gradients(values, tensors), expected_gradients)

    def test_views(self):
        """Queries and keys as models make them, `[B, N, H, d]`, and an upstream gradient without strides."""
        tensors = make(SHAPES["groups of both"])
        turned = [tensor.detach().transpose(1, 2).contiguous().requires_grad_() for tensor in tensors]
        kl = stream_kl(*(tensor.transpose(1, 2) for tensor in turned))
        expected = dense_kl(tensors, visible(2, 9, 12)).mean()
        torch.testing.assert_close(kl, expected)
        found = torch.autograd.grad(kl, turned)
        for actual, wanted in zip(found, torch.autograd.grad(expected, tensors)):
            torch.testing.assert_close(actual.transpose(1, 2), wanted)


class TestReductions:
    def test_mean_is_over_rows_that_see_a_key(self):
        tensors = make(SHAPES["plain"])
        key_mask = torch.ones(2, 11, dtype=torch.bool)
        key_mask[0, :3] = False
        key_mask[1, :6] = False
        rows = stream_kl(*tensors, causal=True, key_mask=key_mask, reduction="none")
        # Rows 0 to 2 of the first example and 0 to 5 of the second see nothing.
        assert not rows[0, :, :3].any() and not rows[1, :, :6].any()
        assert (rows[0, :, 4:] > 0).all() and (rows[1, :, 7:] > 0).all()
        total = stream_kl(*tensors, causal=True, key_mask=key_mask, reduction="sum")
        mean = stream_kl(*tensors, causal=True, key_mask=key_mask)
        torch.testing.assert_close(total, rows.sum())
        torch.testing.assert_close(mean, rows.sum() / (2 * 8 + 2 * 5))
        torch.testing.assert_close(
            torch.autograd.grad(mean, tensors, retain_graph=True),
            tuple(gradient / 26 for gradient in torch.autograd.grad(rows.sum(), tensors)),
        )

    @pytest.mark.parametrize("function", [stream_kl, stream_cross_entropy])
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    def test_no_row_sees_a_key(self, function, reduction):
        one, other, *side_2 = make(SHAPES["plain"])
        tensors = [one.detach(), other.detach(), *side_2]
        value = function(*tensors, key_mask=torch.zeros(2, 11, dtype=torch.bool), reduction=reduction)
        assert not value.any() and value.isfinite().all()
        for gradient in torch.autograd.grad(value.sum(), side_2):
            assert not gradient.any() and gradient.isfinite().all()

    @pytest.mark.parametrize("n_q, n_k", [(0, 4), (4, 0), (0, 0)])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("function", [stream_kl, stream_cross_entropy])
    def test_empty_sequences(self, function, n_q, n_k, causal):
        one, other, *side_2 = make((2, 1, 2, n_q, n_k, 3, 4))
        tensors = [one.detach(), other.detach(), *side_2]
        assert function(*tensors, causal=causal, reduction="none").shape == (2, 2, n_q)
        value = function(*tensors, causal=causal)
        assert value == 0
        for gradient, tensor in zip(torch.autograd.grad(value, side_2), side_2):
            assert gradient.shape == tensor.shape and not gradient.any()

    def test_padding_and_other_examples_change_nothing(self):
        """Padded on the right and put beside a longer example, in either order."""
        tensors = make(SHAPES["groups of both"], batch=1)
        longer = make((6, 3, 2, 14, 17, 4, 3), batch=1, seed=3)
        alone = stream_kl(*tensors, reduction="none")
        expected = gradients(alone, tensors)
        for order in (0, 1):
            batch = []
            for tensor, other in zip(tensors, longer):
                padded = torch.full_like(other, 50.0)
                padded = torch.cat([tensor, padded[:, :, tensor.shape[2] :]], 2)
                batch.append(torch.cat([padded, other] if order == 0 else [other, padded]))
            key_mask = torch.ones(2, 17, dtype=torch.bool)
            key_mask[order, 12:] = False
            values = stream_kl(*batch, key_mask=key_mask, reduction="none")[order : order + 1, :, :9]
            torch.testing.assert_close(values, alone)
            torch.testing.assert_close(gradients(values, tensors), expected)


class TestPrecision:
    @pytest.mark.parametrize("near", [None, 1e-2, 1e-4])
    @pytest.mark.parametrize("offset", [0.0, 100.0])
    def test_float32(self, near, offset, monkeypatch):
        """With 100 added to all logits of side 2, by one more column; and with two sides that are nearly the same."""
        monkeypatch.setitem(module.TILE_BYTES, "cpu", 4 * 64 * 64)
        n, d = 700, 64
        sees = torch.ones(1, 1, n, n, dtype=torch.bool)
        tensors = make((1, 1, 1, n, n, d, d), torch.float32, batch=1)
        with torch.no_grad():
            if near is not None:
                query_1, key_1, noise, _ = tensors
                tensors = [query_1, key_1, query_1 + near * noise, key_1]
            columns = [torch.zeros(1, 1, n, 1)] * 2 + [torch.full((1, 1, n, 1), math.sqrt(8 * offset))] * 2
            tensors = [torch.cat([tensor, column], -1) for tensor, column in zip(tensors, columns)]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        exact = doubled(tensors)
        values = stream_kl(*tensors, scale_1=0.125, scale_2=0.125, reduction="none")
        expected = dense_kl(exact, sees, 0.125, 0.125)
        assert values.dtype == torch.float32
        assert (values - expected).abs().max() <= 2e-6 and values.min() >= -1e-6
        if near is None and not offset:
            for actual, wanted in zip(gradients(values, tensors), gradients(expected, exact)):
                assert relative(actual, wanted) <= 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bits_round_the_results_alone(self, dtype):
        tensors = make((4, 2, 1, 40, 50, 16, 8), dtype)
        exact = doubled(tensors)
        values = stream_kl(*tensors, causal=True, reduction="none")
        expected = dense_kl(exact, visible(2, 40, 50, causal=True))
        assert values.dtype == torch.float32
        assert (values - expected).abs().max() <= 2e-6
        for actual, wanted in zip(gradients(values, tensors), gradients(expected, exact)):
            assert actual.dtype == dtype and actual.isfinite().all()
            assert relative(actual, wanted) <= 4e-3

    def test_sides_of_two_dtypes(self):
        tensors = make(SHAPES["other sizes"], torch.bfloat16)
        tensors = [*tensors[:2], *(tensor.detach().float().requires_grad_() for tensor in tensors[2:])]
        values = stream_kl(*tensors, reduction="none")
        torch.testing.assert_close(
            values.double(), dense_kl(doubled(tensors), visible(2, 7, 19)), rtol=1e-5, atol=1e-6
        )
        assert [gradient.dtype for gradient in gradients(values, tensors)] == [torch.bfloat16] * 2 + [
            torch.float32
        ] * 2

    def test_autocast_changes_nothing(self):
        tensors = make(SHAPES["plain"], torch.float32)
        expected = stream_kl(*tensors)
        with torch.autocast("cpu", torch.bfloat16):
            value = stream_kl(*tensors)
            found = torch.autograd.grad(value, tensors)
        assert torch.equal(value, expected)
        for actual, wanted in zip(found, torch.autograd.grad(expected, tensors)):
            assert torch.equal(actual, wanted)

    def test_equal_sides_are_zero(self):
        query, key, *_ = make((2, 2, 2, 300, 300, 16, 16), torch.float32)
        values = stream_kl(query, key, query, key, reduction="none")
        assert values.abs().max() < 1e-7

    def test_large_logits_stay_finite(self):
        tensors = [tensor.detach().mul(300).requires_grad_() for tensor in make(SHAPES["plain"], torch.float32)]
        values = stream_kl(*tensors, causal=True, reduction="none")
        expected = dense_kl(doubled(tensors), visible(2, 11, 11, causal=True))
        assert values.max() > 1e4
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-2)
        assert all(gradient.isfinite().all() for gradient in gradients(values, tensors))


class TestNonFinite:
    """Only rows that see it, and keys that such a row sees."""

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("side", [1, 2])
    def test_a_query(self, bad, side, tiles):
        tensors = make(SHAPES["plain"])
        clean = stream_kl(*tensors, causal=True, reduction="none")
        with torch.no_grad():
            tensors[2 * side - 2][0, 1, 6, 0] = bad
        values = stream_kl(*tensors, causal=True, reduction="none")
        rows = torch.zeros(2, 2, 11, dtype=torch.bool)
        rows[0, 1, 6] = True
        assert not values[rows].isfinite().any()
        torch.testing.assert_close(values[~rows], clean[~rows])
        keys = torch.zeros(2, 2, 11, dtype=torch.bool)
        keys[0, 1, :7] = True
        for gradient, affected in zip(gradients(values, tensors), (rows, keys, rows, keys)):
            assert gradient[affected].isnan().all() and gradient[~affected].isfinite().all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("side", [1, 2])
    def test_a_key(self, bad, side, tiles):
        tensors = make(SHAPES["plain"])
        clean = stream_kl(*tensors, causal=True, reduction="none")
        with torch.no_grad():
            tensors[2 * side - 1][0, 1, 6, 0] = bad
        values = stream_kl(*tensors, causal=True, reduction="none")
        rows = torch.zeros(2, 2, 11, dtype=torch.bool)
        rows[0, 1, 6:] = True
        assert not values[rows].isfinite().any()
        torch.testing.assert_close(values[~rows], clean[~rows])
        heads = rows.any(-1)
        # The last row sees all keys.
        for gradient, affected in zip(gradients(values, tensors), (rows, heads, rows, heads)):
            assert gradient[affected].isnan().all() and gradient[~affected].isfinite().all()

    def test_behind_a_mask(self, tiles):
        tensors = make(SHAPES["plain"])
        key_mask = torch.ones(2, 11, dtype=torch.bool)
        key_mask[:, 8:] = False
        expected = stream_kl(*tensors, key_mask=key_mask, reduction="none")
        clean = gradients(expected, tensors)
        with torch.no_grad():
            tensors[1][:, :, 8:] = math.nan
            tensors[3][:, :, 9:] = math.inf
        values = stream_kl(*tensors, key_mask=key_mask, reduction="none")
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(gradients(values, tensors), clean)

    def test_of_the_cross_entropy(self, tiles):
        tensors = [tensor.detach() for tensor in make(SHAPES["plain"], mixed=2)]
        side_2 = [tensor.requires_grad_() for tensor in tensors[2:]]
        clean = stream_cross_entropy(*tensors, causal=True, reduction="none")
        tensors[0][0, 3, 6, 0] = math.nan
        values = stream_cross_entropy(*tensors, causal=True, reduction="none")
        rows = torch.zeros(2, 2, 11, dtype=torch.bool)
        rows[0, 1, 6] = True
        assert values[rows].isnan().all()
        torch.testing.assert_close(values[~rows], clean[~rows])
        keys = torch.zeros(2, 2, 11, dtype=torch.bool)
        keys[0, 1, :7] = True
        for gradient, affected in zip(gradients(values, side_2), (rows, keys)):
            assert gradient[affected].isnan().all() and gradient[~affected].isfinite().all()


class TestCrossEntropy:
    @pytest.mark.parametrize("mask", ["none", "causal", "key_mask", "segments"])
    @pytest.mark.parametrize(
        "shape, mixed",
        [("plain", 1), ("plain", 3), ("one query", 2), ("other sizes", 4), ("one head of keys", 2)],
    )
    def test_values_and_gradients(self, shape, mixed, mask, tiles):
        n_q, n_k = SHAPES[shape][3:5]
        arguments, of_visible = masks(mask, n_q, n_k)
        tensors = [tensor.detach() for tensor in make(SHAPES[shape], mixed=mixed)]
        side_2 = [tensor.requires_grad_() for tensor in tensors[2:]]
        scales = {"scale_1": 0.8, "scale_2": 0.4}
        values = stream_cross_entropy(*tensors, reduction="none", **scales, **arguments)
        expected = dense_cross_entropy(tensors, visible(2, n_q, n_k, **of_visible), mixed, **scales)
        torch.testing.assert_close(values, expected)
        found = gradients(values, side_2)
        torch.testing.assert_close(found, gradients(expected, side_2))
        for i in range(2):
            side = [tensor.detach().requires_grad_(i == j) for j, tensor in enumerate(side_2)]
            values = stream_cross_entropy(*tensors[:2], *side, reduction="none", **scales, **arguments)
            torch.testing.assert_close(gradients(values, side[i])[0], found[i])

    def test_heads_that_share_keys_across_groups(self, tiles):
        """Six teacher heads in groups of three over keys that serve two each; two students share theirs."""
        tensors = [tensor.detach() for tensor in make((2, 3, 1, 9, 12, 4, 3), mixed=3)]
        side_2 = [tensor.requires_grad_() for tensor in tensors[2:]]
        values = stream_cross_entropy(*tensors, reduction="none")
        expected = dense_cross_entropy(tensors, visible(2, 9, 12), 3)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(gradients(values, side_2), gradients(expected, side_2))

    def test_gradients_are_those_of_the_kl(self):
        """Of the mean of the teacher's heads; the values differ by its entropy."""
        tensors = [tensor.detach() for tensor in make(SHAPES["plain"], mixed=2)]
        side_2 = [tensor.requires_grad_() for tensor in tensors[2:]]
        sees = visible(2, 11, 11)
        probs = log_probs(*tensors[:2], None, sees).exp().unflatten(1, (-1, 2)).mean(2)
        kl = (probs * (probs.log() - log_probs(*side_2, None, sees))).sum()
        entropy = stream_cross_entropy(*tensors, reduction="sum")
        torch.testing.assert_close(entropy + (probs * probs.log()).sum(), kl)
        torch.testing.assert_close(torch.autograd.grad(entropy, side_2), torch.autograd.grad(kl, side_2))

    def test_float32(self):
        tensors = [tensor.detach() for tensor in make((2, 2, 2, 300, 300, 16, 16), torch.float32, mixed=2)]
        side_2 = [tensor.requires_grad_() for tensor in tensors[2:]]
        exact = doubled(tensors)
        values = stream_cross_entropy(*tensors, reduction="none")
        expected = dense_cross_entropy(exact, visible(2, 300, 300), 2)
        assert (values - expected).abs().max() <= 4e-6
        for actual, wanted in zip(gradients(values, side_2), gradients(expected, exact[2:])):
            assert relative(actual, wanted) <= 1e-5

    def test_the_teacher_is_constant(self):
        tensors = make(SHAPES["plain"])
        with pytest.raises(UserError, match="no gradient for side 1: detach query_1 and key_1"):
            stream_cross_entropy(*tensors)
        with torch.no_grad():
            stream_cross_entropy(*tensors)

    def test_heads_that_cannot_be_averaged(self):
        query_1, key_1, query_2, key_2 = (tensor.detach() for tensor in make(SHAPES["groups of both"]))
        with pytest.raises(UserError, match=r"\[2, 6, 9, 4\].*\[2, 4, 9, 3\].*6 teacher heads can't be averaged"):
            stream_cross_entropy(query_1, key_1, query_2[:, :4], key_2)


class TestOperators:
    @pytest.mark.parametrize("needed", [(2, 3), (1,), (0, 1, 2, 3)], ids=str)
    def test_opcheck(self, needed):
        tensors = [t.detach().requires_grad_(i in needed) for i, t in enumerate(make(SHAPES["groups of both"]))]
        key_mask = torch.ones(2, 12, dtype=torch.bool)
        segments = torch.zeros(2, 9, dtype=torch.int32), torch.zeros(2, 12, dtype=torch.int32)
        rest = (0.5, 0.5, True, key_mask, *segments, True)
        torch.library.opcheck(module._stream_kl, (*tensors, *rest))
        constants = [tensor.detach() for tensor in tensors]
        saved = module._stream_kl(*constants, *rest)
        needs = [i in needed for i in range(4)]
        torch.library.opcheck(
            module._stream_kl_backward, (torch.ones_like(saved[0]), *constants, *saved, *rest[:-1], needs, True)
        )

    def test_opcheck_of_the_cross_entropy(self):
        tensors = [t.detach().requires_grad_(i > 1) for i, t in enumerate(make(SHAPES["plain"], mixed=2))]
        rest = (0.5, 0.5, True, None, None, None)
        torch.library.opcheck(module._stream_cross_entropy, (*tensors, *rest))
        constants = [tensor.detach() for tensor in tensors]
        saved = module._stream_cross_entropy(*constants, *rest)
        torch.library.opcheck(
            module._stream_cross_entropy_backward,
            (torch.ones_like(saved[0]), *constants, *saved, *rest, [True, False]),
        )

    @pytest.mark.parametrize("function", [stream_kl, stream_cross_entropy])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiled(self, function, dtype):
        torch._dynamo.reset()
        one, other, *side_2 = make(SHAPES["groups of both"], dtype)
        tensors = [one.detach(), other.detach(), *side_2]
        key_mask = torch.arange(12) < torch.tensor([[12], [7]])

        def loss(*tensors):
            return function(*tensors, causal=True, key_mask=key_mask) * 2

        value = torch.compile(loss, backend="aot_eager", fullgraph=True)(*tensors)
        expected = loss(*tensors)
        assert torch.equal(value, expected)
        for actual, wanted in zip(torch.autograd.grad(value, side_2), torch.autograd.grad(expected, side_2)):
            assert torch.equal(actual, wanted)

    @pytest.mark.parametrize("switch", [None, True, False])
    def test_determinism_is_that_of_torch_by_default(self, switch, monkeypatch):
        seen = []

        class Kernels:
            @staticmethod
            def forward(*args):
                return module._forward_tiled(*args)

            @staticmethod
            def backward(*args, deterministic):
                seen.append(deterministic)
                return module._backward_tiled(*args)

        monkeypatch.setattr(module, "_kernels", lambda *_: Kernels)
        tensors = make(SHAPES["plain"])
        expected = torch.autograd.grad(dense_kl(tensors, visible(2, 11, 11)).mean(), tensors)
        for wanted in (False, True):
            torch.use_deterministic_algorithms(wanted)
            try:
                kl = stream_kl(*tensors, deterministic=switch)
            finally:
                torch.use_deterministic_algorithms(False)
            torch.testing.assert_close(torch.autograd.grad(kl, tensors), expected)
        assert seen == ([False, True] if switch is None else [switch] * 2)


class TestDispatch:
    @pytest.fixture(autouse=True)
    def say_again(self):
        module._say_once.cache_clear()
        yield
        module._say_once.cache_clear()

    @staticmethod
    def on_gpu(size=64, dtype=torch.bfloat16):
        one = SimpleNamespace(device=SimpleNamespace(type="cuda"), shape=(1, 2, 8, size), dtype=dtype)
        return one, one, one, one

    def test_a_gpu_has_kernels(self, monkeypatch, caplog):
        kernels = SimpleNamespace(MAX_HEAD_DIM=256)
        monkeypatch.setattr(module, "_triton", lambda: kernels)
        assert module._kernels(*self.on_gpu()) is kernels
        assert module._kernels(*self.on_gpu(256, torch.float32)) is kernels
        assert module._kernels(*make(SHAPES["plain"], torch.float32)) is None
        assert caplog.records == []

    @pytest.mark.parametrize(
        "triton, inputs, reason",
        [
            (None, {}, "triton isn't installed (pip install 'hf-dskd[gpu]')"),
            (256, {"size": 257}, "head sizes up to 256, and this one is 257"),
            (256, {"dtype": torch.float64}, "don't take float64"),
        ],
    )
    def test_why_there_are_none_is_said_once(self, triton, inputs, reason, monkeypatch, caplog):
        monkeypatch.setattr(module, "_triton", lambda: triton and SimpleNamespace(MAX_HEAD_DIM=triton))
        with caplog.at_level(logging.WARNING, logger=module.__name__):
            for _ in range(2):
                assert module._kernels(*self.on_gpu(**inputs)) is None
        (record,) = caplog.records
        assert reason in record.getMessage()

    def test_a_cpu_never_loads_the_kernels(self):
        code = (
            "import sys, torch\nfrom hf_dskd.kernels.stream_kl import stream_kl\n"
            "stream_kl(*(torch.randn(1, 1, 3, 2, requires_grad=True) for _ in range(4))).backward()\n"
            "assert 'hf_dskd.kernels.stream_kl_triton' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class TestWork:
    @pytest.mark.parametrize("skips, most", [({}, 1.0), ({"causal": True}, 0.6), ({"segments": 8}, 0.3)], ids=str)
    def test_tiles_that_no_row_sees_are_skipped(self, skips, most, monkeypatch):
        n, computed = 256, []
        monkeypatch.setitem(module.TILE_BYTES, "cpu", 4 * 32 * 32)
        original = module._logits
        monkeypatch.setattr(module, "_logits", lambda *args: computed.append(original(*args)) or computed[-1])
        tensors = make((1, 1, 1, n, n, 4, 4), torch.float32, batch=1)
        arguments = {"causal": "causal" in skips}
        if "segments" in skips:
            arguments["segment_ids"] = torch.arange(n).unsqueeze(0) // (n // skips["segments"])
        stream_kl(*tensors, **arguments).backward()
        # Two sides, forward and backward.
        assert 0 < sum(logits.numel() for logits in computed) <= 4 * n * n * most


class TestMemory:
    @pytest.mark.parametrize("function", [stream_kl, stream_cross_entropy])
    @pytest.mark.parametrize("heads", [1, 4])
    def test_no_tensor_of_queries_and_keys_is_made(self, function, heads, monkeypatch):
        """All allocations, forward and backward: tiles, or as large as the inputs."""
        tile, n = 64 * 64 * 4, 1024
        monkeypatch.setitem(module.TILE_BYTES, "cpu", tile)
        one, other, *side_2 = make((heads, 1, heads, n, n, 8, 8), torch.float32, batch=1)
        tensors = [one.detach(), other.detach(), *side_2]
        sizes = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                output = function(*args, **(kwargs or {}))
                for value in output if isinstance(output, (tuple, list)) else (output,):
                    if isinstance(value, torch.Tensor):
                        sizes.append(value.untyped_storage().nbytes())
                return output

        ids = torch.zeros(1, n, dtype=torch.int32)
        arguments = {"causal": True, "key_mask": torch.ones(1, n, dtype=torch.bool), "segment_ids": ids}
        # The operators hide what they do inside.
        watched = {}
        for name in ("_forward_tiled", "_backward_tiled", "_cross_entropy_tiled", "_cross_entropy_backward_tiled"):
            original = getattr(module, name)

            def inside(*args, original=original, name=name):
                watched[name] = True
                with Watch():
                    return original(*args)

            monkeypatch.setattr(module, name, inside)
        function(*tensors, **arguments).backward()
        assert len(watched) == 2 and len(sizes) > 1000
        assert max(sizes) <= max(tile, heads * n * 8 * 4)


class TestBadInput:
    @pytest.mark.parametrize("function", [stream_kl, stream_cross_entropy])
    @pytest.mark.parametrize(
        "changed, expected",
        [
            ({"query_1": (6, 9, 4)}, "query_1 [6, 9, 4], key_1 [2, 3, 12, 4], query_2 [2, 6, 9, 3], key_2 "),
            ({"query_1": (6, 9, 4)}, "all must be [batch, heads, length, head size]"),
            ({"key_1": (2, 3, 12, 5)}, "query_1 and key_1 must have the same head size"),
            (
                {"query_2": (2, 6, 9, 0), "key_2": (2, 2, 12, 0)},
                "query_2 and key_2 must have the same head size, above",
            ),
            ({"key_1": (2, 4, 12, 4)}, "heads of query_1 must be a multiple of those of key_1"),
            ({"key_2": (2, 0, 12, 3)}, "heads of query_2 must be a multiple of those of key_2"),
            ({"key_2": (3, 2, 12, 3)}, "all must have the same batch size"),
            ({"query_1": (2, 6, 8, 4)}, "both sides must have the same number of queries, and of keys"),
            ({"key_2": (2, 2, 11, 3)}, "both sides must have the same number of queries, and of keys"),
        ],
    )
    def test_shapes(self, function, changed, expected):
        tensors = dict(zip(NAMES, (tensor.detach() for tensor in make(SHAPES["groups of both"]))))
        tensors |= {name: torch.zeros(shape, dtype=torch.float64) for name, shape in changed.items()}
        with pytest.raises(UserError) as error:
            function(**tensors)
        assert expected in str(error.value) and "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "arguments, expected",
        [
            ({"reduction": "average"}, "reduction='average' is unknown"),
            ({"key_mask": torch.ones(2, 11, dtype=torch.bool)}, "key_mask [2, 11] is torch.bool on cpu"),
            ({"key_mask": torch.ones(2, 12)}, "it must be [2, 12], torch.bool, on cpu"),
            ({"segment_ids": torch.zeros(2, 12, dtype=torch.int64)}, "give a pair where the two differ"),
            ({"segment_ids": (torch.zeros(2, 9), torch.zeros(2, 12))}, "torch.float32: give integers"),
        ],
    )
    def test_arguments(self, arguments, expected):
        with pytest.raises(UserError) as error:
            stream_kl(*make(SHAPES["groups of both"]), **arguments)
        assert expected in str(error.value) and "\n" not in str(error.value)

    def test_heads_of_both_sides(self):
        query_1, key_1, query_2, key_2 = make(SHAPES["plain"])
        with pytest.raises(UserError, match=r"query_1 \[2, 1, 11, 4\] and query_2 \[2, 2, 11, 4\] have 1 and 2 heads"):
            stream_kl(query_1[:, :1], key_1[:, :1], query_2, key_2)

    def test_dtypes_and_devices(self):
        query_1, key_1, query_2, key_2 = make(SHAPES["plain"])
        with pytest.raises(UserError, match=r"query_2 is torch\.float32 and key_2 torch.float64"):
            stream_kl(query_1, key_1, query_2.float(), key_2)
        with pytest.raises(UserError, match=r"query_1 is torch\.int64 and key_1 torch.int64"):
            stream_kl(query_1.long(), key_1.long(), query_2, key_2)
        with pytest.raises(UserError, match="query_1 on cpu, key_1 on cpu, query_2 on cpu, key_2 on meta: move all"):
            stream_kl(query_1, key_1, query_2, key_2.to("meta"))
