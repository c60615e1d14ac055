"""Processes of a launcher are one run, or stop."""

import subprocess
import sys

import pytest
import torch

from hf_dskd import DSKDConfig, UserError, cli
from hf_dskd.evaluation.protocol import EvaluationSettings, evaluate
from hf_dskd.launch import VARIABLES, check_processes, launched_processes


@pytest.fixture
def alone(monkeypatch):
    for name in (*VARIABLES, "RANK", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


def made(folder, **settings):
    return DSKDConfig(str(folder), report_to="none", **settings)


def test_a_process_without_a_launcher_is_one(alone, tmp_path, monkeypatch):
    assert launched_processes() == 1
    assert made(tmp_path).world_size == 1 and not made(tmp_path).use_cpu
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched_processes() == 1 and made(tmp_path).world_size == 1


@pytest.mark.parametrize("name", VARIABLES)
def test_a_process_that_would_train_alone_stops(alone, tmp_path, monkeypatch, name):
    """As where each process of MPI has a GPU, or several share that of a Mac: Accelerate takes each for itself."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv(name, "3")
    with pytest.raises(UserError, match=f"^{name}=3, but this process found 1 of them.*--num_processes 3.*unset") as e:
        made(tmp_path)
    assert "\n" not in str(e.value)


def test_the_device_that_keeps_processes_apart_is_named(alone, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="WORLD_SIZE=2, but this process found 1 of them and trains alone on 'mps'"):
        check_processes(1)
    check_processes(2)


def test_an_evaluation_that_would_run_alone_stops(alone, tmp_path, monkeypatch):
    from accelerate import PartialState

    PartialState._reset_state()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2"):
        evaluate(EvaluationSettings("model", tmp_path / "out", {}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compare", "push", "report", "analyse"])
def test_commands_of_one_process_refuse_several(alone, monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        cli.main([command, "anything"])
    assert f"hf-dskd {command} runs in one process, and a launcher has started 2" in capsys.readouterr().err


def test_processes_on_cpus_find_each_other(tmp_path):
    """Also without use_cpu, which Accelerate needs to be told."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\nfrom pathlib import Path\n"
        "from hf_dskd import DSKDConfig\nfrom hf_dskd.launch import leave_together\n"
        "torch.accelerator.is_available = lambda: False\n"
        "config = DSKDConfig(sys.argv[1], report_to='none')\n"
        "found = f'rank {config.process_index} of {config.world_size} on {config.device.type}'\n"
        "Path(sys.argv[1], 'found' + os.environ['RANK']).write_text(found)\n"
        "leave_together()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    # Not what they print, which may run together.
    found = [(tmp_path / f"found{rank}").read_text() for rank in (0, 1)]
    assert found == ["rank 0 of 2 on cpu", "rank 1 of 2 on cpu"]
