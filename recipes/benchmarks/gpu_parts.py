"""
Parts of the GPU check, each a function that saves its figures: `python gpu_parts.py FOLDER PART`, by gpu_check.py.

Many of them start processes of their own, which fill the caches of compiled kernels on disk.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import accelerate
import runs
import test_stream_kl_triton as dense_tests
import torch
import transformers
import triton

from hf_dskd.kernels import linear_divergence, stream_kl_triton
from hf_dskd.losses.divergences import forward_kl
from hf_dskd.losses.dual_space import student_space_rows, teacher_space_rows
from hf_dskd.models.causal_lm import LMHead


ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda"
# Where figures go; none are kept without it.
FOLDER: Path | None = None
# Queries, keys, warps, stages.
Tile = tuple[int, int, int, int]


def say(*words: object) -> None:
    print("##", *words, flush=True)


def save(**figures: Any) -> None:
    """Add figures to gpu_check.json as soon as they stand."""
    if FOLDER is None:
        return
    path = FOLDER / "gpu_check.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | figures, indent=1))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def milliseconds(function: Callable[[], object], repeats: int = 7, warm: int = 2, seconds: float = 3.0) -> float:
    """Measure the median time between two events, within about `seconds`."""
    for _ in range(warm):
        function()
    torch.cuda.synchronize()
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < repeats and time.perf_counter() - began < seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


# ---- The machine


def env() -> None:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,clocks.sm,power.limit", "--format=csv"]
    print(subprocess.run(query, capture_output=True, text=True).stdout)
    modules = (torch, triton, transformers, accelerate)
    say(*(f"{module.__name__} {module.__version__}" for module in modules), torch.cuda.get_device_name())
    one, other = normal(8192, 8192), normal(8192, 8192)
    rate = 2 * 8192**3 / milliseconds(lambda: one @ other, 10) / 1e9
    source = torch.empty(2**32, dtype=torch.uint8, device=DEVICE)
    copy = 2 * source.numel() / milliseconds(source.clone, 10) / 1e9
    say(f"matrix product {rate:.0f} TFLOP/s, copy {copy:.2f} TB/s")
    save(env={"matrix_tflops": rate, "copy_tb_s": copy, **odd_rows()})


def odd_rows(rows: int = 1272, size: int = 768, vocabulary: int = 50_257) -> dict[str, list[float]]:
    """Time the head's three products for GPT-2's odd vocabulary: rows that lie as close as they can, and 64 apart."""
    hidden, head = normal(rows, size), normal(vocabulary, size)
    figures = {}
    for name, width in (("odd rows", vocabulary), ("padded rows", math.ceil(vocabulary / 64) * 64)):
        logits = normal(rows, width)[:, :vocabulary]
        # Into rows that lie apart a product has to be copied.
        product = partial(torch.mm, hidden, head.T, out=logits)
        times = [
            milliseconds(product if width == vocabulary else lambda logits=logits: logits.copy_(hidden @ head.T)),
            milliseconds(lambda logits=logits: logits @ head),
            milliseconds(lambda logits=logits: logits.T @ hidden),
        ]
        products = ("hidden @ headT", "slope @ head", "slopeT @ hidden")
        say(f"{name}:", ", ".join(f"{product} {ms:.3f} ms" for product, ms in zip(products, times)))
        figures[name] = times
    return figures


# ---- StreamKL's kernels against float64


def options(tile: Tile) -> dict[str, int]:
    queries, keys, warps, stages = tile
    # Two programs share a multiprocessor only below 113 KB and 128 registers: with one stage 128 x 64 takes 80 KB, and
    # 133 registers unless it is held back.
    limit = {"maxnreg": 128} if tile == (128, 64, 8, 1) else {}
    return {"BLOCK_Q": queries, "BLOCK_K": keys, "num_warps": warps, "num_stages": stages, **limit}


def tiles() -> tuple[list[Tile], list[Tile]]:
    """List what the autotuner chooses from, and a candidate more, for resident queries and for resident keys."""

    def listed(configs: list[triton.Config]) -> list[Tile]:
        return [(c.kwargs["BLOCK_Q"], c.kwargs["BLOCK_K"], c.num_warps, c.num_stages) for c in configs]

    queries, keys = listed(stream_kl_triton.QUERY_CONFIGS), listed(stream_kl_triton.KEY_CONFIGS)
    return [*queries, (128, 64, 8, 1)], [*keys, (64, 128, 8, 1)]


def choose(tile: Tile | None, path: str = "separate") -> None:
    """Set the tile (`None`: tuned) and the way through the kernels; outputs begin as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    stream_kl_triton.TILES = None if tile is None else options(tile)
    stream_kl_triton.TARGET_PROGRAMS = 24 if path == "split" else 1
    stream_kl_triton.FUSED_RATIO = 0 if path == "fused" else 10**6


def on_device(case: Any) -> Any:
    case.sides = [side.to(DEVICE) for side in case.sides]
    case.weight = case.weight.to(DEVICE)
    case.mask = None if case.mask is None else case.mask.to(DEVICE)
    case.segments = tuple(None if ids is None else ids.to(DEVICE) for ids in case.segments)
    return case


def dense(case: Any) -> Any:
    # The tests make their masks on the default device.
    with torch.device(DEVICE):
        return dense_tests.dense(case)


def gradient_errors(found: Any, wanted: Any) -> list[float]:
    return [dense_tests.error(a.double(), b) for a, b in zip(found, wanted) if a is not None]


def check_case(tile: Tile, name: str, dtype: torch.dtype, path: str) -> tuple[bool, float, float]:
    """Compare one case of the tests: whether it is right, and the largest errors of values and of gradients."""
    choose(tile, path)
    case = dense_tests.CASES[name]()
    case.sides = [side.to(dtype) for side in case.sides]
    *values, gradients = dense_tests.streamed(on_device(case))
    *expected, wanted = dense(case)
    finite = all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(values, expected))
    worst = max((a.double() - b)[b.isfinite()].abs().max().item() for a, b in zip(values, expected))
    errors = gradient_errors(gradients, wanted)
    # Inputs in half precision are exact in float64: only the gradients' own products round.
    most, most_of_gradients = (2e-5, 1e-5) if dtype == torch.float32 else (1e-4, 2e-2)
    return finite and worst < most and all(e < most_of_gradients for e in errors), worst, max(errors)


def check_tile(
    kind: str, tile: Tile, length: int = 1024, dtype: torch.dtype = torch.bfloat16, heads: int = 16
) -> tuple[bool, float]:
    """Compare what `bench` runs with this tile, which also compiles it."""
    choose(tile)
    worst = 0.0
    for causal in (False, True):
        sizes = {"d": (128, 128), "heads": (heads,) * 3, "dtype": dtype}
        case = on_device(dense_tests.case(length, length, causal=causal, **sizes))
        shared = *case.scales, causal, None, None, None
        expected = dense(case)
        kl, *lses = (value.float() for value in expected[:3])
        if kind == "query":
            kl, *lses = stream_kl_triton.forward(*case.sides, *shared)
            worst = max(worst, (kl.double() - expected[0]).abs().max().item())
        needs = (kind == "query", kind == "key") * 2
        found = stream_kl_triton.backward(case.weight, *case.sides, kl, *lses, *shared, needs, True)
        worst = max(worst, *gradient_errors(found, expected[3]))
    return worst < 2e-2, worst


def check_tuned() -> tuple[bool, float]:
    """Compare what goes through the autotuner itself: pruning, zeroing between runs, fused kernels."""
    choose(None)
    worst = 0.0
    for n_q, n_k in ((1, 16384), (64, 512)):
        case = on_device(dense_tests.case(n_q, n_k, d=(64, 64), heads=(2, 2, 2), dtype=torch.bfloat16))
        values, expected = dense_tests.streamed(case), dense(case)
        worst = max(worst, (values[0].double() - expected[0]).abs().max().item())
        worst = max(worst, *gradient_errors(values[3], expected[3]))
    return worst < 2e-2, worst


def comparisons() -> list[tuple[str, Callable, tuple]]:
    """List the autotuner, every large tile, and every case; masks and splits in half precision with more tiles."""
    queries, keys = tiles()
    jobs: list[tuple[str, Callable, tuple]] = [("autotuner", check_tuned, ())]
    jobs += [(f"query {tile}", check_tile, ("query", tile)) for tile in queries if tile[0] >= 32]
    jobs += [(f"key {tile}", check_tile, ("key", tile)) for tile in keys if tile[1] >= 32]
    chosen: dict[torch.dtype, tuple[Tile, ...]] = {
        torch.float32: ((32, 32, 4, 2),),
        torch.bfloat16: ((64, 64, 4, 2), (128, 64, 8, 2), (16, 32, 2, 2)),
        torch.float16: ((64, 64, 4, 2),),
    }
    for dtype, name, path in itertools.product(chosen, dense_tests.CASES, ("separate", "split", "fused")):
        first, *others = chosen[dtype]
        if path == "fused" or name not in ("all masks", "large heads", "grouped heads"):
            others = []
        for tile in (first, *others):
            jobs.append((f"{name}, {dtype}, {tile}, {path}", check_case, (tile, name, dtype, path)))
    return jobs


def correct() -> None:
    jobs, wrong, began = comparisons(), [], time.perf_counter()
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(function, *arguments): name for name, function, arguments in jobs}
        for done in as_completed(waiting):
            try:
                fine, *figures = done.result()
            except Exception as error:
                fine, figures = False, [type(error).__name__, str(error)[:200]]
            if not fine:
                wrong.append((waiting[done], *figures))
                say("WRONG", waiting[done], *figures)
    say(f"correct: {len(jobs) - len(wrong)} of {len(jobs)} in {time.perf_counter() - began:.0f} s")
    save(correct={"jobs": len(jobs), "wrong": wrong})
    if wrong:
        sys.exit(1)


# ---- Their speed


LENGTHS = (4096, 8192, 16384, 65536)
# Milliseconds on an H200 at LENGTHS, batch x heads 16 and size 128 (StreamKL, arXiv 2606.20005).
PAPER = {
    ("forward", False): (0.5, 1.8, 6.9, 112),
    ("forward", True): (0.4, 1.1, 3.8, 60),
    ("side 2", False): (1.1, 4.1, 15, 249),
    ("side 2", True): (0.6, 2.2, 8.2, 129),
    ("side 1", False): (1.0, 3.6, 13, 229),
    ("side 1", True): (0.6, 2.0, 7.8, 138),
}
# Which gradients a kernel is asked for: of query_1, key_1, query_2, key_2.
NEEDS = {
    "query 2": (False, False, True, False),
    "key 2": (False, False, False, True),
    "query 1": (True, False, False, False),
    "key 1": (False, True, False, False),
}


def kernel_call(kind: str, causal: bool, length: int) -> Callable[[], object]:
    """Prepare one kernel; it runs with the tile that is chosen when it's called."""
    sides = [normal(1, 16, length, 128) for _ in range(4)]
    shared = 128**-0.5, 128**-0.5, causal, None, None, None
    if kind == "forward":
        return lambda: stream_kl_triton.forward(*sides, *shared)
    stream_kl_triton.TILES = options((64, 64, 4, 2))
    kl, *lses = stream_kl_triton.forward(*sides, *shared)
    weight = torch.full_like(kl, 1 / kl.numel())
    return lambda: stream_kl_triton.backward(weight, *sides, kl, *lses, *shared, NEEDS[kind], True)


def tile_times(kind: str, causal: bool) -> list[tuple[float, Tile]]:
    """Time every tile at 16K, the fastest first."""
    call, found = kernel_call(kind, causal, 16384), []
    by_keys = kind.startswith("key")
    for tile in tiles()[by_keys]:
        if tile[by_keys] < 64:
            continue
        stream_kl_triton.TILES = options(tile)
        try:
            found.append((milliseconds(call, 5, 1, 1.0), tile))
        except Exception as error:
            say("no", kind, tile, type(error).__name__, str(error)[:80])
    shown = "  ".join(f"{tile}:{ms:.2f}" for ms, tile in sorted(found)[:5])
    say(f"16K {kind:7} {'causal' if causal else 'full':6}", shown)
    return sorted(found)


def bench() -> None:
    choose((64, 64, 4, 2))
    torch.use_deterministic_algorithms(False)
    kinds = ("forward", *NEEDS)
    table = {key: tile_times(*key) for key in itertools.product(kinds, (False, True))}
    final = {}
    for causal, length in itertools.product((False, True), LENGTHS):
        times = {}
        for kind in kinds:
            call = kernel_call(kind, causal, length)
            stream_kl_triton.TILES = options(table[kind, causal][0][1])
            times[kind] = milliseconds(call, 5, 1, 1.5)
        times |= {f"side {side}": times[f"query {side}"] + times[f"key {side}"] for side in (2, 1)}
        for name in ("forward", "side 2", "side 1"):
            ms, paper = times[name], PAPER[name, causal][LENGTHS.index(length)]
            products = (2 if name == "forward" else 4) * (0.5 if causal else 1)
            say(
                f"{length // 1024:3}K {'causal' if causal else 'full':6} {name:7} {ms:8.2f} ms"
                f" {products * 2 * 16 * length**2 * 128 / ms / 1e9:5.0f} TFLOP/s, paper {paper} ms: x{ms / paper:.2f}"
            )
            final[f"{length} {causal} {name}"] = ms
    save(bench={"tiles": {str(key): found for key, found in table.items()}, "final": final})


def gluon() -> None:
    import gluon_forward

    choose((64, 64, 4, 2))
    figures = {}
    for tile in ((128, 64, 2, 8), (128, 64, 3, 8), (64, 64, 2, 4), (64, 64, 1, 4)):
        try:
            sides = [normal(1, 16, 2048, 128) for _ in range(4)]
            wanted = stream_kl_triton.forward(*sides, 128**-0.5, 128**-0.5, False, None, None, None)
            found = gluon_forward.forward(*sides, *tile)
            error = max((a - b).abs().max().item() for a, b in zip(found, wanted))
            for length in (16384, 65536):
                sides = [normal(1, 16, length, 128) for _ in range(4)]
                ms = milliseconds(lambda sides=sides, tile=tile: gluon_forward.forward(*sides, *tile), 5, 1, 1.5)
                figures[f"{tile} {length}"] = ms
                rate = 4 * 16 * length**2 * 128 / ms / 1e9
                say(f"gluon {tile} {length // 1024}K full {ms:.2f} ms {rate:.0f} TFLOP/s, error {error:.1e}")
        except Exception as problem:
            say("gluon", tile, type(problem).__name__, str(problem)[:300])
    save(gluon=figures)


# ---- The loss from hidden states


# Tokens and width of the space that the loss is computed in: GPT-2's and Qwen1.5-1.8B's.
SPACES = {"student": (50_257, 768), "teacher": (151_936, 2048)}


def loss_pass(space: str, rows: int, memory_mb: float, compiled: bool) -> Callable[[], None]:
    """Prepare forward and backward of the loss in one space."""
    vocabulary, size = SPACES[space]
    trains = space == "student"
    weight = (normal(vocabulary, size) * 0.02).requires_grad_(trains)
    hidden = [normal(rows, size).requires_grad_(), normal(rows, size).requires_grad_(trains)]
    frozen = LMHead(weight.detach())
    ids = torch.randint(vocabulary, (rows,), device=DEVICE)
    paired = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    if trains:
        function, heads, per_row = student_space_rows(forward_kl), [LMHead(weight), frozen], [ids, ids, paired]
        weights = {"ce": 0.5, "t2s_ce": 0.5, "t2s_kd": 0.5}
    else:
        function, heads, per_row = teacher_space_rows(forward_kl), [frozen, frozen], [paired]
        weights = {"s2t_kd": 0.5}

    def run() -> None:
        total, _ = linear_divergence.linear_rows(
            function, hidden, heads, per_row, weights=weights, memory_mb=memory_mb, compiled=compiled
        )
        total.backward()
        hidden[0].grad = hidden[1].grad = weight.grad = None

    return run


def loss_case(space: str, compiled: bool, memory_mb: int, tile_bytes: int, timed: bool = True) -> list[float]:
    """Measure seconds of the first pass, and if `timed` the milliseconds and MB of later ones."""
    linear_divergence.TILE_BYTES["cuda"] = tile_bytes
    run = loss_pass(space, 608, memory_mb, compiled)
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    if not timed:
        return [first]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ms = milliseconds(run, 10, 3)
    return [first, ms, (torch.cuda.max_memory_allocated() - before) / 1e6]


def loss() -> None:
    budgets = ((False, 512, 2**26), (True, 512, 2**26), (True, 4096, 2**29), (False, 4096, 2**29))
    cases = [(space, *budget) for space in SPACES for budget in budgets]
    with ProcessPoolExecutor(8, mp_context=get_context("spawn")) as pool:
        # All compile at once; what they compile stays on the disk.
        list(pool.map(loss_case, *zip(*cases), [False] * len(cases)))
    figures = {}
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            first, ms, mb = pool.submit(loss_case, *case).result()
        figures[str(case)] = ms, mb, first
        space, compiled, memory_mb, tile_bytes = case
        say(
            f"loss, {space} space, 608 rows, {'compiled' if compiled else 'eager'}, {memory_mb} MB, tiles of"
            f" {tile_bytes >> 20} MB: {ms:.2f} ms, peak {mb:.0f} MB, first {first:.0f} s"
        )
    save(loss=figures)


# ---- Runs of the trainer


# A case of tests/runs.py, and its precision.
RUNS: tuple[tuple[str, dict[str, bool]], ...] = (
    ("dskd_cma_ga", {"bf16": True}),
    ("dskd_cma_ga", {"fp16": True}),
    ("attention", {"bf16": True}),
    ("attention_of_tokens", {"bf16": True}),
    ("alm", {"bf16": True}),
    ("dskd_cma_ct", {}),
    ("min_edit", {"bf16": True}),
)


def host_waits(trainer: Any) -> list[int]:
    """Train, and count in each micro-batch how often the host waited for the GPU."""
    plain, counts = trainer.training_step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            result = plain(*args, **kwargs)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
        return result

    trainer.training_step = counted
    trainer.train()
    return counts


def syncs() -> None:
    figures, failed = {}, False
    for name, precision in RUNS:
        settings = {"use_cpu": DEVICE == "cpu", "max_steps": 4, "loss_memory_mb": 512.0, "logging_steps": 100}
        title = " ".join([name, *precision])
        try:
            with tempfile.TemporaryDirectory() as folder:
                figures[title] = host_waits(runs.trainer(folder, **{**runs.CASES[name], **settings, **precision}))
            say("trainer,", title, "host waits per micro-batch:", figures[title])
        except Exception as problem:
            failed = True
            say("trainer,", title, "FAILED", type(problem).__name__, str(problem)[:300])
            traceback.print_exc()
    save(syncs=figures)
    if failed:
        sys.exit(1)


STEP = ["--shape", "gpt2-qwen1.5", "--methods", "dskd_cma_ga", "--teacher", "live,cached"]
STEP += ["--steps", "10", "--device", "cuda", "--json"]


def step() -> None:
    script = ROOT / "recipes" / "benchmark_step.py"
    done = subprocess.run([sys.executable, script, *STEP], stdout=subprocess.PIPE, text=True)
    *table, figures = done.stdout.splitlines() or [""]
    for line in table:
        say(line)
    if done.returncode:
        sys.exit(done.returncode)
    save(step=json.loads(figures))


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    globals()[sys.argv[2]]()
