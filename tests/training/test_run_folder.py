"""An output folder holds one run, in which one process works."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import runs
import tiny
import torch
from transformers import TrainerCallback
from warm import ranks_of

from hf_dskd.errors import UserError
from hf_dskd.run.arguments import parse
from hf_dskd.training import run_folder
from hf_dskd.training.run_folder import held, last_checkpoint, noted


ROOT = str(runs.Path(__file__).parents[2])
SAVED = {"method": "sft", "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "rows": 8}


class Stop(TrainerCallback):
    """Ends a training as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def make(folder, **settings):
    return runs.trainer(folder, **{**SAVED, **settings})


def same(one, two):
    return all(torch.equal(value, runs.weights(two)[name]) for name, value in runs.weights(one).items())


def test_another_run_is_not_mixed_with_the_one_that_is_there(tmp_path):
    first = make(tmp_path)
    first.train()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name not in (".run.json",)}
    other = make(tmp_path, learning_rate=5e-2)
    before = runs.weights(other)
    with pytest.raises(UserError, match=r"holds another run \(checkpoint-3\): .*resume_from_checkpoint=True") as error:
        other.train()
    assert "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert all(torch.equal(before[name], value) for name, value in runs.weights(other).items())
    with pytest.raises(UserError, match=r"learning_rate was 0.001 and is 0.05"):
        other.train(resume_from_checkpoint=True)
    again = make(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert same(first, again)


@pytest.mark.parametrize("left", ["result.json", "checkpoint-7"])
def test_what_makes_a_folder_that_of_a_run(left, tmp_path):
    (tmp_path / left).mkdir() if left.startswith("c") else (tmp_path / left).touch()
    with pytest.raises(UserError, match=f"holds another run \\({left}\\)"):
        make(tmp_path).train()


def test_a_checkpoint_says_whose_it_is(tmp_path):
    run = make(tmp_path)
    run.train()
    run.save_model()
    ids = {json.loads(path.read_text())["run_id"] for path in tmp_path.rglob("auxiliary.json")}
    assert len(list(tmp_path.rglob("auxiliary.json"))) == 4
    assert ids == {noted(tmp_path)["run_id"]} and len(ids.pop()) == 32
    resumed = make(tmp_path / "elsewhere", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert noted(tmp_path / "elsewhere")["run_id"] == noted(tmp_path)["run_id"]


def test_training_again_is_a_trainers_own_affair(tmp_path):
    """The second training, stopped early, goes on from its own checkpoint and not from the first's last one."""
    run = make(tmp_path)
    run.train()
    first = noted(tmp_path)["run_id"]
    run.write_report()
    stop = Stop(2)
    run.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    second = noted(tmp_path)["run_id"]
    assert second != first
    assert last_checkpoint(tmp_path).name == "checkpoint-1"
    run.pop_callback(stop)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3
    (tmp_path / ".run.json").write_text(json.dumps({"run_id": "a third"}))
    with pytest.raises(UserError, match=r"no checkpoint of its last run, but one of an earlier run: name it, .*-3'"):
        make(tmp_path).train(resume_from_checkpoint=True)
    make(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_checkpoints_of_several_runs_and_nothing_that_says_which(tmp_path):
    for number, rate in ((1, 1e-3), (2, 1e-2)):
        make(tmp_path / str(number), learning_rate=rate).train()
    shutil.copytree(tmp_path / "2" / "checkpoint-3", tmp_path / "1" / "checkpoint-9")
    assert last_checkpoint(tmp_path / "1").name == "checkpoint-3"
    (tmp_path / "1" / ".run.json").unlink()
    with pytest.raises(UserError, match=r"has checkpoints of several runs: name the one"):
        last_checkpoint(tmp_path / "1")
    (tmp_path / "2" / ".run.json").unlink()
    assert last_checkpoint(tmp_path / "2").name == "checkpoint-3"
    with pytest.raises(UserError, match="has no checkpoint; start without it"):
        make(tmp_path / "3").train(resume_from_checkpoint=True)


def test_a_folder_that_may_be_overwritten(tmp_path):
    make(tmp_path, max_steps=4).train()
    run = make(tmp_path, learning_rate=1e-2)
    run.args.overwrite_output_dir = True  # a setting of transformers 4
    run.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("left", ["checkpoints", "result"])
def test_a_run_from_elsewhere_does_not_take_over_anothers_folder(left, tmp_path):
    make(tmp_path / "one").train()
    two = make(tmp_path / "two", learning_rate=1e-2)
    two.train()
    two.write_report()
    if left == "result":
        for path in (tmp_path / "two").glob("checkpoint-*"):
            shutil.rmtree(path)
    run = noted(tmp_path / "two")["run_id"]
    kept = {path: path.read_bytes() for path in (tmp_path / "two").rglob("*") if path.is_file()}
    other = make(tmp_path / "two")
    with pytest.raises(UserError, match=r"output_dir=.*two' holds another run \(.*result.json\)") as error:
        other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1"))
    assert "\n" not in str(error.value) and noted(tmp_path / "two")["run_id"] == run
    assert {path for path, content in kept.items() if path.read_bytes() != content} <= {tmp_path / "two" / ".run.json"}
    # Once that is the same run, it goes on there.
    for step in ("1", "2"):
        make(tmp_path / "three").train(resume_from_checkpoint=str(tmp_path / "one" / f"checkpoint-{step}"))


# ---- Two processes


HOLD = (
    "import sys, time\n"
    f"sys.path.insert(0, {ROOT!r})\n"
    "from pathlib import Path\n"
    "from hf_dskd.training.run_folder import held\n"
    "with held(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)
# With a process that it has forked, as a data loader's worker, which keeps what was open.
HOLD_WITH_WORKER = (
    "import fcntl, os, socket, sys, time\n"
    f"sys.path.insert(0, {ROOT!r})\n"
    "from pathlib import Path\n"
    "from hf_dskd.training.run_folder import LOCK_NAME, note\n"
    "folder = Path(sys.argv[1])\n"
    "fcntl.flock(os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)\n"
    "note(folder, host=socket.gethostname(), pid=os.getpid(), since='2026')\n"
    "if not os.fork():\n"
    "    os.close(1)\n"
    "    time.sleep(4)\n"
    "    os._exit(0)\n"
    "print('held', flush=True)\n"
    "time.sleep(600)\n"
)


def holder(folder, script=HOLD):
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_process_in_a_folder_is_told_of_the_first(tmp_path):
    process = holder(tmp_path)
    try:
        run = make(tmp_path, eval_dataset=tiny.dataset(3))
        expected = (
            rf"in use by process {process.pid} on .+ since 20\d\d-.*: wait for its end, or name another output_dir"
        )
        for resume in (None, True):
            with pytest.raises(UserError, match=expected) as error:
                run.train(resume_from_checkpoint=resume)
            assert "\n" not in str(error.value)
        # Which looks only.
        assert run.evaluate()["eval_loss"] > 0
        make(tmp_path / "another").train()
    finally:
        process.kill()
        process.wait()
    run.train()
    assert noted(tmp_path)["pid"] == os.getpid()


def test_a_second_smoke_run_leaves_the_first_alone(tmp_path):
    for name in ("tiny_models", "checkpoint-1"):
        (tmp_path / name).mkdir()
    process = holder(tmp_path)
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            parse(None, None, ["--smoke", "--output_dir", str(tmp_path), "--model_name_or_path", "student"])
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "checkpoint-1").is_dir()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_what_a_killed_process_leaves_running_is_waited_for(tmp_path, monkeypatch):
    process = holder(tmp_path, HOLD_WITH_WORKER)
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(run_folder, "PATIENCE", 0.1)
    with pytest.raises(UserError, match=f"in use by process {process.pid}"), held(tmp_path):
        pass
    monkeypatch.setattr(run_folder, "PATIENCE", 30.0)
    with held(tmp_path), held(tmp_path):
        assert noted(tmp_path)["pid"] == os.getpid()


def test_a_lock_that_is_a_link_is_left_alone(tmp_path):
    (tmp_path / "notes").write_text("of somebody")
    (tmp_path / ".run.lock").symlink_to(tmp_path / "notes")
    with pytest.raises(UserError, match=r"\.run\.lock' is a symbolic link: delete it"):
        make(tmp_path).train()
    assert (tmp_path / "notes").read_text() == "of somebody"


@pytest.mark.skipif(os.name != "posix", reason="flock is of Unix")
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    import fcntl

    def none(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with held(tmp_path):
        assert "can't be locked" in caplog.text


def rank_run(folder):
    """Of two ranks: a run, a refusal, and one that goes on."""
    make(folder, per_device_train_batch_size=2).train()
    found = []
    for settings, resume in (({}, None), ({"seed": 1}, True), ({"max_steps": 4}, True)):
        run = make(folder, per_device_train_batch_size=2, **settings)
        try:
            run.train(resume_from_checkpoint=resume)
            found.append(run.state.global_step)
        except UserError as error:
            found.append(str(error))
    return found


def test_the_ranks_of_a_run_share_its_folder_and_are_refused_together(tmp_path):
    one, two = ranks_of("test_run_folder", "rank_run(folder + '/run')", tmp_path)
    assert one == two
    assert "holds another run" in one[0] and "seed was 0 and is 1" in one[1] and one[2] == 4
    with pytest.raises(UserError, match="processes was 2 and is 1"):
        make(tmp_path / "run", per_device_train_batch_size=2).train(resume_from_checkpoint=True)
    (tmp_path / "run" / "checkpoint-4" / "rng_state_1.pth").unlink()
    make(tmp_path / "run", per_device_train_batch_size=2, max_steps=5, allow_changed_settings=True).train(
        resume_from_checkpoint=True
    )
