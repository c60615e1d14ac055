"""What the fields of a dataclass of settings may hold: types by their annotations, bounds by their metadata."""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Mapping
from dataclasses import Field, fields
from enum import Enum
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any

from .errors import UserError, check_name


_KINDS: dict[type, tuple[str, type]] = {
    dict: ("a mapping", Mapping),
    list: ("a list", list),
    bool: ("True or False", bool),
    int: ("an integer", Integral),
    float: ("a number", Real),
    str: ("a string", str),
}


@cache
def _types(settings: type) -> dict[str, tuple[Any, ...]]:
    """Reads the types that each field may have off its annotation."""
    return {
        name: typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
        for name, hint in typing.get_type_hints(settings).items()
    }


def check_fields(settings: Any, rules: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Raises a [`UserError`] for the first field whose value can't work, and writes others as they are kept: the name
    instead of an alias, a path as a string.

    The `rule` in the metadata of a field says what it may be, and `rules` what those of others' fields would:
    `choices` (names), `aliases` (other words for them), `least` and `most` (inclusive), `above` and `below`
    (exclusive), `unset` (a value beyond the bounds that means none), `usual` (what to write instead), and
    `unchecked` for a value that other code replaces by one of another type.
    """
    annotated = _types(type(settings))  # type: ignore[arg-type]  # classes are hashable
    for field in fields(settings):
        rule = {**rule_of(field), **rules.get(field.name, {})}
        value, types = getattr(settings, field.name, None), annotated[field.name]
        if not field.init or "unchecked" in rule:
            continue
        if value is None and (type(None) in types or field.default is None or rule.get("unset", 0) is None):
            continue
        # Every 0 steps is never, where a strategy says so too.
        if value == 0 and getattr(settings, field.name.replace("_steps", "_strategy"), None) == "no":
            continue
        if isinstance(value, str) and value in rule.get("aliases", ()):
            setattr(settings, field.name, rule["aliases"][value])
        elif isinstance(value, os.PathLike) and str in types:
            setattr(settings, field.name, os.fspath(value))
        _check(field, getattr(settings, field.name), rule, types)


def rule_of(field: Field[Any]) -> dict[str, Any]:
    """Reads what a field says of its values."""
    try:
        return field.metadata["rule"]
    except KeyError:
        return {}


def _check(field: Field[Any], value: Any, rule: Mapping[str, Any], types: tuple[Any, ...]) -> None:
    usual = f": {rule['usual']}" if "usual" in rule else "" if field.default is None else f" (default {field.default})"
    shown = f"{field.name}={value!r}"
    names = [kind.value for enum in types if isinstance(enum, type) and issubclass(enum, Enum) for kind in enum]
    if names or "choices" in rule:
        check_name(f"{field.name}=", value.value if isinstance(value, Enum) else value, rule.get("choices", names))
        return
    plain = [typing.get_origin(kind) or kind for kind in types if kind is not type(None)]
    if not _KINDS.keys() >= set(plain):
        return
    kinds = [_KINDS[kind] for kind in plain]
    if value == "" and type(None) in types:
        raise UserError(f"{shown} is empty: leave it out")
    if not any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for _, kind in kinds):
        raise UserError(f"{shown} must be {' or '.join(name for name, _ in kinds)}{usual}")
    if not isinstance(value, Real) or isinstance(value, bool) or value == rule.get("unset"):
        return
    least, above, most, below = (rule.get(key) for key in ("least", "above", "most", "below"))
    # Comparisons that are false for a NaN.
    low_enough = (most is None or value <= most) and (below is None or value < below)
    high_enough = (least is None or value >= least) and (above is None or value > above)
    if not (low_enough and high_enough) or not math.isfinite(value):
        raise UserError(f"{shown} {_bounds(least, above, most, below, value)}{usual}")


def _bounds(least: Any, above: Any, most: Any, below: Any, value: Any) -> str:
    low = f"at least {least}" if least is not None else f"above {above}" if above is not None else ""
    if most is not None or below is not None:
        left = f"[{least}" if least is not None else f"({above}"
        right = f"{most}]" if most is not None else f"{below})"
        return f"is outside {left}, {right}"
    if math.isinf(value) or not low:
        return "must be a finite number"
    return f"must be {low}"


# What transformers lets through, or ends on when the models are loaded.
TRAINING: dict[str, dict[str, Any]] = {
    **{name: {"least": 1} for name in ("per_device_train_batch_size", "per_device_eval_batch_size")},
    **{name: {"least": 1} for name in ("gradient_accumulation_steps", "eval_accumulation_steps", "ddp_timeout")},
    **{name: {"least": 1} for name in ("torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_bucket_cap_mb")},
    **{name: {"least": 0} for name in ("learning_rate", "weight_decay", "adam_epsilon", "neftune_noise_alpha")},
    **{name: {"least": 0} for name in ("dataloader_num_workers", "eval_delay", "warmup_steps")},
    **{name: {"least": 0, "most": 2**32 - 1} for name in ("seed", "data_seed")},
    **{name: {"least": 0, "below": 1} for name in ("adam_beta1", "adam_beta2")},
    "warmup_ratio": {"least": 0, "most": 1},
    "max_grad_norm": {"least": 0, "unset": None, "usual": "0 clips nothing"},
    "eval_steps": {"above": 0, "usual": "eval_strategy='no' evaluates never"},
    "save_steps": {"above": 0, "usual": "save_strategy='no' saves never"},
    "save_total_limit": {"least": 1, "usual": "None keeps all checkpoints"},
    "log_level": {"choices": ("passive", "detail", "debug", "info", "warning", "error", "critical")},
    "log_level_replica": {"choices": ("passive", "detail", "debug", "info", "warning", "error", "critical")},
    "train_sampling_strategy": {"choices": ("random", "sequential", "group_by_length", "batch_rebalance")},
    **{name: {"unchecked": True} for name in ("fsdp", "debug", "accelerator_config", "resume_from_checkpoint")},
}
