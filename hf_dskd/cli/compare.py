"""
Methods and variants of settings over seeds, and one table.

Every method with every seed, one process after another, from the same configuration and in the same order of the data.
Any other setting of `hf-dskd train` goes to every cell. After Ctrl-C the same command goes on: a cell that is complete
stays, one that was interrupted or failed goes on from its last checkpoint. The exit code is 1 if a cell failed.

    hf-dskd compare --methods sft,dskd_cma --seeds 0,1,2 --config recipes/gpt2_qwen.yaml --output_dir runs/compared
"""

from __future__ import annotations

import signal
from argparse import ArgumentParser, Namespace


USAGE = "--methods NAME,NAME --seeds 0,1,2 --config FILE.yaml --output_dir FOLDER [--any_setting VALUE ...]"


def add_arguments(parser: ArgumentParser) -> None:
    """Tells the parser what the grid itself takes."""
    for name, meaning in (
        ("methods", "names out of `hf-dskd methods`, with commas between"),
        (
            "variants",
            "a YAML file with more rows, `label: {method: NAME, setting: value, ...}`; what it sets comes before the"
            " command line and --config",
        ),
        ("seeds", "whole numbers, with commas between (0)"),
        ("config", "a YAML file as for `hf-dskd train`"),
        ("output_dir", "where the cells, results.jsonl, table.md and table.png are written"),
        ("num_processes", "processes of each run, through accelerate (1)"),
        ("data_seed", "order of the training examples, the same in every cell (0)"),
    ):
        parser.add_argument(f"--{name}", metavar="", help=meaning)


def run(given: Namespace) -> int:
    """Runs the grid and prints the table at the end."""
    from ..experiments.grid import parse, run_grid

    grid = parse(given.words)
    # As for Ctrl-C: a cell must not go on without this program, which would start it a second time.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = run_grid(grid)
    print(f"\n{(grid.output_dir / 'table.md').read_text(encoding='utf-8')}")
    for name in ("table.md", "table.png", "results.jsonl"):
        if (grid.output_dir / name).is_file():
            print(grid.output_dir / name)
    return code
