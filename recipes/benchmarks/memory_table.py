"""
Compute how much memory of a GPU a training step takes, for four of the recipes, as a table for README.md.

    python recipes/memory_table.py
    python recipes/memory_table.py --json --computed

Numbers are computed from the sizes of the models, by hf_dskd/experiments/memory.py. Where there is a GPU, each row
is measured as well: real steps with random weights, and the most that the allocator held. Without one the same
formulas, with what is different on a CPU, are compared with what the system says that a few small runs took.
`--computed` measures nothing.

"Live" has the teacher beside the student, "cached" its head and embedding alone (`--teacher_cache`). A GB is 10^9
bytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmark_step import SHAPES, Bench, Cell, Shape, check_memory, fastest_dtype, model_config
from measuring import Parser, device_name, names_of, quiet

from hf_dskd.errors import UserError
from hf_dskd.experiments.memory import CUDA_CONTEXT, FRAGMENTATION, Size, Step, room, step_memory


# Memory of a card that programs can have, in bytes, as PyTorch's out-of-memory errors give it.
CARDS = {"T4 16 GB": 14.56 * 2**30, "RTX 3060 12 GB": 11.75 * 2**30, "RTX 4090 24 GB": 23.6 * 2**30}


@dataclass(frozen=True)
class Recipe:
    """
    A row of the table.

    Attributes:
        title (`str`): For people.
        shape (`str`): A key of `SHAPES`.
        batch_size, max_length, accumulation (`int`): Examples at a time, tokens of each, batches of an optimizer step.
        four_bit (`bool`): Whether a live teacher is an NF4 one.
    """

    title: str
    shape: str
    batch_size: int
    max_length: int
    accumulation: int
    four_bit: bool = False


RECIPES = {
    "gpt2_qwen": Recipe("`gpt2_qwen`: GPT-2 124M ← Qwen1.5-1.8B", "gpt2-qwen1.5", 4, 512, 8),
    "smollm2_qwen_coder": Recipe(
        "`smollm2_qwen_coder`: SmolLM2-135M, LoRA r 16 ← Qwen2.5-Coder-0.5B", "smollm2-qwen-coder", 2, 384, 2
    ),
    "tinyllama_mistral": Recipe(
        "TinyLlama-1.1B, LoRA r 256 on q and v ← Mistral-7B in 4 bits", "tinyllama-mistral", 4, 512, 8, four_bit=True
    ),
    "llama3_qwen2": Recipe(
        "Llama-3.2-1B, LoRA r 64 ← Qwen2.5-7B in 4 bits", "llama3.2-qwen2.5", 4, 512, 8, four_bit=True
    ),
}
METHOD = "dskd_cma_ga"
# Small runs on a CPU: shape, examples, tokens, precision, teacher.
CHECKS = (
    ("small", 8, 384, "float32", "live"),
    ("small", 8, 384, "float32", "cached"),
    ("small", 8, 512, "bfloat16", "live"),
    ("small", 8, 512, "bfloat16", "cached"),
    ("small-full", 8, 384, "float32", "live"),
    ("small-full", 8, 512, "bfloat16", "cached"),
)


# ---- Computed and measured


def make_cell(
    shape: Shape, batch_size: int, max_length: int, accumulation: int, teacher: str, device: str, dtype: str
) -> Cell:
    """Describe a run of two steps; responses are a third of the longest example on average."""
    return Cell(
        method=METHOD,
        teacher=teacher,
        student_folder="",
        teacher_folder="",
        folder="",
        lora_r=shape.lora_r,
        lora_targets=shape.lora_targets,
        half_student=shape.half_student,
        batch_size=batch_size,
        max_length=max_length,
        response_tokens=max_length // 3,
        steps=1,
        warmup_steps=1,
        device=device,
        dtype=dtype,
        accumulation=accumulation,
    )


def sizes(shape: Shape) -> tuple[Size, Size]:
    return Size.of(model_config(shape.student)), Size.of(model_config(shape.teacher))


def computed(student: Size, teacher: Size, cell: Cell) -> dict[str, float]:
    """Compute the bytes of a step by what they are for, and under `total` the most at once."""
    step = Step(
        batch_size=cell.batch_size,
        max_length=cell.max_length,
        method=cell.method,
        adapter_rank=cell.lora_r or None,
        adapter_targets=cell.lora_targets,
        student_dtype=cell.dtype if cell.half_student else "float32",
        teacher=cell.teacher,
        gradient_checkpointing=cell.gradient_checkpointing,
        dtype=cell.dtype,
        device=cell.device,
        accumulation=cell.accumulation,
        response_tokens=cell.response_tokens,
    )
    return asdict(step_memory(student, teacher, step))


def measured(cell: Cell, bench: Bench) -> dict[str, Any]:
    """Measure the bytes that a run takes, under `measured`, or say why it doesn't run, under `skipped`."""
    try:
        check_memory(bench.shape, cell.lora_r, cell.device)
    except UserError as error:
        return {"skipped": str(error)}
    found = bench.measure(
        replace(
            cell,
            student_folder=bench.model("student"),
            teacher_folder=bench.model("teacher"),
            folder=str(bench.folder / f"{cell.dtype}-{cell.batch_size}x{cell.max_length}"),
        )
    )
    if "skipped" in found:
        return found
    context = CUDA_CONTEXT if cell.device == "cuda" else 0
    return {"measured": found["peak_mb"] * 1e6 + context}


def table_rows(names: tuple[str, ...], measure_them: bool, folder: Path) -> list[dict[str, Any]]:
    """Compute every recipe with and without gradient checkpointing: bytes on a GPU, live and cached."""
    rows = []
    # Either half precision takes the same memory; not every GPU has bfloat16.
    dtype = fastest_dtype("cuda") if measure_them else "bfloat16"
    for name in names:
        recipe = RECIPES[name]
        shape = SHAPES[recipe.shape]
        student, teacher = sizes(shape)
        bench = Bench(shape, folder / name, real_weights=False)
        for checkpointing in (False, True):
            row: dict[str, Any] = {
                "recipe": name,
                "title": recipe.title,
                "batch_size": recipe.batch_size,
                "max_length": recipe.max_length,
                "gradient_checkpointing": checkpointing,
            }
            for kind in ("live", "cached"):
                given = "4bit" if recipe.four_bit and kind == "live" else kind
                cell = make_cell(
                    shape, recipe.batch_size, recipe.max_length, recipe.accumulation, given, "cuda", dtype
                )
                cell = replace(cell, gradient_checkpointing=checkpointing)
                row[kind] = {"computed": computed(student, teacher, cell)}
                if measure_them:
                    row[kind] |= measured(cell, bench)
            rows.append(row)
    return rows


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """
    Let the C library of new processes give a tensor's memory back when it is freed.

    Otherwise it keeps smaller blocks in a heap with gaps, and the system counts those: a third on top with the
    packaged pair. A GPU's allocator keeps freed memory too, but it tells what is in use.
    """
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = "65536"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def check(cases: tuple[tuple[str, int, int, str, str], ...], folder: Path) -> list[dict[str, Any]]:
    """Run small models on a CPU: bytes computed and measured, and the relative error."""
    rows = []
    for name, batch_size, max_length, dtype, teacher in cases:
        shape = SHAPES[name]
        cell = make_cell(shape, batch_size, max_length, 1, teacher, "cpu", dtype)
        row: dict[str, Any] = {
            "shape": name,
            "batch_size": batch_size,
            "max_length": max_length,
            "dtype": dtype,
            "teacher": teacher,
            "computed": computed(*sizes(shape), cell),
        }
        with freed_memory_given_back():
            row |= measured(cell, Bench(shape, folder / name, real_weights=False))
        if "measured" in row:
            row["error"] = row["computed"]["total"] / row["measured"] - 1
        rows.append(row)
    return rows


# ---- For people


def needed(found: dict[str, Any]) -> float:
    """Return bytes, measured where that could be done."""
    return found.get("measured", found["computed"]["total"])


def markdown(rows: list[dict[str, Any]]) -> str:
    """Write the table for README.md."""
    lines = [
        f"| recipe | batch × length | live, GB | cached, GB | {' | '.join(CARDS)} |",
        f"|---|---|---|---|{'---|' * len(CARDS)}",
    ]
    for row in rows:
        title = f"{row['title']}{', gradient checkpointing' if row['gradient_checkpointing'] else ''}"
        cells = [title, f"{row['batch_size']} × {row['max_length']}"]
        cells += [f"{needed(row[kind]) / 1e9:.1f}" for kind in ("live", "cached")]
        for memory in CARDS.values():
            which = [kind for kind in ("live", "cached") if room(needed(row[kind]), "cuda") <= memory]
            cells.append(" and ".join(which) or "no")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    rows, checks = result["rows"], result["checks"]
    on_gpu = any("measured" in row[kind] for row in rows for kind in ("live", "cached"))
    how = f"measured on {result['device_name']} where that ran, else computed" if on_gpu else "computed, not measured"
    lines = [
        markdown(rows),
        "",
        f"Peak of a training step (`{METHOD}`, half-precision autocast, AdamW, every example padded to the length"
        f" given, responses a third of it on average), {how}. {CUDA_CONTEXT / 1e9:.1f} GB of it are for the CUDA"
        f" context. A card counts as large enough with {FRAGMENTATION - 1:.0%} to spare. Filling the cache takes the"
        " teacher alone, once, on this GPU or another.",
    ]
    pairs = [
        (f"{row['recipe']}, {kind}{', checkpointing' * row['gradient_checkpointing']}", row[kind])
        for row in rows
        for kind in ("live", "cached")
    ]
    pairs += [
        (f"{row['shape']} {row['batch_size']} x {row['max_length']} {row['dtype']}, {row['teacher']}", row)
        for row in checks
    ]
    pairs = [(title, pair) for title, pair in pairs if "measured" in pair or "skipped" in pair]
    if pairs:
        where = "GPU's allocator + context" if on_gpu else "small runs, process on this CPU"
        lines += ["", f"{f'MB ({where})':50}{'computed':>10}{'measured':>10}{'error':>8}"]
    for title, pair in pairs:
        computed = pair["computed"]["total"]
        line = f"{title:50}{computed / 1e6:10,.0f}"
        if "skipped" in pair:
            line += f"  not run: {pair['skipped']}"
        else:
            line += f"{pair['measured'] / 1e6:10,.0f}{computed / pair['measured'] - 1:+8.1%}"
        lines.append(line)
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    recipes = f"with commas between them: {', '.join(RECIPES)} (all)"
    parser.add_argument("--recipes", type=names_of(RECIPES), default=tuple(RECIPES), metavar="NAMES", help=recipes)
    parser.add_argument("--computed", action="store_true", help="compute only")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    quiet()
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="memory_table") as name:
        folder = Path(name)
        rows = table_rows(args.recipes, cuda and not args.computed, folder)
        checks = [] if cuda or args.computed else check(CHECKS, folder)
    result = {
        "rows": rows,
        "checks": checks,
        "device_name": device_name("cuda" if cuda else "cpu"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(report(result))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    from hf_dskd.launch import command

    command(main)
