"""
How much memory a training step takes, computed from the sizes of the two models.

The formulas count what transformers, peft, AdamW and the losses here keep. What they were checked against is said at
[`estimate`].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from ..methods import METHODS


if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

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


class Linear(NamedTuple):
    """A linear layer; `ends` says that it is the last one of attention or feed-forward layer."""

    name: str
    inputs: int
    outputs: int
    ends: bool


@dataclass(frozen=True)
class Size:
    """
    What the formulas need of a model.

    Attributes:
        width, layers, heads, attention, inner, vocabulary (`int`):
            Hidden size, layers, attention heads, their width together, width of the feed-forward layer, tokens.
        activation (`str`):
            Of the feed-forward layer: `"gated"` (SwiGLU and its like), `"written_out"` (gelu_new in Python),
            `"native"` or `"relu"`.
        normed (`int`): Width of what a layer's norms get, together.
        rms (`bool`): Whether these are RMS norms, written out in Python, and not `nn.LayerNorm`.
        parameters (`int`): Of the whole model.
        linear (`tuple[Linear, ...]`): Each linear layer but the head.
        tied (`bool`): Whether head and embedding are one matrix.
        dropout, attention_dropout (`bool`): Whether anything is dropped in training, of the layers' outputs and of the
            attention weights.
    """

    width: int
    layers: int
    heads: int
    attention: int
    inner: int
    activation: str
    normed: int
    rms: bool
    vocabulary: int
    parameters: int
    linear: tuple[Linear, ...]
    tied: bool
    dropout: bool
    attention_dropout: bool

    @classmethod
    def of(cls, config: PretrainedConfig, init_kwargs: Any = None) -> Size:
        """
        Reads the configuration of a causal language model; the model is built without weights.

        `init_kwargs` are the options of its name, for a model that comes with its code.
        """
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        from ..models.pretrained import empty_model

        if not getattr(config.get_text_config(), "num_attention_heads", None):
            raise UserError(
                f"the memory of a {config.model_type!r} model is not known, for it has no attention: choose"
                " per_device_train_batch_size, use_peft and load_teacher_in_4bit yourself, for `hf-dskd train`"
            )
        model: nn.Module = empty_model(config, init_kwargs)
        text = config.get_text_config()
        width, heads = text.hidden_size, text.num_attention_heads
        attention = heads * (getattr(text, "head_dim", None) or width // heads)
        head = model.get_output_embeddings()  # type: ignore[operator]
        shapes: dict[str, tuple[int, int]] = {}
        normed, rms = -width, False  # the last norm belongs to no layer
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
                shape = module.weight.shape
                shapes[name] = (shape[1], shape[0]) if isinstance(module, nn.Linear) else (shape[0], shape[1])
            elif type(module).__name__.endswith("Norm"):
                rms |= not isinstance(module, nn.LayerNorm)
                # Of Qwen3's and Gemma's norms of queries and keys each has the weights of one head.
                normed += width if len(module.weight) == width else attention  # type: ignore[arg-type]
        last = {name.rpartition(".")[0]: name for name in shapes}.values()
        linear = tuple(Linear(name, *shape, ends=name in last) for name, shape in shapes.items())
        # Configurations call it intermediate_size, n_inner, ffn_dim, or nothing at all.
        inner = max(layer.inputs for layer in linear)
        written = str(getattr(text, "hidden_act", None) or getattr(text, "activation_function", None))
        activation = {"gelu_new": "written_out", "gelu_fast": "written_out", "relu": "relu"}.get(written, "native")
        if (
            sum(layer.outputs // inner for layer in linear if layer.outputs in (inner, 2 * inner))
            >= 2 * text.num_hidden_layers
        ):
            activation = "gated"  # two matrices, or one for both
        return cls(
            width=width,
            layers=text.num_hidden_layers,
            heads=heads,
            attention=attention,
            inner=inner,
            activation=activation,
            normed=normed // text.num_hidden_layers,
            rms=rms,
            vocabulary=text.vocab_size,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            linear=linear,
            tied=head.weight is model.get_input_embeddings().weight,  # type: ignore[operator]
            dropout=any(getattr(text, name, 0) > 0 for name in ("resid_pdrop", "dropout", "hidden_dropout")),
            attention_dropout=any(getattr(text, name, 0) > 0 for name in ("attn_pdrop", "attention_dropout")),
        )

    @property
    def linear_parameters(self) -> int:
        return sum(layer.inputs * layer.outputs for layer in self.linear)

    @property
    def largest_linear(self) -> int:
        return max(layer.inputs * layer.outputs for layer in self.linear)

    def adapted(self, targets: str | Sequence[str] | None = None) -> list[Linear]:
        """
        The linear layers that LoRA with these `target_modules` adapts, as PEFT reads them: ends of names, a regular
        expression of a whole name, or `"all-linear"`, which `None` is here too.
        """
        from ..training.compatibility import lists_module

        if targets is None or targets == "all-linear":
            return list(self.linear)
        return [layer for layer in self.linear if lists_module(targets, layer.name)]

    def adapter(self, rank: int, targets: str | Sequence[str] | None = None) -> int:
        """Parameters of LoRA on the layers of [`Size.adapted`]."""
        return sum(rank * (layer.inputs + layer.outputs) for layer in self.adapted(targets))


@dataclass(frozen=True)
class Step:
    """
    How a training step is made.

    Attributes:
        batch_size, max_length (`int`): Examples at a time, and tokens of each: all are taken to be as long as that.
        method (`str`): A key of `METHODS`.
        adapter_rank (`int`, *optional*): Of LoRA; without, the whole student is trained.
        adapter_targets (`str` or `list[str]`, *optional*): PEFT's `target_modules`; all linear layers without it.
        student_dtype (`str`): Of the student's weights.
        teacher (`str`): `"live"`, `"4bit"` (NF4) or `"cached"`, which leaves its head and embedding.
        gradient_checkpointing (`bool`): As in `TrainingArguments`.
        dtype (`str`): Of matrix products, and of the teacher's weights.
        device (`str`): `"cpu"`, or a GPU.
        accumulation (`int`): Batches of an optimizer step.
        loss_memory_mb (`float`): As in `DSKDConfig`.
        response_tokens (`int`, *optional*): Mean per example, give or take half; a third of `max_length` without it.
    """

    batch_size: int
    max_length: int
    method: str = "dskd_cma_ga"
    adapter_rank: int | None = None
    adapter_targets: str | Sequence[str] | None = None
    student_dtype: str = "float32"
    teacher: str = "live"
    gradient_checkpointing: bool = False
    dtype: str = "bfloat16"
    device: str = "cuda"
    accumulation: int = 1
    loss_memory_mb: float = 512
    response_tokens: int | None = None

    @property
    def tokens(self) -> int:
        return self.batch_size * self.max_length

    @property
    def half_student(self) -> bool:
        return self.student_dtype != "float32"

    @property
    def responses(self) -> list[int]:
        """Response tokens of each example, spread evenly over ±50% of their mean."""
        mean = self.response_tokens or self.max_length // 3
        lengths = [round(mean * (0.5 + (place + 0.5) / self.batch_size)) for place in range(self.batch_size)]
        return [min(max(length, 2), self.max_length - 1) for length in lengths]


@dataclass(frozen=True)
class Memory:
    """
    Bytes of a training step by what they are for.

    Attributes:
        total (`float`):
            The most at once, less than the sum of the parts: what stays through the step, and the largest of its
            phases, which are the teacher's pass, the loss, the beginning of the backward pass (all activations, no
            gradients yet), its end (the reverse) and the discriminator's update.
        student_weights, adapter, teacher_weights (`float`): Parameters.
        projectors_and_discriminator (`float`): Their parameters.
        optimizer_states (`float`): AdamW's two moments of everything that is trained.
        gradients (`float`): Of the student (or its adapter) and the projectors.
        activations (`float`): What the student's forward pass keeps for its backward pass.
        teacher_pass (`float`): A layer of the teacher while it runs.
        loss (`float`): Logits and the work on them in the larger of the two spaces.
        queries_and_keys (`float`): With what alignment and matching make of them.
        process (`float`): What a process takes before it has any tensor.
    """

    total: float
    student_weights: float
    adapter: float
    teacher_weights: float
    projectors_and_discriminator: float
    optimizer_states: float
    gradients: float
    activations: float
    teacher_pass: float
    loss: float
    queries_and_keys: float
    process: float


def estimate(
    student_config: PretrainedConfig | Size,
    teacher_config: PretrainedConfig | Size | None,
    *,
    batch_size: int,
    max_length: int,
    method: str = "dskd_cma_ga",
    adapter_rank: int | None = None,
    adapter_targets: str | Sequence[str] | None = None,
    student_dtype: str = "float32",
    four_bit_teacher: bool = False,
    cached_teacher: bool = False,
    gradient_checkpointing: bool = False,
    dtype: str = "bfloat16",
    device: str = "cuda",
    accumulation: int = 1,
    loss_memory_mb: float = 512,
    response_tokens: int | None = None,
) -> Memory:
    """
    Memory of a training step with AdamW, in bytes; nothing is loaded.

    Checked on CPUs only, with models of a few million parameters (figures of GPUs are open). The activations against
    the tensors that autograd saves, of two layers at 64 tokens: from 6% too low to 21% too high for Llama, Mistral,
    Qwen3, Gemma 3, Phi, GPT-NeoX, OPT and GPT-2, trained whole or with LoRA on all linear layers; on some of them,
    from 8% too low to 28% too high. Whole runs against what the system counted: `dskd_cma_ga`, live and cached,
    float32 and bfloat16, within 11% (`python recipes/memory_table.py` repeats that, and measures on a GPU where there
    is one); in float32 `sft`, `dskd_cma`, `dskd_clp`, `uld`, `alm` and `min_edit` 1 to 8% too high.

    Args:
        student_config ([`~transformers.PretrainedConfig`] or [`Size`]): Of the student.
        teacher_config (same, *optional*): Of the teacher, which `sft` doesn't need.
        batch_size (`int`): Examples of a micro-batch on one device.
        max_length (`int`): Tokens of each; all are taken to be as long as that.
        method (`str`, *optional*, defaults to `"dskd_cma_ga"`): See `hf-dskd methods`.
        adapter_rank (`int`, *optional*): Of LoRA; without, the whole student is trained.
        adapter_targets (`str` or `list[str]`, *optional*): PEFT's `target_modules`; all linear layers without it.
        student_dtype (`str`, *optional*, defaults to `"float32"`): Of the student's weights.
        four_bit_teacher (`bool`, *optional*, defaults to `False`): An NF4 teacher instead of one in `dtype`.
        cached_teacher (`bool`, *optional*, defaults to `False`): With `teacher_cache`, which is filled elsewhere.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): Of the student.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): Of matrix products and of the teacher's weights.
        device (`str`, *optional*, defaults to `"cuda"`): `"cpu"`, or a GPU.
        accumulation (`int`, *optional*, defaults to `1`): Micro-batches of an optimizer step.
        loss_memory_mb (`float`, *optional*, defaults to `512`): Budget for logits, in MB.
        response_tokens (`int`, *optional*): Mean per example, give or take half; by default a third of `max_length`.

    Returns:
        [`Memory`]: Bytes by what they are for, and `total`, the most at once.

    Raises:
        UserError: If `loss_memory_mb` can't hold one row of logits.
    """
    step = Step(
        batch_size=batch_size,
        max_length=max_length,
        method=method,
        adapter_rank=adapter_rank,
        adapter_targets=adapter_targets,
        student_dtype=student_dtype,
        teacher="cached" if cached_teacher else "4bit" if four_bit_teacher else "live",
        gradient_checkpointing=gradient_checkpointing,
        dtype=dtype,
        device=device,
        accumulation=accumulation,
        loss_memory_mb=loss_memory_mb,
        response_tokens=response_tokens,
    )
    sizes = [one if one is None or isinstance(one, Size) else Size.of(one) for one in (student_config, teacher_config)]
    assert sizes[0] is not None
    return step_memory(sizes[0], sizes[1], step)


def step_memory(student: Size, teacher: Size | None, step: Step) -> Memory:
    """[`estimate`] of models whose sizes have been read."""
    row, c = METHODS[step.method], bytes_of(step.dtype)
    if not row.needs_teacher:
        teacher = None
    added = student.adapter(step.adapter_rank or 0, step.adapter_targets)
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
    """Bytes that have to be free for tensors of `needed` bytes: an allocator can't use all that it holds."""
    return needed * (CPU_HEAP if device == "cpu" else FRAGMENTATION)


def free_memory(device: torch.device) -> float:
    """Bytes that a process on `device` can have now, what it takes itself included."""
    import torch

    if device.type in ("cpu", "mps"):
        import psutil  # comes with accelerate

        return psutil.virtual_memory().available
    free, total = torch.accelerator.get_memory_info(device)
    # Asking made the context, which the formulas count too.
    return min(free + CUDA_CONTEXT, total)


def bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def layer_activations(student: Size, step: Step) -> float:
    """
    Bytes for each token that a layer of the student keeps for its backward pass.

    Counted in transformers' modules: in autocast the residual stream is float32 if the weights are, matrix products
    have `c` bytes a number and each keeps a cast copy of its input; with padding the attention's mask has a row per
    token, and keys and values are repeated for every head.
    """
    c, d, a = bytes_of(step.dtype), student.width, student.attention
    autocast, on_cpu = step.dtype != "float32", step.device == "cpu"
    # Queries, keys, values, output and mask; the logarithm of each softmax's sum.
    attention = 4 * a * c + step.max_length * c + 4 * student.heads
    # The norms' inputs in float32, and for the weights of RMS norms, where they are trained, what they multiply.
    norms = student.normed * 4 * (2 if student.rms and not step.adapter_rank else 1)
    # What is trained keeps its input: all linear layers of the student, or those with an adapter.
    trained = student.adapted(step.adapter_targets) if step.adapter_rank else student.linear
    within = [layer for layer in trained if not layer.ends]
    ends = {layer.inputs for layer in trained if layer.ends}
    # Each autocast layer has its own copy of the input; in float32 they share the norm's output.
    inputs = sum(layer.inputs for layer in within) // student.layers * c
    if not autocast:
        modules = {layer.name.rpartition(".")[0] for layer in within}
        inputs = min(student.normed, len(modules) * d // student.layers) * c
    adapter = 0
    if step.adapter_rank:
        adapter = len(trained) // student.layers * step.adapter_rank * c
        adapter += a * c if autocast and a in ends else 0
    # Of gelu_new's five arrays autocast on a GPU keeps three in float32.
    written_out = 3 * 4 + 2 * c if autocast and not on_cpu else 5 * c
    feed_forward = {"gated": 4 * c, "written_out": written_out, "native": 2 * c, "relu": c}[student.activation]
    if student.inner not in ends and student.activation != "relu":
        feed_forward -= c  # the input of its last layer, which relu keeps as its own output
    dropped = 0
    if student.dropout:
        dropped += 2 * d * (c if on_cpu else 1)  # masks, which on a CPU are numbers
    if student.attention_dropout and on_cpu:
        # Attention then builds its weights, three times in float32.
        dropped += (12 * student.heads - c) * step.max_length
    return attention + norms + inputs + adapter + feed_forward * student.inner + dropped


def activations(student: Size, step: Step) -> float:
    """Bytes of the student's forward pass that are kept for the backward pass."""
    c = bytes_of(step.dtype)
    of_layer = step.tokens * layer_activations(student, step)
    # Autocast's half-precision copies of weights that aren't: the backward pass needs them too.
    casts = 0.0
    if step.dtype != "float32":
        added = student.adapter(step.adapter_rank or 0, step.adapter_targets)
        casts = c * (added + (0 if step.half_student else student.linear_parameters))
    # Embedding, last norm.
    ends = step.tokens * student.width * 12
    if step.gradient_checkpointing:
        # The inputs of all layers, and one layer computed again.
        stream = c if step.half_student else 4
        return student.layers * step.tokens * student.width * stream + of_layer + casts / student.layers + ends
    return student.layers * of_layer + casts + ends


def teacher_pass(teacher: Size, step: Step) -> float:
    """Bytes of a layer of the teacher while it runs; nothing is kept."""
    c = bytes_of(step.dtype)
    dequantised = teacher.largest_linear * c if step.teacher == "4bit" else 0
    return step.tokens * (3 * teacher.inner * c + 3 * teacher.width * 4) + dequantised


def teacher_weights(teacher: Size, step: Step) -> float:
    """Bytes of the teacher, or of what the cache leaves of it."""
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
    """Parameters of the projectors, and of the networks that match queries to keys."""
    import torch

    from ..losses.conditional_transport import TransportCritics
    from ..losses.key_query import Discriminator
    from ..projectors import Projectors

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
    """Bytes of the losses in the two spaces, of which one is computed after the other."""
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
    if step.dtype != "float32" and not step.half_student:
        # The head is cast, once for each of its uses.
        largest += uses * matrix * c
    if not step.adapter_rank:
        # Its gradient in float32, and a chunk's share of it.
        largest += 4 * matrix + (c * matrix if step.dtype != "float32" else 0)
    if teacher is not None and "teacher" in row.spaces:
        largest = max(largest, space(teacher.vocabulary, teacher.vocabulary))
    return largest
