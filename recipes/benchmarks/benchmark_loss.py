"""
Measure what the loss costs: forward and backward of ours against the formulation that the published code computes.

    python recipes/benchmark_loss.py --shape gpt2-qwen1.5 --json
    python recipes/benchmark_loss.py --shape llama3.2-qwen2.5 --dtype bfloat16 --device cuda

Both start from the same random last hidden states, at the widths and vocabularies of real models: no backbones, no
optimizer. "Ours" is what the trainer runs. "Dense" has logits at every padded position and the copies of them that the
published code makes, but the statistics, masks, denominators and divergences of ours, so that loss and gradients are
the same numbers and their largest difference says whether the comparison is one. Ratios are dense / ours; memory is
what a pass adds to its inputs, at most, in MB of 10^6 bytes.

On a machine that others use too, read the CPU seconds, of one thread (OMP_NUM_THREADS=1): threads that wait for each
other go on spinning, which counts as time of the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from measuring import DEVICES, Parser, PeakMemory, available, choose_device, device_name, positive

from hf_dskd.errors import UserError, check_name


if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from hf_dskd import DSKDConfig
    from hf_dskd.losses.objective import Terms
    from hf_dskd.losses.projectors import Projectors
    from hf_dskd.models.causal_lm import LMHead

METHODS = ("dskd_cma", "sft", "uld")
DTYPES = ("float32", "bfloat16")
# Bytes that the dense side holds at once for each position and each token of the student's and of the teacher's
# vocabulary, in float32, by method and spaces: counted, a little below what was measured. bfloat16 has 0.8 of it.
DENSE_BYTES = {"both": (31, 36), "student": (54, 4), "teacher": (9, 36), "sft": (13, 0), "uld": (9, 28)}


@dataclass(frozen=True)
class Shape:
    """Sizes of a pair of models; `trained_head` is false for LoRA, which leaves the student's head as it is."""

    models: str
    student_size: int
    student_tokens: int
    teacher_size: int
    teacher_tokens: int
    trained_head: bool


SHAPES = {
    "gpt2-qwen1.5": Shape("GPT-2 124M from Qwen1.5-1.8B", 768, 50_257, 2048, 151_936, True),
    "tinyllama-mistral": Shape("TinyLlama-1.1B (LoRA) from Mistral-7B", 2048, 32_000, 4096, 32_000, False),
    "smollm2-qwen-coder": Shape("SmolLM2-135M (LoRA) from Qwen2.5-Coder-0.5B", 576, 49_152, 896, 151_936, False),
    "llama3.2-qwen2.5": Shape("Llama-3.2-1B (LoRA) from Qwen2.5-7B", 2048, 128_256, 3584, 152_064, False),
    "tiny": Shape("no models, to try the benchmark", 32, 2_000, 48, 3_000, True),
}
# Shape, batch_size, max_length, response_tokens.
Sizes = tuple[Shape, int, int, int]
# Of the pass that only warms up.
TINY_SIZES: Sizes = (SHAPES["tiny"], 2, 16, 5)


# ---- The command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and check it as far as that needs no torch."""
    from hf_dskd.methods import DIVERGENCES
    from hf_dskd.settings import SPACES

    def names(known: tuple[str, ...]) -> str:
        return ", ".join(known)

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--shape", required=True, metavar="NAME", help=names(tuple(SHAPES)))
    add("--batch-size", type=positive, default=4, metavar="N", help="examples (4)")
    add("--max-length", type=positive, default=512, metavar="N", help="positions, padding included (512)")
    add("--response-tokens", type=positive, default=80, metavar="N", help="mean per example, give or take half (80)")
    add("--method", default="dskd_cma", metavar="NAME", help=f"{names(METHODS)} (dskd_cma)")
    add("--spaces", default="both", metavar="NAME", help=f"of dskd_cma: {names(SPACES)} (both)")
    add("--divergence", default="forward_kl", metavar="NAME", help=f"{names(tuple(DIVERGENCES))} (forward_kl)")
    add("--dtype", default="float32", metavar="NAME", help=f"of hidden states and heads: {names(DTYPES)} (float32)")
    add("--device", metavar="NAME", help=f"{names(DEVICES)} (cuda where there is one)")
    add("--repeats", type=positive, metavar="N", help="passes of which the median counts (1; on cuda 5)")
    add("--loss-memory-mb", type=positive, default=512, metavar="MB", help="ours: budget of a chunk (512)")
    add("--json", action="store_true", help="print one line of JSON last")
    args = parser.parse_args(arguments)
    known = {"shape": SHAPES, "method": METHODS, "spaces": SPACES, "divergence": DIVERGENCES, "dtype": DTYPES}
    for name, choices in {**known, "device": DEVICES}.items():
        if getattr(args, name) is not None:
            check_name(f"--{name} ", getattr(args, name), choices)
    if args.response_tokens >= args.max_length:
        raise UserError(
            f"--response-tokens {args.response_tokens} leaves no room for a prompt in --max-length {args.max_length}:"
            f" {args.max_length - 1} is the most"
        )
    return args


def configuration(args: argparse.Namespace, device: str) -> DSKDConfig:
    """Make the trainer's configuration for this method."""
    from hf_dskd import DSKDConfig

    return DSKDConfig(
        "runs/benchmark_loss",
        method=args.method,
        spaces=args.spaces if args.method == "dskd_cma" else None,
        divergence=args.divergence,
        loss_memory_mb=args.loss_memory_mb,
        use_cpu=device == "cpu",
        report_to="none",
    )


# ---- What both sides start from


@dataclass(frozen=True)
class Side:
    """
    One model's part of a batch.

    Attributes:
        hidden (`[B, S, d]`): Last hidden states.
        input_ids (`[B, S]`): Tokens; the head serves as their embedding too, for only its numbers matter here.
        labels (`[B, S]`): Tokens of the response, -100 elsewhere.
        head ([`~hf_dskd.models.causal_lm.LMHead`]): `[V, d]`.
    """

    hidden: Tensor
    input_ids: Tensor
    labels: Tensor
    head: LMHead


@dataclass(frozen=True)
class Problem:
    """Hidden states and what is applied to them; `projectors` is `None` where the method has none."""

    student: Side
    teacher: Side
    projectors: Projectors | None
    trained_head: bool

    def leaves(self) -> dict[str, Tensor]:
        """Return every tensor that gets a gradient, by name."""
        leaves = {"hidden": self.student.hidden}
        if self.trained_head:
            leaves["head"] = self.student.head.weight
        if self.projectors is not None:
            leaves |= dict(self.projectors.named_parameters())
        return leaves


def make_problem(
    shape: Shape,
    batch_size: int,
    max_length: int,
    response_tokens: int,
    dtype: torch.dtype,
    device: str,
    dual_space: bool,
) -> Problem:
    """
    Make random numbers, the same ones in every run.

    The projected teacher is right about half of the student's tokens, by construction: one token is half of the
    targets, and the bias of t2s points at it. By chance alone it would never be, and the divergence in student
    space, which counts only where it is, would be 0.
    """
    import torch

    from hf_dskd.losses.projectors import Projectors
    from hf_dskd.models.causal_lm import LMHead

    generator = torch.Generator().manual_seed(0)

    def side(size: int, tokens: int, trains: bool, frequent: int | None) -> Side:
        ids = torch.randint(tokens, (batch_size, max_length), generator=generator)
        if frequent is not None:
            ids[torch.rand(ids.shape, generator=generator) < 0.5] = frequent
        labels = torch.full_like(ids, -100)
        for i, length in enumerate(response_lengths(batch_size, max_length, response_tokens, generator)):
            start = int(torch.randint(1, max_length - length + 1, (), generator=generator))
            labels[i, start : start + length] = ids[i, start : start + length]
        # Logits with a standard deviation of 2: neither flat nor certain.
        weight = torch.randn(tokens, size, generator=generator).mul_(2 / math.sqrt(size)).to(device, dtype)
        hidden = torch.randn(batch_size, max_length, size, generator=generator).to(device, dtype)
        return Side(
            hidden.requires_grad_(trains),
            ids.to(device),
            labels.to(device),
            LMHead(weight.requires_grad_(trains and shape.trained_head)),
        )

    frequent = shape.student_tokens // 2
    student = side(shape.student_size, shape.student_tokens, True, frequent)
    teacher = side(shape.teacher_size, shape.teacher_tokens, False, None)
    projectors = None
    if dual_space:
        projectors = Projectors(shape.student_size, shape.teacher_size).to(device)
        direction = student.head.weight[frequent].detach().float()
        with torch.no_grad():
            projectors.t2s.bias.copy_(2 * direction / direction.norm())
    return Problem(student, teacher, projectors, shape.trained_head)


def response_lengths(batch_size: int, max_length: int, response_tokens: int, generator: torch.Generator) -> list[int]:
    """Spread lengths evenly over ±50% of the mean (less where `max_length` has no room for that), in random order."""
    import torch

    spread = min(0.5, (max_length - 1) / response_tokens - 1)
    places = (torch.arange(batch_size) + 0.5) / batch_size * 2 - 1
    lengths = (response_tokens * (1 + spread * places)).round().int().clamp(1, max_length - 1)
    return lengths[torch.randperm(batch_size, generator=generator)].tolist()


# ---- Ours


def our_terms(config: DSKDConfig, problem: Problem) -> Terms:
    """Compute the terms as the trainer does."""
    import torch
    from transformers import GPT2Config

    from hf_dskd.losses.objective import Step
    from hf_dskd.losses.states import response_states

    student, teacher = problem.student, problem.teacher
    configs = [SimpleNamespace(config=GPT2Config(n_embd=side.hidden.shape[-1])) for side in (student, teacher)]
    objective = config.method_row.load()(
        config, SimpleNamespace(student=configs[0], teacher=configs[1]), student.hidden.device
    )
    objective.projectors = problem.projectors
    dtype = student.hidden.dtype
    with torch.autocast(student.hidden.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        mine, theirs = (
            response_states(side.hidden, side.input_ids, side.labels, side.head.weight, head=side.head)
            for side in (student, teacher)
        )
        return objective(mine, theirs, Step())


def our_loss(config: DSKDConfig, problem: Problem) -> Tensor:
    """Compute the loss as the trainer does."""
    from hf_dskd.losses.objective import total_loss

    terms = our_terms(config, problem)
    teacher_tokens = terms.student_tokens if terms.teacher_tokens is None else terms.teacher_tokens
    return total_loss(terms, terms.student_tokens.sum(), teacher_tokens.sum())


# ---- Dense: the published formulation (axes B examples, S and T padded positions)


def dense_loss(config: DSKDConfig, problem: Problem) -> Tensor:
    """
    Compute the same loss from logits at every position.

    What the published code logs is computed as there, with its gradient; the log lives as long as the function.
    """
    import torch

    student, teacher = problem.student, problem.teacher
    targets, mask = next_tokens(student.labels)
    log: dict[str, Tensor] = {}
    logits = student.head(student.hidden)
    cross_entropy = dense_cross_entropy(logits, targets, mask)
    if not config.method_row.needs_teacher:
        log["accuracy"] = (logits.argmax(-1).eq(targets) * mask).sum()
        return cross_entropy / mask.sum()

    teacher_targets, teacher_mask = next_tokens(teacher.labels)
    with torch.no_grad():
        teacher_logits = teacher.head(teacher.hidden)
    if config.method == "uld":
        kd = dense_uld(logits, teacher_logits, mask, teacher_mask) / mask.sum()
    else:
        student_space, teacher_space = dense_dual_space(
            config, problem, logits, teacher_logits, (targets, mask), (teacher_targets, teacher_mask), log
        )
        kd = student_space / mask.sum() + teacher_space / teacher_mask.sum()
    log["accuracy"] = (logits.argmax(-1).eq(targets) * mask).sum()
    return (1 - config.kd_rate) * cross_entropy / mask.sum() + config.kd_rate * kd


def next_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return targets `[B, S]` as the published data has them, 0 where there is none, and their mask."""
    import torch.nn.functional as F

    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    mask = shifted != -100
    return shifted.masked_fill(~mask, 0), mask


def dense_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Sum over the response. Logits `[B, S, V]` are mended in place, which keeps a mask of their size."""
    import torch

    logits = logits.masked_fill_(logits.isnan() | logits.isinf(), 0.0)
    log_probs = torch.log_softmax(logits, -1, dtype=torch.float32)
    return (-log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * mask).sum()


def dense_dual_space(
    config: DSKDConfig,
    problem: Problem,
    logits: Tensor,
    teacher_logits: Tensor,
    at_student: tuple[Tensor, Tensor],
    at_teacher: tuple[Tensor, Tensor],
    log: dict[str, Tensor],
) -> tuple[Tensor | float, Tensor | float]:
    """Sum the terms in student and in teacher space; `at_student` and `at_teacher` are targets and their mask."""
    import torch
    import torch.nn.functional as F

    from hf_dskd.alignment.cross_model import unit_std
    from hf_dskd.losses.temperature import space_divergence

    student, teacher, projectors = problem.student, problem.teacher, problem.projectors
    assert projectors is not None
    dtype, spaces = student.hidden.dtype, config.method_row.spaces
    (targets, mask), (teacher_targets, teacher_mask) = at_student, at_teacher

    def embedded(side: Side, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        embedding = side.head.weight.detach()
        return F.embedding(side.input_ids.masked_fill(~mask, 0), embedding), F.embedding(targets, embedding)

    def projected(layer: nn.Linear, values: Tensor) -> Tensor:
        return F.linear(values.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype)).float()

    index = torch.cat(embedded(student, targets, mask), -1)
    teacher_input, teacher_target = embedded(teacher, teacher_targets, teacher_mask)
    teacher_index = torch.cat([teacher_input, teacher_target], -1)
    keys = unit_std(teacher_index.float(), teacher_mask)
    norm_target = unit_std(teacher_target.float(), teacher_mask)
    norm_hidden = unit_std(teacher.hidden.float(), teacher_mask)
    queries = projected(projectors.query, index)
    # Both projections are made, whatever the spaces.
    to_teacher = projected(projectors.s2t, student.hidden)
    to_student = projected(projectors.t2s, norm_hidden + norm_target)

    align = queries @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])
    pairs = mask.float().unsqueeze(-1) * teacher_mask.float().unsqueeze(1)
    align = align + (1.0 - pairs) * -100000
    in_student: Tensor | float = 0.0
    in_teacher: Tensor | float = 0.0
    if "student" in spaces:
        t2s_hidden = (torch.softmax(align, -1) @ to_student).to(dtype)
        t2s_logits = student.head.detach()(t2s_hidden)
        t2s_ce = dense_cross_entropy(t2s_logits, targets, mask)
        correct = t2s_logits.argmax(-1).eq(targets)
        log["t2s_acc"] = (correct * mask).sum()
        log["max_t2s_prob"] = (t2s_logits.softmax(-1).max(-1)[0] * mask).sum()
        # Divided by a temperature of 1 once more, which copies them.
        t2s_kd = space_divergence(config, "student")(logits, t2s_logits.detach() / 1.0)
        in_student = t2s_ce + (t2s_kd * mask * correct).sum()
    if "teacher" in spaces:
        s2t_hidden = (torch.softmax(align.transpose(-1, -2), -1) @ to_teacher).to(dtype)
        s2t_logits = teacher.head.detach()(s2t_hidden)
        s2t_kd = space_divergence(config, "teacher")(s2t_logits, teacher_logits)
        in_teacher = (s2t_kd * teacher_mask).sum()
        log["s2t_acc"] = (s2t_logits.argmax(-1).eq(teacher_targets) * teacher_mask).sum()
    return in_student, in_teacher


def dense_uld(logits: Tensor, teacher_logits: Tensor, mask: Tensor, teacher_mask: Tensor) -> Tensor:
    """Sum over pairs of response tokens: responses are rolled to the front, and every position is sorted."""
    import torch

    masks = [mask.clone(), teacher_mask.clone()]
    for i in range(len(mask)):
        for values, valid in zip((logits, teacher_logits), masks):
            start = int(valid[i].nonzero()[0])
            values[i] = torch.cat([values[i][start:], values[i][:start]])
            valid[i] = torch.cat([valid[i][start:], valid[i][:start]])
    probs = torch.softmax(logits, -1, dtype=torch.float32)
    teacher_probs = torch.softmax(teacher_logits, -1, dtype=torch.float32)
    probs, teacher_probs = (values.sort(-1, descending=True).values for values in (probs, teacher_probs))
    missing = probs.shape[-1] - teacher_probs.shape[-1]
    filler = torch.zeros(*mask.shape, abs(missing), device=mask.device)
    if missing > 0:
        teacher_probs = torch.cat([teacher_probs, filler], -1)
    elif missing < 0:
        probs = torch.cat([probs, filler], -1)
    return ((probs - teacher_probs).abs().sum(-1) * (masks[0] & masks[1])).sum()


# ---- Measuring


@dataclass(frozen=True)
class Pass:
    """One forward and backward: `peak` in bytes over the inputs."""

    loss: float
    gradients: dict[str, Tensor]
    seconds: float
    cpu_seconds: float
    peak: int


def measure(loss_of: Callable[[DSKDConfig, Problem], Tensor], config: DSKDConfig, problem: Problem) -> Pass:
    """Run one side once. The gradients are taken away from `problem`."""
    device = problem.student.hidden.device
    with PeakMemory(device) as memory:
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = loss_of(config, problem)
        loss.backward()
        value = loss.item()  # waits for a GPU
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    gradients = {}
    for name, leaf in problem.leaves().items():
        if leaf.grad is not None:
            gradients[name] = leaf.grad
            leaf.grad = None
    return Pass(value, gradients, seconds, cpu_seconds, memory.peak)


def largest_difference(ours: Pass, dense: Pass) -> tuple[float, str]:
    """
    Return max |ours − dense| / max |dense| over the loss and every gradient, and which of them it is.

    Weight and bias of a projector share the larger of their two maxima: the bias of a query cancels in the attention
    of teacher positions, so that its gradient there is nothing but rounding.
    """
    largest = {name: float(gradient.abs().max()) for name, gradient in dense.gradients.items()}
    differences = {"loss": abs(ours.loss - dense.loss) / abs(dense.loss)}
    for name in sorted(ours.gradients.keys() | dense.gradients.keys()):
        layer = name.partition(".")[0]
        scale = max((value for other, value in largest.items() if other.partition(".")[0] == layer), default=0.0)
        mine, other = ours.gradients.get(name), dense.gradients.get(name)
        present = [gradient for gradient in (mine, other) if gradient is not None]
        gap = present[0].float() if len(present) == 1 else present[0].float() - present[1].float()
        difference = float(gap.abs().max())
        differences[name] = difference / scale if scale else math.inf if difference else 0.0
    # NaN is the worst difference of all, and max() would pass over it.
    name = max(differences, key=lambda key: math.inf if math.isnan(differences[key]) else differences[key])
    return differences[name], name


# ---- The benchmark


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure both sides in turn, and return what is printed as JSON."""
    import torch

    device = choose_device(args.device)
    repeats = args.repeats or (5 if device == "cuda" else 1)
    shape, dtype, config = SHAPES[args.shape], getattr(torch, args.dtype), configuration(args, device)
    check_memory(args, shape, device)
    dual_space = config.method_row.dual_space

    sizes: Sizes = (shape, args.batch_size, args.max_length, args.response_tokens)
    # A pass that isn't timed loads libraries and starts threads; a GPU also compiles and chooses kernels by the sizes.
    warm_up = make_problem(*(sizes if device == "cuda" else TINY_SIZES), dtype, device, dual_space)
    measure(our_loss, config, warm_up)
    measure(dense_loss, config, warm_up)
    del warm_up

    problem = make_problem(*sizes, dtype, device, dual_space)
    ours: list[Pass] = []
    dense: list[Pass] = []
    for i in range(repeats):
        for passes, loss_of in ((ours, our_loss), (dense, dense_loss)):
            passes.append(measure(loss_of, config, problem))
            if i > 0:
                # The first ones are compared; those of the others would only fill the memory.
                passes[-1].gradients.clear()
    difference, where = largest_difference(ours[0], dense[0])

    def median(value: Callable[[Pass], float]) -> dict[str, float]:
        return {name: statistics.median(map(value, passes)) for name, passes in (("ours", ours), ("dense", dense))}

    seconds, cpu_seconds = median(lambda one: one.seconds), median(lambda one: one.cpu_seconds)
    peak = median(lambda one: one.peak / 1e6)
    rows = {"student": count(problem.student), "teacher": count(problem.teacher)}
    return {
        "time_ratio": seconds["dense"] / seconds["ours"],
        "cpu_time_ratio": cpu_seconds["dense"] / cpu_seconds["ours"],
        "peak_memory_ratio": peak["dense"] / peak["ours"],
        "max_relative_difference": difference,
        "max_relative_difference_in": where,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak,
        "response_rows": rows,
        "chunk_rows": chunk_rows(config, shape, dtype, device, rows),
        "settings": {
            **{name: value for name, value in vars(args).items() if name != "json"},
            "device": device,
            "repeats": repeats,
            **{name: value for name, value in asdict(shape).items() if name != "models"},
            "kd_temperature": config.kd_temperature,
            "kd_rate": config.kd_rate,
        },
        "torch": torch.__version__,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
    }


def count(side: Side) -> int:
    """Count the response tokens of the batch."""
    return int(next_tokens(side.labels)[1].sum())


def chunk_rows(
    config: DSKDConfig, shape: Shape, dtype: torch.dtype, device: str, rows: dict[str, int]
) -> dict[str, int]:
    """Return how many rows ours takes at a time, by the space that they are compared in."""
    from hf_dskd.kernels.linear_divergence import chunk_sizes

    of_student, of_teacher = shape.student_tokens, shape.teacher_tokens
    spaces = config.method_row.spaces
    vocabularies = {"student": [of_student, of_student] if "student" in spaces else [of_student]}
    if "teacher" in spaces:
        vocabularies["teacher"] = [of_teacher, of_teacher]
    if "sorted_logits" in spaces:
        vocabularies = {"student": [of_student, of_teacher]}
    return {
        space: min(chunk_sizes(sizes, [dtype] * len(sizes), device, config.loss_memory_mb)[0], rows[space])
        for space, sizes in vocabularies.items()
    }


def check_memory(args: argparse.Namespace, shape: Shape, device: str) -> None:
    """Refuse what the system would kill half way: at the larger shapes the dense side needs tens of GB."""
    import torch

    free = torch.cuda.mem_get_info()[0] if device == "cuda" else available()
    per_logit = DENSE_BYTES[args.spaces if args.method == "dskd_cma" else args.method]
    tokens = (shape.student_tokens, shape.teacher_tokens)
    needed = args.batch_size * args.max_length * sum(size * each for size, each in zip(tokens, per_logit))
    # Heads and the like.
    needed += 4 * (shape.student_size * tokens[0] + shape.teacher_size * tokens[1])
    needed *= 1 if args.dtype == "float32" else 0.8
    if needed > free:
        raise UserError(
            f"--shape {args.shape} with {args.batch_size} x {args.max_length} positions: the dense side needs"
            f" {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; lower --batch-size or --max-length"
        )


def table(result: dict[str, Any]) -> str:
    """Write the result for people."""
    settings, rows = result["settings"], result["response_rows"]
    shape = SHAPES[settings["shape"]]
    spaces = f", {settings['spaces']} space{'s' * (settings['spaces'] == 'both')}, {settings['divergence']}"
    head = "trained" if shape.trained_head else "not trained"
    chunks = " and ".join(f"{size:,} ({space})" for space, size in result["chunk_rows"].items())
    lines = [
        f"{settings['shape']}: {shape.models}",
        f"  student {shape.student_size:,} x {shape.student_tokens:,} (head {head}),"
        f" teacher {shape.teacher_size:,} x {shape.teacher_tokens:,}",
        f"  {settings['method']}{spaces if settings['method'] == 'dskd_cma' else ''}, {settings['dtype']}",
        f"  {settings['batch_size']} x {settings['max_length']} positions a side, response rows {rows['student']:,}"
        f" (student) and {rows['teacher']:,} (teacher)",
        f"  ours in chunks of {chunks} rows within {settings['loss_memory_mb']} MB",
        f"  {result['device_name']}, threads: {result['threads']}, torch {result['torch']},"
        f" median of {settings['repeats']}",
        "",
        f"{'':16}{'ours':>12}{'dense':>12}{'dense / ours':>15}",
    ]
    for title, values, ratio in (
        ("seconds", "seconds", "time_ratio"),
        ("CPU seconds", "cpu_seconds", "cpu_time_ratio"),
        ("peak MB", "peak_mb", "peak_memory_ratio"),
    ):
        ours, dense = result[values]["ours"], result[values]["dense"]
        lines.append(f"{title:16}{ours:12,.2f}{dense:12,.2f}{result[ratio]:15.2f}")
    where = result["max_relative_difference_in"]
    if where != "loss":
        where = f"gradient of {where}"
    lines += ["", f"largest relative difference {result['max_relative_difference']:.1e} ({where})"]
    return "\n".join(lines)


def main() -> None:
    args = parse()
    result = benchmark(args)
    print(table(result))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    from hf_dskd.launch import command

    command(main)
