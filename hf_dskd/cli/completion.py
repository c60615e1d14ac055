"""
Completes commands, settings and their values in a shell.

Prints a script by which the shell completes commands, options and their values. It is made once, and anew after an
update of hf-dskd:

    hf-dskd completion bash > ~/.local/share/bash-completion/completions/hf-dskd
    hf-dskd completion zsh > ~/.zfunc/_hf-dskd
    hf-dskd completion fish > ~/.config/fish/completions/hf-dskd.fish

bash reads it where the package bash-completion is installed; else `source` the file in ~/.bashrc. zsh reads it with
`fpath+=~/.zfunc` before `compinit` in ~/.zshrc. fish reads it as it is. The folder must be there.
"""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser, Namespace
from typing import Any

from ..errors import UserError, check_name
from ..methods import METHODS
from ..utils.environment import check_installed


USAGE = "bash|zsh|fish"
SHELLS = ("bash", "zsh", "fish")
YAML_FILES = ("config", "variants")
FOLDERS = (
    *("output_dir", "teacher_cache", "logging_dir", "base_model", "model", "run", "folders", "dry_run"),
    *("model_name_or_path", "teacher_model_name_or_path"),
)
# Values of options that are read as text.
VALUES = {"methods": tuple(METHODS), "attention_layers": ("last", "uniform"), "resume_from_checkpoint": ("last",)}


def add_arguments(parser: ArgumentParser) -> None:
    """Tells the parser what the command takes."""
    parser.add_argument("shells", nargs="*", metavar="SHELL", help=f"one of {', '.join(SHELLS)}")


def run(given: Namespace) -> int:
    """Prints the script."""
    if len(given.shells) > 1:
        raise UserError(
            f"hf-dskd completion takes one shell, not {' '.join(given.shells)!r}: one of {', '.join(SHELLS)}"
        )
    check_name("shell ", given.shells[0], SHELLS)
    print(script(given.shells[0]))
    return 0


def script(shell: str) -> str:
    """Writes the script for one of `SHELLS` by the library shtab."""
    check_installed("shtab", "completion", "hf-dskd completion")
    import shtab

    from . import TAKE_SETTINGS, tree

    offered = {"folder": shtab.DIRECTORY, "file": shtab.FILE, "yaml": shtab.glob("*.yaml", "*.yml")}
    root, commands = tree()
    for name, parser in commands.items():
        if name in TAKE_SETTINGS:
            add_every_setting(parser)
        for action in parser._actions:
            if action.dest in VALUES:
                action.choices = VALUES[action.dest]
            for kind, names in (("folder", FOLDERS), ("yaml", YAML_FILES), ("file", ("dataset_name",))):
                if action.dest in names:
                    action.complete = offered[kind]  # type: ignore[attr-defined]
            if action.dest == "shells":
                action.choices = SHELLS
    return shtab.complete(root, shell)


def add_every_setting(parser: ArgumentParser) -> None:
    """Adds the settings that transformers and trl have, whose import takes seconds, under one spelling of each."""
    from trl import ModelConfig, ScriptArguments, TrlParser

    from ..config import DSKDConfig
    from ..run.arguments import values_of
    from ..run.settings import RunArguments

    groups: Any = (ScriptArguments, DSKDConfig, ModelConfig, RunArguments)
    ours = {name: setting for group in groups for name, setting in group.__dataclass_fields__.items()}
    there = {action.dest for action in parser._actions}
    for action in TrlParser(groups)._actions:
        if action.dest not in there and action.dest in ours:
            there.add(action.dest)
            parser.add_argument(
                f"--{action.dest}",
                help=first_sentence(action.help or action.dest).replace("%", "%%"),
                choices=values_of(ours[action.dest]) or offered_values(action),
            )


def offered_values(action: Action) -> list[str] | None:
    """Lists the few values that a setting of transformers or trl has, or gives `None`."""
    if action.choices is not None:
        return [str(value) for value in action.choices]
    return ["true", "false"] if action.nargs == "?" else None


def first_sentence(text: str) -> str:
    """Cuts a help text down to one line."""
    line = " ".join(text.split())
    return re.split(r"(?<=\w)\. ", line)[0][:120]
