"""
The command `hf-dskd`: one tree of parsers, from which help, errors, `--version` and completion come.

A file a command. Its docstring is what `--help` says, `USAGE` how it is called; `add_arguments` tells the parser what
it takes, and `run` does the work. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from types import ModuleType

from .. import __version__
from ..errors import UserError, check_name
from ..launch import Parser, command, launched_processes


COMMANDS = (
    *("train", "compare", "cache-teacher", "evaluate", "analyse", "report", "push", "methods", "doctor"),
    "completion",
)
# Of which several processes share the work; of the others each would do all of it, into the same files.
SHARED = ("train", "cache-teacher", "evaluate", "doctor")
# These take every setting of a run, which is read where the run is made.
TAKE_SETTINGS = ("train", "compare", "cache-teacher")
VERSION = f"hf_dskd {__version__}"
DESCRIPTION = "Distil a large language model into a small one whose tokenizer is different."
EPILOG = """\
`hf-dskd COMMAND --help` explains each, with examples.
Several processes: accelerate launch -m hf_dskd.cli COMMAND ..."""


def module_of(name: str) -> ModuleType:
    """Imports the file of a command."""
    return importlib.import_module(f".{name.replace('-', '_')}", __name__)


def tree() -> tuple[Parser, dict[str, Parser]]:
    """Makes the parser of `hf-dskd`, and gives those of its commands by name too."""
    root = Parser("hf-dskd", usage="hf-dskd COMMAND [--option VALUE ...]", description=DESCRIPTION, epilog=EPILOG)
    root.add_argument("--version", "-V", action="version", version=VERSION)
    # Of a usage of its own Python would make the beginning of every command's name.
    commands = root.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser, prog="hf-dskd")
    found = {}
    for name in COMMANDS:
        module = module_of(name)
        about = (module.__doc__ or "").strip()
        summary = about.partition("\n")[0].rstrip(".")
        usage = f"hf-dskd {name} {module.USAGE}".rstrip()
        found[name] = commands.add_parser(name, help=summary[0].lower() + summary[1:], description=about, usage=usage)
        module.add_arguments(found[name])
    return root, found


def main(arguments: list[str] | None = None) -> None:
    """Runs `hf-dskd` and `python -m hf_dskd.cli`."""
    given = sys.argv[1:] if arguments is None else arguments

    def chosen() -> None:
        code = run(list(given))
        if code:
            sys.exit(code)

    command(chosen)


def run(given: list[str]) -> int:
    """Does what a command line says, and returns the exit code."""
    root, commands = tree()
    if not given or given[0] in ("--help", "-h"):
        root.print_help()
        return 0
    if given[0] in ("--version", "-V"):
        print(VERSION)
        return 0
    name, words = given[0], given[1:]
    check_name("command ", name, commands)
    if name not in SHARED and launched_processes() > 1:
        raise UserError(
            f"hf-dskd {name} runs in one process, and a launcher has started {launched_processes()}: start it by"
            " itself"
        )
    if {"--help", "-h"} & set(words) or (not words and name in ("analyse", "completion")):
        commands[name].print_help()
        return 0
    if name in TAKE_SETTINGS:
        return module_of(name).run(argparse.Namespace(words=words))
    # Settings go by either spelling, and so do options.
    words = [re.sub("^--[^=]+", lambda option: "--" + option[0][2:].replace("-", "_"), word) for word in words]
    return module_of(name).run(commands[name].parse_intermixed_args(words))
