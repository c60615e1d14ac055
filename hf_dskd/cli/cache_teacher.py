"""
The teacher's hidden states on disk, for training without running the teacher.

Runs the teacher once over the training and the held-out examples and keeps its last hidden states at the response
tokens, with its head and embedding, in FOLDER (OUTPUT_DIR/teacher_cache). Every run with the same teacher, data and
tokenization, of whatever method, student and seed, can then train from them:

    hf-dskd cache-teacher --config recipes/gpt2_qwen.yaml --teacher_cache runs/teacher_cache
    hf-dskd train --config recipes/gpt2_qwen.yaml --teacher_cache runs/teacher_cache

Takes 2 bytes x the teacher's hidden size per response token, and says so first. Interrupted, the same command goes
on; examples that are there already are not computed again; --repair_teacher_cache makes damaged files anew. Several
processes: accelerate launch --multi_gpu --num_processes 2 -m hf_dskd.cli cache-teacher ...
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from ..run.arguments import add_settings, parse
from ..run.teacher import cache_teacher


USAGE = "--config FILE.yaml [--teacher_cache FOLDER] [--any_setting VALUE ...]"


def add_arguments(parser: ArgumentParser) -> None:
    """Tells the parser of the settings of a run."""
    add_settings(parser)


def run(given: Namespace) -> int:
    """Fills the cache of a run's teacher."""
    try:
        cache_teacher(parse(None, None, given.words))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0
