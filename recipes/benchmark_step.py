"""Runs benchmarks/benchmark_step.py."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).with_name("benchmarks")))

from benchmark_step import main

from hf_dskd.launch import command


if __name__ == "__main__":
    command(main)
