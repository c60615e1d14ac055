"""
Measure what a whole training step costs: student, teacher, loss, backward and optimizers, as the trainer runs them.

    python recipes/benchmark_step.py --shape smollm2-qwen-coder --methods sft,dskd_cma,alm --teacher live,cached
    python recipes/benchmark_step.py --shape gpt2-qwen1.5 --methods all --teacher live,cached,4bit --device cuda --json
    python recipes/benchmark_step.py --shape smollm2-qwen-coder --sweep --plot runs/step.png --json

The models have the sizes of the real ones and random weights (smollm2-qwen-coder has its real weights, except in a
sweep); the tokens are random. In every batch one example is as long as --max-length and the shortest half as long.
Each row of the table is a process of its own, so that one's memory isn't another's. Seconds are from the end of a step
to the end of the next, reading data included. Memory is the most that the process had during the steps over what it
had before the models were loaded (of a GPU, what its allocator held), in MB of 10^6 bytes. The cache is filled before
and apart; "speed-up" is over the same method with a live teacher.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import (
    DEVICES,
    DTYPES,
    Parser,
    available,
    choose_device,
    device_name,
    high_water,
    isolated,
    names_of,
    positive,
    quiet,
    reset_high_water,
    resident,
    return_freed_memory,
)

from hf_dskd.errors import UserError, check_name


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from hf_dskd import DSKDConfig, DSKDTrainer

TEACHERS = ("live", "cached", "4bit")
# What a sweep multiplies, and by what.
AXES = ("response_tokens", "batch_size", "student_vocabulary", "teacher_vocabulary")
FACTORS = (0.5, 1, 2)
COLORS = {"live": "#1f5fa8", "cached": "#e4572e", "4bit": "#3a9d5d", "none": "#7a7a7a"}


def decoder(
    kind: str, hidden: int, mlp: int, layers: int, heads: int, key_heads: int, tokens: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": tokens,
        "tie_word_embeddings": tied,
    }


def gpt2(width: int, layers: int, heads: int, tokens: int, **more: float) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": tokens, **more}


# Sizes as config.json of the model on the hub has them (small and tiny ones: invented); the rest is the architecture's
# default, on which neither time nor memory depends.
MODELS: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": gpt2(768, 12, 12, 50_257),
    "Qwen/Qwen1.5-1.8B": decoder("qwen2", 2048, 5504, 24, 16, 16, 151_936, tied=False),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": decoder("llama", 2048, 5632, 22, 32, 4, 32_000, tied=False),
    "mistralai/Mistral-7B-v0.1": decoder("mistral", 4096, 14_336, 32, 32, 8, 32_000, tied=False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": decoder("llama", 576, 1536, 30, 9, 3, 49_152, tied=True),
    # The packaged conversion has two matrices, as its source file has.
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": decoder("qwen2", 896, 4864, 24, 14, 2, 151_936, tied=False),
    "meta-llama/Llama-3.2-1B": decoder("llama", 2048, 8192, 16, 32, 8, 128_256, tied=True),
    "Qwen/Qwen2.5-7B": decoder("qwen2", 3584, 18_944, 28, 28, 4, 152_064, tied=False),
    "small student": decoder("llama", 256, 1024, 6, 8, 4, 6000, tied=True),
    "small gpt2": gpt2(256, 4, 4, 6000, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "small teacher": decoder("qwen2", 512, 1536, 4, 8, 2, 9000, tied=False),
    "tiny student": decoder("llama", 64, 128, 2, 2, 2, 1000, tied=True),
    "tiny teacher": decoder("qwen2", 128, 256, 2, 2, 2, 1200, tied=False),
}


@dataclass(frozen=True)
class Shape:
    """
    A pair of models and how the student is trained.

    Attributes:
        student, teacher (`str`): Keys of `MODELS`.
        lora_r (`int`): Rank of the adapter; 0 trains the whole student.
        half_student (`bool`): Whether the student is loaded in the training precision instead of float32.
        packaged (`tuple[str, str]`, *optional*): Names of the packaged models with the real weights.
        lora_targets (`str` or `tuple[str, ...]`): The adapter's `target_modules`.
    """

    student: str
    teacher: str
    lora_r: int
    half_student: bool = False
    packaged: tuple[str, str] | None = None
    lora_targets: str | tuple[str, ...] = "all-linear"


SHAPES = {
    "gpt2-qwen1.5": Shape("openai-community/gpt2", "Qwen/Qwen1.5-1.8B", 0),
    "tinyllama-mistral": Shape(
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "mistralai/Mistral-7B-v0.1",
        256,
        half_student=True,
        lora_targets=("q_proj", "v_proj"),
    ),
    "smollm2-qwen-coder": Shape(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        16,
        packaged=("SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"),
    ),
    "llama3.2-qwen2.5": Shape("meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-7B", 64, half_student=True),
    "small": Shape("small student", "small teacher", 16),
    "small-full": Shape("small gpt2", "small teacher", 0),
    "tiny": Shape("tiny student", "tiny teacher", 8),
}


@dataclass(frozen=True)
class Cell:
    """
    One run to be measured.

    Attributes:
        method (`str`): Of the trainer.
        teacher (`str`): One of `TEACHERS`, or `"none"` for a method without.
        student_folder, teacher_folder (`str`): The models, with their tokenizers.
        folder (`str`): For the cache of the teacher's states and for what a run writes.
        lora_r, half_student, lora_targets: As in [`Shape`].
        batch_size, max_length, response_tokens (`int`): Examples, longest example, mean tokens of a response.
        steps, warmup_steps (`int`): Optimizer steps that are measured, and those before them that aren't.
        device, dtype (`str`): One of `DEVICES` and of `DTYPES`, the training precision.
        gradient_checkpointing (`bool`), accumulation (`int`): Of the trainer.
    """

    method: str
    teacher: str
    student_folder: str
    teacher_folder: str
    folder: str
    lora_r: int
    half_student: bool
    batch_size: int
    max_length: int
    response_tokens: int
    steps: int
    warmup_steps: int
    device: str
    dtype: str
    gradient_checkpointing: bool = False
    accumulation: int = 1
    lora_targets: str | tuple[str, ...] = "all-linear"

    @property
    def cache_folder(self) -> str:
        return str(Path(self.folder) / "cache")


# ---- The command line


def rank(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 to train the whole student")
    return int(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and check it as far as that needs no torch."""
    from hf_dskd.methods import METHODS

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--shape", required=True, metavar="NAME", help=", ".join(SHAPES))
    add(
        "--methods",
        type=names_of(METHODS),
        default=("dskd_cma", "sft"),
        metavar="NAMES",
        help="or all (dskd_cma, sft)",
    )
    teachers = f"{','.join(TEACHERS)}, or all (live,cached)"
    add("--teacher", type=names_of(TEACHERS), default=("live", "cached"), metavar="NAMES", help=teachers)
    add("--batch-size", type=positive, default=4, metavar="N", help="examples of a step (4)")
    add("--max-length", type=positive, default=512, metavar="N", help="tokens of the longest example (512)")
    add("--response-tokens", type=positive, default=80, metavar="N", help="mean per example, give or take half (80)")
    add("--steps", type=positive, default=10, metavar="N", help="steps of which the median counts (10)")
    add("--warmup-steps", type=positive, default=2, metavar="N", help="steps before them (2)")
    add("--device", metavar="NAME", help="cpu or cuda (cuda where there is one)")
    add("--dtype", metavar="NAME", help=f"of training: {', '.join(DTYPES)} (what the machine computes in)")
    add("--lora-r", type=rank, metavar="N", help="rank of the student's adapter, 0 for none (the shape's)")
    add("--gradient-checkpointing", action="store_true", help="compute the student's layers again in backward")
    axes = f"how the first method grows with half and twice of: {', '.join(AXES)} (all)"
    add("--sweep", nargs="?", type=names_of(AXES), const=AXES, metavar="NAMES", help=axes)
    add("--plot", metavar="FILE", help="also as a picture")
    add("--json", action="store_true", help="print one line of JSON last")
    args = parser.parse_args(arguments)
    check_name("--shape ", args.shape, SHAPES)
    for name, known in (("device", DEVICES), ("dtype", DTYPES)):
        if getattr(args, name) is not None:
            check_name(f"--{name} ", getattr(args, name), known)
    if args.max_length < 8:
        raise UserError(f"--max-length {args.max_length} leaves no room for prompt and response: 8 is the least")
    if args.response_tokens > args.max_length // 2:
        raise UserError(
            f"--response-tokens {args.response_tokens} leaves no room for a prompt where the shortest example has half"
            f" of --max-length {args.max_length}: {args.max_length // 2} is the most"
        )
    if args.plot is not None and not Path(args.plot).resolve().parent.is_dir():
        raise UserError(f"--plot {args.plot!r}: there is no such folder; name a file in one that exists")
    return args


def fastest_dtype(device: str) -> str:
    """Return the precision that the recipes train in on this machine."""
    import torch

    from hf_dskd.run.arguments import fastest_precision

    if device == "cpu" and torch.cuda.is_available():
        return "float32"
    flags = fastest_precision()
    return "bfloat16" if "--bf16" in flags else "float16" if "--fp16" in flags else "float32"


# ---- Models and data


def model_config(name: str, vocabulary: int | None = None) -> PretrainedConfig:
    """Make the configuration of a model in `MODELS`, with another number of tokens if that is asked for."""
    from transformers import AutoConfig

    sizes = dict(MODELS[name])
    if vocabulary is not None:
        sizes["vocab_size"] = vocabulary
    return AutoConfig.for_model(**{**sizes, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0})


def count_parameters(config: PretrainedConfig) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def write_model(config: PretrainedConfig, folder: Path, side: str) -> None:
    """Write a model with random weights in bfloat16 and its tokenizer, as `from_pretrained` loads them."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer(config.vocab_size, side).save_pretrained(folder)


def make_tokenizer(size: int, side: str) -> PreTrainedTokenizerBase:
    """
    Make a vocabulary of `size` words of four letters and an end of sequence, which isn't meant to tokenize anything.

    The words of the two sides are the same, their ids differ by one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end, letters = "<end>", "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(letters[number // 26**place % 26] for place in range(4)) for number in range(size - 1)]
    pieces = [end, *words] if side == "student" else [end, *words[1:], words[0]]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def lengths(batch_size: int, max_length: int, response_tokens: int) -> list[tuple[int, int]]:
    """
    Return how many tokens each example of a batch has, and its response.

    Examples are spread evenly between half of `max_length` and all of it, responses over ±50% of their mean.
    """
    sizes = []
    for place in range(batch_size):
        part = (place + 0.5) / batch_size * 2 - 1
        total = round(max_length * (1 - 0.5 * place / max(batch_size - 1, 1)))
        sizes.append((total, min(max(round(response_tokens * (1 + 0.5 * part)), 2), total - 1)))
    return sizes


def make_dataset(cell: Cell, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Dataset:
    """Draw tokens that both models have, in the columns of [`~hf_dskd.data.tokenization.tokenize_dataset`]."""
    import numpy as np
    from datasets import Dataset

    from hf_dskd.alignment.spans import chunk_ids
    from hf_dskd.data.tokens import token_bytes
    from hf_dskd.data.vocabulary import shared_tokens

    ids = np.stack([side.numpy() for side in shared_tokens(student, teacher)])
    ids = ids[:, ids[0] != student.eos_token_id]
    spelled = token_bytes(student)
    widths = np.array([len(spelled[token]) for token in ids[0].tolist()])
    generator = np.random.default_rng(0)
    sizes = lengths(cell.batch_size, cell.max_length, cell.response_tokens)
    rows = []
    for number in range(cell.batch_size * cell.accumulation * (cell.warmup_steps + cell.steps)):
        total, response = sizes[number % cell.batch_size]
        chosen = generator.integers(ids.shape[1], size=total - 1)
        ends = np.cumsum(widths[chosen[total - response :]])
        ends = [*ends.tolist(), int(ends[-1])]
        chunks = chunk_ids(ends, ends, True, True)
        row: dict[str, Any] = {"example_id": number, "response_bytes": ends[-1], "cut": False}
        for prefix, side, tokenizer, of_side in zip(("", "teacher_"), ids, (student, teacher), chunks):
            row |= {
                f"{prefix}input_ids": [*side[chosen].tolist(), tokenizer.eos_token_id],
                f"{prefix}prompt_length": total - response,
                f"{prefix}byte_ends": ends,
                f"{prefix}chunk_ids": of_side,
            }
        rows.append(row)
    return Dataset.from_list(rows)


# ---- One run, in a process of its own


def prepare(cell: Cell) -> tuple[DSKDConfig, PreTrainedTokenizerBase, PreTrainedTokenizerBase, Dataset]:
    """Make configuration, the two tokenizers and the data of a run."""
    from transformers import PreTrainedTokenizerFast

    from hf_dskd import DSKDConfig

    # An AutoTokenizer takes the class that goes with the model, which may add tokens of its own.
    student, teacher = (
        PreTrainedTokenizerFast.from_pretrained(path) for path in (cell.student_folder, cell.teacher_folder)
    )
    config = DSKDConfig(
        str(Path(cell.folder) / "run"),
        method=cell.method,
        max_length=cell.max_length,
        per_device_train_batch_size=cell.batch_size,
        gradient_accumulation_steps=cell.accumulation,
        gradient_checkpointing=cell.gradient_checkpointing,
        max_steps=cell.warmup_steps + cell.steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        use_cpu=cell.device == "cpu",
        bf16=cell.dtype == "bfloat16",
        fp16=cell.dtype == "float16",
        model_init_kwargs={"dtype": cell.dtype} if cell.half_student else None,
        load_teacher_in_4bit=cell.teacher == "4bit",
        teacher_cache=cell.cache_folder if cell.teacher == "cached" else None,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return config, student, teacher, make_dataset(cell, student, teacher)


def fill(cell: Cell) -> dict[str, Any]:
    """Write the teacher's states of the data that `cell` trains on."""
    quiet()
    import torch
    from transformers import AutoConfig

    from hf_dskd.teacher.cache import open_cache
    from hf_dskd.teacher.load import load_causal_lm

    config, _, tokenizer, dataset = prepare(cell)
    teacher_config = AutoConfig.from_pretrained(cell.teacher_folder)
    cache = open_cache(cell.cache_folder, config, cell.teacher_folder, teacher_config, tokenizer)

    def load_teacher() -> Any:
        return load_causal_lm(cell.teacher_folder, dtype=getattr(torch, cell.dtype)).to(config.device)

    try:
        filled = cache.fill({"train": dataset}, load_teacher)
    except torch.OutOfMemoryError:
        return {"skipped": "the GPU's memory doesn't suffice for the teacher that fills the cache"}
    states = sum(path.stat().st_size for path in Path(cell.cache_folder).glob("states-*"))
    return {"examples": filled.examples, "states": filled.states, "seconds": filled.seconds, "mb": states / 1e6}


def measure(cell: Cell) -> dict[str, Any]:
    """Train as `cell` says, and return seconds, tokens and memory of a step, or `skipped` with the reason."""
    quiet()
    import peft  # noqa: F401
    import torch
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    # What is imported before the start doesn't count as memory of the step.
    import hf_dskd.trainer  # noqa: F401

    cuda = cell.device == "cuda"
    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            return_freed_memory()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                reset_high_water()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            ends.append((time.perf_counter(), time.process_time()))

    try:
        prepared = prepare(cell)
        start = resident()
        trainer = make_trainer(cell, *prepared)
        trainer.add_callback(Clock())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    except UserError as error:
        return {"skipped": str(error)}
    except torch.OutOfMemoryError:
        return {"skipped": "the GPU's memory doesn't suffice"}
    # A page is the least that can be told.
    peak = torch.cuda.max_memory_allocated() if cuda else max(high_water() - start, 4096)
    every, of_cpu = (
        [after - before for before, after in pairwise(times)][cell.warmup_steps - 1 :] for times in zip(*ends)
    )
    seconds = statistics.median(every)
    sizes = lengths(cell.batch_size, cell.max_length, cell.response_tokens)
    return {
        "seconds_per_step": seconds,
        "seconds": every,
        "cpu_seconds_per_step": statistics.median(of_cpu),
        "response_tokens_per_second": cell.accumulation * sum(response for _, response in sizes) / seconds,
        "tokens_per_second": cell.accumulation * sum(total for total, _ in sizes) / seconds,
        "peak_mb": peak / 1e6,
        "threads": torch.get_num_threads(),
    }


def make_trainer(
    cell: Cell,
    config: DSKDConfig,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
) -> DSKDTrainer:
    """Make the trainer of a run, whose batches come in order."""
    from torch.utils.data import SequentialSampler

    from hf_dskd import DSKDTrainer

    class InOrder(DSKDTrainer):
        """Every batch has an example of each length."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    peft_config = None
    if cell.lora_r:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=cell.lora_r, lora_alpha=2 * cell.lora_r, target_modules=cell.lora_targets, task_type="CAUSAL_LM"
        )
    return InOrder(
        cell.student_folder,
        None if cell.teacher == "none" else cell.teacher_folder,
        config,
        train_dataset=dataset,
        processing_class=student_tokenizer,
        teacher_processing_class=None if cell.teacher == "none" else teacher_tokenizer,
        peft_config=peft_config,
    )


# ---- Many runs


class Bench:
    """
    Measures cells of one shape, and keeps what they share: the models and the caches of the teacher's states.

    Args:
        shape ([`Shape`]): Which models.
        folder (`Path`): For models, caches and what runs write.
        real_weights (`bool`): Take the packaged models where the shape has them.
        run (`Callable`): Calls a function of a cell, as [`~measuring.isolated`] does.
    """

    def __init__(
        self,
        shape: Shape,
        folder: Path,
        real_weights: bool,
        run: Callable[[Callable[[Cell], dict[str, Any]], Cell], dict[str, Any] | None] = isolated,
    ):
        self.shape, self.folder, self.run = shape, folder, run
        self.real_weights = real_weights and shape.packaged is not None
        self._models: dict[tuple[str, int | None], str] = {}
        self.fills: dict[Cell, dict[str, Any]] = {}

    def model(self, side: str, vocabulary: int | None = None) -> str:
        """Return the folder of the student or the teacher, made if need be."""
        if self.real_weights:
            from hf_dskd.offline.packaged import packaged_model

            assert self.shape.packaged is not None
            return str(packaged_model(self.shape.packaged[side == "teacher"]))
        if (side, vocabulary) not in self._models:
            config = model_config(getattr(self.shape, side), vocabulary)
            folder = self.folder / f"{side}-{config.vocab_size}"
            say(f"writing random weights of {getattr(self.shape, side)}, {config.vocab_size:,} tokens")
            write_model(config, folder, side)
            self._models[side, vocabulary] = str(folder)
        return self._models[side, vocabulary]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Measure a row of the table. A cache is filled once for all methods."""
        say(f"measuring {cell.method}, teacher {cell.teacher}")
        if cell.teacher == "cached":
            same = replace(cell, method="dskd_cma")
            if same not in self.fills:
                self.fills[same] = self.apart(fill, same)
            if "skipped" in self.fills[same]:
                return self.fills[same]
        return self.apart(measure, cell)

    def apart(self, function: Callable[[Cell], dict[str, Any]], cell: Cell) -> dict[str, Any]:
        """Call it; what can't run is a row that says why, under `skipped`."""
        return self.run(function, cell) or {"skipped": "the system ended the process, for want of memory probably"}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check_memory(shape: Shape, lora_r: int, device: str) -> None:
    """Refuse what the system would kill half way."""
    student, teacher = (count_parameters(model_config(name)) for name in (shape.student, shape.teacher))
    needed = 2 * teacher
    if device == "cpu":
        needed += (2 if shape.half_student else 4) * student + (0 if lora_r else 12 * student)
    free = available()
    if needed > free:
        raise UserError(
            f"--shape: the weights of {shape.student} and {shape.teacher} need {needed / 1e9:.0f} GB and"
            f" {free / 1e9:.0f} GB of memory are free; choose a smaller shape"
        )


def teachers_of(method: str, asked: tuple[str, ...]) -> tuple[str, ...]:
    from hf_dskd.methods import METHODS

    return asked if METHODS[method].needs_teacher else ("none",)


def table_rows(bench: Bench, base: Cell, methods: tuple[str, ...], teachers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Measure every method with every teacher."""
    from hf_dskd.methods import METHODS

    rows: list[dict[str, Any]] = []
    for method in methods:
        of_method = []
        for teacher in teachers_of(method, teachers):
            if METHODS[method].text == "teacher":
                found: dict[str, Any] = {"skipped": "once the teacher has written its responses, its steps are sft's"}
            else:
                found = bench.measure(replace(base, method=method, teacher=teacher))
            of_method.append({"method": method, "teacher": teacher, **found})
        rows += with_ratios(of_method)
    return rows


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `speed_up`, `cpu_speed_up` and `memory_ratio` over the row with a live teacher."""
    live = next((row for row in rows if row["teacher"] == "live" and "skipped" not in row), None)
    ratios = {"speed_up": "seconds_per_step", "cpu_speed_up": "cpu_seconds_per_step", "memory_ratio": "peak_mb"}
    for row in rows if live is not None else []:
        if "skipped" not in row:
            row |= {name: live[measured] / row[measured] for name, measured in ratios.items()}
    return rows


def sweep_points(shape: Shape, base: Cell, axes: tuple[str, ...]) -> Iterator[tuple[str, int, dict[str, int]]]:
    """List each axis with its values, and what changes: sizes of the cell, or a model's number of tokens."""
    sizes = {
        "response_tokens": base.response_tokens,
        "batch_size": base.batch_size,
        "student_vocabulary": MODELS[shape.student]["vocab_size"],
        "teacher_vocabulary": MODELS[shape.teacher]["vocab_size"],
    }
    for axis in axes:
        for factor in FACTORS:
            value = max(round(sizes[axis] * factor), 1)
            if axis == "response_tokens":
                value = min(value, base.max_length // 2)
            yield axis, value, {} if value == sizes[axis] else {axis: value}


def sweep_rows(bench: Bench, base: Cell, teachers: tuple[str, ...], axes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Measure each point of each axis. The point in the middle is measured once."""
    rows: list[dict[str, Any]] = []
    known: dict[tuple, dict[str, Any]] = {}
    for axis, value, changes in sweep_points(bench.shape, base, axes):
        point = []
        for teacher in teachers:
            key = (teacher, *changes.items())
            if key not in known:
                sizes = {name: size for name, size in changes.items() if not name.endswith("vocabulary")}
                cell = replace(
                    base,
                    teacher=teacher,
                    student_folder=bench.model("student", changes.get("student_vocabulary")),
                    teacher_folder=bench.model("teacher", changes.get("teacher_vocabulary")),
                    folder=str(bench.folder / "-".join(["sweep", *map(str, key[1:])])),
                    **sizes,  # type: ignore[arg-type]
                )
                say(f"{axis} {value:,}")
                known[key] = bench.measure(cell)
            point.append({"axis": axis, "value": value, "teacher": teacher, **known[key]})
        rows += with_ratios(point)
    return rows


def benchmark(args: argparse.Namespace, folder: Path, run: Callable = isolated) -> dict[str, Any]:
    """Measure what the command line asks for, and return what is printed as JSON."""
    quiet()
    import torch
    import transformers

    from hf_dskd.offline import packaged

    shape = SHAPES[args.shape]
    device = choose_device(args.device)
    lora_r = shape.lora_r if args.lora_r is None else args.lora_r
    check_memory(shape, lora_r, device)
    bench = Bench(shape, folder, real_weights=args.sweep is None, run=run)
    student, teacher = bench.model("student"), bench.model("teacher")
    if not bench.real_weights:
        # Maps between vocabularies that don't exist elsewhere are of no use later.
        os.environ[packaged.CACHE_VARIABLE] = str(folder / "maps")
    base = Cell(
        method=args.methods[0],
        teacher="live",
        student_folder=student,
        teacher_folder=teacher,
        folder=str(folder),
        lora_r=lora_r,
        lora_targets=shape.lora_targets,
        half_student=shape.half_student,
        batch_size=args.batch_size,
        max_length=args.max_length,
        response_tokens=args.response_tokens,
        steps=args.steps,
        warmup_steps=args.warmup_steps,
        device=device,
        dtype=args.dtype or fastest_dtype(device),
        gradient_checkpointing=args.gradient_checkpointing,
    )
    if args.sweep is None:
        rows = table_rows(bench, base, args.methods, args.teacher)
    else:
        rows = sweep_rows(bench, base, teachers_of(base.method, args.teacher), args.sweep)
    threads = [row.pop("threads") for row in rows if "threads" in row]
    return {
        "rows": rows,
        "sweep": args.sweep is not None,
        "cache": [
            {"batch_size": cell.batch_size, "response_tokens": cell.response_tokens, **filled}
            for cell, filled in bench.fills.items()
        ],
        "settings": {
            **{name: value for name, value in vars(args).items() if name not in ("json", "plot")},
            "device": device,
            "dtype": base.dtype,
            "lora_r": lora_r,
            "real_weights": bench.real_weights,
            "tokens_per_step": lengths(args.batch_size, args.max_length, args.response_tokens),
        },
        "device_name": device_name(device),
        "threads": threads[0] if threads else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


# ---- For people


def table(result: dict[str, Any]) -> str:
    """Write the result for people."""
    settings = result["settings"]
    shape = SHAPES[settings["shape"]]
    sizes = settings["tokens_per_step"]
    trained = f"LoRA of rank {settings['lora_r']}" if settings["lora_r"] else "all of it trained"
    lines = [
        f"{settings['shape']}: {shape.student} ({trained}) from {shape.teacher},"
        f" {'real' if settings['real_weights'] else 'random'} weights",
        f"  {settings['dtype']}, {settings['batch_size']} examples of up to {settings['max_length']} tokens a step:"
        f" {sum(total for total, _ in sizes):,} tokens, {sum(response for _, response in sizes):,} of them responses",
        f"  {result['device_name']}, {result['threads']} threads, torch {result['torch']}, transformers"
        f" {result['transformers']}, {result['date']}, median of {settings['steps']} steps",
        "",
    ]
    head = f"{'axis':20}{'value':>9}" if result["sweep"] else f"{'method':12}"
    lines.append(
        f"{head}  {'teacher':8}{'s/step':>9}{'CPU s':>9}{'response tok/s':>16}{'tokens/s':>10}{'peak MB':>10}"
        f"{'speed-up':>10}{'of CPU s':>10}"
    )
    for row in result["rows"]:
        first = f"{row['axis']:20}{row['value']:9,}" if result["sweep"] else f"{row['method']:12}"
        start = f"{first}  {row['teacher']:8}"
        if "skipped" in row:
            lines.append(f"{start} not run: {row['skipped']}")
            continue
        ratios = f"{row['speed_up']:10.2f}{row['cpu_speed_up']:10.2f}" if "speed_up" in row else ""
        lines.append(
            f"{start}{row['seconds_per_step']:9.3f}{row['cpu_seconds_per_step']:9.3f}"
            f"{row['response_tokens_per_second']:16,.1f}{row['tokens_per_second']:10,.0f}{row['peak_mb']:10,.0f}{ratios}"
        )
    for filled in result["cache"]:
        if "skipped" not in filled:
            lines.append(
                f"cache filled once and apart: {filled['examples']:,} examples, {filled['states']:,} states,"
                f" {filled['mb']:.1f} MB in {filled['seconds']:.1f} s"
            )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: str) -> None:
    """Draw seconds and memory of a step: bars for the methods, lines for a sweep."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "skipped" not in row]
    measures = (("seconds_per_step", "seconds per step"), ("peak_mb", "peak memory, MB"))
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    settings = result["settings"]
    title = f"{settings['shape']}, {settings['dtype']}, {result['device_name']}, {result['date']}"
    if result["sweep"]:
        axes = list(dict.fromkeys(row["axis"] for row in rows))
        figure = Figure(figsize=(2.8 * len(axes) + 0.5, 5.2), dpi=110, facecolor="white", layout="constrained")
        panels = figure.subplots(len(measures), len(axes), sharey="row", squeeze=False)
        for line, (measured, label) in zip(panels, measures):
            for panel, axis in zip(line, axes):
                for teacher in teachers:
                    points = [row for row in rows if row["axis"] == axis and row["teacher"] == teacher]
                    xs, ys = [row["value"] for row in points], [row[measured] for row in points]
                    panel.plot(xs, ys, "o-", color=COLORS[teacher], label=f"teacher {teacher}", markersize=4)
                panel.set_xlabel(axis.replace("_", " "))
            # The panels of a line share it, so that all of them must be drawn first.
            line[0].set_ylim(bottom=0)
            line[0].set_ylabel(label)
        panels[0][0].legend(frameon=False)
        title = f"{settings['methods'][0]} — {title}"
    else:
        height = 0.35 * len(rows) + 1.4
        figure = Figure(figsize=(9.5, height), dpi=110, facecolor="white", layout="constrained")
        panels = figure.subplots(1, len(measures), sharey=True)
        for panel, (measured, label) in zip(panels, measures):
            for place, row in enumerate(rows):
                panel.barh(place, row[measured], color=COLORS[row["teacher"]])
            panel.set_xlabel(label)
            panel.set_yticks(range(len(rows)), [f"{row['method']}, {row['teacher']}" for row in rows])
        panels[0].invert_yaxis()
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="benchmark_step") as folder:
        result = benchmark(args, Path(folder))
    print(table(result))
    if args.plot is not None:
        plot(result, args.plot)
        print(args.plot)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    from hf_dskd.launch import command

    command(main)
