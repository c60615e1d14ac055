"""
Measure what the KL between two attention distributions costs: `stream_kl` against PyTorch with whole matrices.

    python recipes/benchmark_stream_kl.py --json
    python recipes/benchmark_stream_kl.py --lengths 4096,8192 --head-sizes 64 --forms eager,compile,stream_kl
    python recipes/benchmark_stream_kl.py --device cuda --json

"eager" has all logits and probabilities, "compile" is the same through torch.compile, "chunked" takes some queries at
a time and computes them again in the backward pass. "forward" is without gradient; "backward 2" and "backward 1" have
gradients of queries and keys of that side (the student's in forward and in reverse KL), and their time is that of the
backward pass alone. Memory is the most that a pass, forward included, adds to its inputs, in MB of 10^6 bytes.
TFLOP/s counts the matrix products that are needed: 2 in a forward pass and 4 in a backward pass, half of each if
causal; "of peak" is their share of what a large matrix product reaches on the same device. A form that doesn't fit
into memory is left out, by an estimate on a CPU. On a CPU each cell is a process of its own; on a GPU times are
between CUDA events. The paper's are those of StreamKL (arXiv 2606.20005), for the same cell.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from measuring import (
    DEVICES,
    DTYPES,
    Parser,
    PeakMemory,
    available,
    choose_device,
    device_name,
    isolated,
    names_of,
    positive,
)

from hf_dskd.errors import check_name


if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMS = ("eager", "compile", "chunked", "stream_kl")
MASKS = ("full", "causal")
PASSES = ("forward", "backward 2", "backward 1")
# Which of query_1, key_1, query_2 and key_2 need a gradient.
NEEDS = {
    "forward": (False, False, False, False),
    "backward 2": (False, False, True, True),
    "backward 1": (True, True, False, False),
}
# Of what isn't given on the command line, by device.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "dtype": "float32",
        "batch_heads": (1,),
        "lengths": (1024, 2048, 4096, 8192),
        "head_sizes": (64,),
        "forms": ("eager", "chunked", "stream_kl"),
        "repeats": 1,
    },
    "cuda": {
        "dtype": "bfloat16",
        "batch_heads": (16, 32),
        "lengths": tuple(4096 * 2**i for i in range(8)),
        "head_sizes": (64, 128),
        "forms": FORMS,
        "repeats": 5,
    },
}
# Float32 matrices of queries and keys that whole rows take at once, as measured.
DENSE_COPIES = 6
# Numbers in the logits of a chunk.
CHUNK = {"cpu": 2**22, "cuda": 2**28}
# A cell is repeated no more after this many seconds.
ENOUGH_SECONDS = 10
# Milliseconds in the paper, at batch x heads 16 and head size 128, for 4K, 8K, ... 512K, without those that it
# extrapolates.
PAPER_LENGTHS = tuple(4096 * 2**i for i in range(8))
PAPER: dict[str, dict[tuple[str, str, str], tuple[float, ...]]] = {
    "H200": {
        ("stream_kl", "forward", "full"): (0.5, 1.8, 6.9, 26, 112, 433, 1700, 7500),
        ("stream_kl", "forward", "causal"): (0.4, 1.1, 3.8, 15, 60, 257, 1100, 3900),
        ("stream_kl", "backward 2", "full"): (1.1, 4.1, 15, 62, 249, 969, 4200, 17000),
        ("stream_kl", "backward 2", "causal"): (0.6, 2.2, 8.2, 32, 129, 523, 2100, 8500),
        ("stream_kl", "backward 1", "full"): (1.0, 3.6, 13, 57, 229, 890, 4200, 16000),
        ("stream_kl", "backward 1", "causal"): (0.6, 2.0, 7.8, 30, 138, 539, 2100, 8500),
        ("eager", "forward", "full"): (6.9, 29, 106),
        ("eager", "forward", "causal"): (9.9, 40, 150),
        ("eager", "backward 2", "full"): (4.0, 15, 62),
        ("compile", "forward", "full"): (1.3, 6.3, 23, 93),
        ("compile", "forward", "causal"): (1.9, 6.7, 26, 101),
        ("compile", "backward 2", "full"): (1.2, 4.1, 16, 65),
    },
    "A100": {
        ("stream_kl", "forward", "full"): (1.2, 4.5, 16, 66, 268, 1100, 4400, 17000),
        ("stream_kl", "forward", "causal"): (0.8, 2.5, 9.4, 36, 144, 572, 2300, 9100),
        ("stream_kl", "backward 2", "full"): (2.9, 11, 42, 169, 681, 2900, 11000, 48000),
        ("stream_kl", "backward 2", "causal"): (2.0, 6.0, 23, 95, 380, 1500, 6000, 24000),
        ("stream_kl", "backward 1", "full"): (2.9, 11, 42, 174, 742, 3100, 12000, 49000),
        ("stream_kl", "backward 1", "causal"): (1.6, 5.8, 23, 93, 372, 1600, 6300, 25000),
    },
}
# Memory of StreamKL in MB, for 4K, 8K, ... 128K.
PAPER_MB = {
    "forward": (1, 2, 4, 8, 16, 32),
    "backward 2": (33, 66, 132, 264, 528, 1000),
    "backward 1": (33, 66, 133, 264, 532, 1000),
}


@dataclass(frozen=True)
class Cell:
    """One form of one pass: a line of the table."""

    device: str
    dtype: str
    form: str
    mask: str
    what: str
    batch_heads: int
    length: int
    head_size: int
    repeats: int

    @property
    def flops(self) -> float:
        """Count the operations of the matrix products that no form can do without."""
        products = 2 if self.what == "forward" else 4
        share = 0.5 if self.mask == "causal" else 1.0
        return products * 2 * self.batch_heads * self.length**2 * self.head_size * share

    def paper(self) -> dict[str, float | None]:
        """Look the same cell up in the paper: milliseconds and MB."""
        columns = {f"paper_{gpu.lower()}_ms": PAPER[gpu].get((self.form, self.what, self.mask), ()) for gpu in PAPER}
        columns["paper_mb"] = PAPER_MB[self.what] if self.form == "stream_kl" else ()
        place = len(PAPER_LENGTHS)
        if (self.batch_heads, self.head_size) == (16, 128) and self.length in PAPER_LENGTHS:
            place = PAPER_LENGTHS.index(self.length)
        return {name: values[place] if place < len(values) else None for name, values in columns.items()}


# ---- The command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and check it as far as that needs no torch."""

    def numbers(text: str) -> tuple[int, ...]:
        try:
            return tuple(map(positive, text.split(",")))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}; several as 1024,2048") from None

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--device", metavar="NAME", help=f"{', '.join(DEVICES)} (cuda where there is one)")
    add("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)} (float32; on cuda bfloat16)")
    add("--forms", type=names_of(FORMS), metavar="NAMES", help=f"of {','.join(FORMS)} (on cpu without compile)")
    add("--masks", type=names_of(MASKS), default=MASKS, metavar="NAMES", help=f"of {','.join(MASKS)} (all)")
    add("--passes", type=names_of(PASSES), default=PASSES, metavar="NAMES", help=f"of {','.join(PASSES)} (all)")
    add("--batch-heads", type=numbers, metavar="N,N", help="examples times heads (1; on cuda 16,32)")
    add("--lengths", type=numbers, metavar="N,N", help="queries, and keys (1024 to 8192; on cuda 4096 to 524288)")
    add("--head-sizes", type=numbers, metavar="N,N", help="(64; on cuda 64,128)")
    add("--repeats", type=positive, metavar="N", help="passes of which the median counts (1; on cuda 5)")
    add("--json", action="store_true", help="print one line of JSON last")
    args = parser.parse_args(arguments)
    for name, known in (("device", DEVICES), ("dtype", DTYPES)):
        if getattr(args, name) is not None:
            check_name(f"--{name} ", getattr(args, name), known)
    return args


def cells(args: argparse.Namespace, device: str) -> list[Cell]:
    """List all lines of the table, in its order."""
    settings = {**DEFAULTS[device], **{name: value for name, value in vars(args).items() if value is not None}}
    return [
        Cell(device, settings["dtype"], form, mask, what, batch_heads, length, head_size, settings["repeats"])
        for what, mask, head_size, batch_heads, length, form in product(
            args.passes,
            args.masks,
            settings["head_sizes"],
            settings["batch_heads"],
            settings["lengths"],
            settings["forms"],
        )
    ]


# ---- The forms: from query_1, key_1, query_2 and key_2, all [1, H, N, d], to the mean over rows


def eager(tensors: list[Tensor], causal: bool) -> Tensor:
    return whole_rows(*tensors, causal=causal).mean()


def whole_rows(query_1: Tensor, key_1: Tensor, query_2: Tensor, key_2: Tensor, causal: bool, first: int = 0) -> Tensor:
    """Compute the KL of every row, `[1, H, n]`, of n queries from the `first` on."""
    import torch

    log_probs = []
    for query, key in ((query_1, key_1), (query_2, key_2)):
        logits = (query @ key.mT).float() / math.sqrt(query.shape[-1])
        if causal:
            later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(first + 1)
            # Not infinite, for the difference of two of them.
            logits = logits.masked_fill(later, -1e30)
        log_probs.append(torch.log_softmax(logits, -1))
    return (log_probs[0].exp() * (log_probs[0] - log_probs[1])).sum(-1)


def chunked(tensors: list[Tensor], causal: bool) -> Tensor:
    """Take some queries at a time, and compute them again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    query_1, key_1, query_2, key_2 = tensors
    rows = max(CHUNK[query_1.device.type] // (query_1.shape[1] * key_1.shape[2]), 1)
    total = query_1.new_zeros((), dtype=query_1.float().dtype)
    for first in range(0, query_1.shape[2], rows):
        part = slice(first, first + rows)
        # Of a causal chunk, no more keys than its last query sees.
        seen = slice(0, first + rows if causal else None)
        values = checkpoint(
            whole_rows,
            query_1[:, :, part],
            key_1[:, :, seen],
            query_2[:, :, part],
            key_2[:, :, seen],
            causal,
            first,
            use_reentrant=False,
        )
        total = total + values.sum()
    return total / (query_1.shape[1] * query_1.shape[2])


def streamed(tensors: list[Tensor], causal: bool) -> Tensor:
    from hf_dskd.kernels.stream_kl import stream_kl

    return stream_kl(*tensors, causal=causal)


def form(name: str) -> Callable[[list[Tensor], bool], Tensor]:
    import torch

    if name == "compile":
        # Compiled for each shape, however many there were before.
        torch._dynamo.reset()
        return torch.compile(eager, dynamic=False)
    return {"eager": eager, "chunked": chunked, "stream_kl": streamed}[name]


# ---- Measuring


def inputs(cell: Cell) -> list[Tensor]:
    """Draw the same random numbers for every form."""
    import torch

    shape = 1, cell.batch_heads, cell.length, cell.head_size
    generator = torch.Generator(cell.device).manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, device=cell.device) for _ in range(4)]
    dtype = getattr(torch, cell.dtype)
    return [tensor.to(dtype).requires_grad_(need) for tensor, need in zip(tensors, NEEDS[cell.what])]


def measure(cell: Cell) -> dict[str, Any]:
    """Measure seconds, CPU seconds and peak in bytes; return them with the KL and the norms of its gradients."""
    import torch

    run = form(cell.form)
    # What is loaded, compiled and tuned at the first call is none of the pass. Sizes don't matter on a CPU.
    small = cell.device == "cpu" and cell.form != "compile"
    one_pass(run, cell, inputs(replace(cell, length=min(cell.length, 64)) if small else cell))
    tensors, passes, start = inputs(cell), [], time.perf_counter()
    while len(passes) < cell.repeats and (not passes or time.perf_counter() < start + ENOUGH_SECONDS):
        passes.append(one_pass(run, cell, tensors))
    result = {name: statistics.median(one[name] for one in passes) for name in ("seconds", "cpu_seconds", "peak")}
    last = {name: passes[-1][name] for name in ("kl", "gradients")}
    return {**result, **last, "passes": len(passes), "threads": torch.get_num_threads()}


def one_pass(run: Callable[[list[Tensor], bool], Tensor], cell: Cell, tensors: list[Tensor]) -> dict[str, Any]:
    import torch

    device, causal = torch.device(cell.device), cell.mask == "causal"
    backward = cell.what != "forward"
    with PeakMemory(device) as memory, torch.set_grad_enabled(backward):
        clock = Clock(device)
        loss = run(tensors, causal)
        if backward:
            clock = Clock(device)
            loss.backward()
        seconds, cpu_seconds = clock.stop()
    gradients = [float(tensor.grad.float().norm()) for tensor in tensors if tensor.grad is not None]
    for tensor in tensors:
        tensor.grad = None
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak": memory.peak,
        "kl": loss.item(),
        "gradients": gradients,
    }


class Clock:
    """Seconds since it was made; on a GPU between two events of its stream."""

    def __init__(self, device: torch.device):
        import torch

        self.events = None
        if device.type == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        self.start = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        """Return seconds, and seconds of the CPU."""
        if self.events is not None:
            self.events[1].record()
            self.events[1].synchronize()
            seconds = self.events[0].elapsed_time(self.events[1]) / 1000
        else:
            seconds = time.perf_counter() - self.start[0]
        return seconds, time.process_time() - self.start[1]


def matrix_rate(device: str, dtype: str) -> float:
    """Measure the FLOP/s of a large matrix product."""
    import torch

    size = 8192 if device == "cuda" else 2048
    one, other = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(5):
        clock = Clock(torch.device(device))
        one @ other
        seconds.append(clock.stop()[0])
    # The best, for it is the measure of the others.
    return 2 * size**3 / min(seconds)


def fits(cell: Cell) -> bool:
    """Tell whether a CPU's memory suffices; a GPU says so itself."""
    needed = 4 * cell.batch_heads * cell.length**2 * DENSE_COPIES
    return cell.device == "cuda" or cell.form in ("chunked", "stream_kl") or needed < available()


def on_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it here, for kernels are tuned once a process; `None` where memory doesn't suffice."""
    import torch

    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


# ---- The benchmark


def benchmark(
    args: argparse.Namespace,
    run: Callable[..., Any] | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure cell by cell; `show` gets each line of the table as soon as it stands."""
    import torch

    device = choose_device(args.device)
    run = run or (isolated if device == "cpu" else on_gpu)
    todo = cells(args, device)
    rate = run(matrix_rate, device, todo[0].dtype)
    name = device_name(device)
    show(
        f"{name}, torch {torch.__version__}, {todo[0].dtype}; a matrix product: {rate / 1e12:.3g} TFLOP/s;"
        f" median of {todo[0].repeats}"
    )
    show(HEADER)
    rows: list[dict[str, Any]] = []
    for cell in todo:
        found = run(measure, cell) if fits(cell) else None
        row = {
            **{name: value for name, value in asdict(cell).items() if name not in ("device", "dtype", "repeats")},
            "seconds": None,
            **cell.paper(),
        }
        if found is not None:
            row |= {name: found[name] for name in ("seconds", "cpu_seconds", "kl", "gradients", "passes", "threads")}
            row["peak_mb"] = found["peak"] / 1e6
            row["tflops"] = cell.flops / found["seconds"] / 1e12
            row["of_peak"] = cell.flops / found["seconds"] / rate
        rows.append(row)
        show(line(row))
    return {
        "rows": rows,
        "matrix_tflops": rate / 1e12,
        "device_name": name,
        "torch": torch.__version__,
        "settings": {"device": device, "dtype": todo[0].dtype, "repeats": todo[0].repeats},
    }


HEADER = (
    f"\n{'pass':11}{'mask':7}{'heads':>6}{'length':>8}{'size':>5}  {'form':10}{'ms':>12}{'CPU ms':>12}{'TFLOP/s':>9}"
    f"{'of peak':>8}{'peak MB':>11}   paper: {'H200 ms':>8}{'A100 ms':>9}{'MB':>7}"
)


def line(row: dict[str, Any]) -> str:
    """Write a cell for people."""
    text = (
        f"{row['what']:11}{row['mask']:7}{row['batch_heads']:6}{row['length']:8}{row['head_size']:5}  {row['form']:10}"
    )
    if row["seconds"] is None:
        text += f"{'out of memory':>24}{'':28}"
    else:
        text += (
            f"{row['seconds'] * 1e3:12,.1f}{row['cpu_seconds'] * 1e3:12,.1f}{row['tflops']:9.3g}"
            f"{row['of_peak']:8.0%}{row['peak_mb']:11,.1f}"
        )
    widths = {"paper_h200_ms": 18, "paper_a100_ms": 9, "paper_mb": 7}
    return (text + "".join(f"{'' if row[name] is None else row[name]:>{w}}" for name, w in widths.items())).rstrip()


def main() -> None:
    args = parse()
    result = benchmark(args, show=lambda line: print(line, flush=True))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    from hf_dskd.launch import command

    command(main)
