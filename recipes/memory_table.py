"""
How much memory of a GPU a training step takes, for the recipes here and two larger pairs, as a table for README.md.

    python recipes/memory_table.py
    python recipes/memory_table.py --json --computed

Numbers are computed from the sizes of the models, by the formulas below. Where there is a GPU, each row is measured as
well: real steps with random weights, and the most that the allocator held. Without one the same formulas, with what is
different on a CPU, are compared with what the system says that a few small runs took. `--computed` measures nothing.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark_step import (
    SHAPES,
    Bench,
    Cell,
    Parser,
    Shape,
    check_memory,
    cpu_name,
    fastest_dtype,
    lengths,
    model_config,
    names_of,
    quiet,
)

from hf_dskd.errors import UserError


if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# Memory of a card that programs can have, in bytes, as PyTorch's out-of-memory errors give it.
CARDS = {"T4 16 GB": 14.56 * 2**30, "RTX 3060 12 GB": 11.75 * 2**30, "RTX 4090 24 GB": 23.6 * 2**30}
# What the driver takes for a process, and workspaces of matrix products. Not in the allocator's numbers.
CUDA_CONTEXT = 0.5e9
# Of an allocator's memory, what lies between blocks.
FRAGMENTATION = 1.05
# What a process on a CPU takes beside tensors: threads, compiled kernels, buffers of matrix products.
CPU_PROCESS = 50e6
# Copies of queries and keys, in float32, that alignment, matching and their gradients hold at once.
ROW_COPIES = 5


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
        "TinyLlama-1.1B, LoRA r 256 ← Mistral-7B in 4 bits", "tinyllama-mistral", 4, 512, 8, four_bit=True
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


# ---- The model of a step


@dataclass(frozen=True)
class Size:
    """
    What the formulas need of a model.

    Attributes:
        kind (`str`): `"gpt2"`, or `"llama"` for all that are built like it.
        width, layers, heads, attention, inner, vocabulary (`int`):
            Hidden size, layers, attention heads, their width together, width of the feed-forward layer, tokens.
        parameters (`int`): Of the whole model.
        linear (`tuple[tuple[int, int], ...]`): Inputs and outputs of each linear layer but the head.
        tied (`bool`): Whether head and embedding are one matrix.
        dropout (`bool`): Whether the model drops anything in training.
    """

    kind: str
    width: int
    layers: int
    heads: int
    attention: int
    inner: int
    vocabulary: int
    parameters: int
    linear: tuple[tuple[int, int], ...]
    tied: bool
    dropout: bool

    @classmethod
    def of(cls, config: PretrainedConfig) -> Size:
        """Reads a configuration; the model is built without weights."""
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()  # type: ignore[operator]
        linear: list[tuple[int, int]] = []
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
                linear.append(tuple(module.weight.shape))  # type: ignore[arg-type]
        width, heads = config.hidden_size, config.num_attention_heads
        gpt2 = config.model_type == "gpt2"
        return cls(
            kind="gpt2" if gpt2 else "llama",
            width=width,
            layers=config.num_hidden_layers,
            heads=heads,
            attention=heads * (getattr(config, "head_dim", None) or width // heads),
            inner=4 * width if gpt2 else config.intermediate_size,
            vocabulary=config.vocab_size,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            linear=tuple(linear),
            tied=bool(config.tie_word_embeddings),
            dropout=gpt2 and config.resid_pdrop > 0,
        )

    @property
    def linear_parameters(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.linear)

    @property
    def largest_linear(self) -> int:
        return max(inputs * outputs for inputs, outputs in self.linear)

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on all linear layers."""
        return sum(rank * (inputs + outputs) for inputs, outputs in self.linear)


def bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def layer_activations(student: Size, cell: Cell) -> float:
    """
    Bytes for each token that a layer of the student keeps for its backward pass.

    Counted in transformers' modules: in autocast the residual stream is float32 if the weights are, matrix products
    have `c` bytes a number and each keeps a cast copy of its input; with padding the attention's mask has a row per
    token, and keys and values are repeated for every head.
    """
    c, d, a, inner = bytes_of(cell.dtype), student.width, student.attention, student.inner
    autocast = cell.dtype != "float32"
    # Queries, keys, values, output and mask; the logarithm of each softmax's sum.
    attention = 4 * a * c + cell.max_length * c + 4 * student.heads
    # The norms' inputs in float32.
    norms = 2 * d * 4
    if student.kind == "gpt2":
        # gelu_new is written out: five arrays, of which autocast on a GPU keeps three in float32.
        gelu = 3 * 4 + 2 * c if autocast and cell.device == "cuda" else 5 * c
        dropout = 2 * d if student.dropout else 0
        return attention + norms + 2 * d * c + inner * gelu + dropout
    feed_forward = 4 * inner * c
    if cell.lora_r:
        # Every adapted layer has its own copy of the input; in float32 they share one.
        inputs = 5 * d * c + a * c if autocast else 2 * d * c
        return attention + norms + feed_forward + inputs + 7 * cell.lora_r * c
    return attention + 2 * norms + feed_forward + (5 if autocast else 2) * d * c


def activations(student: Size, cell: Cell) -> float:
    """Bytes of the student's forward pass that are kept for the backward pass."""
    tokens, c = cell.batch_size * cell.max_length, bytes_of(cell.dtype)
    of_layer = tokens * layer_activations(student, cell)
    # Autocast's half-precision copies of weights that aren't: the backward pass needs them too.
    casts = 0.0
    if cell.dtype != "float32":
        casts = c * (student.adapter(cell.lora_r) + (0 if cell.half_student else student.linear_parameters))
    # Embedding, last norm.
    ends = tokens * student.width * 12
    if cell.gradient_checkpointing:
        # The inputs of all layers, and one layer computed again.
        stream = c if cell.half_student else 4
        return student.layers * tokens * student.width * stream + of_layer + casts / student.layers + ends
    return student.layers * of_layer + casts + ends


def teacher_pass(teacher: Size, cell: Cell) -> float:
    """Bytes of a layer of the teacher while it runs; nothing is kept."""
    tokens, c = cell.batch_size * cell.max_length, bytes_of(cell.dtype)
    dequantised = teacher.largest_linear * c if cell.teacher == "4bit" else 0
    return tokens * (3 * teacher.inner * c + 3 * teacher.width * 4) + dequantised


def teacher_weights(teacher: Size, cell: Cell) -> float:
    """Bytes of the teacher, or of what the cache leaves of it."""
    c, matrix = bytes_of(cell.dtype), teacher.vocabulary * teacher.width
    if cell.teacher == "cached":
        return c * matrix * (1 if teacher.tied else 2)
    if cell.teacher == "4bit":
        # Half a byte, for every 64 numbers a scale of one byte, for every 256 scales one of four. The rest is as it
        # is: the head, which is therefore never dequantised, the embedding, norms and biases.
        scaled = 0.5 + 1 / 64 + 4 / (64 * 256)
        return scaled * teacher.linear_parameters + c * (teacher.parameters - teacher.linear_parameters)
    return c * teacher.parameters


def projectors(student: Size, teacher: Size) -> int:
    """Parameters of query, s2t and t2s."""
    s, t = student.width, teacher.width
    return (2 * s + 1) * 2 * t + (s + 1) * t + (t + 1) * s


def discriminator(teacher: Size, hidden: int = 768) -> int:
    width = 2 * teacher.width
    return (width + 1) * width + (width + 1) * hidden + hidden + 1


def loss(student: Size, teacher: Size, cell: Cell, responses: list[int], memory_mb: float = 512) -> float:
    """Bytes of the losses in the two spaces, of which one is computed after the other."""
    import torch

    from hf_dskd.kernels.linear_divergence import TILE_COPIES, chunk_sizes

    c, dtype = bytes_of(cell.dtype), getattr(torch, cell.dtype)
    count = sum(responses)

    def space(vocabulary: int) -> float:
        chunk, tile = chunk_sizes([vocabulary] * 2, [dtype] * 2, cell.device, memory_mb)
        return 2 * vocabulary * (min(chunk, count) * c + min(tile, count) * TILE_COPIES * 4)

    own = space(student.vocabulary)
    matrix = student.vocabulary * student.width
    if cell.dtype != "float32" and not cell.half_student:
        # The head is cast, once for each of its two uses.
        own += 2 * matrix * c
    if not cell.lora_r:
        # Its gradient in float32, and a chunk's share of it.
        own += 4 * matrix + (c * matrix if cell.dtype != "float32" else 0)
    return max(own, space(teacher.vocabulary))


def step_memory(student: Size, teacher: Size, cell: Cell) -> dict[str, float]:
    """
    Bytes of a training step by what they are for, and under `total` the most at once.

    `total` is what stays through the step and the largest of its phases: the teacher's pass, the loss, the beginning
    of the backward pass (all activations, no gradients yet), its end (the reverse) and the discriminator's update.
    """
    tokens, c = cell.batch_size * cell.max_length, bytes_of(cell.dtype)
    responses = [response for _, response in lengths(cell.batch_size, cell.max_length, cell.response_tokens)]
    trained = student.adapter(cell.lora_r) if cell.lora_r else student.parameters
    projected, critic = projectors(student, teacher), discriminator(teacher)
    # Queries and keys, padded to the longest response.
    rows = 2 * cell.batch_size * max(responses) * 2 * teacher.width * 4
    parts = {
        "student weights": (c if cell.half_student else 4) * student.parameters,
        "adapter": 4 * student.adapter(cell.lora_r),
        "teacher weights": teacher_weights(teacher, cell),
        "projectors and discriminator": 4 * (projected + critic),
        # AdamW's two moments.
        "optimizer states": 8 * (trained + projected + critic),
        "gradients": 4 * (trained + projected),
        "activations": activations(student, cell),
        "teacher's pass": 0 if cell.teacher == "cached" else teacher_pass(teacher, cell),
        "loss": loss(student, teacher, cell, responses),
        "queries and keys": ROW_COPIES * rows,
        "process": CUDA_CONTEXT if cell.device == "cuda" else CPU_PROCESS,
    }
    stays = sum(
        parts[name]
        for name in (
            "student weights",
            "adapter",
            "teacher weights",
            "projectors and discriminator",
            "optimizer states",
            "process",
        )
    )
    earlier = 0.0
    if cell.accumulation > 1:
        # Of the batches before: gradients, and the queries and keys that the discriminator will learn from.
        earlier = parts["gradients"] + (cell.accumulation - 1) * rows
    head = 0 if cell.lora_r else 4 * student.vocabulary * student.width
    through_layer = tokens * (4 * student.inner * c + 3 * student.width * 4)
    phases = (
        earlier + parts["activations"] + parts["teacher's pass"],
        earlier + parts["activations"] + parts["queries and keys"] + parts["loss"],
        earlier + parts["activations"] + parts["queries and keys"] + head + through_layer,
        parts["gradients"] + head + through_layer,
        # Its gradients, and on a GPU as much for AdamW over all of its parameters at once.
        parts["gradients"]
        + cell.accumulation * rows
        + parts["queries and keys"]
        + (8 if cell.device == "cuda" else 4) * critic,
    )
    return {**parts, "total": stays + max(phases)}


# ---- Computed and measured


def make_cell(
    shape: Shape, batch_size: int, max_length: int, accumulation: int, teacher: str, device: str, dtype: str
) -> Cell:
    """A run of two steps; responses are a third of the longest example on average."""
    return Cell(
        method=METHOD,
        teacher=teacher,
        student_folder="",
        teacher_folder="",
        folder="",
        lora_r=shape.lora_r,
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


def measured(cell: Cell, bench: Bench) -> dict[str, Any]:
    """Bytes that a run really takes, under `measured`, or why it doesn't run, under `skipped`."""
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
    """Every recipe with and without gradient checkpointing: bytes on a GPU, live and cached."""
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
                row[kind] = {"computed": step_memory(student, teacher, cell)}
                if measure_them:
                    row[kind] |= measured(cell, bench)
            rows.append(row)
    return rows


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """
    Lets the C library of new processes give a tensor's memory back when it is freed.

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
    """Small runs on a CPU: bytes computed and measured, and the relative error."""
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
            "computed": step_memory(*sizes(shape), cell),
        }
        with freed_memory_given_back():
            row |= measured(cell, Bench(shape, folder / name, real_weights=False))
        if "measured" in row:
            row["error"] = row["computed"]["total"] / row["measured"] - 1
        rows.append(row)
    return rows


# ---- For people


def needed(found: dict[str, Any]) -> float:
    """Bytes: measured where that could be done."""
    return found.get("measured", found["computed"]["total"])


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for README.md."""
    lines = [
        f"| recipe | batch × length | live, GB | cached, GB | {' | '.join(CARDS)} |",
        f"|---|---|---|---|{'---|' * len(CARDS)}",
    ]
    for row in rows:
        title = f"{row['title']}{', gradient checkpointing' if row['gradient_checkpointing'] else ''}"
        cells = [title, f"{row['batch_size']} × {row['max_length']}"]
        cells += [f"{needed(row[kind]) / 1e9:.1f}" for kind in ("live", "cached")]
        for memory in CARDS.values():
            fits = [kind for kind in ("live", "cached") if FRAGMENTATION * needed(row[kind]) <= memory]
            cells.append(" and ".join(fits) or "no")
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
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--recipes",
        type=names_of(RECIPES),
        default=tuple(RECIPES),
        metavar="NAMES",
        help=f"with commas between them: {', '.join(RECIPES)} (all)",
    )
    add("--computed", action="store_true", help="compute only")
    add("--json", action="store_true", help="print one line of JSON last")
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
        "device_name": torch.cuda.get_device_name() if cuda else cpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(report(result))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    from hf_dskd.run import command

    command(main)
