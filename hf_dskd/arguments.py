"""What a trainer is given: taken in the kinds that people have, and refused by name where it is no such thing."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

from .errors import UserError, check_name, kind_of


if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from .config import DSKDConfig

logger = logging.getLogger(__name__)


def check_args(args: Any) -> None:
    """Settings must be a [`DSKDConfig`]."""
    from .config import DSKDConfig

    if isinstance(args, DSKDConfig):
        return
    remedy = "write DSKDConfig(...) with the same settings"
    if isinstance(args, Mapping):
        remedy = "write DSKDConfig(**args)"
    elif isinstance(args, (str, os.PathLike)):
        remedy = f"write DSKDConfig({os.fspath(args)!r}), if that is the output folder"
    raise UserError(f"args is {kind_of(args)}, which isn't a DSKDConfig: {remedy}")


def check_functions(**given: Any) -> None:
    """Functions that are given must be callable."""
    for name, function in given.items():
        if function is not None and not callable(function):
            raise UserError(f"{name}={function!r} is {kind_of(function)}: pass a function")


def check_callbacks(callbacks: Any) -> None:
    """Callbacks come as a list of [`~transformers.TrainerCallback`]."""
    from transformers import TrainerCallback

    if callbacks is None:
        return
    if not isinstance(callbacks, (list, tuple)):
        raise UserError(f"callbacks is {kind_of(callbacks)}: pass a list of them")
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise UserError(f"callbacks has {kind_of(callback)}, which is no TrainerCallback: derive it from that")


def check_optimizers(optimizers: Any, model: Any) -> None:
    """An optimizer and a schedule, either of them `None`; the optimizer can't know a student that isn't loaded yet."""
    if not isinstance(optimizers, (tuple, list)) or len(optimizers) != 2:
        shown = f" of {len(optimizers)}" if isinstance(optimizers, (tuple, list)) else ""
        raise UserError(f"optimizers is {kind_of(optimizers)}{shown}: pass the two (optimizer, None)")
    optimizer, schedule = optimizers
    if optimizer is not None and (isinstance(optimizer, type) or not hasattr(optimizer, "param_groups")):
        raise UserError(
            f"optimizers has {kind_of(optimizer)} as its first: make a torch.optim.Optimizer, or set optim"
        )
    if schedule is not None and (isinstance(schedule, type) or not hasattr(schedule, "step")):
        raise UserError(f"optimizers has {kind_of(schedule)} as its second: make a schedule, or set lr_scheduler_type")
    if optimizer is not None and isinstance(model, str):
        raise UserError(
            f"optimizers=({type(optimizer).__name__}, ...): the student {model!r} is loaded by its name, and an"
            " optimizer made before can't hold its parameters: pass the loaded student as model, or set optim"
        )


@contextmanager
def making(args: DSKDConfig, name: str, more: str) -> Iterator[None]:
    """Names the settings `name` and `more`, of which an optimizer or a schedule can't be made."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        value, reason = getattr(args, name), " ".join(str(error).split())
        shown = f"{name}={getattr(value, 'value', value)!r}"
        if getattr(args, more):
            shown += f" with {more}={getattr(args, more)!r}"
        raise UserError(f"{shown}: {reason}") from error


def check_optimization(args: DSKDConfig, optimizer: Any) -> None:
    """Optimizer and schedule of the settings must be such that can be made, of one number as of a student."""
    import torch
    from transformers import Trainer, get_scheduler

    number = [torch.nn.Parameter(torch.zeros(1))]
    of_model = ("galore", "apollo", "lomo", "adalomo")  # these look at the model
    if optimizer is None and not str(getattr(args.optim, "value", args.optim)).startswith(of_model):
        with making(args, "optim", "optim_args"):
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
            kind(number, **options)
            for pair in (args.optim_args or "").replace(" ", "").split(","):
                name = pair.partition("=")[0]
                if name and name not in options and not _reads(args, name):
                    raise ValueError(f"{name!r} has no effect on it, leave it out")
    steps = args.max_steps if args.max_steps > 0 else 100
    with making(args, "lr_scheduler_type", "lr_scheduler_kwargs"):
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD(number, 1.0),
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]  # a mapping by now
        )


def _reads(args: DSKDConfig, name: str) -> bool:
    """Whether the optimizer of the settings hangs on that part of optim_args: one that is read can't be any text."""
    from transformers import Trainer

    without, other = copy(args), copy(args)
    without.optim_args, other.optim_args = None, f"{name}=?"
    try:
        found = Trainer.get_optimizer_cls_and_kwargs(other)
    except (ValueError, AttributeError):
        return True
    return found != Trainer.get_optimizer_cls_and_kwargs(without)


def check_optimized(optimizer: Optimizer | None, student: nn.Module) -> None:
    """An optimizer of the user's must hold parameters of the student, trained ones among them."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = {id(parameter): parameter.requires_grad for parameter in student.parameters()}
    foreign = len(held - own.keys())
    if foreign:
        raise UserError(
            f"optimizers: {foreign} of the optimizer's {len(held)} parameters are none of the student's: make it from"
            " model.parameters() of the student that is passed"
        )
    if not any(own[parameter] for parameter in held):
        raise UserError(
            "optimizers: none of the optimizer's parameters is trained (those of an adapter are made later): pass the"
            " student with its adapter, or set optim"
        )


def check_adapter_config(peft_config: Any) -> None:
    """An adapter is described by a [`~peft.PeftConfig`]."""
    if peft_config is None:
        return
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        remedy = "LoraConfig(**peft_config)" if isinstance(peft_config, Mapping) else "LoraConfig(...)"
        raise UserError(f"peft_config is {kind_of(peft_config)}: write peft_config={remedy}")


def check_quantization(**given: Any) -> None:
    """A quantization is described by one of transformers' configs."""
    for name, config in given.items():
        if config is not None and (isinstance(config, type) or not hasattr(config, "quant_method")):
            remedy = f"BitsAndBytesConfig(**{name})" if isinstance(config, Mapping) else "BitsAndBytesConfig(...)"
            raise UserError(f"{name} is {kind_of(config)}: write {name}={remedy}")


def check_evaluation(args: DSKDConfig, eval_dataset: Any, compute_metrics: Any) -> None:
    """Evaluations that are asked for need data, and the best checkpoint a metric that they have."""
    from .losses.terms import TERMS

    asked = [name for name in ("eval_strategy", "eval_on_start") if getattr(args, name) not in ("no", False)]
    if asked and eval_dataset is None:
        value = getattr(args, asked[0])
        raise UserError(
            f"{asked[0]}={getattr(value, 'value', value)!r} but eval_dataset=None: pass the examples to evaluate on,"
            f" or leave {asked[0]} out"
        )
    metric = args.metric_for_best_model
    if metric is None or compute_metrics is not None or not asked:
        return
    name = metric.removeprefix("eval_")
    for split in eval_dataset if isinstance(eval_dataset, dict) else ():
        name = name.removeprefix(f"{split}_")
    of_answers = ("rouge_l", "exact_match", "unfinished")
    if name in of_answers and not args.eval_generation_samples:
        raise UserError(
            f"metric_for_best_model={metric!r} is of answers, and there are none: set eval_generation_samples"
        )
    if name not in ("runtime", "samples_per_second", "steps_per_second"):
        names = ("bits_per_byte", "loss", *(term.evaluated for term in TERMS.values()), *of_answers)
        check_name("metric_for_best_model=", name, names)


def check_trackers(names: list[str]) -> None:
    """Trackers of the log must be some that transformers knows, and installed."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        check_name("report_to=", name, INTEGRATION_TO_CALLBACK)
        # Of these the callback raises what isn't one line.
        if name in ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "clearml", "swanlab", "codecarbon"):
            if name not in get_available_reporting_integrations():
                package = name.replace("_", "-")
                raise UserError(f"report_to={name!r} needs {package}: pip install {package}, or choose another")


def check_backends(args: DSKDConfig) -> None:
    """What transformers asks of other libraries only when a model is there must be known, and installed."""
    from accelerate.utils import DynamoBackend
    from torch.utils.checkpoint import checkpoint
    from transformers.utils import is_liger_kernel_available

    check_trackers(args.report_to)  # type: ignore[arg-type]  # a list by now
    if args.torch_compile and args.torch_compile_backend is not None:
        check_name(
            "torch_compile_backend=", args.torch_compile_backend, [kind.value.lower() for kind in DynamoBackend]
        )
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("use_liger_kernel=True needs liger-kernel: pip install liger-kernel, or leave it out")
    for name in args.include_for_metrics:
        check_name("include_for_metrics has ", name, ("inputs", "loss"))
    known = {*inspect.signature(checkpoint).parameters, "preserve_rng_state"} - {"function", "args", "kwargs"}
    for name in args.gradient_checkpointing_kwargs or ():
        check_name("gradient_checkpointing_kwargs has ", name, sorted(known))


def as_model(model: Any, parameter: str) -> Any:
    """A model's name or folder as a string, or a loaded model that has weights."""
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


def check_collator(collator: Any, dataset: Any, with_teacher: bool) -> None:
    """A collator of the user's must make batches of the two tokenizations out of tokenized rows."""
    if dataset is None:
        return
    if hasattr(dataset, "__len__"):
        rows = [dataset[index] for index in range(min(2, len(dataset)))]
    else:
        rows = list(dataset.take(2))
    name = getattr(collator, "__name__", type(collator).__name__)
    remedy = "leave it out, or derive it from hf_dskd.data.collator.DualCollator"
    try:
        batch = collator([dict(row) for row in rows])
    except Exception as error:  # anything may go wrong in code of others
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"data_collator={name} can't batch tokenized rows ({reason}): {remedy}") from error
    tensors = ("input_ids", "attention_mask", "labels")
    needed = (*tensors, *(f"teacher_{tensor}" for tensor in tensors if with_teacher))
    missing = [tensor for tensor in needed if tensor not in batch]
    if missing:
        raise UserError(f"data_collator={name} makes batches without {', '.join(missing)}: {remedy}")


def check_own_tokenizer(tokenizer: Any, model: Any, name: str, parameter: str, init_kwargs: Any) -> None:
    """
    A tokenizer that is given must have the ids of the one saved beside the model.

    Of a student or teacher given by name it is an error, for its embedding can't have another's rows; a loaded model
    may have been changed, and its embedding with it.
    """
    from .pretrained import load_tokenizer, options_of

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
    Each of two tokenizers must be its own model's, not the other's.

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
