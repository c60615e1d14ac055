"""What a teacher's states depend on beside the tokens: its weights, its tokenizer, and settings of the run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError
from ..models.causal_lm import base_causal_lm, hidden_size
from ..models.pretrained import ADAPTER_NAME, config_settings, find_file, options_of, reading, source
from ..redaction import without_secrets
from .load import teacher_dtype


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from ..config import DSKDConfig

logger = logging.getLogger(__name__)

FORMAT = 1
# Values of a parameter, or blocks of a file, that identify the teacher.
SAMPLES = 1000
BLOCK = 4096
# Facts that are settings, which can be set to what they were.
SETTINGS = ("teacher_dtype", "load_teacher_in_4bit", "prompt_style", "max_length")


def cache_facts(
    config: DSKDConfig,
    teacher_model: Any,
    teacher_config: PretrainedConfig,
    teacher_tokenizer: PreTrainedTokenizerBase,
    quantization_config: Any = None,
    *,
    download: bool = False,
) -> dict[str, Any]:
    """
    Collects what the teacher's hidden states depend on beside the tokens, in values of JSON.

    The teacher is a name or folder, to which `quantization_config` belongs, or a loaded model. `download` fetches
    weights that aren't on this machine; without it, the fact `teacher` is then `None`.
    """
    dtype: Any
    options = options_of(config.teacher_model_init_kwargs)
    if isinstance(teacher_model, str):
        dtype = teacher_dtype(config)
        if dtype == "auto":
            dtype = getattr(teacher_config, "dtype", None) or dtype
        teacher, name = files_digest(teacher_model, options, download=download), teacher_model
    else:
        plain = base_causal_lm(teacher_model)
        teacher, dtype = parameters_digest(teacher_model), plain.dtype
        name = plain.name_or_path or type(plain).__name__
    return {
        "format": FORMAT,
        "teacher": teacher,
        # Without the folder that it happens to lie in: a run may move to another machine.
        "teacher_name": Path(name).resolve().name if os.path.isdir(name) else name,
        "hidden_size": hidden_size(teacher_config),
        "teacher_dtype": str(dtype).removeprefix("torch."),
        "load_teacher_in_4bit": config.load_teacher_in_4bit,
        # What a 4-bit teacher computes in.
        "training_dtype": config.training_dtype if config.load_teacher_in_4bit else None,
        "teacher_quantization_config": None
        if quantization_config is None or config.load_teacher_in_4bit
        else _as_json(getattr(quantization_config, "to_dict", lambda: quantization_config)()),
        # Settings of the teacher's configuration that its options replace.
        "teacher_settings": _as_json(without_secrets(config_settings(options))) or None,
        "teacher_tokenizer": tokenizer_digest(teacher_tokenizer),
        "teacher_chat_template": digest_of(json.dumps(teacher_tokenizer.chat_template, sort_keys=True)),
        "prompt_style": config.prompt_style,
        "max_length": config.max_length,
    }


def files_digest(name: str, options: Mapping[str, Any], *, download: bool) -> str | None:
    """
    Identifies the weights of a name or folder without loading them, as `"files:…"`.

    Hashed are config.json and, of every weight file, its name, its size, the safetensors header (names, types, shapes)
    and 1,000 blocks of 4 KiB at evenly spaced places. That tells any other model, and any training of the same one; it
    misses an edit of a few bytes between the blocks. The same weights cut into other files are taken for others.

    `options` are those of `from_pretrained`. Without `download`, `None` is returned for what isn't on this machine.
    """
    remedy = "check the name, the network and your access to it"
    with reading("the teacher", name, options, ("config.json", ADAPTER_NAME), remedy):
        files = _weight_files(name, options, download)
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        for block in _blocks(path):
            digest.update(block)
    return f"files:{digest.hexdigest()}"


def _weight_files(name: str, options: Mapping[str, Any], download: bool) -> list[Path]:
    """Finds the files that `from_pretrained` reads a model and its adapter from; none unless all of them are here."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

    of = source(name, options)
    variant = f".{options['variant']}" if options.get("variant") else ""

    def find(file: str, variant: str = "") -> Path | None:
        stem, _, ending = file.rpartition(".")
        return find_file(of.name, f"{stem}{variant}.{ending}", of.options, download=download, raises=download)

    kinds = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
    files: list[Path | None] = []
    for single, index in kinds[options.get("use_safetensors") is False :]:
        files = [find(single, variant)]
        if files == [None] and (listing := find(index, variant)) is not None:
            weight_map = json.loads(listing.read_text(encoding="utf-8"))["weight_map"]
            files = [find(file) for file in sorted(set(weight_map.values()))]
        if files != [None]:
            break
    files.insert(0, find("config.json"))
    # Transformers takes an adapter that lies beside a model for a part of it.
    adapter, place = (name, options) if of.adapter is None else (of.adapter, of.adapter_options)
    if of.adapter is not None or (Path(name) / ADAPTER_NAME).is_file():
        weights = (
            find_file(adapter, f"adapter_model.{kind}", place, download=download) for kind in ("safetensors", "bin")
        )
        files += [find_file(adapter, ADAPTER_NAME, place), next(filter(None, weights), None)]
    return [] if None in files else [file for file in files if file is not None]


def _blocks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            yield file.read(int.from_bytes(file.read(8), "little"))
            file.seek(0)
        if size <= SAMPLES * BLOCK:
            yield file.read()
            return
        for sample in range(SAMPLES):
            file.seek((size - BLOCK) * sample // (SAMPLES - 1))
            yield file.read(BLOCK)


def parameters_digest(model: nn.Module) -> str:
    """
    Identifies a loaded model, as `"parameters:…"`: name, shape, type and up to 1,000 evenly spaced values of every
    parameter.

    It says nothing about the files that the model came from: a cache is either of the one kind or of the other.
    """
    digest = hashlib.blake2b(digest_size=16)
    # What the parameters of an adapter are multiplied by, and which adapter is on, isn't among them.
    for name, adapter in getattr(model, "peft_config", {}).items():
        settings = json.dumps(adapter.to_dict(), sort_keys=True, default=lambda value: sorted(map(str, value)))
        digest.update(f"{name} {settings} {model.active_adapters}".encode())
    for name, parameter in model.named_parameters():
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype)]).encode())
        values = parameter.detach().flatten()
        samples = min(SAMPLES, len(values))
        places = torch.arange(samples, device=values.device) * len(values) // max(samples, 1)
        digest.update(values[places].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return f"parameters:{digest.hexdigest()}"


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hashes how a tokenizer cuts text: vocabulary, normalization, merges, special tokens."""
    if not tokenizer.is_fast:
        return digest_of(json.dumps(sorted(tokenizer.get_vocab().items())))
    content = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    # Left there by the last call.
    content |= {"truncation": None, "padding": None}
    return digest_of(json.dumps(content, sort_keys=True))


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def digest_of(text: str) -> str:
    """Hashes text, to 32 hex digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_facts(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a [`UserError`] that names every fact in which a cache and this run differ, and what to do about it."""
    # The weights decide whose states they are. A name does where there are no weights to compare.
    ignored = ("teacher_name", "hidden_size") if now["teacher"] is not None else ("teacher",)
    differing = [name for name in now if name not in ignored and then.get(name) != now[name]]
    if not differing:
        if now["teacher"] is None:
            logger.warning(
                "teacher_cache=%r: the weights of %r aren't on this machine, so only its name was compared",
                *(str(folder), now["teacher_name"]),
            )
        return
    remedies = [f"set {name}={then[name]}" for name in differing if name in SETTINGS]
    kinds = [str(facts["teacher"]).partition(":")[0] for facts in (then, now)]
    if "teacher" in differing and kinds[0] != kinds[1]:
        given = "by name" if kinds[0] == "files" else "as a loaded model"
        remedies.append(f"give the teacher {given} (the weights of the two kinds can't be compared)")
    elif {"teacher", "teacher_name"} & {*differing}:
        remedies.append("give that teacher")
    if {"teacher_tokenizer", "teacher_chat_template"} & {*differing}:
        remedies.append("give the teacher's tokenizer as it was")
    written, here = (", ".join(_shown(facts, name) for name in differing) for facts in (then, now))
    raise UserError(
        f"teacher_cache={str(folder)!r} was written with {written}, this run has {here}: use another folder"
        + (f", or {' and '.join(remedies)}" if remedies else "")
    )


def _shown(facts: Mapping[str, Any], name: str) -> str:
    value = facts.get(name)
    if name == "teacher":
        # Trained again, a teacher may have the name that it had.
        kind, _, digest = str(value).partition(":")
        return f"teacher={facts.get('teacher_name')!r} ({kind} {digest[:8]})"
    if name in ("teacher_tokenizer", "teacher_chat_template"):
        return f"{name} {str(value)[:8]}"
    return f"{name}={value!r}"
