"""What two models, their tokenizers and the settings must have in common, looked at before weights are read."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..alignment.byte_prefix import check_bytes
from ..data.vocabulary import same_vocabulary, shared_tokens
from ..errors import UserError, kind_of
from ..models.pretrained import four_bit, load_tokenizer, options_of, quantized_how
from ..utils.environment import check_installed


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ..config import DSKDConfig

logger = logging.getLogger(__name__)


def as_model(model: Any, parameter: str) -> Any:
    """Returns a model's name or folder as a string, or a loaded model that has weights."""
    from torch import nn

    if model is None or isinstance(model, str):
        if model == "":
            raise UserError(f"{parameter}='' is empty: name a model or a folder")
        return model
    if isinstance(model, os.PathLike):
        return os.fspath(model)
    inner = getattr(model, "module", None)
    if isinstance(model, nn.Module) and isinstance(inner, nn.Module) and not hasattr(model, "config"):
        raise UserError(f"{parameter} is {kind_of(model)} around a {type(inner).__name__}: pass the model itself")
    if not isinstance(model, nn.Module) or not hasattr(model, "config") or not hasattr(model, "name_or_path"):
        raise UserError(
            f"{parameter} is {kind_of(model)}: pass a name, a folder, or a model of"
            " AutoModelForCausalLM.from_pretrained(...)"
        )
    # Those that accelerate keeps elsewhere are on the meta device too.
    if getattr(model, "hf_device_map", None) is None and any(weight.is_meta for weight in model.parameters()):
        raise UserError(
            f"{parameter} is on the meta device, without weights: load it with from_pretrained, or name it"
        )
    return model


def check_pair(config: DSKDConfig, model: Any, teacher_model: Any) -> None:
    """Checks that a method with a teacher has one, and another one than the student."""
    if model is None:
        raise UserError("model=None: name the student, or pass a causal language model")
    row = config.method_row
    if not row.needs_teacher and row.text != "teacher":
        return
    if teacher_model is None:
        raise UserError(
            f"method={config.method!r} needs teacher_model (a name or a model); method='sft' trains without one"
        )
    names = [getattr(m, "name_or_path", m) for m in (model, teacher_model)]
    same_folder = all(isinstance(n, str) and os.path.isdir(n) for n in names) and os.path.samefile(*names)
    same_name = names[0] == names[1] and isinstance(model, str) and isinstance(teacher_model, str)
    # One name may have several models: those of revisions and of subfolders, and an adapted one.
    given: tuple[Any, Any] = (config.model_init_kwargs, config.teacher_model_init_kwargs)
    options = [each or {} for each in given]
    revision, other_revision = (each.get("revision") or "main" for each in options)
    folder, other_folder = (each.get("subfolder") or "" for each in options)
    adapted, other_adapted = (bool(getattr(m, "peft_config", None)) for m in (model, teacher_model))
    same_kind = (revision, folder, adapted) == (other_revision, other_folder, other_adapted)
    same_object = model is teacher_model and not isinstance(model, str)
    if same_object or ((same_folder or same_name) and same_kind):
        raise UserError(f"teacher_model is the student itself ({names[0]!r}): name a larger model")
    if "vocabulary_map" in row.all_needs:
        check_installed("rapidfuzz", "min_edit", f"method={config.method!r}")


def check_vocabularies(config: DSKDConfig, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Checks that a method that compares by position has one vocabulary, and one that maps tokens some in common."""
    row = config.method_row
    if row.same_vocabulary and not same_vocabulary(student_tokenizer, teacher_tokenizer):
        names = [getattr(t, "name_or_path", "") or type(t).__name__ for t in (student_tokenizer, teacher_tokenizer)]
        what, remedy = f"method={config.method!r}", "a method for different tokenizers, such as uld, min_edit or alm"
        if config.alignment is not None:
            what, remedy = f"alignment={config.alignment!r}", "another, such as cross_model_attention"
        elif row.dual_space:
            remedy = "a method for different tokenizers, such as dskd_cma"
        raise UserError(
            f"{what} compares the two models token by token, and the vocabularies of {names[0]!r} and {names[1]!r}"
            f" differ: choose {remedy}"
        )
    if "bytes" in row.all_needs:
        check_bytes(student_tokenizer, teacher_tokenizer)
    if "shared_tokens" in row.all_needs:
        shared_tokens(student_tokenizer, teacher_tokenizer)


def check_positions(config: DSKDConfig, model_config: PretrainedConfig, name: str, role: str) -> None:
    """Checks that a model has a position for every token of the longest sequence."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return
    # The released code's sequences are padded to one more.
    longest = positions - 1 if config.as_published else positions
    if config.max_length > longest:
        raise UserError(
            f"max_length={config.max_length} is too long for {role} {name or model_config.model_type!r}, which has"
            f" {positions} positions (max_position_embeddings): set max_length={longest} or less"
        )


def check_adapter_config(peft_config: Any) -> None:
    """Checks that an adapter is described by a [`~peft.PeftConfig`]."""
    if peft_config is None:
        return
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        remedy = "LoraConfig(**peft_config)" if isinstance(peft_config, Mapping) else "LoraConfig(...)"
        raise UserError(f"peft_config is {kind_of(peft_config)}: write peft_config={remedy}")


def check_quantization(**given: Any) -> None:
    """Checks that a quantization is described by one of transformers' configs."""
    for name, config in given.items():
        if config is not None and (isinstance(config, type) or not hasattr(config, "quant_method")):
            remedy = f"BitsAndBytesConfig(**{name})" if isinstance(config, Mapping) else "BitsAndBytesConfig(...)"
            raise UserError(f"{name} is {kind_of(config)}: write {name}={remedy}")


def check_quantized_student(device: Any, config: PretrainedConfig, name: str, chosen: Any, adapted: bool) -> None:
    """Refuses a quantized student, by how it is loaded (`chosen`) or by its own files, where it can't be trained."""
    found = getattr(config, "quantization_config", None) if chosen is None else chosen
    if found is None or "bitsandbytes" not in quantized_how(found):
        return
    setting = "load_in_4bit" if four_bit(found) else "load_in_8bit"
    what, remedy = f"{setting}=True", "leave that out (--load_teacher_in_4bit is for the teacher)"
    if chosen is None:
        what, remedy = (
            f"the student {name!r} is in {quantized_how(found)} ({setting} in its config)",
            "name it in 16 bits",
        )
    if four_bit(found) and device.type == "cpu":
        # bitsandbytes packs the weights for the CPU at the first forward pass without gradient, and what it then
        # computes with has no backward.
        raise UserError(
            f"{what}: a 4-bit student can't be trained on a CPU, where bitsandbytes has no gradients for it: {remedy}"
        )
    if not adapted:
        raise UserError(f"{what} needs an adapter to train: set --use_peft (peft_config)")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs bitsandbytes: pip install bitsandbytes")


def check_trainable(student: Any) -> None:
    """Refuses a student of which nothing is trained: projectors and critic would learn, and the run look like one."""
    if any(parameter.requires_grad for parameter in student.parameters()):
        return
    adapters = getattr(student, "peft_config", {})
    if adapters:
        names = ", ".join(map(repr, adapters))
        raise UserError(
            f"no parameter of the student is trainable: its adapter ({names}) was loaded for inference; load it with"
            " PeftModel.from_pretrained(model, adapter, is_trainable=True)"
        )
    raise UserError(
        "no parameter of the student is trainable (requires_grad is False for all of them): pass peft_config for an"
        " adapter, or call student.requires_grad_(True)"
    )


def lists_module(target: str | Collection[str] | None, module: str) -> bool:
    if not target:
        return False
    if isinstance(target, str):
        # PEFT's "all-linear" leaves the output layer out.
        return target != "all-linear" and re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target)


def check_peft(peft_config: Any, model: PreTrainedModel) -> None:
    """
    Checks that LoRA, to be made or in a loaded student, leaves the two vocabulary matrices alone.

    Queries read the embedding and both spaces read the head as plain matrices; an adapter on them would be ignored
    there, and the student would be distilled towards a head that it doesn't have. `model` is a student without
    weights.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    task = getattr(peft_config.task_type, "value", peft_config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"peft_config.task_type={task!r} makes another model of the student: set it to 'CAUSAL_LM'")
    matrices = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is matrix for matrix in matrices)]
    target, exclude, save, parameters = (
        getattr(peft_config, key, None)
        for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
    )
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    if isinstance(target, (list, set)) and not any(lists_module(target, name) for name, _ in model.named_modules()):
        known = sorted({name.rpartition(".")[2] for name in linear - set(names)})
        raise UserError(
            f"peft_config.target_modules={sorted(target)} names no module of the student: choose among"
            f" {', '.join(known)}, or set 'all-linear'"
        )
    for name in names:
        covers = {
            "target_modules": lists_module(target, name) and not lists_module(exclude, name),
            # PEFT takes the end of a name here: "head" is "lm_head" too.
            "modules_to_save": any(name.endswith(ending) for ending in save or ()),
            "target_parameters": lists_module(parameters, f"{name}.weight"),
        }
        for key, covered in covers.items():
            if covered:
                raise UserError(
                    f"peft_config.{key}={getattr(peft_config, key)!r} covers {name!r}: adapters on the embedding or"
                    " the language-model head are not supported; leave it out, or train the whole student without"
                    " peft_config"
                )


def check_own_tokenizer(tokenizer: Any, model: Any, name: str, parameter: str, init_kwargs: Any) -> None:
    """
    Checks that a tokenizer that is given has the ids of the one saved beside the model.

    Of a student or teacher given by name it is an error, for its embedding can't have another's rows; a loaded model
    may have been changed, and its embedding with it.
    """
    try:
        here = {**options_of(init_kwargs), "local_files_only": True}
        saved = load_tokenizer(name, here, "the tokenizer", parameter).get_vocab()
    except (OSError, ValueError):  # there is none here, or the model has no name
        return
    given = tokenizer.get_vocab()
    same = sum(given.get(piece) == token for piece, token in saved.items())
    if saved and same < len(saved) / 2:
        said = (
            f"{parameter} gives only {same} of {len(saved)} tokens the id that the tokenizer saved with {name!r} gives"
            " them: it is another model's; leave it out, or pass that model's own"
        )
        if isinstance(model, str):
            raise UserError(said)
        logger.warning(said)


def check_not_exchanged(tokenizers: tuple[Any, Any], configs: tuple[Any, Any], names: tuple[str | None, ...]) -> None:
    """
    Checks that each of two tokenizers is its own model's, not the other's.

    They are the other's where both carry the other model's name, or where both end with the token that the other
    model's config names and not with that of their own.
    """

    def ends(tokenizer: Any, config: Any) -> bool:
        end = config.get_text_config().eos_token_id
        return tokenizer.eos_token_id in (end if isinstance(end, (list, tuple)) else [end])

    (student, teacher), (student_config, teacher_config) = tokenizers, configs
    carried = (getattr(student, "name_or_path", ""), getattr(teacher, "name_or_path", ""))
    by_name = all(carried) and carried == tuple(reversed(names)) and carried != tuple(names)
    own = ends(student, student_config) or ends(teacher, teacher_config)
    if by_name or (not own and ends(student, teacher_config) and ends(teacher, student_config)):
        raise UserError(
            "processing_class is the tokenizer of the teacher's model, and teacher_processing_class that of the"
            " student's: exchange the two"
        )
