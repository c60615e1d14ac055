"""
The GPU kernels of StreamKL against a dense float64 formulation.

Without a GPU they run under Triton's interpreter, which has to be chosen before Triton is imported: functions named
`check_...` run in a process of their own, which one test here starts. That they pass the real compiler, too, is tested
by compiling them for a Hopper GPU, which needs none.
"""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("triton", reason="Triton isn't installed")

HOPPER_SHARED_BYTES = 227 * 1024


def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-o", "python_functions=check_*", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- The dense formulation


def case(n_q, n_k, d=(32, 32), heads=(1, 1, 1), batch=1, dtype=torch.float32, seed=0, **options):
    """Random inputs; `heads` are those of the queries and of the keys of both sides."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    sides = []
    for size, key_heads in zip(d, heads[1:]):
        sides += [normal(batch, heads[0], n_q, size), normal(batch, key_heads, n_k, size)]
    given = {"scales": (d[0] ** -0.5, d[1] ** -0.5), "causal": False, "mask": None, "segments": (None, None)} | options
    return SimpleNamespace(sides=sides, weight=torch.randn(batch, heads[0], n_q, generator=random), **given)


def visible(c):
    """Pairs that count, [B, 1, N_Q, N_K]."""
    batch, n_q, n_k = len(c.sides[0]), c.sides[0].shape[2], c.sides[1].shape[2]
    pairs = torch.ones(batch, 1, n_q, n_k, dtype=torch.bool)
    if c.causal:
        pairs &= torch.arange(n_k) <= torch.arange(n_q)[:, None] + n_k - n_q
    if c.mask is not None:
        pairs &= c.mask[:, None, None]
    if c.segments[0] is not None:
        pairs &= c.segments[0][:, None, :, None] == c.segments[1][:, None, None]
    return pairs


def dense(c):
    """KL and log-sum-exps [B, H, N_Q] and the gradients of Σ weight · KL."""
    sides = [x.double().requires_grad_() for x in c.sides]
    pairs = visible(c)
    logs, lses = [], []
    for query, key, scale in zip(sides[::2], sides[1::2], c.scales):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = (scale * query @ key.mT).masked_fill(~pairs, -1e100)
        lses.append(logits.logsumexp(-1).masked_fill(~pairs.any(-1), -math.inf))
        logs.append(logits.log_softmax(-1))
    kl = (logs[0].exp() * (logs[0] - logs[1]) * pairs).sum(-1)
    return kl, *lses, torch.autograd.grad((kl * c.weight).sum(), sides)


def streamed(c, needs=(True,) * 4, deterministic=False):
    from hf_dskd.kernels import stream_kl_triton

    shared = *c.scales, c.causal, c.mask, *c.segments
    kl, lse_1, lse_2 = stream_kl_triton.forward(*c.sides, *shared)
    gradients = stream_kl_triton.backward(c.weight, *c.sides, kl, lse_1, lse_2, *shared, needs, deterministic)
    return kl, lse_1, lse_2, gradients


def error(found, expected):
    """Largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_agrees(c, gradient_tolerance=1e-5, needs=(True,) * 4):
    *values, gradients = streamed(c, needs)
    *expected, expected_gradients = dense(c)
    for value, wanted in zip(values, expected):
        assert value.dtype == torch.float32 and value.shape == wanted.shape
        torch.testing.assert_close(value.double(), wanted, atol=2e-6, rtol=1e-6)
    for tensor, gradient, wanted, need in zip(c.sides, gradients, expected_gradients, needs):
        if not need:
            assert gradient is None
            continue
        assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape
        assert error(gradient, wanted) < gradient_tolerance


# ---- Under the interpreter: tiles of 32 x 32


@pytest.fixture
def kernels(monkeypatch):
    from hf_dskd.kernels import stream_kl_triton

    monkeypatch.setattr(stream_kl_triton, "SPLIT_STEP", 32)
    return monkeypatch, stream_kl_triton


@pytest.fixture(params=["separate", "split", "fused"])
def path(request, kernels):
    """One of the ways through the kernels: a program for all keys or several, and the gradients of a side together."""
    monkeypatch, module = kernels
    monkeypatch.setattr(module, "TARGET_PROGRAMS", 24 if request.param == "split" else 1)
    monkeypatch.setattr(module, "FUSED_RATIO", 0 if request.param == "fused" else 10**6)
    return request.param


def padded(batch, n_k):
    """A first tile without any key, holes, and an example without any key."""
    mask = torch.ones(batch, n_k, dtype=torch.bool)
    mask[0, :40] = False
    mask[0, 50:60:3] = False
    mask[1:] = False
    return mask


def packed(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]


CASES = {
    "fewer queries than keys": lambda: case(40, 75, d=(64, 16), heads=(2, 2, 2)),
    "one query": lambda: case(1, 100, d=(16, 40)),
    "whole tiles": lambda: case(32, 64, causal=True),
    "causal, fewer queries": lambda: case(40, 75, d=(40, 80), causal=True),
    "causal, rows without keys": lambda: case(70, 40, causal=True),
    "grouped heads": lambda: case(35, 40, d=(16, 32), heads=(4, 2, 1), causal=True),
    "padding": lambda: case(40, 75, mask=padded(2, 75), batch=2),
    "padding, causal": lambda: case(40, 75, mask=padded(2, 75), batch=2, causal=True),
    "packed": lambda: case(66, 66, segments=(packed(30, 1, 35), packed(30, 1, 35)), causal=True),
    "packed, other lengths": lambda: case(40, 75, segments=(packed(10, 20, 10), packed(36, 0, 39))),
    "all masks": lambda: case(
        40,
        75,
        mask=padded(2, 75),
        batch=2,
        segments=(packed(5, 35).expand(2, -1), packed(45, 30).expand(2, -1)),
        causal=True,
    ),
    "scales": lambda: case(40, 40, scales=(0.5, -0.3)),
    "large heads": lambda: case(33, 40, d=(128, 100)),
}


@pytest.mark.parametrize("name", CASES)
def check_agrees_with_dense(path, name):
    # Splits change nothing for keys.
    assert_agrees(CASES[name](), needs=(True, path != "split") * 2)


def check_strides():
    """Heads behind positions, as models have them, and a batch that is one example read twice."""
    c = case(40, 50, heads=(2, 2, 2), batch=2, causal=True)
    c.sides = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in c.sides]
    c.sides[1] = c.sides[1][:1].expand(2, -1, -1, -1)
    c.sides[2] = c.sides[2].mT.contiguous().mT
    assert_agrees(c)


def check_offset_and_near_equal(path):
    """Logits of side 2 are 100 higher and both distributions almost the same: the published form cancels."""
    c = case(40, 150, d=(33, 33), scales=(1.0, 1.0), seed=1)
    query, key = c.sides[:2]
    query[..., 32], key[..., 32] = 1, 0
    noise = 1e-3 * torch.randn(key.shape, generator=torch.Generator().manual_seed(0))
    noise[..., 32] = 100
    c.sides = [query * 0.5, key, query * 0.5, key + noise]
    c.sides[2][..., 32] = 1
    kl, lse_1, lse_2, gradients = streamed(c)
    expected, *_, expected_gradients = dense(c)
    assert expected.max() < 1e-4 and (lse_2 - lse_1).min() > 95
    assert (kl - expected).abs().max() < 2e-6 and kl.min() > -1e-6
    # In float32, logits of 100 are exact to about 1e-5, and so are the terms of P_2 - P_1 then.
    for gradient, wanted in zip(gradients[2:], expected_gradients[2:]):
        assert (gradient - wanted)[..., :32].abs().max() < 1e-4


def check_equal_sides():
    c = case(40, 75, causal=True)
    c.sides = c.sides[:2] * 2
    kl, _, _, gradients = streamed(c)
    assert kl.abs().max() < 1e-6
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


@pytest.fixture
def true_products(monkeypatch):
    """The interpreter multiplies bfloat16 as the integers that it keeps them in."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return plain(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def check_half_precision(path, true_products, dtype):
    c = case(40, 75, d=(64, 40), dtype=dtype, causal=True, mask=padded(1, 75))
    assert_agrees(c, gradient_tolerance=2e-2)


def check_sides_of_two_dtypes(true_products):
    c = case(40, 75, d=(64, 40))
    c.sides[:2] = [x.bfloat16() for x in c.sides[:2]]
    assert_agrees(c, gradient_tolerance=2e-2)
    gradients, expected = streamed(c)[-1], dense(c)[-1]
    assert all(error(g, e) < 1e-5 for g, e in zip(gradients[2:], expected[2:]))


def check_small_gradients_in_half_precision(true_products):
    """Of a mean over a million rows: what a product takes in must not be rounded to 0."""
    c = case(40, 75, dtype=torch.float16)
    c.weight *= 1e-2
    expected = dense(c)[-1]
    c.weight *= 1e-4
    gradients = streamed(c)[-1]
    # Of the result itself float16 keeps steps of 6e-8.
    for gradient, wanted in zip(gradients, expected):
        torch.testing.assert_close(gradient.double(), wanted * 1e-4, atol=1e-7, rtol=2e-2)


@pytest.mark.parametrize("needs", [(True, False, False, True), (False, False, True, True)])
def check_only_what_is_needed(path, needs):
    c = case(40, 50, causal=True)
    everything, some = streamed(c)[-1], streamed(c, needs=needs)[-1]
    for need, found, full in zip(needs, some, everything):
        assert (found is not None) == need
        if need:
            torch.testing.assert_close(found, full, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("path, bad", [("separate", math.inf), ("fused", math.nan)], indirect=["path"])
@pytest.mark.parametrize("where", ["query_1", "key_1", "query_2", "key_2"])
@pytest.mark.parametrize("masks", ["causal", "packed"])
def check_non_finite_inputs_stay_in_their_rows(path, bad, where, masks):
    c = case(50, 50, d=(16, 16))
    c.causal = masks == "causal"
    if masks == "packed":
        c.segments = packed(15, 35), packed(15, 35)
    c.mask = torch.ones(1, 50, dtype=torch.bool)
    c.mask[0, 3:6] = False
    tensor = c.sides[["query_1", "key_1", "query_2", "key_2"].index(where)]
    tensor[0, 0, 36] = bad
    # Padding may hold anything.
    c.sides[1][0, 0, 4], c.sides[3][0, 0, 5] = math.nan, math.inf
    pairs = visible(c)
    rows = torch.zeros(1, 1, 50, dtype=torch.bool)
    if where.startswith("query"):
        rows[0, :, 36] = True
    else:
        rows = pairs[..., 36]
    keys = (pairs & rows[..., None]).any(-2)
    kl, _, _, gradients = streamed(c)
    assert torch.equal(~kl.isfinite(), rows)
    for i, gradient in enumerate(gradients):
        concerned = rows if i % 2 == 0 else keys
        assert torch.equal(~gradient.isfinite().all(-1), concerned)
    assert not concerned.all() and concerned.any()


def check_rows_without_keys_have_no_gradient():
    c = case(40, 75, mask=padded(2, 75), batch=2)
    kl, lse_1, lse_2, gradients = streamed(c)
    assert (kl[1] == 0).all() and (lse_1[1] == -math.inf).all() and (lse_2[1] == -math.inf).all()
    assert all((gradient[1] == 0).all() for gradient in gradients)


@pytest.mark.parametrize("n_q, n_k", [(0, 5), (5, 0)])
def check_empty_sequences(n_q, n_k):
    kl, lse_1, _, gradients = streamed(case(n_q, n_k))
    assert kl.shape == (1, 1, n_q) and (kl == 0).all() and (lse_1 == -math.inf).all()
    assert [gradient.shape[2] for gradient in gradients] == [n_q, n_k] * 2
    assert all((gradient == 0).all() for gradient in gradients)


def check_examples_do_not_depend_on_each_other():
    c = case(40, 75, mask=padded(2, 75), batch=2, causal=True)
    kl, *_, gradients = streamed(c)
    c.sides, c.weight, c.mask = [x[:1] for x in c.sides], c.weight[:1], c.mask[:1]
    alone, *_, alone_gradients = streamed(c)
    torch.testing.assert_close(alone, kl[:1], atol=1e-6, rtol=1e-5)
    for found, wanted in zip(alone_gradients, gradients):
        torch.testing.assert_close(found, wanted[:1], atol=1e-6, rtol=1e-5)


def check_choice_of_kernels(kernels):
    """Atomic additions for few queries only, and never in a deterministic run."""
    monkeypatch, module = kernels
    launched = []
    plain = module._launch

    def launch(kernel, grid, *arguments, **constants):
        launched.append(constants.get("FUSED"))
        plain(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(module, "_launch", launch)
    monkeypatch.setattr(module, "FUSED_RATIO", 1)

    def choices(c, **options):
        launched.clear()
        streamed(c, needs=(False, False, True, True), **options)
        return launched[1:]

    few, many = case(1, 64), case(40, 64)
    assert choices(few) == [True]
    assert choices(few, deterministic=True) == [None, False]
    assert choices(many) == [None, False]


# ---- Without the interpreter


def compiled(kernel, constants, dtype, warps, masks, ones=()):
    """For a Hopper GPU; `ones` are numbers known to be 1 when a kernel is launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    constants = constants | dict.fromkeys(ones, 1)
    for i, name in enumerate(kernel.arg_names):
        if name in ("key_mask", "query_segments", "key_segments"):
            signature[name] = ("*u8" if name == "key_mask" else "*i32") if masks else "constexpr"
            constants |= {} if masks else {name: None}
        elif name in constants:
            signature[name] = "constexpr"
        elif name in ("q_a", "k_a", "q_b", "k_b", "dk") or (name == "dq" and not constants.get("FUSED")):
            signature[name] = f"*{dtype}"
        elif name.startswith(("out_", "grad_kl", "kl", "lse", "dq", "partial")):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name.startswith(("c_", "scale_")) else "i32"
        if signature[name] != "constexpr" and (signature[name][0] == "*" or name.startswith("stride")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in kernel.arg_names},
        attrs=attributes,
    )
    options = {"num_warps": warps, "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    from triton import knobs

    if not os.path.exists(knobs.nvidia.ptxas.path):
        pytest.skip("Triton has no ptxas here")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


# Kernel, its own constants, whether a masked and causal form is compiled, and what is 1.
COMPILED = {
    "forward": ("_forward_kernel", {"SPLIT": False}, True, ()),
    "forward, split": ("_forward_kernel", {"SPLIT": True}, False, ("n_q", "n_k", "heads")),
    "queries of side 2": ("_query_kernel", {"TO_FIRST": False}, True, ()),
    "queries of side 1": ("_query_kernel", {"TO_FIRST": True, "CAUSAL": True}, False, ("n_q", "n_k", "group_b")),
    "keys of side 1": ("_key_kernel", {"TO_FIRST": True, "FUSED": False}, True, ()),
    "fused": (
        "_key_kernel",
        {"TO_FIRST": False, "FUSED": True, "CAUSAL": True},
        False,
        ("n_q", "n_k", "heads", "group_a"),
    ),
}


@pytest.mark.parametrize("dtype, sizes, tiles, warps", [("bf16", (64, 40), 64, 4), ("fp32", (16, 16), 16, 2)])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_hopper(hopper, name, dtype, sizes, tiles, warps):
    import triton
    import triton.language as tl

    from hf_dskd.kernels import stream_kl_triton

    kernel, constants, masks, ones = COMPILED[name]
    constants = {"CAUSAL": masks, "BLOCK_Q": tiles, "BLOCK_K": tiles} | constants
    constants["DTYPE"] = tl.bfloat16 if dtype == "bf16" else tl.float32
    for side, size in zip("ab", sizes):
        constants |= {f"D_{side}": size, f"D_PAD_{side}": triton.next_power_of_2(size)}
    binary = compiled(getattr(stream_kl_triton, kernel).fn, constants, dtype, warps, masks, ones)
    assert binary.metadata.shared <= HOPPER_SHARED_BYTES
    if dtype == "bf16":
        assert "wgmma" in binary.asm["ptx"]


def test_merge_compiles_for_hopper(hopper):
    from hf_dskd.kernels import stream_kl_triton

    kernel = stream_kl_triton._merge_kernel
    assert compiled(kernel, {"BLOCK": 128}, "fp32", 4, masks=False).asm["cubin"]


@pytest.mark.parametrize("name", ["_forward_kernel", "_query_kernel", "_key_kernel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [16, 128, 256])
@pytest.mark.parametrize("n_q", [1, 50, 4096])
def test_some_tiles_fit(name, dtype, size, n_q):
    from hf_dskd.kernels import stream_kl_triton

    kernel = getattr(stream_kl_triton, name)
    query = torch.empty(1, dtype=dtype)
    kept = kernel.early_config_prune(
        kernel.configs, {"q_a": query, "q_b": query, "n_q": n_q}, D_PAD_a=size, D_PAD_b=size
    )
    assert 1 <= len(kept) <= 8
    assert all(stream_kl_triton.SPLIT_STEP % config.kwargs["BLOCK_K"] == 0 for config in kept)
    assert all(config.kwargs["BLOCK_Q"] <= max(16, 2 * n_q) for config in kept)
