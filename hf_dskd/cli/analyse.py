"""
What the alignment of a run attends to, and whether queries match keys.

How the tokens of student and teacher are aligned in a run: share of the attention on the right text, monotonicity,
entropy, distance; how far queries are from keys; pictures, and a page to point at, token by token.

    hf-dskd analyse runs/gpt2_qwen
    hf-dskd analyse runs/gpt2_qwen/checkpoint-500 --examples 60 --output_dir runs/gpt2_qwen/analysis-500

In training, --analysis_steps N does the same on the way.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..errors import UserError


USAGE = "RUN [--examples N] [--config FILE.yaml] [--output_dir FOLDER]"


def add_arguments(parser: ArgumentParser) -> None:
    """Tells the parser what the command takes."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the output folder of a run, or a checkpoint in it")
    parser.add_argument(
        "--examples",
        metavar="N",
        type=int,
        default=24,
        help="how many of the held-out examples, or else of the training examples (24)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        type=Path,
        help="the run's configuration (settings.yaml or config.yaml in its folder)",
    )
    parser.add_argument(
        "--output_dir", metavar="FOLDER", type=Path, help="for numbers.jsonl and the pictures (RUN/analysis)"
    )


def run(given: Namespace) -> int:
    """Analyses a run and prints the numbers and the files."""
    from ..run.training import analyse
    from ..training.run_folder import SETTINGS_NAME

    if given.examples < 1:
        raise UserError(f"--examples {given.examples} must be at least 1")
    if not given.run.is_dir():
        raise UserError(f"{str(given.run)!r} isn't a folder: name the output folder of a run, or a checkpoint in it")
    home = given.run.parent if given.run.name.startswith("checkpoint-") else given.run
    places = [home / SETTINGS_NAME, home / "config.yaml"]
    config = given.config or next((path for path in places if path.is_file()), None)
    if config is None:
        raise UserError(f"{str(home)!r} has no {SETTINGS_NAME}: name the run's configuration file with --config")
    analyse(given.run, config, given.examples, given.output_dir or home / "analysis")
    return 0
