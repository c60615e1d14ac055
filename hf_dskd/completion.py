"""`hf-dskd completion`: commands, their options and the options' values for the shell, by the library shtab."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from .errors import UserError, check_name
from .methods import METHODS


SHELLS = ("bash", "zsh", "fish")

HELP = """\
hf-dskd completion bash|zsh|fish

Prints a script by which the shell completes commands, options and their values. It is made once, and anew after an
update of hf-dskd:

    hf-dskd completion bash > ~/.local/share/bash-completion/completions/hf-dskd
    hf-dskd completion zsh > ~/.zfunc/_hf-dskd
    hf-dskd completion fish > ~/.config/fish/completions/hf-dskd.fish

bash reads it where the package bash-completion is installed; else `source` the file in ~/.bashrc. zsh reads it with
`fpath+=~/.zfunc` before `compinit` in ~/.zshrc. fish reads it as it is. The folder must be there."""

# These take every setting of a run beside their own.
RUN_COMMANDS = ("train", "cache-teacher", "compare")
YAML_FILES = ("config", "variants")
FOLDERS = (
    *("output_dir", "teacher_cache", "logging_dir", "base_model", "model"),
    *("model_name_or_path", "teacher_model_name_or_path"),
)


def script(shell: str) -> str:
    """The script for one of `SHELLS`."""
    import shtab

    return shtab.complete(make_parser(), shell)


def make_parser() -> argparse.ArgumentParser:
    """
    What the shell needs to know of `hf-dskd`, as a parser that parses nothing.

    Settings of a run come from the parser of `hf-dskd train`; other options from the lines of the commands' own help.
    """
    from .cli import COMMANDS, USAGE

    summaries = dict(re.findall(r"^    hf-dskd (\S+).*\n +(.+)", USAGE, re.MULTILINE))
    settings = run_settings()
    parser = argparse.ArgumentParser(prog="hf-dskd")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=summaries.get(name, name))
        text = help_of(command)
        options = {option: (meaning, None) for option, meaning in described_options(text).items()}
        for option, (meaning, values) in (options | (settings if name in RUN_COMMANDS else {})).items():
            add_option(own, option, meaning, values)
        if re.match(rf"hf-dskd {name} [A-Z]", text):
            complete(own.add_argument("folders", nargs="*"), "directory")
        if name == "completion":
            own.add_argument("shell", choices=SHELLS)
    return parser


def add_option(parser: argparse.ArgumentParser, name: str, meaning: str, values: Iterable[Any] | None) -> None:
    """An option, with what the shell can offer for its value."""
    known = choices().get(name, values)
    action = parser.add_argument(
        f"--{name}",
        help=meaning.replace("%", "%%"),
        choices=None if known is None else [str(value) for value in known],
    )
    if name in YAML_FILES:
        complete(action, "yaml")
    elif name in FOLDERS:
        complete(action, "directory")
    elif name == "dataset_name":
        complete(action, "file")


def complete(action: argparse.Action, what: str) -> None:
    """Has the shell offer files for a value."""
    import shtab

    offered = {"directory": shtab.DIRECTORY, "file": shtab.FILE, "yaml": shtab.glob("*.yaml", "*.yml")}
    action.complete = offered[what]  # type: ignore[attr-defined]


def choices() -> dict[str, tuple[str, ...]]:
    """Values of the settings that have a few."""
    from . import settings
    from .methods import DUAL_SPACE_ALIGNMENTS, MATCHINGS

    divergences = dict.fromkeys(
        ("divergence", "student_space_divergence", "teacher_space_divergence"), settings.DIVERGENCE_NAMES
    )
    return {
        **divergences,
        "method": tuple(METHODS),
        "methods": tuple(METHODS),
        "alignment": tuple(DUAL_SPACE_ALIGNMENTS),
        "spaces": settings.SPACES,
        "matching": (*MATCHINGS, "none"),
        "teacher_value": settings.TEACHER_VALUES,
        "t2s_label": settings.LABELS,
        "projector_init": settings.PROJECTOR_INITS,
        "alm_divergence": settings.BINARY_DIVERGENCE_NAMES,
        "adversarial_loss": settings.ADVERSARIAL_LOSSES,
        "temperature_scaling": settings.TEMPERATURE_SCALINGS,
        "temperature_schedule": settings.TEMPERATURE_SCHEDULES,
        "attention_layers": ("last", "uniform"),
        "teacher_dtype": settings.DTYPES,
        "resume_from_checkpoint": ("last",),
    }


def help_of(command: Any) -> str:
    """What a command answers to `--help`."""
    said = StringIO()
    with redirect_stdout(said):
        try:
            command(["--help"])
        except SystemExit:
            pass
    return said.getvalue()


def described_options(text: str) -> dict[str, str]:
    """Options that a help text has a line about, and the first of what it says of them."""
    found = {}
    for names, meaning in re.findall(r"^  (--\w[\w, -]*?)  +(\S.*)", text, re.MULTILINE):
        for name in re.findall(r"--(\w+)", names):
            found[name] = meaning
    return found


def run_settings() -> dict[str, tuple[str, list[str] | None]]:
    """Meaning and possible values of every setting of a run, by name."""
    from trl import ModelConfig, ScriptArguments, TrlParser

    from .config import DSKDConfig
    from .run import RunArguments

    parser = TrlParser((ScriptArguments, DSKDConfig, ModelConfig, RunArguments))  # type: ignore[arg-type]
    found: dict[str, tuple[str, list[str] | None]] = {"config": ("a YAML file of settings", None)}
    for action in parser._actions:
        # Each is there with dashes too, and switches that are on as --no_NAME.
        name = next((option[2:] for option in action.option_strings if option.startswith("--")), "")
        if name in ("", "help"):
            continue
        values = None if action.choices is None else list(action.choices)
        if action.nargs == "?" and values is None:
            values = ["true", "false"]
        found[name] = (first_sentence(action.help or name), values)
    return found


def first_sentence(text: str) -> str:
    """Of a help text, on one line."""
    line = " ".join(text.split())
    return re.split(r"(?<=\w)\. ", line)[0][:120]


def main(arguments: Sequence[str]) -> int:
    """`hf-dskd completion`: prints the script."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(HELP)
        return 0
    if len(arguments) > 1:
        raise UserError(f"hf-dskd completion takes one shell, not {' '.join(arguments)!r}: one of {', '.join(SHELLS)}")
    check_name("shell ", arguments[0], SHELLS)
    print(script(arguments[0]))
    return 0
