"""`hf-dskd report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .files import runs_in
from .one import write_report
from .several import compare_runs


HELP = """\
hf-dskd report DIR [DIR ...] [--output_dir FOLDER]

Writes report.md and report.html (one file with its pictures in it). The folders are those that `hf-dskd train` wrote,
or one that `hf-dskd compare` wrote, which stands for all of its runs.

  one run        its report again, in DIR/report
  several runs   results with their mean and standard deviation over seeds, the settings that differ, and the curves on
                 the same axes; in DIR/report of the one folder of a comparison, else --output_dir is needed

  --output_dir   where to write it

    hf-dskd report runs/smollm2_qwen_coder
    hf-dskd report runs/sft runs/dskd_cma_ga --output_dir runs/report"""


def parse(arguments: Sequence[str]) -> tuple[list[Path], Path | None]:
    """Folders and `--output_dir` of a command line."""
    folders: list[Path] = []
    output_dir: Path | None = None
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--output_dir", "--output-dir"):
            value = value if equals else next(words, "")
            if not value:
                raise UserError("--output_dir has no value: name a folder for the report")
            output_dir = Path(value)
        elif word.startswith("-"):
            raise UserError(f"hf-dskd report has no {word}: it takes folders of runs and --output_dir")
        else:
            folders.append(Path(word))
    if not folders:
        raise UserError("there is nothing to report on: name the --output_dir of a run of `hf-dskd train`")
    twice = [folder for index, folder in enumerate(folders) if folder.resolve() in map(Path.resolve, folders[:index])]
    if twice:
        raise UserError(f"{str(twice[0])!r} is named twice: name it once")
    return folders, output_dir


def main(arguments: Sequence[str]) -> int:
    """`hf-dskd report`: prints the files that it wrote, and returns the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    folders, output_dir = parse(arguments)
    runs, unfinished = runs_in(folders)
    if len(runs) == 1 and not unfinished:
        path = write_report(runs[0], output_dir)
    else:
        if output_dir is None and len(folders) > 1:
            raise UserError("--output_dir is not set: name a folder for the report on several runs")
        path = compare_runs(folders, output_dir or folders[0] / "report")
    print(path.with_name("report.md"))
    print(path)
    return 0
