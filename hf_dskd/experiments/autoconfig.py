"""
Two names are all that another pair of models takes: every other setting is derived, and its reason said.

There is no file to write for the projectors, no table of layer or embedding names and no file of shared tokens, which
the published code asks for: hidden sizes are read from the two configurations, embedding and head from the models,
and tokens are aligned by the method.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..methods import METHODS


if TYPE_CHECKING:
    from ..training.pair import Side
    from .memory import Size, Step

logger = logging.getLogger(__name__)

MAX_LENGTH = 512
TOTAL_BATCH_SIZE = 32
BATCH_SIZES = (8, 4, 2, 1)
# Of the free memory, what is kept back: the formulas have errors of about that size.
MARGIN = 0.1
# Students with more parameters than that get an adapter, whatever the memory.
FULLY_TRAINED = 0.5e9
LORA_R = 64
LEARNING_RATES = {"full": 5e-5, "adapter": 2e-4}
# Settings that memory depends on, and that are derived unless they are given.
FITTED = ("use_peft", "load_teacher_in_4bit", "gradient_checkpointing", "per_device_train_batch_size")


@dataclass(frozen=True)
class Derived:
    """What a pair needs: settings of a run, as `hf-dskd train --config` reads them, and a reason for each."""

    settings: dict[str, Any]
    reasons: dict[str, str]

    @property
    def flags(self) -> list[str]:
        """Writes the settings as a command line has them."""
        return [
            f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"
            for name, value in self.settings.items()
        ]

    def __str__(self) -> str:
        # YAML, with the reasons as comments.
        import yaml

        lines = [
            # JSON is YAML of one line.
            f"{name}: {json.dumps(value)}"
            if isinstance(value, dict)
            else yaml.safe_dump({name: value}, width=math.inf).strip()
            for name, value in self.settings.items()
        ]
        width = max(map(len, lines))
        return "\n".join(f"{line:{width}}  # {reason}" for line, reason in zip(lines, self.reasons.values()))


def derive(
    student: str,
    teacher: str,
    *,
    memory: float | None,
    device: str,
    given: dict[str, Any],
    dtype: str = "bfloat16",
    processes: int = 1,
) -> Derived:
    """
    Derives settings for a pair of models, from their configurations and tokenizers alone: no weights are loaded.

    Args:
        student, teacher (`str`): Folders, names on the hub, or of packaged models.
        memory (`float`, *optional*): Bytes that a process can have on the device; `None` is as much as it takes.
        device (`str`): Its type, such as `"cuda"` or `"cpu"`.
        given (`dict[str, Any]`): Settings that are fixed. They are used in the fitting, and not among the derived.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): Name of the training precision.
        processes (`int`, *optional*, defaults to `1`): That share `total_batch_size`.

    Raises:
        UserError: If a model can't be read or is no causal one, if both are the same, or if no choice of what is left
            to choose fits into the memory.
    """
    check_two(student, teacher)
    from ..offline.packaged import model_name
    from ..run.trl_settings import STUDENT, TEACHER, merged_options
    from ..training.pair import Side

    sides = [
        Side("student", model_name(student), merged_options(given, STUDENT, "model_init_kwargs")),
        Side("teacher", model_name(teacher), merged_options(given, TEACHER, "teacher_model_init_kwargs")),
    ]
    names = [_short(student), _short(teacher)]
    found: dict[str, tuple[Any, str]] = {
        "model_name_or_path": (student, "the student"),
        "teacher_model_name_or_path": (teacher, "the teacher"),
        "output_dir": (output_dir(student, teacher), "named after the two"),
        "max_length": _max_length(sides, names),
        "method": _method(sides, given),
        "prompt_style": _prompt_style(sides, names),
    }
    if given.get("prompt_style", found["prompt_style"][0]) == "chat":
        found |= _chat_template_kwargs(sides)
    fixed = {**{name: value for name, (value, _) in found.items()}, **given}
    found |= _fit(sides, fixed, memory, device, dtype, processes)
    own = [name for name in found if name not in given]
    return Derived({name: found[name][0] for name in own}, {name: found[name][1] for name in own})


def check_two(student: str, teacher: str) -> None:
    """Refuses a model as its own teacher."""
    if student == teacher or (
        os.path.isdir(student) and os.path.isdir(teacher) and os.path.samefile(student, teacher)
    ):
        raise UserError(f"{student!r} is student and teacher: name a larger model as the teacher, after the student")


def output_dir(student: str, teacher: str) -> str:
    """Names the run `runs/STUDENT_TEACHER`, without organizations and folders."""
    return f"runs/{_short(student)}_{_short(teacher)}"


def _short(name: str) -> str:
    return Path(name).resolve().name


def _max_length(sides: list[Side], names: list[str]) -> tuple[int, str]:
    longest, why = MAX_LENGTH, "tokens of prompt and response"
    for side, name in zip(sides, names):
        positions = getattr(side.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and positions < longest:
            longest, why = positions, f"{name} has no more positions"
    return longest, why


def _method(sides: list[Side], given: dict[str, Any]) -> tuple[str, str]:
    from ..config import PARTS
    from ..data.vocabulary import same_vocabulary

    same = same_vocabulary(*(side.tokenizer for side in sides))
    if same and not given.keys() & set(PARTS):
        return "dskd", "one vocabulary: compares token by token"
    return "dskd_cma_ga", "goes with the parts that you set" if same else "two vocabularies: attention aligns tokens"


def _prompt_style(sides: list[Side], names: list[str]) -> tuple[str, str]:
    if not any(side.tokenizer.chat_template for side in sides):
        return "plain", "neither has a chat template: both see plain text"
    sees = {True: "its chat template", False: "plain text, it has no template"}
    seen = (f"{name}: {sees[bool(side.tokenizer.chat_template)]}" for side, name in zip(sides, names))
    return "chat", "; ".join(seen)


def _chat_template_kwargs(sides: list[Side]) -> dict[str, tuple[Any, str]]:
    templates = json.dumps([side.tokenizer.chat_template for side in sides])
    found = {
        "enable_thinking": (False, "the data's responses don't think aloud"),
        "date_string": ("26 Jul 2024", "with today's date, prompts would be others tomorrow"),
    }
    named = {name: pair for name, pair in found.items() if name in templates}
    values, reasons = ({name: pair[part] for name, pair in named.items()} for part in (0, 1))
    return {"chat_template_kwargs": (values, "; ".join(map(str, reasons.values())))} if named else {}


@dataclass(frozen=True)
class _Choice:
    """A way to train that is tried against the memory; `needed` in bytes, with what an allocator can't use."""

    step: Step
    four_bit: bool
    needed: float

    def __str__(self) -> str:
        step = self.step
        parts = [f"LoRA r {step.adapter_rank}" if step.adapter_rank else "all of the student trained"]
        parts += ["NF4 teacher"] if self.four_bit else []
        parts += ["gradient checkpointing"] if step.gradient_checkpointing else []
        return ", ".join([*parts, f"batches of {step.batch_size} x {step.max_length}"])


def _choices(
    student: Size, teacher: Size, fixed: dict[str, Any], device: str, dtype: str, processes: int, four_bit: bool
) -> Iterator[_Choice]:
    """Ways to train that `fixed` settings leave open, the best first; `four_bit` says whether NF4 can run."""
    from .memory import Step, room, step_memory, teacher_pass, teacher_weights

    def options(name: str, *otherwise: Any) -> tuple[Any, ...]:
        return (fixed[name],) if name in fixed else otherwise

    accumulation = fixed.get("gradient_accumulation_steps", 1)
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    total = fixed.get("total_batch_size", None if "gradient_accumulation_steps" in fixed else TOTAL_BATCH_SIZE)
    if total is not None:
        batch_sizes = tuple(size for size in BATCH_SIZES if total % (size * processes) == 0) or (1,)
    rank = fixed.get("lora_r", LORA_R)
    wants_adapter = any(name.startswith(("lora_", "load_in_")) for name in fixed)
    ranks: tuple[int | None, ...] = (None, rank)
    if fixed.get("use_peft", wants_adapter or student.parameters > FULLY_TRAINED):
        ranks = (rank,)
    elif "use_peft" in fixed:
        ranks = (None,)
    cached = fixed.get("teacher_cache") is not None
    # Beside the student are then its head and embedding alone.
    elsewhere = cached or fixed.get("teacher_device") is not None
    # What changes no result gives way first: the micro-batch, then checkpointing; after that a rounded teacher.
    for adapter_rank, nf4, checkpointing, size in product(
        ranks,
        options("load_teacher_in_4bit", *((False, True) if four_bit else (False,))),
        options("gradient_checkpointing", False, True),
        options("per_device_train_batch_size", *batch_sizes),
    ):
        live = Step(
            batch_size=size,
            max_length=fixed["max_length"],
            method=fixed["method"],
            adapter_rank=adapter_rank,
            adapter_targets=fixed.get("lora_target_modules"),
            student_dtype=fixed.get("dtype") or (dtype if adapter_rank else "float32"),
            teacher="4bit" if nf4 else "live",
            gradient_checkpointing=checkpointing,
            dtype=dtype,
            device=device,
            accumulation=accumulation if total is None else max(total // (size * processes), 1),
            loss_memory_mb=fixed.get("loss_memory_mb", 512),
        )
        step = replace(live, teacher="cached") if elsewhere else live
        needed = step_memory(student, teacher, step).total
        if cached and "load_teacher_in_4bit" not in fixed:
            # A cache made in 4 bits is another one: unless that was decided, it has to be possible to fill it here.
            needed = max(needed, teacher_weights(teacher, live) + teacher_pass(teacher, live))
        yield _Choice(step, nf4, room(needed, device))


def _fit(
    sides: list[Side], fixed: dict[str, Any], memory: float | None, device: str, dtype: str, processes: int
) -> dict[str, tuple[Any, str]]:
    """Finds the settings, with reasons, of the first way to train that fits."""
    from .memory import Size

    student, teacher = (Size.of(side.config, side.init_kwargs) for side in sides)
    if student.parameters > teacher.parameters:
        logger.warning(
            "the student has more parameters (%s) than the teacher (%s): name the student first",
            f"{student.parameters:,}",
            f"{teacher.parameters:,}",
        )
    no_four_bit = _why_no_four_bit(sides[1], fixed["teacher_model_name_or_path"], device)
    refused: list[_Choice] = []
    tight = False
    for choice in _choices(student, teacher, fixed, device, dtype, processes, no_four_bit is None):
        if memory is None or choice.needed <= (1 - MARGIN) * memory:
            break
        refused.append(choice)
    else:
        assert memory is not None
        choice, tight = min(refused, key=lambda choice: choice.needed), True
        if choice.needed > memory:
            raise UserError(_too_large(choice, student, teacher, fixed, memory, no_four_bit))

    step = choice.step
    found: dict[str, tuple[Any, str]] = {}
    count = _millions(student)
    if step.adapter_rank:
        why = f"above {FULLY_TRAINED / 1e6:.0f} M an adapter is trained"
        if any(other.step.adapter_rank is None for other in refused):
            why = "training all of them doesn't fit"
        elif student.parameters <= FULLY_TRAINED:
            why = "an adapter, by your settings"
        found["use_peft"] = True, f"{count}: {why}"
        found["lora_r"] = step.adapter_rank, "rank of the adapter"
        found["lora_alpha"] = 2 * step.adapter_rank, "twice the rank"
        found["lora_dropout"] = 0.0, "none"
        found["lora_target_modules"] = "all-linear", "every linear layer but the head"
        found["dtype"] = step.student_dtype, "the weights below the adapter don't change"
        found["learning_rate"] = LEARNING_RATES["adapter"], "for an adapter"
    else:
        found["use_peft"] = False, f"{count}: all of them are trained"
        found["learning_rate"] = LEARNING_RATES["full"], "for all of the weights"
    if METHODS[step.method].needs_teacher:
        size = _millions(teacher)
        why = f"{size} fit in {dtype}"
        if choice.four_bit:
            why = f"{size} don't fit in {dtype}"
        elif step.teacher == "cached":
            why = f"{size} aren't beside the student"
        found["load_teacher_in_4bit"] = choice.four_bit, why
    of = "" if memory is None else f" of {memory / 1e9:.1f}"
    takes = f"takes {choice.needed / 1e9:.1f}{of} GB"
    found["per_device_train_batch_size"] = step.batch_size, takes + ": tight, and nothing takes less" * tight
    found["per_device_eval_batch_size"] = step.batch_size, "as in training"
    checkpointing = step.gradient_checkpointing
    found["gradient_checkpointing"] = checkpointing, "doesn't fit without" if checkpointing else "it fits without"
    return found


def _millions(model: Size) -> str:
    count = model.parameters / 1e6
    return f"{count:,.{0 if count >= 10 else 1}f} M parameters"


def _why_no_four_bit(teacher: Side, name: str, device: str) -> str | None:
    """Says why the teacher can't run in 4 bits on `device`, or `None` if it can."""
    from ..teacher.load import check_four_bit, check_four_bit_shapes

    try:
        check_four_bit()
        if device == "cpu":
            check_four_bit_shapes(teacher.config, name, init_kwargs=teacher.init_kwargs)
    except UserError as error:
        return str(error)
    return None


def _too_large(
    least: _Choice, student: Size, teacher: Size, fixed: dict[str, Any], memory: float, no_four_bit: str | None
) -> str:
    from .memory import room, step_memory

    step = least.step
    names = [_short(fixed[name]) for name in ("model_name_or_path", "teacher_model_name_or_path")]
    yours = [f"{name}={fixed[name]}" for name in FITTED if name in fixed]
    remedies = [f"leave {' and '.join(yours)} out"] if yours else []
    if step.teacher != "cached" and METHODS[step.method].needs_teacher:
        if no_four_bit is not None:
            remedies.append(no_four_bit)
        cached = room(step_memory(student, teacher, replace(step, teacher="cached")).total, step.device)
        if cached <= memory:
            remedies.append(
                f"train with {cached / 1e9:.1f} GB from a --teacher_cache that hf-dskd cache-teacher fills on a larger"
                " machine"
            )
    remedies.append("name smaller models or a smaller --max_length (nothing is offloaded to the CPU)")
    return (
        f"{names[0]} from {names[1]} doesn't fit: it takes {least.needed / 1e9:.1f} GB at least ({least}) and"
        f" {memory / 1e9:.1f} GB are free; {'; or '.join(remedies)}"
    )


def train(description: str | None, config_file: Path, arguments: list[str] | None = None) -> None:
    """
    Trains two models that the command line names: `STUDENT TEACHER [--any_setting VALUE ...]`.

    What the two need is derived and printed with its reasons. `--dry_run` prints the other settings too, which makes
    a configuration file for `hf-dskd train --config`, and stops there.
    """
    from .. import run

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"--help", "-h"} & set(arguments):
        run.parse(description, config_file, arguments)
    import yaml
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from ..redaction import without_secrets
    from ..report.record import UNWRITTEN
    from ..run.arguments import flag_names
    from ..run.smoke import SMOKE, wants_smoke
    from ..utils.files import plain, read_yaml
    from .memory import free_memory

    student, teacher, flags = two_names(arguments)
    check_two(student, teacher)
    dry_run = bool({"--dry_run", "--dry-run"} & set(flags))
    flags = [flag for flag in flags if flag not in ("--dry_run", "--dry-run")]
    told = {name.removeprefix("no_") for name in flag_names(flags)}
    if "dataset_name" in told and "rename_columns" not in told:
        # The file's are of the file's dataset.
        flags.append("--rename_columns=")
    smoke = wants_smoke(flags, {})
    names = [
        f"--model_name_or_path={student}",
        f"--teacher_model_name_or_path={teacher}",
        f"--output_dir={output_dir(student, teacher)}{'_smoke' * smoke}",
    ]
    # One example at a time divides whatever total_batch_size is; a smoke run has sizes of its own.
    size = [] if smoke else ["--per_device_train_batch_size=1"]
    file = flags[flags.index("--config") + 1] if "--config" in flags else config_file
    fixed = {*told, *read_yaml("--config", file), *(("output_dir", *SMOKE) if smoke else ())}
    # What an adapter is to be like says that there is one.
    adapter = [] if "use_peft" in fixed or not any(name.startswith("lora_") for name in fixed) else ["--use_peft=true"]
    first = run.parse(None, config_file, [*names, *size, *adapter, *flags])

    values: dict[str, Any] = {}
    for part in (first.script, first.config, first.model, first.options):
        values |= {name: value for name, value in vars(part).items() if name in fixed}
    config = first.config
    memory = free_memory(config.device)
    if config.device.type == "cpu":
        memory /= config.world_size
    # Every process has to derive the same.
    memory = min(gather_object([memory]))
    derived = derive(
        str(first.model.model_name_or_path),
        str(first.options.teacher_model_name_or_path),
        memory=memory,
        device=config.device.type,
        given=values,
        dtype=config.training_dtype,
        processes=config.world_size,
    )
    final = run.parse(None, config_file, [*derived.flags, *names, *flags])
    if PartialState().is_main_process:
        print(derived, flush=True)
        if dry_run:
            rest = without_secrets({name: plain(value) for name, value in values.items() if value is not None})
            print(yaml.safe_dump({name: rest[name] for name in rest if name not in ("smoke", *UNWRITTEN)}), end="")
    if not dry_run:
        run.train(final)


def two_names(arguments: list[str]) -> tuple[str, str, list[str]]:
    """Splits arguments into student, teacher and the flags after them."""
    count = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    if count != 2:
        got = " ".join(map(repr, arguments[:count])) or "nothing"
        raise UserError(f"two names go before any --setting, the student's and then the teacher's: got {got}")
    return arguments[0], arguments[1], arguments[2:]
