"""
Reads what a model's name stands for: configuration, tokenizer, files and commit, with every option given for it.

Options are those of `from_pretrained` (`model_init_kwargs`, `teacher_model_init_kwargs`). Each goes to every place
where it means something, or is refused by name.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError


if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer*", "vocab*")
ADAPTER_NAME = "adapter_config.json"
# Where files are, for configuration, tokenizer and weights alike.
PLACE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")
CODE = ("trust_remote_code", "code_revision")
DTYPE = ("dtype", "torch_dtype")
# What the weights take beside these; any other option is one of the configuration.
_WEIGHTS = (
    "attn_implementation experts_implementation device_map max_memory offload_folder offload_buffers"
    " offload_state_dict low_cpu_mem_usage quantization_config variant use_safetensors weights_only"
    " ignore_mismatched_sizes key_mapping generation_config use_kernels kernel_config"
    " disable_mmap allow_all_kernels fusion_config"
).split()
_SHARDING = "a model isn't cut over processes here; leave it out"
_REFUSED = {
    "config": "settings of the configuration go here by their own names",
    "load_in_4bit": "write quantization_config={'quant_method': 'bitsandbytes', 'load_in_4bit': True} instead",
    "load_in_8bit": "write quantization_config={'quant_method': 'bitsandbytes', 'load_in_8bit': True} instead",
    "output_loading_info": "a model alone is needed; leave it out",
    "state_dict": "pass the loaded model instead of its name",
    "gguf_file": "load the model yourself and pass it instead of its name",
    "use_auth_token": "write token instead",
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), _SHARDING),
}


# ---- Options


def options_of(init_kwargs: Any) -> dict[str, Any]:
    """Copies options as a mapping. TrainingArguments parses JSON strings; what is left is a dict or nothing."""
    return dict(init_kwargs or {})


def check_options(model: Any, init_kwargs: Any, setting: str) -> None:
    """Raises a [`UserError`] for an option of `setting` that would have no effect, or another one than it says."""
    options = options_of(init_kwargs)
    if not options:
        return
    if not isinstance(model, str):
        raise UserError(
            f"{setting}={options!r} is for a model given by name, and this {type(model).__name__} is loaded already:"
            " leave it out"
        )
    for name, remedy in _REFUSED.items():
        if name in options:
            raise UserError(f"{setting} has {name!r}; {remedy}")
    dtype_option(options, setting)
    revision = options.get("revision")
    if revision not in (None, "main") and os.path.isdir(model):
        raise UserError(
            f"{setting} has revision={revision!r}, and {model!r} is a folder, which has no revisions: leave it out, or"
            " name the model on the hub"
        )


def dtype_option(init_kwargs: Any, setting: str) -> torch.dtype | str | None:
    """Reads what `dtype`, or its older name `torch_dtype`, asks for: a torch dtype, `"auto"`, or `None`."""
    options = options_of(init_kwargs)
    found = {name: _dtype(options[name], f"{setting} has {name}") for name in DTYPE if options.get(name) is not None}
    if len(set(found.values())) > 1:
        raise UserError(
            f"{setting} has dtype={options['dtype']!r} and torch_dtype={options['torch_dtype']!r}: name one"
        )
    return next(iter(found.values()), None)


def _dtype(value: Any, what: str) -> torch.dtype | str:
    import torch

    if value == "auto":
        return value
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise UserError(f"{what}={value!r}: name one of float32, bfloat16, float16 or auto")
    return dtype


def weight_options(init_kwargs: Any, dtype: torch.dtype | str) -> dict[str, Any]:
    """Picks the options for the weights, which are loaded in `dtype`; a quantization is decided elsewhere."""
    own = (*DTYPE, "quantization_config")
    return {"dtype": dtype, **{name: value for name, value in options_of(init_kwargs).items() if name not in own}}


def place(init_kwargs: Any, *more: str) -> dict[str, Any]:
    """Picks the options that say where files are, and `more` of them."""
    return {name: value for name, value in options_of(init_kwargs).items() if name in (*PLACE, *more)}


def config_settings(init_kwargs: Any) -> dict[str, Any]:
    """Picks the options that replace settings of the configuration."""
    others = (*PLACE, *CODE, *DTYPE, *_WEIGHTS)
    return {name: value for name, value in options_of(init_kwargs).items() if name not in others}


# ---- Names


@dataclass(frozen=True)
class Source:
    """What a name stands for: a model, or an adapter and the model that it is for, each with its options."""

    name: str
    options: dict[str, Any]
    adapter: str | None = None
    adapter_options: dict[str, Any] | None = None


def source(name: str, init_kwargs: Any = None) -> Source:
    """Finds out whether `name` is an adapter, and then which model it is for."""
    options = options_of(init_kwargs)
    found = _adapter_file(name, options)
    if found is None:
        return Source(name, options)
    settings = json.loads(found.read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"the adapter {name!r} doesn't say what it adapts: set base_model_name_or_path in {ADAPTER_NAME}"
        )
    # Where the adapter is says nothing about where its model is.
    own = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    if settings.get("revision"):
        own["revision"] = settings["revision"]
    return Source(base, own, name, place(options))


def _adapter_file(name: str, options: Mapping[str, Any]) -> Path | None:
    if os.path.isdir(name):
        folder = Path(name, options.get("subfolder") or "")
        there = (folder / ADAPTER_NAME).is_file() and not (folder / "config.json").is_file()
        return folder / ADAPTER_NAME if there else None
    return find_file(name, ADAPTER_NAME, options)


def find_file(
    name: str, file: str, init_kwargs: Any = None, *, download: bool = True, raises: bool = False
) -> Path | None:
    """Finds a file of a model's folder, or of its repository; `None` where there is none, or `raises` offline."""
    from transformers.utils import cached_file

    where = place(init_kwargs)
    if not download:
        where["local_files_only"] = True
    found = cached_file(
        name,
        file,
        _raise_exceptions_for_gated_repo=raises,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=raises,
        **where,
    )
    return None if found is None else Path(found)


def commit(name: str | None, init_kwargs: Any = None) -> str | None:
    """Finds the commit of a model on the hub whose files are read; `None` for a folder, or without its files."""
    if name is None or os.path.isdir(name):
        return None
    for file in ("config.json", ADAPTER_NAME):
        path = find_file(name, file, init_kwargs, download=False)
        found = None if path is None else re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
        if found is not None:
            return found.group(1)
    return None


def origin(model: Any, init_kwargs: Any = None) -> dict[str, str | None]:
    """Finds the commit of a model on the hub; of an adapter given by name also its model, with the commit of that."""
    if not isinstance(model, str):
        # transformers 4 notes it when it loads a model; 5.23 doesn't.
        return {"commit": getattr(model.config, "_commit_hash", None)}
    of = source(model, init_kwargs)
    if of.adapter is None:
        return {"commit": commit(of.name, of.options)}
    return {
        "commit": commit(of.adapter, of.adapter_options),
        "adapts": of.name,
        "adapts_commit": commit(of.name, of.options),
    }


# ---- Configuration and tokenizer


@contextmanager
def loading(what: str, name: str, files: tuple[str, ...], remedy: str) -> Iterator[None]:
    """
    Puts what transformers says at length about a name or folder that it can't load on one line.

    A folder must hold one of `files`: without, transformers may guess from its name, or make a tokenizer of no tokens.
    """
    try:
        if os.path.isdir(name) and not any(any(Path(name).glob(pattern)) for pattern in files):
            raise OSError(f"the folder has no {files[0]}")
        yield
    except Exception as error:
        from safetensors import SafetensorError

        if isinstance(error, (TypeError, AttributeError)):
            # What was passed on to the model's own class, or to torch.
            remedy = "check what the init kwargs name"
        elif isinstance(error, ImportError):
            remedy = "install that, or leave out what needs it"
        elif not isinstance(error, (OSError, ValueError, SafetensorError)):
            raise
        elif "trust_remote_code" in str(error):
            remedy = "where you trust that code, set trust_remote_code in the init kwargs of that model"
        reason = str(error).split("\n")[0].strip().rstrip(".")
        raise UserError(f"{what} {name!r} can't be loaded ({reason}): {remedy}") from error


def reading(
    role: str,
    name: str,
    options: Mapping[str, Any],
    files: tuple[str, ...] = ("config.json",),
    remedy: str = "check the path or the name; a gated model needs `hf auth login`, one that isn't downloaded yet no"
    " HF_HUB_OFFLINE",
) -> AbstractContextManager[None]:
    """Guards the reading of a model, or of what lies beside it in the subfolder of its options (see [`loading`])."""
    folder = os.path.join(name, options.get("subfolder") or "").rstrip("/") if os.path.isdir(name) else name
    return loading(role, folder, files, remedy)


def read_config(model: Any, init_kwargs: Any, role: str) -> Any:
    """
    Reads the configuration of a model, as its weights will be loaded; of an adapter that of the model below it.

    Raises:
        UserError: If it can't be read, for an option that nothing knows, and for an adapter as `"the student"`.
    """
    from transformers import AutoConfig

    if not isinstance(model, str):
        return model.config
    with reading(role, model, options_of(init_kwargs), ("config.json", ADAPTER_NAME)):
        of = source(model, init_kwargs)
    if of.adapter is not None and role == "the student":
        raise UserError(
            f"the student {model!r} is an adapter: load its model, then PeftModel.from_pretrained(model, adapter,"
            f" is_trainable=True), and pass that; or name {of.name!r} with a new adapter (--use_peft)"
        )
    options = {key: value for key, value in of.options.items() if key not in (*DTYPE, "quantization_config")}
    with reading(role, of.name, of.options):
        config, unused = AutoConfig.from_pretrained(of.name, return_unused_kwargs=True, **options)
    known = (*PLACE, *CODE, *_WEIGHTS)
    for name in unused:
        if name not in known and not name.startswith("_"):
            near = difflib.get_close_matches(name, [*known, *DTYPE, *config.to_dict()], n=1, cutoff=0.7)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise UserError(
                f"{role}'s init kwargs have {name!r}, which is no option of from_pretrained and no setting of"
                f" {type(config).__name__}: {hint}"
            )
    return config


def generation_config(name: str, init_kwargs: Any = None) -> GenerationConfig | None:
    """Reads what a model's generation_config.json says, if it has one."""
    from transformers import GenerationConfig

    if find_file(name, "generation_config.json", init_kwargs) is None:
        return None
    with reading("the generation config of", name, options_of(init_kwargs), remedy="mend its generation_config.json"):
        return GenerationConfig.from_pretrained(name, **place(init_kwargs))


def empty_model(config: PretrainedConfig, init_kwargs: Any = None, loaded: nn.Module | None = None) -> PreTrainedModel:
    """
    Builds a causal language model of `config` without weights, to look at its layers.

    It is built with the code that the options of its name allow, or of the class that a `loaded` one has.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from .causal_lm import base_causal_lm

    kind: Any = None if loaded is None else type(base_causal_lm(loaded))
    options = options_of(init_kwargs)
    class_name = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if loaded is None and class_name is not None and options.get("trust_remote_code"):
        # Not by from_config, which looks for the code at the revision that is the newest.
        where = {name: value for name, value in options.items() if name in (*PLACE, "code_revision")}
        kind = get_class_from_dynamic_module(class_name, str(config.name_or_path), **where)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config) if kind is None else kind(deepcopy(config))


def load_tokenizer(name: str, init_kwargs: Any, role: str, parameter: str) -> Any:
    """Loads the tokenizer of a model; an adapter may have one of its own."""
    from transformers import AutoTokenizer

    of = source(name, init_kwargs)
    here, options = of.name, place(of.options, *CODE)
    if of.adapter is not None and find_file(of.adapter, TOKENIZER_FILES[0], of.adapter_options) is not None:
        here, options = of.adapter, {**place(of.options, *CODE), **(of.adapter_options or {})}
    with reading(role, here, options, TOKENIZER_FILES, f"pass {parameter}, or save a tokenizer beside the model"):
        return AutoTokenizer.from_pretrained(here, **options)


# ---- Quantization


def quantization(given: Any, init_kwargs: Any, config: PretrainedConfig, name: str, setting: str) -> Any:
    """
    Decides how a model is to be quantized when it is loaded, by its parameter `setting` or its init kwargs; or `None`.

    Its own files may be quantized already. Then transformers would take no other.
    """
    in_options = (init_kwargs or {}).get("quantization_config")
    if given is not None and in_options is not None:
        raise UserError(f"{setting} and an init kwarg quantization_config: pass only one of them")
    chosen = in_options if given is None else given
    if chosen is not None and getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{setting}: the files of {name!r} are quantized already ({quantized_how(config.quantization_config)}),"
            " which nothing changes; leave it out, or name the model in 16 bits"
        )
    return chosen


def four_bit(quantization: Any) -> bool:
    """Tells whether a quantization, of a parameter or of a config.json, is bitsandbytes' of 4 bits."""
    settings = quantization if isinstance(quantization, dict) else getattr(quantization, "__dict__", {})
    return bool(settings.get("load_in_4bit", settings.get("_load_in_4bit", False)))


def quantized_how(quantization: Any) -> str:
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    kind = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    return f"{kind}, {4 if four_bit(settings) else 8} bits" if kind == "bitsandbytes" else kind
