"""What a run makes of the settings that trl has for its scripts: each is used, or refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..models.pretrained import PLACE, dtype_option, options_of


if TYPE_CHECKING:
    from trl import ModelConfig, ScriptArguments

    from .settings import Run

# Settings that are options of from_pretrained under another name.
STUDENT = {"model_revision": "revision", "attn_implementation": "attn_implementation"}
STUDENT["trust_remote_code"] = "trust_remote_code"  # of some versions of trl
TEACHER = {"teacher_model_revision": "revision"}
# What means something with another setting only.
ADAPTER = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
    *("lora_task_type", "use_rslora", "use_dora"),
)
FOUR_BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
_USED = (*STUDENT, *ADAPTER, *FOUR_BIT, "model_name_or_path", "dtype", "use_peft", "load_in_8bit", "load_in_4bit")


def merged_options(values: Mapping[str, Any], names: Mapping[str, str], setting: str) -> dict[str, Any]:
    """Merges the options in `setting` of `values` with those that other settings (`names`) stand for."""
    options = options_of(values.get(setting))
    for name, option in names.items():
        value = values.get(name)
        if value in (None, False) or (option == "revision" and value == "main"):
            continue
        if options.get(option, value) != value:
            raise UserError(f"{name}={value!r} and {setting} with {option}={options[option]!r}: name one")
        options[option] = value
    return options


def student_options(run: Run) -> dict[str, Any]:
    """Collects options for `from_pretrained` of the student, out of all settings that say something of it."""
    values = {**vars(run.model), "model_init_kwargs": run.config.model_init_kwargs}
    options = merged_options(values, STUDENT, "model_init_kwargs")
    given = dtype_option(options, "model_init_kwargs")
    if given is None and run.model.dtype is not None:
        options["dtype"] = run.model.dtype
    # float32 is trl's default, and says nothing.
    elif run.model.dtype not in (None, "float32") and dtype_option({"dtype": run.model.dtype}, "dtype") != given:
        raise UserError(f"dtype={run.model.dtype!r} and model_init_kwargs with dtype={str(given)!r}: name one")
    return options


def teacher_options(run: Run) -> dict[str, Any]:
    """Collects options for `from_pretrained` of the teacher that is named, which may still have to be trained."""
    values = {**vars(run.options), "teacher_model_init_kwargs": run.config.teacher_model_init_kwargs}
    return merged_options(values, TEACHER, "teacher_model_init_kwargs")


def without_place(options: Mapping[str, Any]) -> dict[str, Any]:
    """Picks the options for a copy of a model that a run made itself."""
    return {name: value for name, value in options.items() if name not in PLACE}


def quantization(model: ModelConfig, training_dtype: str) -> Any:
    """Makes the student's; where it is loaded in whatever it was saved in, it computes in the training precision."""
    from trl import get_quantization_config

    if model.load_in_4bit and model.dtype in (None, "auto"):
        model = replace(model, dtype=training_dtype)
    return get_quantization_config(model)


def check_model_config(model: ModelConfig, named: Collection[str]) -> None:
    """Raises a [`UserError`] for settings of the student, of which the user `named` some, that nothing would read."""
    for group, needed, setting in (
        (ADAPTER, model.use_peft, "use_peft"),
        (FOUR_BIT, model.load_in_4bit, "load_in_4bit"),
    ):
        alone = [name for name in group if name in named]
        # Who says that there is none overrides a configuration file that has one.
        if alone and not needed and setting not in named:
            what = "all of the student would be trained" if setting == "use_peft" else "the student isn't in 4 bits"
            raise UserError(f"{alone[0]}={getattr(model, alone[0])!r} without {setting}: {what}; add --{setting}")
    for name, value in _changed(model).items():
        if name not in _USED:
            raise UserError(f"{name}={value!r} of trl's ModelConfig is not used by hf_dskd: leave it out")


def check_script_arguments(script: ScriptArguments) -> None:
    """Raises a [`UserError`] for settings of the data that nothing would read."""
    name = script.dataset_name
    if script.ignore_bias_buffers:
        raise UserError("ignore_bias_buffers=True is not used by hf_dskd: set --ddp_broadcast_buffers false instead")
    if script.dataset_config is not None and name is not None:
        folder = Path(name)
        saved = any((folder / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))
        if folder.is_file() or saved or (name == "python_functions" and not folder.exists()):
            raise UserError(
                f"dataset_config={script.dataset_config!r}: {name!r} has no configurations, as datasets of the hub do;"
                " leave it out"
            )


def unused(model: ModelConfig) -> set[str]:
    """Names the settings that mean nothing beside what others are."""
    return {*(() if model.use_peft else ADAPTER), *(() if model.load_in_4bit else FOUR_BIT)}


def _changed(settings: Any) -> dict[str, Any]:
    defaults = {
        setting.name: setting.default if setting.default_factory is MISSING else setting.default_factory()
        for setting in fields(settings)
    }
    return {name: getattr(settings, name) for name, value in defaults.items() if getattr(settings, name) != value}
