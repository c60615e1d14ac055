"""The command `hf-dskd`. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from . import __version__, run
from .errors import UserError, check_name
from .launch import Parser, command, launched_processes


USAGE = """\
Distil a large language model into a small one whose tokenizer is different.

    hf-dskd train --config FILE.yaml [--any_setting VALUE ...]
        one run: data, models, training, evaluation, OUTPUT_DIR/result.json
    hf-dskd compare --methods sft,dskd_cma --seeds 0,1,2 --config FILE.yaml --output_dir FOLDER
        methods and variants of settings over seeds, and one table
    hf-dskd cache-teacher --config FILE.yaml --teacher_cache FOLDER
        the teacher's hidden states on disk, for training without running the teacher
    hf-dskd evaluate --model FOLDER --sets dolly=test.jsonl --output_dir FOLDER
        the papers' evaluation: ROUGE-L over decoding seeds, bits per byte
    hf-dskd analyse RUN
        what the alignment of a run attends to, and whether queries match keys
    hf-dskd report RUN [RUN ...]
        one page about a run, or about several side by side
    hf-dskd push RUN NAME/REPOSITORY
        the student with a model card to the hub, in one commit
    hf-dskd methods
        which methods there are
    hf-dskd doctor [--config FILE.yaml]
        whether this machine, and a run, have what they need
    hf-dskd completion bash
        completes commands, settings and their values in a shell

`hf-dskd COMMAND --help` explains each. Several processes: accelerate launch -m hf_dskd.cli COMMAND ..."""

TRAIN = """\
hf-dskd train --config FILE.yaml [--any_setting VALUE ...]

One run for any pair of models and any data.

    hf-dskd train --config recipes/gpt2_qwen.yaml --smoke
    hf-dskd train --config recipes/gpt2_qwen.yaml --method alm --seed 1 --output_dir runs/alm
    hf-dskd train --config recipes/gpt2_qwen.yaml --resume_from_checkpoint last
    accelerate launch --multi_gpu --num_processes 2 -m hf_dskd.cli train --config recipes/gpt2_qwen.yaml

It stops with Ctrl-C and goes on with --resume_from_checkpoint last; --smoke tries it with tiny random models."""

CACHE_TEACHER = """\
hf-dskd cache-teacher --config FILE.yaml [--teacher_cache FOLDER] [--any_setting VALUE ...]

Runs the teacher once over the training and the held-out examples and keeps its last hidden states at the response
tokens, with its head and embedding, in FOLDER (OUTPUT_DIR/teacher_cache). Every run with the same teacher, data and
tokenization, of whatever method, student and seed, can then train from them:

    hf-dskd cache-teacher --config recipes/gpt2_qwen.yaml --teacher_cache runs/teacher_cache
    hf-dskd train --config recipes/gpt2_qwen.yaml --teacher_cache runs/teacher_cache

Takes 2 bytes x the teacher's hidden size per response token, and says so first. Interrupted, the same command goes
on; examples that are there already are not computed again; --repair_teacher_cache makes damaged files anew. Several
processes: accelerate launch --multi_gpu --num_processes 2 -m hf_dskd.cli cache-teacher ..."""

ANALYSE = """\
hf-dskd analyse RUN [--examples N] [--config FILE.yaml] [--output_dir FOLDER]

How the tokens of student and teacher are aligned in a run: share of the attention on the right text, monotonicity,
entropy, distance; how far queries are from keys; pictures, and a page to point at, token by token.

  RUN           the output folder of a run, or a checkpoint in it
  --examples    of the held-out examples, or else of the training examples (24)
  --config      the run's configuration (settings.yaml or config.yaml in its folder)
  --output_dir  for numbers.jsonl and the pictures (RUN/analysis)

    hf-dskd analyse runs/gpt2_qwen
    hf-dskd analyse runs/gpt2_qwen/checkpoint-500 --examples 60 --output_dir runs/gpt2_qwen/analysis-500

In training, --analysis_steps N does the same on the way."""

METHODS = """\
hf-dskd methods

Every method: how student and teacher positions are aligned, the spaces that are compared, how queries are matched to
keys, and where it comes from.

    hf-dskd methods | less"""


def train(arguments: list[str]) -> int:
    """`hf-dskd train`."""
    run.train(run.parse(TRAIN, None, arguments))
    return 0


def cache_teacher(arguments: list[str]) -> int:
    """`hf-dskd cache-teacher`."""
    try:
        run.cache_teacher(run.parse(CACHE_TEACHER, None, arguments))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def evaluate(arguments: list[str]) -> int:
    """`hf-dskd evaluate`."""
    from .evaluation import command

    return command.main(arguments)


def analyse(arguments: list[str]) -> int:
    """`hf-dskd analyse`."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(ANALYSE)
        return 0
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--examples", type=int, default=24)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--output_dir", type=Path)
    given = parser.parse_args(arguments)
    if given.examples < 1:
        raise UserError(f"--examples {given.examples} must be at least 1")
    if not given.run.is_dir():
        raise UserError(f"{str(given.run)!r} isn't a folder: name the output folder of a run, or a checkpoint in it")
    home = given.run.parent if given.run.name.startswith("checkpoint-") else given.run
    places = [home / run.SETTINGS_NAME, home / "config.yaml"]
    config = given.config or next((path for path in places if path.is_file()), None)
    if config is None:
        raise UserError(f"{str(home)!r} has no {run.SETTINGS_NAME}: name the run's configuration file with --config")
    run.analyse(given.run, config, given.examples, given.output_dir or home / "analysis")
    return 0


def report(arguments: list[str]) -> int:
    """`hf-dskd report`."""
    from .report import command

    return command.main(arguments)


def methods(arguments: list[str]) -> int:
    """`hf-dskd methods`."""
    import shutil

    if arguments and arguments[0] not in ("--help", "-h"):
        raise UserError(f"hf-dskd methods takes no {arguments[0]!r}: it lists them all")
    print(METHODS if arguments else methods_table(shutil.get_terminal_size().columns))
    return 0


def methods_table(width: int) -> str:
    """One line a method for what it is composed of, and below it what that means, wrapped to `width` columns."""
    from .methods import METHODS

    names = ("alignment", "spaces", "matching")
    rows: list[tuple[str, ...]] = [("method", *names)]
    for name, method in METHODS.items():
        parts = [getattr(method, part) for part in names]
        rows.append((name, *(", ".join(part) if isinstance(part, tuple) else part or "" for part in parts)))
    rows = [tuple(cell or "–" for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(len(names) + 1)]
    lines = []
    for row in rows:
        line = "".join(cell.ljust(column) for cell, column in zip(row, widths)).rstrip()
        lines += textwrap.wrap(line, width, subsequent_indent=" " * widths[0], break_long_words=False)
        if row is not rows[0]:
            method = METHODS[row[0]]
            for text in (method.summary, method.source):
                if text.strip("–"):
                    lines += textwrap.wrap(
                        text, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False
                    )
        lines.append("")
    return "\n".join(lines[:-1])


def compare(arguments: list[str]) -> int:
    """`hf-dskd compare`."""
    from . import compare

    return compare.main(arguments)


def push(arguments: list[str]) -> int:
    """`hf-dskd push`."""
    from .hub import command

    return command.main(arguments)


def doctor(arguments: list[str]) -> int:
    """`hf-dskd doctor`."""
    from . import doctor

    return doctor.main(arguments)


def completion(arguments: list[str]) -> int:
    """`hf-dskd completion`."""
    from . import completion

    return completion.main(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "compare": compare,
    "cache-teacher": cache_teacher,
    "evaluate": evaluate,
    "analyse": analyse,
    "report": report,
    "push": push,
    "methods": methods,
    "doctor": doctor,
    "completion": completion,
}


# Of which several processes share the work; of the others each would do all of it, into the same files.
SHARED = ("train", "cache-teacher", "evaluate", "doctor")


def main(arguments: list[str] | None = None) -> None:
    """Entry of `hf-dskd` and of `python -m hf_dskd.cli`."""
    given = sys.argv[1:] if arguments is None else arguments

    def chosen() -> None:
        if not given or given[0] in ("--help", "-h"):
            print(USAGE)
            return
        if given[0] in ("--version", "-V"):
            print(f"hf_dskd {__version__}")
            return
        check_name("command ", given[0], COMMANDS)
        if given[0] not in SHARED and launched_processes() > 1:
            raise UserError(
                f"hf-dskd {given[0]} runs in one process, and a launcher has started {launched_processes()}: start it"
                " by itself"
            )
        code = COMMANDS[given[0]](list(given[1:]))
        if code:
            sys.exit(code)

    command(chosen)


if __name__ == "__main__":
    main()
