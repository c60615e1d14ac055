"""Queries and keys of attention layers, caught in the forward passes of student and teacher."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..losses.attention import AttentionInputs, common_heads, head_shape
from ..models.causal_lm import backbone, base_causal_lm
from ..settings import parse_layers


# The name under which transformers finds `_recorded_attention`.
_RECORDED = "hf_dskd_recorded"


def layer_pairs(attention_layers: str, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """
    Which layer of the student is compared with which of the teacher, counted from 0.

    `"last"` is the last with the last (MiniLM, arXiv 2002.10957), `"uniform"` every layer of the student with teacher
    layers evenly spaced up to the last (as TinyBERT, arXiv 1909.10351, has it); or pairs (see
    [`~hf_dskd.settings.parse_layers`]). A [`UserError`] for a layer that isn't there.
    """
    pairs = parse_layers(attention_layers)
    if attention_layers == "last":
        return [(student_layers - 1, teacher_layers - 1)]
    if pairs is None:
        return [(i, math.ceil((i + 1) * teacher_layers / student_layers) - 1) for i in range(student_layers)]
    for index, (side, count) in enumerate((("student", student_layers), ("teacher", teacher_layers))):
        highest = max(pair[index] for pair in pairs)
        if highest >= count:
            raise UserError(
                f"attention_layers={attention_layers!r}: the {side} has no layer {highest}, its {count} layers count"
                f" from 0 to {count - 1}"
            )
    return pairs


class AttentionCapture:
    """
    Catches queries and keys of some layers in a forward pass, as the layers' attention functions receive them: after
    position embedding, and not repeated for heads that share keys. No attention weights are asked for.

    Models of transformers call their attention function by the name that their config has. For one call, the config of
    a wanted attention module is replaced by one that names a function which keeps the arguments and goes on to the
    model's own. A recomputed forward pass (gradient checkpointing) therefore finds the model as it always was.

    Attention weights must be softmax(scale · queries keysᵀ) over all earlier tokens, with nothing else in them, which
    [`check`] tries: Llama, Qwen2, Qwen3, Mistral, Gemma, Gemma 3 and GPT-2 are known to be so, Gemma 2 only without
    its cap on attention scores. A [`UserError`] where the attention of that kind of model can't be caught.

    Attributes:
        layer_count (`int`): How many layers have attention.
    """

    def __init__(self, model: nn.Module, role: str):
        from transformers import AttentionInterface

        AttentionInterface.register(_RECORDED, _recorded_attention)
        self._model, self._role = model, role
        modules: Iterable[Any] = backbone(model).modules()
        self._modules: dict[int, Any] = {
            module.layer_idx: module
            for module in modules
            if type(module).__name__.endswith("Attention")
            and {"layer_idx", "config"} <= vars(module).keys()
            and "ALL_ATTENTION_FUNCTIONS" in _model_file(module)
        }
        if not self._modules:
            raise self._unsupported("has no layer that calls the attention functions of transformers")
        self.layer_count = max(self._modules) + 1

    @contextmanager
    def recording(self, layers: Iterable[int]) -> Iterator[dict[int, AttentionInputs]]:
        """
        Within it, the first forward pass fills the dictionary that it gives: from a layer to its queries and keys.

        Raises:
            UserError: If a student in training has queries that carry no gradient.
        """
        recorded: dict[int, AttentionInputs] = {}
        trains = torch.is_grad_enabled()

        def keep(module: Any, inputs: AttentionInputs, *rest: Any) -> None:
            if trains and module.training and not inputs.queries.requires_grad:
                raise UserError(
                    f"attention_kd_rate: queries of the {self._role}'s layer {module.layer_idx} carry no gradient: set"
                    " gradient_checkpointing_kwargs={'use_reentrant': False}, and train that layer or one below it"
                )
            recorded[module.layer_idx] = inputs

        with self._each_call(layers, keep):
            yield recorded

    def check(self, layers: Iterable[int], max_length: int) -> dict[int, tuple[int, int]]:
        """
        Tries `layers` on sixteen tokens, where the model is and under the autocast that is on.

        Returns number and size of the heads of each layer's queries. A [`UserError`] if the weights of a layer aren't
        those that its queries and keys give, or not for `max_length` tokens: a sliding window must not be shorter.
        """
        shapes: dict[int, tuple[int, int]] = {}

        def compare(module: Any, inputs: AttentionInputs, value: Tensor, kwargs: Any, output: Tensor) -> None:
            where = f"in layer {module.layer_idx}"
            if kwargs.get("softcap") is not None:
                raise self._unsupported(f"caps attention scores at {kwargs['softcap']} {where}")
            # Llama 4 has chunks where others have windows.
            window = kwargs.get("sliding_window") or getattr(module.config, "attention_chunk_size", None)
            if window is not None and window < max_length:
                raise UserError(
                    f"attention_kd_rate: the {self._role}'s attention has a window of {window} tokens {where}, and"
                    f" max_length={max_length}: choose other attention_layers, or max_length={window}"
                )
            expected = _attention_output(inputs, value)
            difference = (output.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
            if not difference <= 0.02:
                raise self._unsupported(
                    f"has another attention {where} than queries and keys give (by {difference.item():.1%})"
                )
            shapes[module.layer_idx] = head_shape(inputs)

        plain = base_causal_lm(self._model)
        was_training = plain.training
        plain.eval()
        with torch.no_grad(), self._each_call(layers, compare):
            plain(input_ids=torch.arange(1, 17, device=plain.device).unsqueeze(0), use_cache=False)
        plain.train(was_training)
        missing = sorted(set(layers) - set(shapes))
        if missing:
            raise self._unsupported(f"calls no attention function of transformers in layer {missing[0]}")
        return shapes

    @contextmanager
    def _each_call(self, layers: Iterable[int], keep: Callable[..., None]) -> Iterator[None]:
        configs = {layer: self._modules[layer].config for layer in set(layers) & set(self._modules)}
        try:
            for layer, config in configs.items():
                self._modules[layer].config = _RecordingConfig(config, keep)
            yield
        finally:
            for layer, config in configs.items():
                self._modules[layer].config = config

    def _unsupported(self, problem: str) -> UserError:
        return UserError(
            f"attention_kd_rate: the {self._role} {type(base_causal_lm(self._model)).__name__} {problem}: set"
            " attention_kd_rate=0, or distil with a model such as Llama, Qwen2, Qwen3, Mistral, Gemma or GPT-2"
        )


class AttentionPairs:
    """
    The layers of student and teacher (not wrapped yet) whose attention is compared.

    `attention_layers` are those of [`layer_pairs`], `relation_heads` of [`~hf_dskd.losses.attention.common_heads`];
    `max_length` are the tokens of the longest sequence of either. A [`UserError`] if layers, heads or a model don't
    fit.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        attention_layers: str = "last",
        relation_heads: int | None = None,
        max_length: int = 512,
    ):
        self._captures = AttentionCapture(student, "student"), AttentionCapture(teacher, "teacher")
        counts = [capture.layer_count for capture in self._captures]
        self.layers = layer_pairs(attention_layers, counts[0], counts[1])
        shapes = [capture.check(layers, max_length) for capture, layers in zip(self._captures, zip(*self.layers))]
        for own, theirs in self.layers:
            common_heads(shapes[0][own], shapes[1][theirs], relation_heads)

    @contextmanager
    def recording(self) -> Iterator[list[tuple[AttentionInputs, AttentionInputs]]]:
        """
        Within it both models run, in any order. Afterwards the list that it gives has a pair for each pair of layers,
        on the student's device; the teacher's are tensors of inference mode if that is how it ran.
        """
        pairs: list[tuple[AttentionInputs, AttentionInputs]] = []
        with ExitStack() as stack:
            student, teacher = (
                stack.enter_context(capture.recording(layers))
                for capture, layers in zip(self._captures, zip(*self.layers))
            )
            yield pairs
        for own, theirs in self.layers:
            device, of_teacher = student[own].queries.device, teacher[theirs]
            of_teacher = AttentionInputs(of_teacher.queries.to(device), of_teacher.keys.to(device), of_teacher.scale)
            pairs.append((student[own], of_teacher))


class _RecordingConfig:
    """An attention module's config for one call: the same, but that it names the recording attention function."""

    _attn_implementation = _RECORDED

    def __init__(self, config: Any, keep: Callable[..., None]):
        self.config, self.keep = config, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def _recorded_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    recording = module.config
    module.config = recording.config
    names = _model_file(module)
    attention = names["ALL_ATTENTION_FUNCTIONS"].get(
        module.config._attn_implementation, names.get("eager_attention_forward")
    )
    output = attention(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling")
    inputs = AttentionInputs(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    recording.keep(module, inputs, value, kwargs, output[0])
    return output


def _model_file(module: Any) -> dict[str, Any]:
    """What is defined beside a module's class: the attention functions by name, and its own eager one."""
    return vars(sys.modules[type(module).forward.__module__])


def _attention_output(inputs: AttentionInputs, value: Tensor) -> Tensor:
    """What causal attention makes of values `[B, H_k, N, d_v]`: `[B, N, H, d_v]`, float32."""
    groups, length = inputs.queries.shape[1] // value.shape[1], value.shape[2]
    keys, value = (x.float().repeat_interleave(groups, dim=1) for x in (inputs.keys, value))
    scores = inputs.scale * inputs.queries.float() @ keys.transpose(2, 3)
    later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return (scores.masked_fill(later, -math.inf).softmax(-1) @ value).transpose(1, 2)
