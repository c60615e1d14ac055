"""The GPU check, as far as a CPU can tell that it still fits the package and the tests that it builds on."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import gpu_check
import pytest
import torch


pytest.importorskip("triton", reason="Triton isn't installed")

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "recipes" / "benchmarks"


@pytest.fixture
def parts(monkeypatch, tmp_path):
    # Importing it takes every name from the package and from the tests.
    import gpu_parts

    monkeypatch.setattr(gpu_parts, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_parts, "FOLDER", tmp_path)
    return gpu_parts


def test_every_part_is_there(parts):
    import gluon_forward

    assert all(callable(getattr(parts, name)) for name in gpu_check.PARTS) and callable(gluon_forward.forward)
    assert sum(gpu_check.PARTS.values()) >= gpu_check.DEADLINE and gpu_check.DEADLINE < 8 * 60
    jobs = parts.comparisons()
    assert len({name for name, *_ in jobs}) == len(jobs) > 100
    assert {name for name, _ in parts.RUNS} <= parts.runs.CASES.keys()


def test_the_step_is_a_command_of_the_benchmark(parts):
    import benchmark_step

    args = benchmark_step.parse(parts.STEP)
    assert args.json and args.teacher == ("live", "cached")


def test_runs_count_what_the_host_waits_for(parts, monkeypatch, tmp_path, capsys):
    def warn(mode):
        if mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", warn)
    monkeypatch.setattr(parts, "RUNS", (("dskd_cma_ga", {}), ("attention", {"bf16": True})))
    parts.syncs()
    figures = json.loads((tmp_path / "gpu_check.json").read_text())["syncs"]
    assert figures == {"dskd_cma_ga": [1] * 4, "attention bf16": [1] * 4}
    assert "## trainer, attention bf16 host waits per micro-batch: [1, 1, 1, 1]" in capsys.readouterr().out


@pytest.mark.parametrize("space", ["student", "teacher"])
def test_the_loss_has_its_gradients(parts, monkeypatch, space):
    monkeypatch.setattr(parts, "SPACES", {space: (50, 8)})
    made = []
    normal = parts.normal
    monkeypatch.setattr(parts, "normal", lambda *shape: made.append(normal(*shape)) or made[-1])
    moved = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: moved.append(loss.item()))
    parts.loss_pass(space, 6, 512, False)()
    assert moved and moved[0] > 0


def test_a_tile_under_the_interpreter():
    code = (
        "import gpu_parts as parts, torch\nparts.DEVICE = 'cpu'\n"
        "assert parts.check_case((32, 32, 4, 2), 'one query', torch.float32, 'split')[0]\n"
        # The interpreter has no bfloat16.
        "assert parts.check_tile('key', (32, 32, 4, 2), 32, torch.float32, 1)[0]\n"
        "right = parts.dense_tests.streamed\n"
        "parts.dense_tests.streamed = lambda case: (right(case)[0] + 0.1, *right(case)[1:])\n"
        "assert not parts.check_case((32, 32, 4, 2), 'one query', torch.float32, 'separate')[0]\n"
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "kernels", BENCHMARKS)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path / "out")])
    gpu_check.main()
    shown = capsys.readouterr().out
    assert shown.startswith("## no GPU: torch ") and shown.count("\n") == 1 and not (tmp_path / "out").exists()


def test_each_part_has_its_limit(monkeypatch, tmp_path, capsys):
    """A part that fails or overruns costs its own figures only; figures and errors are shown, the rest is logged."""
    script = (
        "import sys, time\nname = sys.argv[2]\nprint('## figure of', name, flush=True)\nprint('chatter', flush=True)\n"
        "if name == 'bench':\n    time.sleep(60)\nif name == 'gluon':\n    raise ValueError('wrong')\n"
    )
    (tmp_path / "gpu_parts.py").write_text(script)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "gpu_check.py"))
    monkeypatch.setattr(gpu_check, "PARTS", {"env": 30, "bench": 0.5, "gluon": 30, "loss": 30})
    monkeypatch.setattr(gpu_check, "carried_packages", list)
    assert not gpu_check.check(tmp_path / "out", ["env", "bench", "gluon", "loss"])
    shown = capsys.readouterr().out.splitlines()
    assert [line.rpartition(",")[0] for line in shown if line.startswith("## ==")] == [
        *("## == env: 0", "## == bench: overran", "## == gluon: 1", "## == loss: 0")
    ]
    assert "ValueError: wrong" in shown and "chatter" not in shown
    assert (tmp_path / "out" / "log").read_text().count("chatter") == 4
    assert gpu_check.check(tmp_path / "out", ["env"])


def test_wheels_are_installed_where_they_lie(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command))
    assert gpu_check.carried_packages(tmp_path) == [] and asked == []
    (tmp_path / "trl-1.16.0-py3-none-any.whl").touch()
    (target,) = gpu_check.carried_packages(tmp_path)
    (command,) = asked
    assert "--no-index" in command and command[-2:] == [target, str(tmp_path / "trl-1.16.0-py3-none-any.whl")]


def test_what_wheels_are_collected():
    done = subprocess.run(["make", "--dry-run", "gpu-wheels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    # Run by another make, it also says which folder it leaves.
    named = done.stdout.split(" --constraint constraints.txt ")[1].splitlines()[0].split()
    assert set(named) == {"trl", "datasets", "dill", "multiprocess", "rapidfuzz", "shtab", "peft"} <= pinned
