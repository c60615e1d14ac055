"""
How much memory a training step takes; no weights are loaded.

What the student's forward pass keeps is counted with the model's own code on tensors without data. The rest follows
from the sizes of the two models, and from what AdamW and the losses here hold. [`estimate`] says what that was checked
against.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..methods import METHODS


if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from .activations import FakeStudent, Kept

# What the driver takes for a process, and workspaces of matrix products. Not in the allocator's numbers.
CUDA_CONTEXT = 0.5e9
# Of an allocator's memory, what lies between blocks.
FRAGMENTATION = 1.05
# The heap of the C library keeps freed memory with gaps: a third on top of the tensors with the packaged pair.
CPU_HEAP = 1.35
# What a process on a CPU takes beside tensors: threads, compiled kernels, buffers of matrix products.
CPU_PROCESS = 50e6
# Copies of queries and keys, in float32, that alignment, matching and their gradients hold at once.
ROW_COPIES = 5
# Conditional transport holds that many matrices of its networks' width squared, and of queries x keys, for an example
# in its forward and backward pass, and that many rows of that width for a query or a key.
TRANSPORT_PLANS, TRANSPORT_ROWS, TRANSPORT_WIDTH = 9, 17, 768


@dataclass(frozen=True)
class Size:
    """Sizes of a model."""

    key: str  # of the configuration and options, by which sizes are told apart
    width: int
    layers: int
    heads: int
    vocabulary: int
    inner: int  # the most inputs of a linear layer: mostly the width inside the feed-forward layer
    parameters: int
    linear_parameters: int  # of linear layers but the head
    largest_linear: int  # parameters of the largest of these
    tied: bool  # head and embedding are one matrix
    # What the model is built from.
    config: PretrainedConfig = field(compare=False, repr=False)
    init_kwargs: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, config: PretrainedConfig, init_kwargs: Any = None) -> Size:
        """
        Reads the configuration of a causal language model; the model is built without weights.

        `init_kwargs` are the options of its name, for a model that comes with its code.
        """
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        from ..models.pretrained import empty_model, options_of

        text = config.get_text_config()
        if not getattr(text, "num_attention_heads", None):
            raise _unknown(config, "it has no attention")
        if config._attn_implementation not in (None, "eager", "sdpa"):
            # Flash attention keeps the same, and needs a package to build.
            config = type(config).from_dict(config.to_dict(), attn_implementation="sdpa")
        options = {name: str(value) for name, value in options_of(init_kwargs).items()}
        # A configuration doesn't write down its attention.
        key = f"{config.to_json_string(use_diff=False)} {config._attn_implementation} {json.dumps(options)}"
        if key in _SIZES:
            return _SIZES[key]
        model: nn.Module = empty_model(config, init_kwargs)
        head = model.get_output_embeddings()  # type: ignore[operator]
        linear = [
            module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        ]
        counts = [module.weight.numel() for module in linear]
        _SIZES[key] = size = cls(
            key=key,
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            vocabulary=text.vocab_size,
            inner=max(module.weight.shape[isinstance(module, nn.Linear)] for module in linear),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            linear_parameters=sum(counts),
            largest_linear=max(counts),
            tied=head.weight is model.get_input_embeddings().weight,  # type: ignore[operator]
            config=config,
            init_kwargs=init_kwargs,
        )
        return size


_SIZES: dict[str, Size] = {}


def _unknown(config: PretrainedConfig, why: str) -> UserError:
    return UserError(
        f"the memory of a {config.model_type!r} model is not known, for {why}: choose per_device_train_batch_size,"
        " use_peft and load_teacher_in_4bit yourself, for `hf-dskd train`"
    )


@dataclass(frozen=True)
class Step:
    """How a training step is made."""

    batch_size: int
    max_length: int  # tokens of an example: all are taken to be as long as that
    method: str = "dskd_cma_ga"
    adapter_rank: int | None = None  # of LoRA; without, the whole student is trained
    adapter_targets: str | Sequence[str] | None = None  # PEFT's `target_modules`; all linear layers without it
    student_dtype: str = "float32"
    teacher: str = "live"  # or "4bit" (NF4), or "cached", which leaves its head and embedding
    gradient_checkpointing: bool = False
    dtype: str = "bfloat16"  # of matrix products, and of the teacher's weights
    device: str = "cuda"
    accumulation: int = 1  # batches of an optimizer step
    loss_memory_mb: float = 512
    response_tokens: int | None = None  # mean per example, give or take half; a third of `max_length` without it

    def __post_init__(self) -> None:
        if not isinstance(self.adapter_targets, (str, type(None))):
            object.__setattr__(self, "adapter_targets", tuple(self.adapter_targets))

    @property
    def tokens(self) -> int:
        return self.batch_size * self.max_length

    @property
    def responses(self) -> list[int]:
        """Spreads the response tokens of each example evenly over ±50% of their mean."""
        mean = self.response_tokens or self.max_length // 3
        lengths = [round(mean * (0.5 + (index + 0.5) / self.batch_size)) for index in range(self.batch_size)]
        return [min(max(length, 2), self.max_length - 1) for length in lengths]


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step by what they are for."""

    # The most at once, less than the sum of the parts: what stays through the step, and the largest of its phases,
    # which are the teacher's pass, the loss, the beginning of the backward pass (all activations, no gradients yet),
    # its end (the reverse) and the discriminator's update.
    total: float
    student_weights: float
    adapter: float
    teacher_weights: float
    projectors_and_discriminator: float  # their parameters
    optimizer_states: float  # AdamW's two moments of everything that is trained
    gradients: float  # of the student (or its adapter) and the projectors
    activations: float  # what the student's forward pass keeps for its backward pass
    teacher_pass: float  # a layer of the teacher while it runs
    loss: float  # logits and the work on them in the larger of the two spaces
    queries_and_keys: float  # with what alignment and matching make of them
    process: float  # what a process takes before it has any tensor


def estimate(
    student_config: PretrainedConfig | Size,
    teacher_config: PretrainedConfig | Size | None,
    *,
    four_bit_teacher: bool = False,
    cached_teacher: bool = False,
    **step: Any,
) -> Memory:
    """
    Estimates the memory of a training step with AdamW, in bytes; nothing is loaded.

    What the student keeps on a CPU is exactly what autograd saves, for every architecture tried (30, whole and with
    LoRA); on a GPU it is counted with its dropout, attention and autocast, which was not measured on one yet. Whole
    runs were checked against what the system counted, on CPUs, with models of a few million parameters:
    `python recipes/memory_table.py` repeats that, and measures on a GPU where there is one. A teacher in 4 bits is
    taken to have its linear layers in NF4 and all else in `dtype`; experts in one matrix aren't linear layers. A
    student in 4 bits, padding that `padding_free` saves, and adapters other than LoRA aren't counted.

    Args:
        student_config ([`~transformers.PretrainedConfig`] or [`Size`]): Of the student.
        teacher_config (same, *optional*): Of the teacher, which `sft` doesn't need.
        four_bit_teacher (`bool`, *optional*, defaults to `False`): An NF4 teacher instead of one in `dtype`.
        cached_teacher (`bool`, *optional*, defaults to `False`): With `teacher_cache`, which is filled elsewhere.
        step: Attributes of [`Step`].

    Returns:
        [`Memory`]: Bytes by what they are for, and `total`, the most at once.

    Raises:
        UserError: If `loss_memory_mb` can't hold one row of logits, or the student's forward pass can't be counted.
    """
    sizes = [one if one is None or isinstance(one, Size) else Size.of(one) for one in (student_config, teacher_config)]
    assert sizes[0] is not None
    teacher = "cached" if cached_teacher else "4bit" if four_bit_teacher else "live"
    return step_memory(sizes[0], sizes[1], Step(teacher=teacher, **step))


def step_memory(student: Size, teacher: Size | None, step: Step) -> Memory:
    """Computes [`estimate`] for models whose sizes have been read."""
    row, c = METHODS[step.method], bytes_of(step.dtype)
    if not row.needs_teacher:
        teacher = None
    if step.student_dtype == "auto":
        own = getattr(student.config, "dtype", None)
        step = replace(step, student_dtype=str(own or "float32").removeprefix("torch."))
    added = fake_student(student, step).adapter_parameters
    trained = added if step.adapter_rank else student.parameters
    projected, critic = (0, 0) if teacher is None else auxiliary_parameters(student, teacher, step.method)
    rows = 0
    if teacher is not None and row.has_queries:
        # Queries and keys, padded to the longest response.
        rows = 2 * step.batch_size * max(step.responses) * 2 * teacher.width * 4
    matched = ROW_COPIES * rows
    if row.matching == "ct":
        longest = max(step.responses)
        matched += 4 * step.batch_size * TRANSPORT_PLANS * (TRANSPORT_WIDTH**2 + longest**2)
        matched += 4 * 2 * sum(step.responses) * TRANSPORT_ROWS * TRANSPORT_WIDTH
    weights = bytes_of(step.student_dtype) * student.parameters
    adapter = 4 * added
    frozen = 0.0 if teacher is None else teacher_weights(teacher, step)
    auxiliary = 4 * (projected + critic)
    # AdamW's two moments.
    states = 8 * (trained + projected + critic)
    gradients = 4 * (trained + projected)
    kept = activations(student, step)
    running = 0.0 if teacher is None or step.teacher == "cached" else teacher_pass(teacher, step)
    logits = loss(student, teacher, step)
    process = CPU_PROCESS if step.device == "cpu" else CUDA_CONTEXT

    stays = weights + adapter + frozen + auxiliary + states + process
    earlier = 0.0
    if step.accumulation > 1:
        # Of the batches before: gradients, and the queries and keys that the discriminator will learn from.
        earlier = gradients + (step.accumulation - 1) * rows
    head = 0 if step.adapter_rank else 4 * student.vocabulary * student.width
    through_layer = step.tokens * (4 * student.inner * c + 3 * student.width * 4)
    phases = (
        earlier + kept + running,
        earlier + kept + matched + logits,
        earlier + kept + matched + head + through_layer,
        gradients + head + through_layer,
        # Its gradients, and on a GPU as much for AdamW over all of its parameters at once.
        gradients + step.accumulation * rows + matched + (4 if step.device == "cpu" else 8) * critic,
    )
    return Memory(
        total=stays + max(phases),
        student_weights=weights,
        adapter=adapter,
        teacher_weights=frozen,
        projectors_and_discriminator=auxiliary,
        optimizer_states=states,
        gradients=gradients,
        activations=kept,
        teacher_pass=running,
        loss=logits,
        queries_and_keys=matched,
        process=process,
    )


def room(needed: float, device: str) -> float:
    """Computes what must be free for tensors of `needed` bytes: an allocator can't use all that it holds."""
    return needed * (CPU_HEAP if device == "cpu" else FRAGMENTATION)


def free_memory(device: torch.device) -> float:
    """Measures the bytes that a process on `device` can have now, what it takes itself included."""
    import torch

    if device.type in ("cpu", "mps"):
        import psutil  # comes with accelerate

        return psutil.virtual_memory().available
    free, total = torch.accelerator.get_memory_info(device)
    # Asking made the context, which the formulas count too.
    return min(free + CUDA_CONTEXT, total)


def bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


@lru_cache(maxsize=8)
def _fake_student(
    student: Size, dtype: str, adapter_rank: int | None, adapter_targets: str | Sequence[str] | None
) -> FakeStudent:
    import torch

    from .activations import FakeStudent

    return FakeStudent(student.config, student.init_kwargs, getattr(torch, dtype), adapter_rank, adapter_targets)


def fake_student(student: Size, step: Step) -> FakeStudent:
    """Builds the student as it is trained, without data; the same one again for steps that differ in sizes alone."""
    return _fake_student(student, step.student_dtype, step.adapter_rank, step.adapter_targets)


@lru_cache(maxsize=256)
def _kept(student: FakeStudent, batch_size: int, length: int, dtype: str, on_gpu: bool) -> Kept:
    import torch

    return student.forward(batch_size, length, getattr(torch, dtype), on_gpu)


def activations(student: Size, step: Step) -> int:
    """Counts the bytes of the student's forward pass that are kept for the backward pass."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    model = fake_student(student, step)
    try:
        kept = _kept(model, step.batch_size, step.max_length, step.dtype, step.device != "cpu")
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise _unknown(student.config, "what its forward pass keeps depends on the text") from error
    return kept.total(step.gradient_checkpointing)


def teacher_pass(teacher: Size, step: Step) -> float:
    """Estimates the bytes of a layer of the teacher while it runs; nothing is kept."""
    c = bytes_of(step.dtype)
    dequantised = teacher.largest_linear * c if step.teacher == "4bit" else 0
    return step.tokens * (3 * teacher.inner * c + 3 * teacher.width * 4) + dequantised


def teacher_weights(teacher: Size, step: Step) -> float:
    """Computes the bytes of the teacher, or of what the cache leaves of it."""
    c, matrix = bytes_of(step.dtype), teacher.vocabulary * teacher.width
    if step.teacher == "cached":
        return c * matrix * (1 if teacher.tied else 2)
    if step.teacher == "4bit":
        # Half a byte, for every 64 numbers a scale of one byte, for every 256 scales one of four. The rest is as it
        # is: the head, which is therefore never dequantised, the embedding, norms and biases.
        scaled = 0.5 + 1 / 64 + 4 / (64 * 256)
        return scaled * teacher.linear_parameters + c * (teacher.parameters - teacher.linear_parameters)
    return c * teacher.parameters


def auxiliary_parameters(student: Size, teacher: Size, method: str) -> tuple[int, int]:
    """Counts the parameters of the projectors, and of the networks that match queries to keys."""
    import torch

    from ..losses.conditional_transport import TransportCritics
    from ..losses.key_query import Discriminator
    from ..losses.projectors import Projectors

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    row = METHODS[method]
    if not row.dual_space:
        return 0, 0
    critics = {"gan": Discriminator, "ct": TransportCritics}
    with torch.device("meta"):
        projectors = Projectors(student.width, teacher.width, has_query=row.has_queries)
        return count(projectors), count(critics[row.matching](2 * teacher.width)) if row.matching in critics else 0


def loss(student: Size, teacher: Size | None, step: Step) -> float:
    """Estimates the bytes of the losses in the two spaces, of which one is computed after the other."""
    import torch

    from ..kernels.linear_divergence import TILE_COPIES, chunk_sizes

    c, dtype = bytes_of(step.dtype), getattr(torch, step.dtype)
    count = sum(step.responses)

    def space(*vocabularies: int) -> float:
        chunk, tile = chunk_sizes(vocabularies, [dtype] * len(vocabularies), step.device, step.loss_memory_mb)
        return sum(vocabularies) * (min(chunk, count) * c + min(tile, count) * TILE_COPIES * 4)

    row = METHODS[step.method]
    uses = 2 if "student" in row.spaces else 1
    own = [student.vocabulary] * uses
    if teacher is not None and not row.dual_space:
        own.append(teacher.vocabulary)
    largest = space(*own)
    matrix = student.vocabulary * student.width
    if step.dtype != "float32" and step.student_dtype == "float32":
        # The head is cast, once for each of its uses.
        largest += uses * matrix * c
    if not step.adapter_rank:
        # Its gradient in float32, and a chunk's share of it.
        largest += 4 * matrix + (c * matrix if step.dtype != "float32" else 0)
    if teacher is not None and "teacher" in row.spaces:
        largest = max(largest, space(teacher.vocabulary, teacher.vocabulary))
    return largest
