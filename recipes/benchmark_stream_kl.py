"""Runs benchmarks/benchmark_stream_kl.py."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).with_name("benchmarks")))

from benchmark_stream_kl import main

from hf_dskd.launch import command


if __name__ == "__main__":
    command(main)
