"""What a trainer is given: taken in the kinds that people have, and refused by name where it is no such thing."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

from ..errors import UserError, check_name, kind_of
from ..teacher.load import named_device
from .run_folder import check_output_dir


if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from ..config import DSKDConfig

logger = logging.getLogger(__name__)


def check_given(
    args: DSKDConfig, model: Any, eval_dataset: Any, data_collator: Any, compute_metrics: Any, optimizers: Any
) -> None:
    """Checks what [`~hf_dskd.DSKDTrainer`] is given as far as that takes neither models nor the rows of data."""
    check_evaluation(args, eval_dataset, compute_metrics)
    check_backends(args)
    check_optimizers(args, optimizers, model)
    check_optimization(args, optimizers[0])
    check_launch(args)
    check_output_dir(str(args.output_dir))
    check_metric(args, eval_dataset)
    if args.teacher_cache is not None and args.method_row.needs_teacher and data_collator is not None:
        raise UserError(
            f"teacher_cache={args.teacher_cache!r} and a data_collator of your own: batches need the cached states,"
            " which DualCollator adds; leave one of them out"
        )


def check_args(args: Any) -> None:
    """Settings must be a [`DSKDConfig`]."""
    from ..config import DSKDConfig

    if isinstance(args, DSKDConfig):
        return
    remedy = "write DSKDConfig(...) with the same settings"
    if isinstance(args, Mapping):
        remedy = "write DSKDConfig(**args)"
    elif isinstance(args, (str, os.PathLike)):
        remedy = f"write DSKDConfig({os.fspath(args)!r}), if that is the output folder"
    raise UserError(f"args is {kind_of(args)}, which isn't a DSKDConfig: {remedy}")


def settle(args: DSKDConfig) -> None:
    """Sets what the other settings of a run leave open."""
    if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
        # Reentrant checkpointing needs an input that requires a gradient, which a frozen embedding doesn't give.
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    if args.world_size > 1 and args.accelerator_config.dispatch_batches is None:  # type: ignore[union-attr]
        # One rank would cut the batches of all out of its own, which are padded to lengths of their own.
        args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]


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


def check_optimizers(args: DSKDConfig, optimizers: Any, model: Any) -> None:
    """Checks the pair of optimizer and schedule, either `None`; a student that isn't loaded yet has no parameters."""
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
    if args.method_row.dual_space and schedule is not None:
        raise UserError(
            "optimizers=(…, scheduler): a schedule made before the projectors join the optimizer can't drive them;"
            " pass (optimizer, None) and set lr_scheduler_type"
        )
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
    """Makes the optimizer and the schedule of the settings for one number, to find out whether they can be made."""
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
    """Tells whether the optimizer of the settings reads that part of optim_args: such a part can't be any text."""
    from transformers import Trainer

    without, other = copy(args), copy(args)
    without.optim_args, other.optim_args = None, f"{name}=?"
    try:
        found = Trainer.get_optimizer_cls_and_kwargs(other)
    except (ValueError, AttributeError):
        return True
    return found != Trainer.get_optimizer_cls_and_kwargs(without)


def check_optimized(optimizer: Optimizer | None, student: nn.Module) -> None:
    """Checks that an optimizer of the user's holds parameters of the student, trained ones among them."""
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


def check_evaluation(args: DSKDConfig, eval_dataset: Any, compute_metrics: Any) -> None:
    """Evaluations that are asked for need data, and the best checkpoint a metric that they have."""
    from ..losses.terms import TERMS

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
    """Checks what transformers asks of other libraries only when a model is there: known, and installed."""
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


def check_collator(collator: Any, dataset: Any, with_teacher: bool) -> None:
    """Checks that a collator of the user's makes batches of the two tokenizations out of tokenized rows."""
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


def check_launch(config: DSKDConfig) -> None:
    """Refuses a way of running that would give wrong numbers silently, and a device that isn't there."""
    if config.teacher_device is not None and named_device(config.teacher_device).type != "cpu" and config.n_gpu == 2:
        # The second is the teacher's. Trainer would spread the student's batches over both.
        config._n_gpu = 1
    if config.n_gpu > 1:
        raise UserError(
            f"{config.n_gpu} GPUs are visible to one process, which means nn.DataParallel:"
            f" start with `accelerate launch --num_processes {config.n_gpu} SCRIPT`, or set CUDA_VISIBLE_DEVICES=0"
        )


def check_metric(config: DSKDConfig, eval_dataset: Any) -> None:
    """Checks that a metric that chooses a checkpoint, or moves a schedule, names its set; of one set it is that."""
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
