"""Loads the teacher, and answers for its last hidden states. Its dtype and quantization are decided here only."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.causal_lm import LMHead, answer_positions, backbone, input_embedding, lm_head
from ..models.pretrained import (
    ADAPTER_NAME,
    check_options,
    dtype_option,
    empty_model,
    four_bit,
    quantization,
    reading,
    source,
    weight_options,
)


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ..config import DSKDConfig


class Teacher:
    """
    A frozen model as a source of last hidden states.

    Args:
        model ([`~transformers.PreTrainedModel`]): Set to eval mode, its parameters frozen. It stays where it is.
        device (`torch.device` or `str`, *optional*):
            Where the losses run, which may be another device than the model's; `None` is the model's.

    Attributes:
        head ([`~hf_dskd.models.causal_lm.LMHead`]): To logits, dequantised, on `device`.
        embedding (`torch.Tensor` of shape `[V_t, d_t]`): Input embedding, on `device`.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | str | None = None):
        for name, adapter in getattr(model, "peft_config", {}).items():
            if adapter.is_prompt_learning:
                raise UserError(
                    f"the teacher's adapter {name!r} is {adapter.peft_type.value}, which puts states of its own before"
                    " a text: use a teacher with LoRA, or without an adapter"
                )
        model.eval()
        model.requires_grad_(False)
        self.model = model
        self._backbone = backbone(model)
        embedding, head = input_embedding(model), lm_head(model)
        self._entrance = embedding.device
        self.device = torch.device(self._entrance if device is None else device)
        bias = None if head.bias is None else head.bias.to(self.device)
        self.head: LMHead = replace(head, weight=head.weight.to(self.device), bias=bias)
        # One matrix that is both stays one: it can take a gigabyte.
        self.embedding: Tensor = self.head.weight if embedding is head.weight else embedding.to(self.device)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the last hidden state `[B, T, d_t]` on `device`; no other layer is kept, and there are no logits."""
        with torch.inference_mode():
            hidden = self._backbone(
                input_ids=input_ids.to(self._entrance),
                attention_mask=attention_mask.to(self._entrance),
                use_cache=False,
            )[0]
        hidden = hidden.to(self.device)
        # A loss may save it for its backward pass, which is refused to a tensor made in inference mode.
        return hidden.clone() if hidden.is_inference() else hidden

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Runs on a batch, and returns the states that predict a response token, `[B, R, d_t]`."""
        rows, _ = answer_positions(batch["teacher_labels"])
        hidden = self(batch["teacher_input_ids"], batch["teacher_attention_mask"])
        return hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def named_device(name: str) -> torch.device:
    """
    Finds the device called `name`; a [`UserError`] where this machine has none of that name.

    Without a number (`"cuda"`) it is the one that this process uses.
    """
    accelerator = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if accelerator is not None else 0
    known = ["cpu", *(f"{accelerator}:{index}" for index in range(count))]
    if count and name == str(accelerator):
        name = known[1 + torch.accelerator.current_device_index()]
    if name not in known:
        raise UserError(f"teacher_device={name!r} is no device of this machine: set it to one of {', '.join(known)}")
    return torch.device(name)


def four_bit_config(compute_dtype: torch.dtype, setting: str = "load_teacher_in_4bit") -> Any:
    """Makes NF4 with double quantization, computing in `compute_dtype`; a [`UserError`] where it can't run."""
    check_four_bit(setting)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def check_four_bit(setting: str = "load_teacher_in_4bit") -> None:
    """Raises a [`UserError`], which names the setting that asks for it, where bitsandbytes can't run 4-bit models."""
    remedy = f"leave {setting} out (the model then loads in 16 or 32 bits)"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{setting} needs bitsandbytes: pip install bitsandbytes, or {remedy}")
    if torch.backends.mps.is_available():
        raise UserError(f"{setting}: bitsandbytes runs NF4 on CUDA, XPU and CPU, not on MPS; {remedy}")


def check_four_bit_shapes(
    config: PretrainedConfig, name: str, setting: str | None = "load_teacher_in_4bit", init_kwargs: Any = None
) -> None:
    """
    Raises a [`UserError`], which names the setting, for a model that NF4 on a CPU would crash on.

    On CPUs with AVX512 bitsandbytes ends the process at a linear layer whose sizes are no multiples of 64. `setting`
    is `None` for a model whose own files are in 4 bits.
    """
    model = empty_model(config, init_kwargs)
    output = model.get_output_embeddings()
    remedy = "name a model in 16 or 32 bits" if setting is None else f"leave {setting} out"
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not output:
            if module.in_features % 64 or module.out_features % 64:
                raise UserError(
                    f"{name!r} can't run in 4 bits on a CPU: {path} is {module.in_features} x {module.out_features}"
                    f" and both must be multiples of 64; {remedy}"
                )


def teacher_place(args: DSKDConfig) -> torch.device:
    """Returns the device of the teacher."""
    return args.device if args.teacher_device is None else named_device(args.teacher_device)


def teacher_dtype(args: DSKDConfig) -> torch.dtype | str:
    """Decides what a teacher given by name is loaded in: a dtype, or `"auto"` for that of its own configuration."""
    given = dtype_option(args.teacher_model_init_kwargs, "teacher_model_init_kwargs")
    if args.teacher_dtype == "auto":
        return getattr(torch, args.training_dtype) if given is None else given
    chosen = getattr(torch, args.teacher_dtype)
    if given not in (None, chosen):
        raise UserError(
            f"teacher_dtype={args.teacher_dtype!r} and teacher_model_init_kwargs with dtype"
            f" {str(given).removeprefix('torch.')!r}: name one"
        )
    return chosen


def check_teacher_options(args: DSKDConfig, teacher_model: Any) -> None:
    """Raises a [`UserError`] for settings of the teacher that can't be kept, before anything of it is read."""
    if teacher_model is not None:
        check_options(teacher_model, args.teacher_model_init_kwargs, "teacher_model_init_kwargs")
        teacher_dtype(args)
    if args.load_teacher_in_4bit and not isinstance(teacher_model, str):
        raise UserError("load_teacher_in_4bit=True needs teacher_model as a name: a loaded model can't be quantized")
    if args.teacher_dtype != "auto" and teacher_model is not None and not isinstance(teacher_model, str):
        raise UserError(
            f"teacher_dtype={args.teacher_dtype!r} needs teacher_model as a name: a loaded model is taken as it is, in"
            f" {str(teacher_model.dtype)[6:]}; leave it out"
        )


def teacher_quantization(args: DSKDConfig, given: Any, config: PretrainedConfig, name: str) -> Any:
    """
    Decides how the teacher is to be quantized when it is loaded, or `None`.

    Raises:
        UserError: For two ways at once, a teacher that is quantized already, or one that bitsandbytes can't run here.
    """
    setting = "teacher_quantization_config"
    if args.load_teacher_in_4bit:
        if given is not None or "quantization_config" in (args.teacher_model_init_kwargs or {}):
            raise UserError(f"load_teacher_in_4bit=True and {setting}: pass only one of them")
        setting = "load_teacher_in_4bit"
        given = four_bit_config(getattr(torch, args.training_dtype))
    chosen = quantization(given, args.teacher_model_init_kwargs, config, name, setting)
    found = getattr(config, "quantization_config", None) if chosen is None else chosen
    if four_bit(found) and teacher_place(args).type == "cpu":
        check_four_bit_shapes(config, name, None if chosen is None else setting, args.teacher_model_init_kwargs)
    return chosen


def load_teacher_model(teacher_model: Any, args: DSKDConfig, quantization_config: Any = None) -> Any:
    """
    Loads the teacher on its device, in the dtype of the settings where it is a name; an adapter with its model.

    `quantization_config` is what [`teacher_quantization`] returned.
    """
    where = teacher_place(args)
    if isinstance(teacher_model, str):
        of = source(teacher_model, args.teacher_model_init_kwargs)
        options = weight_options(of.options, teacher_dtype(args))
        with reading("the teacher", of.name, options):
            teacher_model = load_causal_lm(of.name, quantization_config=quantization_config, device=where, **options)
        if of.adapter is not None:
            from peft import PeftModel

            where_adapter = of.adapter_options or {}
            with reading("the teacher", of.adapter, where_adapter, (ADAPTER_NAME,), "save the adapter anew"):
                teacher_model = PeftModel.from_pretrained(teacher_model, of.adapter, **where_adapter)
    if getattr(teacher_model, "hf_device_map", None) is None:
        teacher_model.to(where)
    elif args.teacher_device is not None and teacher_model.get_input_embeddings().weight.device != where:
        raise UserError(
            f"teacher_device={args.teacher_device!r}: the teacher was given a device_map, which puts it elsewhere;"
            " leave one of them out"
        )
    return teacher_model


def load_causal_lm(
    name: str, *, quantization_config: Any = None, device: torch.device | None = None, **options: Any
) -> Any:
    """
    Calls `AutoModelForCausalLM.from_pretrained`; a quantized model goes to `device` at once, or to this process's.

    `device_map="auto"` would spread one rank's model over the other ranks' devices.
    """
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM

    if quantization_config is not None:
        where = PartialState().device if device is None else device
        options = {"quantization_config": quantization_config, "device_map": {"": where}, **options}
    return AutoModelForCausalLM.from_pretrained(name, **options)
