"""
One run: data, models, training, evaluation, OUTPUT_DIR/result.json.

For any pair of models and any data. It stops with Ctrl-C and goes on with --resume_from_checkpoint last; --smoke tries
it with tiny random models.

    hf-dskd train --config recipes/gpt2_qwen.yaml --smoke
    hf-dskd train --config recipes/gpt2_qwen.yaml --method alm --seed 1 --output_dir runs/alm
    hf-dskd train --config recipes/gpt2_qwen.yaml --resume_from_checkpoint last
    accelerate launch --multi_gpu --num_processes 2 -m hf_dskd.cli train --config recipes/gpt2_qwen.yaml
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..run.arguments import add_settings, parse
from ..run.training import train


USAGE = "--config FILE.yaml [--any_setting VALUE ...]"


def add_arguments(parser: ArgumentParser) -> None:
    """Tells the parser of the settings of a run."""
    add_settings(parser)


def run(given: Namespace) -> int:
    """Trains, evaluates and writes what there is to look at."""
    train(parse(None, None, given.words))
    return 0
