"""Every setting says what it may be, and what it may be is checked."""

import math
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import runs
from transformers import HfArgumentParser

from hf_dskd import DSKDConfig
from hf_dskd.errors import UserError, nearest
from hf_dskd.field_checks import TRAINING, check_fields, rule_of
from hf_dskd.methods import DIVERGENCES
from hf_dskd.settings import DIVERGENCE_ALIASES, DistillationSettings


RULES = {setting.name: {**rule_of(setting), **TRAINING.get(setting.name, {})} for setting in fields(DSKDConfig)}
# Not `Field.type`, which parsers replace.
TYPES = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(DSKDConfig).items()}
OWN = [setting.name for setting in fields(DistillationSettings)]
NUMBERS = [name for name in OWN if {int, float} & set(TYPES[name])]


def make(**settings):
    # Every 0 steps is nothing wrong where the strategy says never.
    strategies = {"eval_strategy": "steps"} if "eval_steps" in settings else {}
    return DSKDConfig("out", use_cpu=True, **strategies, **settings)


def refused(**settings):
    ((name, value),) = settings.items()
    with pytest.raises(UserError) as caught:
        make(**settings)
    said = str(caught.value)
    assert said.startswith(f"{name}={value!r} ") and len(said.splitlines()) == 1


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_of_ours_is_one_and_has_a_bound(name):
    rule = RULES[name]
    assert rule.keys() & {"least", "above"}
    for value in (math.nan, math.inf, -math.inf, "1", True, [1]):
        refused(**{name: value})
    if int in TYPES[name]:
        refused(**{name: 2.5})


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.keys() & {"least", "above"}])
def test_values_at_a_bound(name):
    rule = RULES[name]
    for inside, outside in (("least", -1), ("most", 1)):
        if inside in rule:
            refused(**{name: rule[inside] + outside})
    for excluded in ("above", "below"):
        if excluded in rule:
            refused(**{name: rule[excluded]})


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if "choices" in rule])
def test_every_name_is_one_of_its_choices(name):
    first = next(iter(RULES[name]["choices"]))
    with pytest.raises(UserError, match=f"{name}='no such name' is unknown: one of {first}"):
        make(**{name: "no such name"})


@pytest.mark.parametrize("name", [name for name in OWN if TYPES[name] == (bool,)])
def test_a_switch_is_on_or_off(name):
    for value in ("true", 1, None):
        refused(**{name: value})


@pytest.mark.parametrize("alias, name", DIVERGENCE_ALIASES.items())
def test_divergences_as_others_write_them(alias, name):
    setting = "divergence" if name in DIVERGENCES else "alm_divergence"
    assert getattr(make(**{setting: alias}), setting) == name


def test_numbers_of_numpy_and_paths_are_taken(tmp_path):
    config = make(kd_rate=np.float32(0.5), max_length=np.int64(64), teacher_cache=tmp_path, learning_rate=1)
    assert config.teacher_cache == str(tmp_path) and config.max_length == 64 and config.learning_rate == 1
    assert DSKDConfig(Path("out"), use_cpu=True).output_dir == "out"


def test_what_changes_after_a_configuration_is_made_is_checked_again(tmp_path):
    config = runs.config(tmp_path, report_to=["tensorboard"], lr_scheduler_kwargs={}, debug="", max_grad_norm=None)
    config.check()
    config.discriminator_adam_beta1 = 1.0
    with pytest.raises(UserError, match=r"discriminator_adam_beta1=1\.0 is outside \[0, 1\)"):
        config.check()


def test_a_parser_of_arguments_takes_the_settings_as_they_are():
    (config,) = HfArgumentParser((DSKDConfig,)).parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", "--divergence", "rkl", "--kd_temperature", "1"]
    )
    assert (config.divergence, config.kd_temperature) == ("reverse_kl", 1.0)


def test_the_defaults_of_every_setting_are_within_their_bounds():
    check_fields(DistillationSettings(), {})


@pytest.mark.parametrize(
    "value, expected",
    [
        ("forward", "forward_kl"),
        ("Forward-KL", "forward_kl"),
        ("revers_kl", "reverse_kl"),
        ("total", "total_variation"),
        ("kl", None),
        ("x", None),
        ("--version", None),
        ("", None),
    ],
)
def test_near_is_a_slip_or_a_beginning(value, expected):
    assert nearest(value, [*DIVERGENCES, "train"]) == expected
