"""
Counts what a student's forward pass keeps for its backward pass, on tensors that have shapes but no data.

The model's own code runs, with the adapter that it would get, so that the count is exact for whatever loads. Layers of
one kind are alike: one of each kind runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..models.causal_lm import backbone
from ..models.pretrained import empty_model
from ..training.compatibility import check_peft


if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What CUDA's autocast computes in float32, as far as models use it; a CPU's leaves it in the type that it has.
FLOAT32_ON_GPU = frozenset(
    "cumprod cumsum exp expm1 group_norm layer_norm log log1p log_softmax norm normalize pow prod reciprocal rpow"
    " rsqrt softmax softplus sum".split()
)


class Layer(NamedTuple):
    """Bytes of a layer: all that it keeps, the same without its input, and its input, kept or not."""

    kept: int
    inside: int
    input: int


class Kept(NamedTuple):
    """Bytes that a forward pass keeps."""

    layers: tuple[Layer, ...]
    outside: int  # beside them, and of what they share
    given: int  # of what they are all given (masks) and don't keep themselves, but gradient checkpointing does

    def total(self, gradient_checkpointing: bool) -> int:
        """Adds up; with `gradient_checkpointing` layers keep their inputs, and one of them is computed again."""
        if not gradient_checkpointing:
            return self.outside + sum(layer.kept for layer in self.layers)
        again = max((layer.inside for layer in self.layers), default=0)
        return self.outside + self.given + sum(layer.input for layer in self.layers) + again


class FakeStudent:
    """
    A student without data, plain or with LoRA, whose forward passes are counted.

    It is made as [`~hf_dskd.models.pretrained.empty_model`] and PEFT do it, with all linear layers for
    `target_modules` where `adapter_targets` has none; `adapter_parameters` are the numbers that LoRA adds.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        init_kwargs: Any,
        dtype: torch.dtype,
        adapter_rank: int | None = None,
        adapter_targets: str | Sequence[str] | None = None,
    ):
        model: nn.Module = empty_model(config, init_kwargs)
        model.to(dtype)
        if adapter_rank:
            model = _with_adapter(model, adapter_rank, adapter_targets)
        self.adapter_parameters = sum(
            weights.numel() for name, weights in model.named_parameters() if adapter_rank and weights.requires_grad
        )
        self._mode = FakeTensorMode()
        _forget_data(model, self._mode)
        self._model = model.train()

    def forward(self, batch_size: int, length: int, dtype: torch.dtype, on_gpu: bool) -> Kept:
        """Counts a pass over `[batch_size, length]` tokens of which some are padding, in autocast if not float32."""
        body = backbone(self._model)
        counter = _Counter(self._model)
        hooks = torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)
        kernels = _Kernels(on_gpu, dtype != torch.float32)
        with self._mode, counter.watch(_layers(body)), hooks, autocast, kernels:
            ids = torch.ones(batch_size, length, dtype=torch.int64)
            body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return Kept(tuple(counter.layers), counter.outside, counter.given)


def _with_adapter(model: nn.Module, rank: int, targets: str | Sequence[str] | None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    named = targets if isinstance(targets, str) else list(targets) if targets else "all-linear"
    adapter = LoraConfig(r=rank, target_modules=named, task_type="CAUSAL_LM")
    check_peft(adapter, model)  # type: ignore[arg-type]
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # about Conv1D, which PEFT then treats as it should
        return get_peft_model(model, adapter, low_cpu_mem_usage=True)  # type: ignore[arg-type]


def _layers(body: nn.Module) -> list[nn.Module]:
    """Finds the list that has most of the weights."""
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda modules: sum(weights.numel() for weights in modules.parameters()), default=()))


def _forget_data(model: nn.Module, mode: FakeTensorMode) -> None:
    """Puts a fake in the place of each parameter and buffer: on a CPU, where operations choose the real kernels."""
    fakes: dict[Tensor, Tensor] = {}
    for module in model.modules():
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in own:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in fakes:
                    fake: Tensor = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
                    trained = isinstance(tensor, nn.Parameter)
                    fakes[tensor] = nn.Parameter(fake, tensor.requires_grad) if trained else fake
                tensors[name] = fakes[tensor]


class _Counter:
    """Counts what autograd saves, each storage once, and the model's own never."""

    def __init__(self, model: nn.Module):
        self.layers: list[Layer] = []
        self.outside = 0
        self._inside: int | None = None  # of the layer that runs
        # The storages too, so that none takes the place of another in memory.
        self._seen = {_address(own): own.untyped_storage() for own in (*model.parameters(), *model.buffers())}
        self._given: dict[int, torch.UntypedStorage] = {}
        self._known: dict[Any, tuple[Layer, Any]] = {}

    @property
    def given(self) -> int:
        """Bytes of what layers are given beside hidden states and don't keep."""
        return sum(storage.nbytes() for address, storage in self._given.items() if address not in self._seen)

    def pack(self, tensor: Tensor) -> Tensor:
        """Counts a tensor that autograd saves."""
        address = _address(tensor)
        if address not in self._seen:
            self._seen[address] = storage = tensor.untyped_storage()
            if self._inside is None or address in self._given:
                self.outside += storage.nbytes()
            else:
                self._inside += storage.nbytes()
        return tensor

    @contextmanager
    def watch(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Counts these layers apart, and runs one of each kind."""
        for layer in layers:
            layer.forward = partial(self._run, layer, layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _run(self, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kind = (*map(_kind, tensors), *_kinds(layer))
        if kind not in self._known:
            # Masks and positions are the same for all layers.
            self._given |= {_address(tensor): tensor.untyped_storage() for tensor in tensors if tensor is not hidden}
            address, size = _address(hidden), hidden.untyped_storage().nbytes()
            new, self._inside = address not in self._seen, 0
            output = forward(*args, **kwargs)
            kept, self._inside = self._inside, None
            self._known[kind] = Layer(kept, kept - size if new and address in self._seen else kept, size), output
        found, output = self._known[kind]
        self.layers.append(found)
        # A tensor of its own, which what follows may keep.
        return tree_map_only(Tensor, Tensor.clone, output)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.requires_grad


def _kinds(layer: nn.Module) -> Iterator[Any]:
    """All that tells a layer from another one of the same model: its modules, their settings, and their weights."""
    for name, module in layer.named_modules():
        yield name, type(module)
        for setting, value in vars(module).items():
            if setting not in ("layer_idx", "layer_id") and isinstance(value, (bool, int, float, str, type(None))):
                yield setting, value
    yield from map(_kind, layer.parameters())


class _Kernels(TorchFunctionMode):
    """Replaces what can't run without data, and with `on_gpu` what keeps something else on a GPU than on a CPU."""

    def __init__(self, on_gpu: bool, autocast: bool):
        super().__init__()
        self._on_gpu, self._autocast = on_gpu, autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name == "bool":
            return False  # transformers 4 asks whether the mask is all ones: there is padding
        if name == "grouped_mm" and args[0].dtype != torch.bfloat16:
            # Of experts: without data in bfloat16 alone. The product with one of them keeps the same.
            with torch.autocast("cpu", enabled=False):
                return args[0] @ args[1][0]
        if self._on_gpu and func is F.dropout:
            return _dropout(*args, **kwargs)
        if self._on_gpu and func is F.scaled_dot_product_attention:
            # A GPU's kernel draws what it drops from a seed; a CPU's then builds the attention weights.
            kwargs = {**kwargs, "dropout_p": 0.0}
        elif self._on_gpu and self._autocast and name in FLOAT32_ON_GPU:
            args = [_float32(value) for value in args]
        return func(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    # Its mask has a byte for a number.
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
