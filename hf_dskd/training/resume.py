"""What a checkpoint must have and agree in before a run goes on from it."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..models.pretrained import config_settings, options_of
from ..settings import DistillationSettings
from ..utils.files import plain
from .run_folder import (
    AUXILIARY_NAME,
    check_facts,
    checkpoints,
    read_auxiliary,
    run_id,
    step,
)


if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ..config import DSKDConfig

logger = logging.getLogger(__name__)

# Settings of hf_dskd that change nothing of what is learnt.
HARMLESS = frozenset(
    "dataset_num_proc teacher_cache repair_teacher_cache loss_memory_mb padding_free logging_steps report_to"
    " analysis_steps analysis_examples eval_generation_samples hub_strategy push_auxiliary_to_hub replace_on_hub"
    " teacher_device model_init_kwargs teacher_model_init_kwargs on_nonfinite allow_changed_settings".split()
)
# Those of transformers that do.
TRAINING = (
    "seed data_seed per_device_train_batch_size gradient_accumulation_steps max_steps num_train_epochs learning_rate"
    " lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args optim_target_modules"
    " weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 fp16 neftune_noise_alpha group_by_length"
    " train_sampling_strategy dataloader_drop_last"
).split()
# What the saved states of optimizers have the shape of.
FIXED = frozenset(
    "optim optim_args optim_target_modules discriminator_hidden_size peft_config.r peft_config.target_modules"
    " peft_config.modules_to_save peft_config.rank_pattern peft_config.peft_type".split()
)
# Schedules that remember more than their step.
STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
# Settings among what the groups of an optimizer have; some keep states of theirs there.
GROUP_SETTINGS = frozenset(
    "initial_lr betas eps weight_decay momentum dampening nesterov alpha amsgrad warmup_steps".split()
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def trajectory(config: DSKDConfig, ranks: int, data: str | None, peft_config: Any = None) -> dict[str, Any]:
    """
    Collects everything of a run that changes what its student becomes, as JSON has it.

    `data` is the [`~hf_dskd.data.fingerprint.fingerprint`] of its training data, `peft_config` that of its adapter.
    """
    names = [setting.name for setting in fields(DistillationSettings) if setting.name not in HARMLESS]
    names += [name for name in TRAINING if hasattr(config, name)]
    teacher = options_of(config.teacher_model_init_kwargs)
    adapter = {} if peft_config is None else peft_config.to_dict()
    for name in ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"):
        adapter.pop(name, None)
    if adapter.get("peft_type") == "ADALORA":
        # What it has allocated so far, and no setting.
        adapter.pop("rank_pattern", None)
    found = {
        **{name: getattr(config, name) for name in names},
        "processes": ranks,
        "train_data": data,
        **{f"teacher_{name}": str(teacher[name]) for name in ("revision", "dtype", "torch_dtype") if name in teacher},
        "model_init_kwargs": _of_model(config.model_init_kwargs),
        "teacher_model_init_kwargs": _of_model(teacher),
        **{f"peft_config.{name}": value for name, value in adapter.items()},
    }
    return {name: _jsonable(value) for name, value in found.items()}


def _of_model(init_kwargs: Any) -> dict[str, Any]:
    """Picks the options that change what a model computes, beside its dtype; not those of places and speed."""
    options = options_of(init_kwargs)
    found = {"revision": options.get("revision") or "main", "quantization": options.get("quantization_config")}
    return config_settings(options) | {name: value for name, value in found.items() if value not in (None, "main")}


def active_adapter(model: Any) -> Any:
    """Returns the configuration of a model's adapter, of PEFT's class or added to one of transformers, or `None`."""
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return None
    active = model.active_adapters
    # A property in PEFT, a method in transformers.
    names = active() if callable(active) else active
    return adapters[names if isinstance(names, str) else names[0]]


def _jsonable(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    return json.loads(json.dumps(plain(value), default=str))


def differences(saved: dict[str, Any], now: dict[str, Any], any_length: bool) -> dict[str, tuple[Any, Any]]:
    """
    Compares what was `saved` with what is `now`, by name; what only one of them has is of another version.

    With `any_length` the length of the run changes nothing before its end.
    """
    ignored = {"max_steps", "num_train_epochs"} if any_length else set()
    if min(saved.get("max_steps") or 0, now.get("max_steps") or 0) > 0:
        ignored.add("num_train_epochs")
    return {
        name: (saved[name], now[name])
        for name in saved.keys() & now.keys()
        if name not in ignored and saved[name] != now[name]
    }


def keeps_no_length(config: DSKDConfig) -> bool:
    """Tells whether no rate and no temperature moves with the share of the run that is done."""
    warms_up = bool(getattr(config, "warmup_ratio", None)) or 0 < (config.warmup_steps or 0) < 1
    steady = ("constant",) if warms_up else ("constant", "constant_with_warmup")
    kinds = (plain(config.lr_scheduler_type), config.discriminator_lr_scheduler_type)
    return all(kind in steady for kind in kinds) and config.temperature_schedule == "constant"


def check_settings(
    checkpoint: Path, saved: dict[str, Any], now: dict[str, Any], config: DSKDConfig
) -> dict[str, tuple[Any, Any]]:
    """Compares the settings of a checkpoint's run; a [`UserError`] names what may not change, in one line."""
    changed = differences(saved, now, keeps_no_length(config))
    if config.auto_find_batch_size:
        changed.pop("per_device_train_batch_size", None)
    if not changed:
        return {}
    shown = ", ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in sorted(changed.items()))
    fixed = [name for name in sorted(changed) if name in FIXED or _is_stateful(name, saved, now)]
    if fixed:
        raise UserError(
            f"resume_from_checkpoint={str(checkpoint)!r} has other settings: {shown}; {', '.join(fixed)} can't change"
            " in a run, whose optimizer has states of it: set as it was, or start in a new output_dir"
        )
    if not config.allow_changed_settings:
        raise UserError(
            f"resume_from_checkpoint={str(checkpoint)!r} has other settings: {shown}; set as it was, or accept the"
            " change with allow_changed_settings=True (--allow_changed_settings)"
        )
    later = [path for path in checkpoints(checkpoint.parent) if step(path) > step(checkpoint)]
    later = [path for path in later if run_id(path) == run_id(checkpoint)]
    if later:
        raise UserError(
            f"{later[-1].name} comes after {str(checkpoint)!r}, which is to go on with other settings ({shown}):"
            " delete what comes after, or choose another output_dir"
        )
    logger.warning("%s goes on with other settings: %s", checkpoint, shown)
    return changed


def _is_stateful(name: str, saved: dict[str, Any], now: dict[str, Any]) -> bool:
    schedules = {saved.get("lr_scheduler_type"), now.get("lr_scheduler_type")}
    rates = ("learning_rate", "projector_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs")
    return name in rates and not schedules.isdisjoint(STATEFUL_SCHEDULES)


def check_checkpoint(
    folder: str | Path, facts: dict[str, Any], shapes: dict[str, dict[str, list[int]]], needed: list[str], ranks: int
) -> dict[str, Any]:
    """
    Reads `auxiliary.json` of a checkpoint that a run can go on from.

    `facts` must agree whatever is allowed: method, pair, sizes; `shapes` are those of every tensor beside the student;
    `needed` are files that the run reads beside those that every one does; `ranks` its processes. A [`UserError`] if
    it is none, of another run, or damaged; then with the last one that is whole.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"resume_from_checkpoint={str(folder)!r} isn't a folder: name a checkpoint-N folder of a run")
    # A run's own folder can have the first two.
    parts = ("trainer_state.json", AUXILIARY_NAME, "optimizer.pt")
    is_one = folder.name.startswith("checkpoint-") and any((folder / name).is_file() for name in parts)
    for name in parts:
        if not is_one and not (folder / name).is_file():
            inside = checkpoints(folder)
            hint = f": did you mean {str(inside[-1])!r}?" if inside else ": name a checkpoint-N folder of a run"
            raise UserError(f"resume_from_checkpoint={str(folder)!r} is not a checkpoint, it has no {name}{hint}")
    reason = damage(folder, needed, ranks)
    if reason is not None:
        whole = [path for path in checkpoints(folder.parent) if path != folder and damage(path, needed, ranks) is None]
        remedy = f"go on from {str(whole[-1])!r}, the last whole one" if whole else "there is no whole one beside it"
        raise UserError(f"resume_from_checkpoint={str(folder)!r} is damaged, {reason}: {remedy}")
    check_facts(folder, facts, "resume_from_checkpoint=")
    saved = read_auxiliary(folder)
    for name, tensors in shapes.items():
        if saved["modules"].get(name, {}).get("shapes") != tensors:
            raise UserError(
                f"resume_from_checkpoint={str(folder)!r} has other {name.replace('_', ' ')} than this run, in shape or"
                " number: use the settings it was made with, or start in a new output_dir"
            )
    return saved


def damage(folder: Path, needed: list[str], ranks: int) -> str | None:
    """Finds what keeps a checkpoint from being read, or `None`."""
    name = ""
    try:
        if not (folder / AUXILIARY_NAME).is_file():
            return f"{AUXILIARY_NAME} is missing"
        saved = read_auxiliary(folder)
        for name in _files(folder, saved, needed, ranks):
            if not (folder / name).is_file():
                return f"{name} is missing"
            check_readable(folder / name)
    except UserError as error:
        return str(error).removesuffix(": use another checkpoint")
    except Exception as error:  # the readers of three formats raise some ten kinds
        return f"{name} can't be read ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return None


def _files(folder: Path, saved: dict[str, Any], needed: list[str], ranks: int) -> Iterator[str]:
    settings = saved.get("settings", {})
    yield from ("trainer_state.json", "optimizer.pt", "scheduler.pt")
    # A run that is now in fp16 and wasn't has no scale to go on with, and other processes have no random states.
    yield from (name for name in needed if name != "scaler.pt" or settings.get("fp16", True))
    if settings.get("processes") == ranks:
        yield from ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    yield from (module["file"] for module in saved["modules"].values())
    if saved["adapter"]:
        found = [path for name in ADAPTER_WEIGHTS for path in (folder / name, *folder.glob(f"*/{name}"))]
        yield from [str(path.relative_to(folder)) for path in found if path.is_file()] or ADAPTER_WEIGHTS[:1]
        return
    sharded = any(folder.glob("model-*-of-*.safetensors"))
    name = next((name for name in WEIGHTS if (folder / name).is_file()), WEIGHTS[1 if sharded else 0])
    yield name
    if name.endswith(".index.json"):
        yield from sorted(set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()))


def check_readable(path: Path) -> None:
    """Raises whatever its reader does if a JSON, safetensors or PyTorch file is cut off or malformed."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt"):
            # Names, shapes and the size of the file agree.
            pass
    else:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise zipfile.BadZipFile(f"{bad} has another checksum")


def rates(optimizer: Optimizer, schedule: Any) -> tuple[list[dict[str, Any]], list[float]]:
    """Reads what a new optimizer and its schedule are set to, to be given to [`set_rates`]."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return groups, list(getattr(schedule, "base_lrs", []))


def set_rates(optimizer: Optimizer, schedule: Any, kept: tuple[list[dict[str, Any]], list[float]]) -> None:
    """
    Gives an optimizer that was loaded the settings that it had before, at the step that its schedule has reached.

    Loading replaces them by those that were saved, which would pass over what has been changed.
    """
    groups, base = kept
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in settings.items() if key in GROUP_SETTINGS})
    if not hasattr(schedule, "lr_lambdas"):
        return
    schedule.base_lrs = base
    schedule._last_lr = [rate * factor(schedule.last_epoch) for rate, factor in zip(base, schedule.lr_lambdas)]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
