"""Tests don't hang on each other: what conftest.py takes back, and the random order that it offers."""

import os
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent

LEAVES = """
import logging, os, random
import torch
from accelerate import PartialState
from transformers.utils import logging as transformers_logging

drawn, handler = [], logging.StreamHandler()
# transformers passes its messages on where the variable CI is set, as on most machines that test.
propagates = transformers_logging.get_logger("transformers").propagate

def test_leaves(tmp_path):
    drawn.append((torch.rand(1).item(), random.random()))
    os.environ["HF_ENDPOINT"] = "elsewhere"
    os.chdir(tmp_path)
    logging.getLogger("hf_dskd").setLevel(logging.ERROR)
    logging.getLogger("transformers").addHandler(handler)
    logging.getLogger("transformers").propagate = not propagates
    logging.disable(logging.WARNING)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(7)
    transformers_logging.disable_progress_bar()
    PartialState(cpu=True)

def test_finds_nothing(caplog):
    assert drawn == [(torch.rand(1).item(), random.random())]
    assert os.environ.get("HF_ENDPOINT") != "elsewhere" and os.getcwd() == os.environ["HERE"]
    logging.getLogger("hf_dskd.any").warning("heard")
    assert caplog.messages == ["heard"]
    logger = logging.getLogger("transformers")
    assert logger.propagate == propagates and handler not in logger.handlers
    assert torch.get_default_dtype() == torch.float32 and torch.get_num_threads() != 7
    assert transformers_logging.is_progress_bar_enabled() and not PartialState._shared_state
"""


def pytest_in(folder, *options):
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-v", *options, str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HERE": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_a_test_leaves_is_taken_back(tmp_path):
    (tmp_path / "test_it.py").write_text(LEAVES)
    done = pytest_in(tmp_path)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


def test_a_random_order_keeps_files_whole_and_is_the_same_for_the_same_seed(tmp_path):
    names = [(file, test) for file in range(4) for test in range(4)]
    for file in range(4):
        (tmp_path / f"test_{file}.py").write_text("".join(f"def test_{n}(): pass\n" for n in range(4)))

    def order(*options):
        lines = [line for line in pytest_in(tmp_path, *options).stdout.splitlines() if "PASSED" in line]
        return [(int(line[5]), int(line.split("::test_")[1][0])) for line in lines]

    assert order() == names
    shuffled = order("--order-seed", "1")
    assert shuffled != names and sorted(shuffled) == names
    assert shuffled == order("--order-seed", "1") != order("--order-seed", "2")
    files = [file for file, _ in shuffled]
    assert len([place for place in range(16) if place == 0 or files[place] != files[place - 1]]) == 4


def test_a_plain_processor_has_no_bf16_in_any_process(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import subprocess, sys, torch\nfrom hf_dskd.run.arguments import fastest_precision\n"
        "ASK = 'import torch; print(torch.cpu.get_capabilities(), torch.backends.cpu.get_cpu_capability())'\n"
        "def test_both():\n"
        "    assert fastest_precision() == [] or torch.cuda.is_available()\n"
        "    done = subprocess.run([sys.executable, '-c', ASK], capture_output=True, text=True, check=True)\n"
        "    assert done.stdout.split() == ['{}', 'DEFAULT'], done.stdout\n"
    )
    done = pytest_in(tmp_path, "--plain-processor")
    assert done.returncode == 0, done.stdout
