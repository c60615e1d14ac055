"""Bad input, found before anything is loaded or lost. Every function here raises a one-line [`UserError`]."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from .config import DSKDConfig


def check_launch(config: DSKDConfig) -> None:
    """Refuses a way of running that would give wrong numbers silently, and a device that isn't there."""
    from .teacher.load import named_device

    if config.teacher_device is not None and named_device(config.teacher_device).type != "cpu" and config.n_gpu == 2:
        # The second is the teacher's. Trainer would spread the student's batches over both.
        config._n_gpu = 1
    if config.n_gpu > 1:
        raise UserError(
            f"{config.n_gpu} GPUs are visible to one process, which means nn.DataParallel:"
            f" start with `accelerate launch --num_processes {config.n_gpu} SCRIPT`, or set CUDA_VISIBLE_DEVICES=0"
        )


def check_sharding(config: DSKDConfig) -> None:
    """Refuses to spread a model over ranks. TrainingArguments would ask for deepspeed to be installed first."""
    for name, set_in_config in (("FSDP", bool(config.fsdp)), ("DEEPSPEED", bool(config.deepspeed))):
        if set_in_config or os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes"):
            raise UserError(
                f"{name} shards the language-model heads that both spaces share and is not supported: use plain"
                " data parallelism (accelerate launch --multi_gpu), with LoRA and load_teacher_in_4bit to save memory"
            )


def check_output_dir(folder: str) -> None:
    """An output folder must take files."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output_dir={folder!r} is not writable ({error.strerror}): choose another folder") from None


def check_metric(config: DSKDConfig, eval_dataset: Any) -> None:
    """
    Of several evaluation sets the metric that chooses a checkpoint, or moves a schedule, must name its set.

    Where there is but one, it is of that.
    """
    metric = config.metric_for_best_model
    if metric is None or not isinstance(eval_dataset, dict) or config.eval_strategy == "no":
        return
    metric = metric.removeprefix("eval_")
    names = [str(name) for name in eval_dataset]
    if any(metric.startswith(f"{name}_") for name in names):
        return
    if len(names) > 1:
        raise UserError(
            f"metric_for_best_model={config.metric_for_best_model!r} could be of each of the {len(names)} sets of"
            f" eval_dataset: set {' or '.join(repr(f'{name}_{metric}') for name in names)}"
        )
    config.metric_for_best_model = f"{names[0]}_{metric}"


def check_pair(config: DSKDConfig, model: Any, teacher_model: Any) -> None:
    """A method with a teacher needs one, and another one than the student."""
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


def check_vocabularies(config: DSKDConfig, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """A method that compares position by position needs one vocabulary; one that maps tokens needs some in common."""
    from .data.vocabulary import same_vocabulary, shared_tokens

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
    if (
        row.label == "teacher"
        or row.projector_init == "pseudo_inverse"
        or row.alignment in ("min_edit", "exact_tokens")
    ):
        shared_tokens(student_tokenizer, teacher_tokenizer)


def check_columns(config: DSKDConfig, dataset: Any, split: str) -> None:
    """An alignment through the text needs the text: a dataset tokenized elsewhere may not say what tokens cover."""
    columns = getattr(dataset, "column_names", None) or []
    row = config.method_row
    if row.needs_chunks and columns and "chunk_ids" not in columns:
        raise UserError(
            f"method={config.method!r} aligns tokens by the bytes of the text that they cover, and the {split} data"
            " has no column chunk_ids: pass the text (prompt and response) instead of tokens, or tokenize it with"
            " hf_dskd.tokenize_dataset"
        )
    if config.attention_kd_rate and columns and "chunk_ids" not in columns:
        raise UserError(
            f"attention_kd_rate={config.attention_kd_rate} compares attention over the bytes of the text, and the"
            f" {split} data has no column chunk_ids: pass the text instead of tokens, or tokenize it with"
            " hf_dskd.tokenize_dataset"
        )


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


def quantization(given: Any, init_kwargs: Any, config: PretrainedConfig, name: str, setting: str) -> Any:
    """
    How a model is to be quantized when it is loaded, by its parameter `setting` or by its init kwargs; or `None`.

    Its own files may be quantized already. Then transformers would take no other.
    """
    in_options = (init_kwargs or {}).get("quantization_config")
    if given is not None and in_options is not None:
        raise UserError(f"{setting} and an init kwarg quantization_config: pass only one of them")
    chosen = in_options if given is None else given
    if chosen is not None and getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{setting}: the files of {name!r} are quantized already ({_in_words(config.quantization_config)}), which"
            " nothing changes; leave it out, or name the model in 16 bits"
        )
    return chosen


def four_bit(quantization: Any) -> bool:
    """Whether a quantization, of a parameter or of a config.json, is bitsandbytes' of 4 bits."""
    settings = quantization if isinstance(quantization, dict) else getattr(quantization, "__dict__", {})
    return bool(settings.get("load_in_4bit", settings.get("_load_in_4bit", False)))


def _in_words(quantization: Any) -> str:
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    kind = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    return f"{kind}, {4 if four_bit(settings) else 8} bits" if kind == "bitsandbytes" else kind


def check_quantized_student(device: Any, config: PretrainedConfig, name: str, chosen: Any, adapted: bool) -> None:
    """A quantized student, by how it is to be loaded (`chosen`) or by its own files, can be trained on a GPU alone."""
    found = getattr(config, "quantization_config", None) if chosen is None else chosen
    if found is None or "bitsandbytes" not in _in_words(found):
        return
    setting = "load_in_4bit" if four_bit(found) else "load_in_8bit"
    what, remedy = f"{setting}=True", "leave that out (--load_teacher_in_4bit is for the teacher)"
    if chosen is None:
        what, remedy = f"the student {name!r} is in {_in_words(found)} ({setting} in its config)", "name it in 16 bits"
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


def check_positions(config: DSKDConfig, model_config: PretrainedConfig, name: str, role: str) -> None:
    """A model must have a position for every token of the longest sequence."""
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


def check_steps(config: DSKDConfig, train_dataset: Any) -> None:
    """
    Refuses a run in which no optimizer step would be taken.

    Of too few micro-batches for `gradient_accumulation_steps` Trainer makes a step all the same. A stream's length
    isn't known before it ends.
    """
    if config.max_steps < -1 or config.max_steps == 0:
        raise UserError(
            f"max_steps={config.max_steps} takes no step: set it to 1 or more, or to -1 for num_train_epochs; pass no"
            " train_dataset to evaluate only"
        )
    if config.max_steps < 0 and not config.num_train_epochs > 0:
        raise UserError(
            f"num_train_epochs={config.num_train_epochs} takes no step: set it above 0, or max_steps to 1 or more;"
            " pass no train_dataset to evaluate only"
        )
    if not hasattr(train_dataset, "__len__"):
        return
    rows = len(train_dataset)
    if not rows:
        raise UserError("train_dataset has no examples: nothing would be trained; pass some")
    shared = getattr(config.accelerator_config, "split_batches", False)
    processes = 1 if shared else config.world_size
    if config.dataloader_drop_last and rows < config.train_batch_size * processes:
        batch = f"per_device_train_batch_size={config.per_device_train_batch_size}"
        if processes > 1:
            batch += f" on {processes} processes"
        raise UserError(
            f"dataloader_drop_last=True drops all of {rows} examples, fewer than {batch}: set it to False, or smaller"
            " batches"
        )


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


def check_eos(tokenizer: Any, role: str) -> None:
    """A response must be able to end."""
    if tokenizer.eos_token_id is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise UserError(f"the {role}'s tokenizer {name!r} has no EOS token: set tokenizer.eos_token first")


def _lists_module(target: str | Collection[str] | None, module: str) -> bool:
    if not target:
        return False
    if isinstance(target, str):
        # PEFT's "all-linear" leaves the output layer out.
        return target != "all-linear" and re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target)


def check_peft(peft_config: Any, model: PreTrainedModel) -> None:
    """
    LoRA, to be made or in a loaded student, must leave the two vocabulary matrices alone.

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
    if isinstance(target, (list, set)) and not any(_lists_module(target, name) for name, _ in model.named_modules()):
        known = sorted({name.rpartition(".")[2] for name in linear - set(names)})
        raise UserError(
            f"peft_config.target_modules={sorted(target)} names no module of the student: choose among"
            f" {', '.join(known)}, or set 'all-linear'"
        )
    for name in names:
        covers = {
            "target_modules": _lists_module(target, name) and not _lists_module(exclude, name),
            # PEFT takes the end of a name here: "head" is "lm_head" too.
            "modules_to_save": any(name.endswith(ending) for ending in save or ()),
            "target_parameters": _lists_module(parameters, f"{name}.weight"),
        }
        for key, covered in covers.items():
            if covered:
                raise UserError(
                    f"peft_config.{key}={getattr(peft_config, key)!r} covers {name!r}: adapters on the embedding or"
                    " the language-model head are not supported; leave it out, or train the whole student without"
                    " peft_config"
                )
