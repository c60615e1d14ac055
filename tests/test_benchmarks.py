"""What the benchmarks share, and the commands in recipes/ that run them."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import measuring
import pytest
import torch

from hf_dskd import UserError


RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.mark.parametrize("name", ["benchmark_loss", "benchmark_step", "benchmark_stream_kl", "memory_table"])
def test_help_answers_without_heavy_imports(name):
    code = (
        f"import runpy, sys\npath = {str(RECIPES / name)!r} + '.py'\nsys.argv = [path, '--help']\n"
        "sys.path[0] = str(__import__('pathlib').Path(path).parent)\n"
        "try:\n    runpy.run_path(path, run_name='__main__')\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = ('torch', 'transformers', 'datasets', 'matplotlib', 'triton', 'psutil')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "--json" in done.stdout and f"recipes/{name}.py" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_error_is_one_line():
    command = [sys.executable, str(RECIPES / "benchmark_step.py"), "--shape", "huge"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --shape 'huge' is unknown") and "tinyllama-mistral" in line


def test_cells_are_processes_of_their_own(tmp_path):
    """From the command in recipes/, whose processes import it again."""
    command = [sys.executable, str(RECIPES / "benchmark_stream_kl.py"), "--device", "cpu", "--lengths", "96"]
    command += ["--head-sizes", "8", "--batch-heads", "2", "--forms", "stream_kl", "--passes", "backward 2"]
    command += ["--masks", "causal", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, title, shown, last = done.stdout.splitlines()
    result = json.loads(last)
    (row,) = result["rows"]
    assert (row["form"], row["what"], row["mask"]) == ("stream_kl", "backward 2", "causal")
    assert (row["batch_heads"], row["length"], row["head_size"]) == (2, 96, 8)
    for name in ("seconds", "cpu_seconds", "peak_mb", "tflops", "of_peak"):
        assert 0 < row[name] < math.inf
    assert row["of_peak"] == pytest.approx(row["tflops"] / result["matrix_tflops"])
    assert result["settings"] == {"device": "cpu", "dtype": "float32", "repeats": 1}
    assert result["torch"] == torch.__version__ and result["device_name"]
    assert "peak MB" in title and f"{row['seconds'] * 1e3:,.1f}" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies():
    assert measuring.isolated(os._exit, 1) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(UserError, match="torch sees no GPU here"):
        measuring.choose_device("cuda")


@pytest.mark.parametrize("marked", [True, False])
def test_peak_memory_of_what_is_gone_again(marked, monkeypatch):
    if not marked:
        monkeypatch.setattr(measuring, "reset_high_water", lambda: False)
    elif not measuring.reset_high_water():
        pytest.skip("this system keeps no high-water mark that can be reset")
    done = []
    for _ in range(2):
        with measuring.PeakMemory(torch.device("cpu")) as memory:
            block = torch.ones(100_000_000, dtype=torch.uint8)
            if not marked:
                time.sleep(0.2)
            del block
        done.append(memory.peak)
    # The second finds none of the first's memory.
    assert all(99e6 < peak < 120e6 for peak in done)


def test_peak_memory_of_nothing_is_a_page():
    with measuring.PeakMemory(torch.device("cpu")) as memory:
        pass
    assert 4096 <= memory.peak < 10e6
