"""
One page about a run, or about several side by side.

Writes report.md and report.html (one file with its pictures in it). The folders are those that `hf-dskd train` wrote,
or one that `hf-dskd compare` wrote, which stands for all of its runs.

  one run        its report again, in DIR/report
  several runs   results with their mean and standard deviation over seeds, the settings that differ, and the curves on
                 the same axes; in DIR/report of the one folder of a comparison, else --output_dir is needed

    hf-dskd report runs/smollm2_qwen_coder
    hf-dskd report runs/sft runs/dskd_cma_ga --output_dir runs/report
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..errors import UserError


USAGE = "DIR [DIR ...] [--output_dir FOLDER]"


def add_arguments(parser: ArgumentParser) -> None:
    """Tells the parser what the command takes."""
    parser.add_argument("folders", metavar="DIR", nargs="*", type=Path, help="the output folder of a run or a grid")
    parser.add_argument("--output_dir", metavar="FOLDER", help="where to write the report")


def run(given: Namespace) -> int:
    """Writes a report and prints its files."""
    from ..report.files import runs_in
    from ..report.one import write_report
    from ..report.several import compare_runs

    folders: list[Path] = given.folders
    if given.output_dir == "":
        raise UserError("--output_dir has no value: name a folder for the report")
    if not folders:
        raise UserError("there is nothing to report on: name the --output_dir of a run of `hf-dskd train`")
    twice = [folder for index, folder in enumerate(folders) if folder.resolve() in map(Path.resolve, folders[:index])]
    if twice:
        raise UserError(f"{str(twice[0])!r} is named twice: name it once")
    runs, unfinished = runs_in(folders)
    if len(runs) == 1 and not unfinished:
        path = write_report(runs[0], given.output_dir)
    else:
        if given.output_dir is None and len(folders) > 1:
            raise UserError("--output_dir is not set: name a folder for the report on several runs")
        path = compare_runs(folders, given.output_dir or folders[0] / "report")
    print(path.with_name("report.md"))
    print(path)
    return 0
