"""The settings of a run: those of a YAML file, and whatever the command line sets instead."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import UserError
from ..field_checks import check_fields
from ..launch import Parser
from ..precision import launched_precision
from ..settings import DistillationSettings
from ..utils.files import read_yaml
from ..words import FLAGS, INSTEAD, SETTINGS, instead_of, translated
from .settings import RULES, Run, RunArguments
from .smoke import prepare_smoke, smoke_flags, wants_smoke


if TYPE_CHECKING:
    from ..config import DSKDConfig

LISTED = "--help lists the settings"
# What settings are about, by the first of each kind in the order of the dataclasses; `--help` has them so.
GROUPS = {
    "teacher_model_name_or_path": "Models",
    "rename_columns": "Data",
    "total_batch_size": "Training",
    "smoke": "A try",
    "sft_teacher": "A teacher that is trained first",
    "method": "Method",
    "alignment": "Alignment and matching",
    "divergence": "Divergence and temperature",
    "alm_divergence": "Likelihood matching (alm)",
    "bpm_segmentation": "Byte-prefix target (bpm)",
    "on_policy_fraction": "Method",
    "kq_rate": "Alignment and matching",
    "attention_kd_rate": "Attention",
    "scale_queries": "Alignment and matching",
    "as_published": "Method",
    "projector_learning_rate": "Projectors and discriminator",
    "on_nonfinite": "Training",
    "max_length": "Data",
    "teacher_cache": "Memory and speed",
    "logging_steps": "Logs and evaluation",
    "hub_strategy": "Hub",
    "load_teacher_in_4bit": "Memory and speed",
    "model_init_kwargs": "Models",
}
OTHERS = """\
The student: --model_name_or_path, --use_peft, --lora_r, --lora_target_modules, ... (trl.ModelConfig).
The data: --dataset_name, --dataset_config, ... (trl.ScriptArguments).
The training: --output_dir, --max_steps, --num_train_epochs, --learning_rate, --per_device_train_batch_size,
--bf16, --seed, --report_to, --push_to_hub, --resume_from_checkpoint last, ... (transformers.TrainingArguments)."""


def parse(description: str | None, config_file: Path | None = None, arguments: list[str] | None = None) -> Run:
    """
    Reads the arguments of a run: those of a YAML file, `config_file` or the one of `--config`, and whatever the
    command line overrides.

    Half precision is taken where the machine computes in it, unless the arguments say otherwise. `--help` answers from
    the light settings alone; importing transformers would take seconds.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(description, config_file))
        sys.exit(0)
    arguments = [
        part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    if "--config" not in arguments and config_file is not None:
        arguments = ["--config", str(config_file), *arguments]
    path, settings = "", dict[str, Any]()
    if "--config" in arguments:
        path = [*arguments, ""][arguments.index("--config") + 1]
        settings = read_yaml("--config", path)
    run, named = _parsed(arguments, path, settings)
    _check(run, named)
    set_accumulation(run)
    if run.options.smoke:
        prepare_smoke(run)
    return run


def _parsed(arguments: list[str], path: str, settings: dict[str, Any]) -> tuple[Run, set[str]]:
    """Reads a command line with the settings of the file that it names; gives the names of all that are set too."""
    from trl import ModelConfig, ScriptArguments, TrlParser

    from ..config import DSKDConfig

    groups = (ScriptArguments, DSKDConfig, ModelConfig, RunArguments)
    known = [setting.name for group in groups for setting in fields(group) if setting.init]
    same = {**SETTINGS, **FLAGS}

    class RunParser(TrlParser):
        def error(self, message: str) -> NoReturn:
            # argparse would print the names of some three hundred settings first.
            raise UserError(message)

        def set_defaults_with_config(self, **settings: Any) -> list[str]:
            return super().set_defaults_with_config(**translated(repr(path), settings, known, same, LISTED))

    # What is wanted of `env` is the parser's.
    settings = translated(
        repr(path), {name: settings[name] for name in settings if name != "env"}, known, same, LISTED
    )
    arguments = our_flags(arguments, known, same)
    given = flag_names(arguments)
    smoke = smoke_flags(settings, given) if wants_smoke(arguments, settings) else []
    # What a YAML file says about precision would lose to flags on the command line, and fp16 doesn't replace bf16.
    said = (given | settings.keys()) & {"bf16", "fp16"} or launched_precision()
    precision = [f"{flag}=true" for flag in fastest_precision() if flag == "--use_cpu" or not said]
    # Half of a name would be understood by the parser, but not by what looks for names here.
    parser = RunParser(groups, allow_abbrev=False)  # type: ignore[arg-type]
    try:
        parts = parser.parse_args_and_config(args=[*precision, *smoke, *arguments])
    except UserError:
        raise
    except ValueError as error:
        raise _not_parsed(" ".join(str(error).split()), known) from None
    return Run(*parts), given | settings.keys()


def _check(run: Run, named: set[str]) -> None:
    from .trl_settings import check_model_config, check_script_arguments

    check_fields(run.options, RULES)
    check_model_config(run.model, named)
    check_script_arguments(run.script)
    if run.options.teacher_model_revision is not None and run.options.teacher_model_name_or_path is None:
        raise UserError(
            f"teacher_model_revision={run.options.teacher_model_revision!r} without teacher_model_name_or_path: name"
            " the teacher too"
        )


def flag_names(arguments: list[str]) -> set[str]:
    """Names the settings that a command line sets."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}


def our_flags(arguments: list[str], known: Collection[str], same: Mapping[str, str]) -> list[str]:
    """Gives the settings of a command line the names that they have here (see [`hf_dskd.words`])."""
    given, result = flag_names(arguments), []
    for word in arguments:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        ours = same.get(name, name)
        if word.startswith("--") and name not in known:
            if ours in given and ours != name:
                raise UserError(f"{flag} is --{ours} here, and both are given: leave one of them out")
            if ours not in known and name in INSTEAD:
                raise UserError(instead_of(flag, known, LISTED))
            flag = f"--{ours}" if ours in known else flag
        result.append(flag + equals + value)
    return result


def _not_parsed(message: str, known: list[str]) -> UserError:
    """Says what the parser says, or of a word that it doesn't know, the nearest name."""
    words = re.search(r"not used by the HfArgumentParser: \[(.*?)\]", message)
    word = words.group(1).split(",")[0].strip(" '\"") if words else ""
    if not word:
        return UserError(message)
    if not word.startswith("--"):
        return UserError(
            f"{word!r} belongs to no setting: name a configuration file with --config, a value with --NAME"
        )
    return UserError(instead_of(word.partition("=")[0], known, LISTED))


def help_text(description: str | None, config_file: Path | None = None) -> str:
    """Lists every setting of hf_dskd with its default, which may be a recipe's own."""
    parser = Parser(usage=argparse.SUPPRESS, description=description)
    add_settings(parser, config_file)
    return parser.format_help().strip()


def add_settings(parser: argparse.ArgumentParser, config_file: Path | None = None) -> None:
    """Adds the settings that hf_dskd has of its own to a parser, in groups and with the defaults of a file."""
    defaults = {} if config_file is None else read_yaml("--config", config_file)
    source = "the YAML file of --config" if config_file is None else config_file.name
    parser.epilog = f"Defaults come from {source}; any value can be overridden.\n\n{OTHERS}"
    own = parser.add_argument_group("The run")
    own.add_argument("--config", metavar="FILE.yaml", help="file of settings, one `name: value` a line")
    groups, title = dict[str, Any](), ""
    for settings in (RunArguments, DistillationSettings):
        for setting in fields(settings):
            title = GROUPS.get(setting.name, title)
            group = groups[title] = groups.get(title) or parser.add_argument_group(title)
            told = str(setting.metadata["help"]).replace("%", "%%")
            default = defaults.get(setting.name, setting.default)
            choices = values_of(setting)
            group.add_argument(f"--{setting.name}", metavar=f"({default})", help=told, choices=choices)


def values_of(setting: Any) -> tuple[str, ...] | None:
    """Lists the few values that a setting has, or gives `None`."""
    if setting.type in ("bool", "bool | None"):
        return ("true", "false")
    try:
        return tuple(setting.metadata["rule"]["choices"])
    except KeyError:
        return None


def fastest_precision() -> list[str]:
    """Gives the flags of the half precision that this machine computes in, or none."""
    import torch

    if torch.cuda.is_available():
        return ["--bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["--fp16"]
    # Processors without such instructions are slower in bf16 than in float32.
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    # transformers wants to be told that bf16 on a CPU is meant.
    return ["--bf16", "--use_cpu"] if has_bf16 and not torch.backends.mps.is_available() else []


def variant(config: DSKDConfig, **changes: Any) -> DSKDConfig:
    """
    Makes the same configuration with some settings changed, and checks it anew.

    For a method without a teacher in its loss, the settings that it would refuse are left out.
    """
    from ..config import PARTS
    from ..methods import METHODS

    own = {setting.name: getattr(config, setting.name) for setting in fields(config) if setting.init}
    changed = {**own, **changes}
    if not METHODS[changed["method"]].needs_teacher:
        changed |= {**dict.fromkeys(PARTS), "on_policy_fraction": 0.0, "attention_kd_rate": 0.0}
    return type(config)(**changed)


def set_accumulation(run: Run) -> None:
    """Makes `gradient_accumulation_steps` of `total_batch_size`, whatever the number of processes."""
    total = run.options.total_batch_size
    if total is None:
        return
    config = run.config
    at_once = config.per_device_train_batch_size * config.world_size
    if total % at_once:
        raise UserError(
            f"total_batch_size={total} is no multiple of {config.world_size} processes x per_device_train_batch_size"
            f"={config.per_device_train_batch_size}: change one of them"
        )
    config.gradient_accumulation_steps = total // at_once
