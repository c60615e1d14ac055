"""With what else users of transformers have: callbacks, trackers, searches, streams, files of accelerate config."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import runs
import tiny
import torch
from datasets import IterableDataset
from transformers import EarlyStoppingCallback, TrainerCallback
from warm import forked

from hf_dskd import DSKDTrainer, UserError, run


ROOT = Path(__file__).resolve().parents[1]
TERMS = ("loss", "ce_loss", "kq_loss", "discriminator_loss", "grad_norm", "projector_grad_norm")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a tiny student and teacher, and a JSONL file."""
    folder = tmp_path_factory.mktemp("pair")
    for name, model, tokenizer in (
        ("student", tiny.gpt2(len(runs._STUDENT_TOKENIZER)), runs._STUDENT_TOKENIZER),
        ("teacher", tiny.qwen2(len(runs._TEACHER_TOKENIZER)), runs._TEACHER_TOKENIZER),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.dataset(16)))
    return folder


# ---- Callbacks


class Recorder(TrainerCallback):
    """What somebody else's callback sees."""

    def __init__(self):
        self.events, self.logs = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.events.append("begin")
        self.model = model

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.events.append("pre_optimizer_step")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append("step_end")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append("evaluate")
        self.metrics = metrics

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def test_callbacks_of_others_see_steps_evaluations_and_every_term(tmp_path):
    recorder = Recorder()
    trainer = runs.trainer(
        tmp_path, callbacks=[recorder], eval_dataset=tiny.dataset(4), eval_strategy="steps", eval_steps=2, max_steps=2
    )
    trainer.train()
    assert recorder.events == ["begin", *["pre_optimizer_step", "step_end"] * 2, "evaluate"]
    assert recorder.model is trainer.model
    training = [logs for logs in recorder.logs if "loss" in logs]
    assert len(training) == 2 and all(set(TERMS) <= set(logs) for logs in training)
    assert recorder.metrics["eval_bits_per_byte"] > 0


def test_a_callback_can_stop_the_run(tmp_path):
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    # Bits per byte fall from the first evaluation on: "greater is better" makes the second one a disappointment.
    trainer = runs.trainer(
        tmp_path,
        callbacks=[stop],
        eval_dataset=tiny.dataset(4),
        max_steps=6,
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": "bits_per_byte", "greater_is_better": True},
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")


# ---- Trackers


def scalars(folder):
    """Every scalar that TensorBoard reads in a folder: `{tag: {step: value}}`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


def test_tensorboard_has_every_term_of_every_step(tmp_path):
    trainer = runs.trainer(tmp_path, report_to=["tensorboard"])
    trainer.train()
    found = scalars(tmp_path)
    for name in TERMS:
        expected = {log["step"]: log[name] for log in trainer.state.log_history if "loss" in log}
        assert found[f"train/{name}"] == pytest.approx(expected, rel=1e-5), name


SCRIPT = """
import runs
project = dict(project="hf_dskd_tests", trackio_space_id=None)
trainer = runs.trainer({out!r}, report_to=[{tracker!r}], run_name="tiny", **project)
trainer.train()
"""


def track(tmp_path, tracker, **environment):
    """A run of three steps in a process of its own, since trackers keep global state."""
    source = SCRIPT.format(out=str(tmp_path / "out"), tracker=tracker)
    if tracker == "wandb":
        source = source.replace(", **project", "")
    done = forked(source, cwd=tmp_path, environment={key: str(value) for key, value in environment.items()})
    assert done.returncode == 0, done.stderr[-3000:]


def test_wandb_has_every_term(tmp_path):
    track(tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=tmp_path, WANDB_PROJECT="hf_dskd_tests")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for name in TERMS:
        assert f"train/{name}".encode() in content, name


def test_trackio_has_every_term(tmp_path):
    track(tmp_path, "trackio", TRACKIO_DIR=tmp_path / "trackio")
    import sqlite3

    (file,) = (tmp_path / "trackio").glob("hf_dskd_tests*.db")
    with sqlite3.connect(file) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics")]
    names = {name for row in rows for name in row}
    assert {f"train/{name}" for name in TERMS} <= names


# ---- Search


def searched(tmp_path, folders, **settings):
    """A trainer whose student is given by name."""
    return DSKDTrainer(
        str(folders / "student"),
        str(folders / "teacher"),
        runs.config(tmp_path, **settings),
        train_dataset=tiny.dataset(8),
        eval_dataset=tiny.dataset(4),
    )


def test_a_trial_is_the_run_that_its_settings_make(tmp_path, folders):
    space = {"kd_rate": [0.25, 0.75], "projector_learning_rate": [1e-3]}
    trainer = searched(tmp_path / "search", folders, logging_strategy="no")

    def suggest(trial):
        return {name: trial.suggest_categorical(name, values) for name, values in space.items()}

    best = trainer.hyperparameter_search(suggest, n_trials=2, sampler=optuna.samplers.GridSampler(space, seed=0))
    alone = {}
    for rate in space["kd_rate"]:
        plain = searched(tmp_path / str(rate), folders, kd_rate=rate)
        plain.train()
        alone[rate] = plain.evaluate()["eval_bits_per_byte"]
    assert alone[0.25] != alone[0.75]
    # To the last bit: no weight, moment or random number of an earlier trial is left.
    assert best.objective == min(alone.values())
    assert alone[best.hyperparameters["kd_rate"]] == best.objective
    # What people do next.
    for name, value in best.hyperparameters.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert trainer.evaluate()["eval_bits_per_byte"] == best.objective


def test_what_a_search_cannot_vary_is_refused(tmp_path, folders):
    trainer = searched(tmp_path, folders)
    for name, value, expected in (
        ("max_length", 128, r"can't vary max_length \(256, 128\).*hf-dskd compare"),
        ("method", "sft", r"can't vary method \('dskd_cma_ga', 'sft'\)"),
        ("bpm_segmentation", "longest", r"can't vary bpm_segmentation \('student', 'longest'\)"),
        ("kd_rate", 1.5, r"kd_rate=1.5 is outside"),
    ):
        before = getattr(trainer.args, name)
        with pytest.raises(UserError, match=expected):
            trainer.hyperparameter_search(lambda trial, name=name, value=value: {name: value}, n_trials=1)
        setattr(trainer.args, name, before)
    with pytest.raises(UserError, match="pass model as a name or folder instead of a GPT2LMHeadModel"):
        runs.trainer(tmp_path, eval_dataset=tiny.dataset(4)).hyperparameter_search(lambda trial: {})
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    with pytest.raises(UserError, match=r"2 sets: pass compute_objective.*eval_a_bits_per_byte, eval_b_bits_per_byte"):
        trainer.hyperparameter_search(lambda trial: {})
    trainer.eval_dataset = None
    with pytest.raises(UserError, match="eval_dataset=None: pass one"):
        trainer.hyperparameter_search(lambda trial: {})


# ---- Streams


def test_a_stream_trains_as_the_dataset_in_its_order(tmp_path):
    """Without shuffling both see the same batches."""
    from torch.utils.data import SequentialSampler

    rows = list(tiny.dataset(12))
    streamed = runs.trainer(tmp_path / "a", train_dataset=IterableDataset.from_generator(lambda: iter(rows)))
    listed = runs.trainer(tmp_path / "b", train_dataset=tiny.dataset(12))
    listed._get_train_sampler = lambda dataset=None: SequentialSampler(listed.train_dataset)
    for trainer in (streamed, listed):
        trainer.train()
    assert runs.history(streamed, *TERMS) == runs.history(listed, *TERMS)
    assert all(torch.equal(a, b) for a, b in zip(runs.weights(streamed).values(), runs.weights(listed).values()))


def parsed(folders, tmp_path, *arguments):
    return run.parse(
        None,
        None,
        [
            *("--model_name_or_path", str(folders / "student"), "--output_dir", str(tmp_path), "--use_cpu"),
            *("--teacher_model_name_or_path", str(folders / "teacher"), "--dataset_name", str(folders / "data.jsonl")),
            *("--dataset_streaming", "--report_to", "none", "--bf16", "false", *arguments),
        ],
    )


def test_a_streamed_file_from_the_command_line(folders, tmp_path):
    arguments = (
        "--max_steps",
        "2",
        "--held_out_size",
        "3",
        "--train_size",
        "9",
        "--rename_columns",
        "prompt=question",
    )
    given = parsed(folders, tmp_path, *arguments, "--prompt_column", "question", "--max_length", "256")
    train, held_out = run.load_data(given)
    rows = list(tiny.dataset(16))
    assert not hasattr(train, "__len__")
    assert [row["question"] for row in held_out] == [row["prompt"] for row in rows[:3]]
    assert [row["question"] for row in train] == [row["prompt"] for row in rows[3:12]]
    run.train(given)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 2 and math.isfinite(result["metrics"]["eval_bits_per_byte"])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((), r"dataset_streaming=True: max_steps=-1 says when to stop"),
        (("--max_steps", "2", "--teacher_cache", "c"), r"teacher_cache='c' needs the number of examples"),
        (("--max_steps", "2", "--rename_columns", "x=y"), r"rename_columns='x=y'.*columns out of prompt, completion"),
    ],
)
def test_limits_of_a_stream_are_named(folders, tmp_path, arguments, expected):
    with pytest.raises(UserError, match=expected):
        run.load_data(parsed(folders, tmp_path, *arguments))


# ---- accelerate


def test_a_configuration_file_of_accelerate(folders, tmp_path):
    """What `accelerate config` writes, for two processes on a CPU without instructions for bf16."""
    (tmp_path / "recipe.py").write_text(
        f"import runpy, torch\ntorch.cpu.get_capabilities = dict\n"
        f"runpy.run_path({str(ROOT / 'recipes' / 'gpt2_qwen.py')!r}, run_name='__main__')\n"
    )
    (tmp_path / "config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nmachine_rank: 0\n"
        "num_processes: 2\nmixed_precision: 'no'\nuse_cpu: true\nmain_training_function: main\ndowncast_bf16: 'no'\n"
        "rdzv_backend: static\nsame_network: true\nmain_process_port: 0\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "config.yaml")),
            *(str(tmp_path / "recipe.py"), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"),
            *("--model_name_or_path", str(folders / "student"), "--bf16", "false", "--dataset_num_proc", "1"),
            *("--teacher_model_name_or_path", str(folders / "teacher"), "--dataset_name", str(folders / "data.jsonl")),
            *("--rename_columns", "", "--held_out_size", "4", "--total_batch_size", "4", "--max_length", "256"),
            *("--per_device_train_batch_size", "2", "--save_strategy", "no", "--load_best_model_at_end", "false"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["hardware"]["processes"] == 2


def test_processes_end_together(tmp_path):
    """One that is done while another still writes its report would else end under the other's hands."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "import torch.distributed as dist\nfrom hf_dskd import run\n"
        "done = Path(sys.argv[1])\n"
        "def main():\n"
        "    dist.init_process_group('gloo')\n"
        "    if dist.get_rank() == 0:\n        time.sleep(1)\n        done.touch()\n"
        "run.command(main)\n"
        "assert done.exists() and not dist.is_initialized()\n"
    )
    done = forked(code, tmp_path / "done", ranks=2, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
