"""Runs on text that a model writes: the student's own in on-policy steps, the teacher's with `seq_kd`."""

import gc
import json
import math
import os
import subprocess
import sys
import weakref

import pytest
import runs
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import GenerationConfig, TrainerCallback
from warm import PATHS, of_ranks

from hf_dskd.data.tokenization import tokenize_dataset
from hf_dskd.errors import UserError
from hf_dskd.losses.terms import TERMS
from hf_dskd.models.generation import response_text
from hf_dskd.teacher import load as load_module
from hf_dskd.teacher import responses
from hf_dskd.training import on_policy


STUDENT, TEACHER = runs._STUDENT_TOKENIZER, runs._TEACHER_TOKENIZER
MAX_LENGTH = 96
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
WITH_TEACHER = [case for case in runs.CASES if case != "sft"]
# A student that has learnt nothing writes broken characters or repeats white space, which is no answer.
UNWANTED = [token for token in range(1, len(STUDENT)) if not response_text(STUDENT, [token]).isalnum()]
SAMPLING = {"do_sample": True, "top_k": 50, "top_p": 0.95, "temperature": 1.3}
GREEDY = {"do_sample": False}
STILL = {"learning_rate": 0.0, "projector_learning_rate": 0.0, "discriminator_learning_rate": 0.0}


# ---- On-policy steps


def student(dropout=0.0, **generation):
    model = tiny.gpt2(len(STUDENT), dropout=dropout)
    model.generation_config = GenerationConfig(
        **{"max_new_tokens": 10, "suppress_tokens": UNWANTED, "bos_token_id": 0, "eos_token_id": 0, **generation}
    )
    return model


def on_policy_run(folder, *, dropout=0.0, generation=SAMPLING, fraction=1.0, **settings):
    settings = {"rows": 12, "max_length": MAX_LENGTH, "on_policy_fraction": fraction, **settings}
    return runs.trainer(folder, student=student(dropout, **generation), **settings)


class RandomStates(TrainerCallback):
    """The state of the global random numbers after each step."""

    def __init__(self, states):
        self.states = states

    def on_step_end(self, *args, **kwargs):
        self.states.append(torch.get_rng_state())


class Watch:
    """What the batches of each step of a run are, and whether making them moves the global random numbers."""

    def __init__(self, run):
        self.on_policy, self.ids, self.texts, self.moved = [], [], [], []
        self.run, self.batches = run, run.get_batch_samples
        run.get_batch_samples = self

    def __call__(self, iterator, *args, **kwargs):
        fetched = []

        def watched():
            for batch in iterator:
                fetched.append(torch.get_rng_state())
                yield batch

        batches, items = self.batches(watched(), *args, **kwargs)
        if not batches:  # at the end of an epoch
            return batches, items
        self.on_policy.append(self.run._on_policy)
        self.ids.append([batch["example_ids"].tolist() for batch in batches])
        self.texts.append(
            [response_text(STUDENT, row[row != -100].tolist()) for batch in batches for row in batch["labels"]]
        )
        self.moved.append(not torch.equal(torch.get_rng_state(), fetched[-1]))
        return batches, items


def loss_from_terms(run, log, on_policy):
    weights = run.distiller.weights()
    weights["ce"] *= not on_policy
    return sum(weight * log[TERMS[name].log] for name, weight in weights.items())


def training_logs(run):
    return [log for log in run.state.log_history if "loss" in log]


def data_texts(run):
    return {
        row["example_id"]: response_text(STUDENT, row["input_ids"][row["prompt_length"] :])
        for row in run.train_dataset
    }


def assert_equal_weights(one, two):
    assert [name for name, value in runs.weights(one).items() if not torch.equal(value, runs.weights(two)[name])] == []


@pytest.mark.parametrize("case", WITH_TEACHER)
def test_every_case_learns_the_students_own_text(case, tmp_path):
    run = on_policy_run(tmp_path, max_steps=1, rows=8, **runs.CASES[case])
    watch, original, before = Watch(run), data_texts(run), runs.weights(run)
    run.train()
    assert watch.on_policy == [True]
    [[ids]], [texts] = watch.ids, watch.texts
    assert len(texts) == 4 and all(text.isalnum() for text in texts)
    assert not {original[example] for example in ids} & set(texts)
    [log] = training_logs(run)
    assert all(math.isfinite(value) for value in log.values())
    assert log["loss"] == pytest.approx(loss_from_terms(run, log, True), rel=1e-5, abs=1e-4)
    assert abs(log["loss"] - loss_from_terms(run, log, False)) > 1
    for name, value in runs.weights(run).items():
        assert torch.isfinite(value).all(), name
    assert any(not torch.equal(before[name], value) for name, value in runs.weights(run).items() if "student" in name)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_resume_is_bit_exact(adapter, tmp_path):
    def make(folder):
        return on_policy_run(
            folder,
            dropout=0.1,
            fraction=0.5,
            peft_config=LORA if adapter else None,
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,  # three steps an epoch: the run crosses one
            discriminator_dropout=0.2,
            lr_scheduler_type="cosine",
        )

    whole = make(tmp_path / "whole")
    watch = Watch(whole)
    whole.train()
    for step in (2,) if adapter else (1, 2, 3):
        resumed = make(tmp_path / "resumed")
        again = Watch(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert again.on_policy == watch.on_policy[step:]
        assert again.texts == watch.texts[step:]
        assert_equal_weights(whole, resumed)
        assert runs.history(resumed, "loss", "kq_loss") == runs.history(whole, "loss", "kq_loss")


def test_steps_on_the_data_are_those_of_a_run_without_samples(tmp_path):
    """With weights that don't move, to the last bit; without dropout, which draws more for longer responses."""
    logs, watches = [], []
    for fraction in (0.0, 0.5):
        run = on_policy_run(
            tmp_path / str(fraction), fraction=fraction, max_steps=4, discriminator_dropout=0.3, **STILL
        )
        states = []
        run.add_callback(RandomStates(states))
        watches.append(Watch(run))
        run.train()
        assert watches[-1].moved == [False] * 4
        logs.append((runs.history(run, "loss", "kq_loss", "discriminator_loss"), states))
        original = data_texts(run)
        for on, ids, texts, log in zip(watches[-1].on_policy, watches[-1].ids, watches[-1].texts, training_logs(run)):
            assert log["loss"] == pytest.approx(loss_from_terms(run, log, on), rel=1e-5, abs=1e-4)
            assert (texts == [original[example] for example in ids[0]]) == (not on)
    (off, states), (mixed, mixed_states) = logs
    assert watches[1].on_policy == [False, True, False, True] and watches[0].ids == watches[1].ids
    assert [one == other for one, other in zip(watches[0].texts, watches[1].texts)] == [True, False, True, False]
    assert [one == other for one, other in zip(off, mixed)] == [True, False, True, False]
    assert len(states) == 4 and all(torch.equal(one, other) for one, other in zip(states, mixed_states))


def test_seeds_and_steps_sample_differently(tmp_path):
    texts = []
    for seed in (0, 0, 1):
        run = on_policy_run(tmp_path, method="uld", seed=seed, data_seed=0, max_steps=2, rows=4, learning_rate=0.0)
        watch = Watch(run)
        run.train()
        by_example = [dict(zip(ids[0], step)) for ids, step in zip(watch.ids, watch.texts)]
        # The four prompts come again in the second step.
        assert by_example[0].keys() == by_example[1].keys() and by_example[0] != by_example[1]
        texts.append(by_example)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("case", ["dskd_cma_ga", "min_edit", "alm"])
def test_gradient_accumulation(case, tmp_path):
    logs, finals, texts = [], [], []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        run = on_policy_run(
            tmp_path / str(batch_size),
            generation=GREEDY,
            fraction=0.5,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            **runs.CASES[case],
        )
        watch = Watch(run)
        run.train()
        texts.append(watch.texts)
        names = [name for name in training_logs(run)[0] if name.endswith(("loss", "norm", "rate", "accuracy"))]
        logs.append(torch.tensor(runs.history(run, *names)))
        finals.append(runs.weights(run))
    assert texts[0] == texts[1] and all(text.isalnum() for text in texts[0][1])
    torch.testing.assert_close(logs[0], logs[1], rtol=1e-5, atol=1e-6)
    for name in finals[0]:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=1e-5, atol=1e-5)


def test_evaluation_is_on_the_data(tmp_path, monkeypatch):
    calls = []
    sample = on_policy.sample
    monkeypatch.setattr(on_policy, "sample", lambda *args, **kwargs: calls.append(1) or sample(*args, **kwargs))
    metrics = []
    for fraction in (0.0, 1.0):
        run = on_policy_run(
            tmp_path / str(fraction),
            fraction=fraction,
            max_steps=2,
            eval_dataset=tiny.dataset(6),
            eval_strategy="steps",
            eval_steps=1,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            **STILL,
        )
        run.train()
        evaluations = [log for log in run.state.log_history if "eval_loss" in log] + [run.evaluate()]
        assert len(calls) == 4 * fraction
        metrics.append(
            [{k: v for k, v in log.items() if k.endswith(("loss", "byte", "accuracy"))} for log in evaluations]
        )
    assert metrics[0] == metrics[1] and len(metrics[0]) == 3


def test_gradient_checkpointing_changes_nothing(tmp_path):
    finals, texts = [], []
    for checkpointing in (False, True):
        settings = {"peft_config": LORA, "max_steps": 2, "gradient_checkpointing": checkpointing}
        run = on_policy_run(tmp_path / str(checkpointing), dropout=0.1, **settings)
        watch = Watch(run)
        run.train()
        assert run.model.training
        finals.append(runs.weights(run))
        texts.append(watch.texts)
    assert texts[0] == texts[1]
    for name in finals[0]:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=1e-4, atol=1e-5)


def logs_of_runs(folder, batch_size):
    """What short runs log, on what the student writes greedily and on what the teacher wrote, and how they end."""
    options = {"per_device_train_batch_size": batch_size, "optim": "sgd", "learning_rate": 0.1}
    logs = {}
    for case in ("dskd_cma_ga", "min_edit", "seq_kd"):
        if case == "seq_kd":
            run = seq_kd(folder, max_steps=1, **options)
        else:
            run = on_policy_run(folder, generation=GREEDY, fraction=0.5, rows=16, max_steps=2, method=case, **options)
        watch = Watch(run)
        run.train()
        assert case == "seq_kd" or all(text.isalnum() for text in watch.texts[1])
        ends = ("loss", "norm", "rate", "agreement", "accuracy", "real", "fake")
        names = sorted(name for name in training_logs(run)[0] if name.endswith(ends))
        logs[case] = [[log[name] for name in names] for log in training_logs(run)]
        logs[case].append([value.double().sum().item() for value in runs.weights(run).values()])
    return logs if run.accelerator.is_main_process else None


RANK = """
import json, sys, test_generated
from hf_dskd.launch import leave_together
logs = test_generated.logs_of_runs(sys.argv[1], 4)
if logs is not None:
    json.dump(logs, open(sys.argv[1] + "/logs.json", "w"))
leave_together()
"""


def test_two_processes_equal_one(tmp_path):
    """Two gloo processes of half the batch, in which strings have different hashes, as they have on any two."""
    one = logs_of_runs(str(tmp_path / "1"), 8)
    (tmp_path / "2").mkdir()
    paths = os.pathsep.join(PATHS)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "2")],
            env={**os.environ, **rank, "PYTHONHASHSEED": seed, "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, seed in zip(of_ranks(2), ("1", "4"))
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0][-3000:]
    two = json.loads((tmp_path / "2" / "logs.json").read_text())
    assert two.keys() == one.keys()
    for case, expected in one.items():
        assert two[case] == [pytest.approx(numbers, rel=1e-4, abs=1e-5) for numbers in expected], case


# ---- What the teacher wrote


def teacher():
    """Ends some of its responses."""
    model = tiny.qwen2(len(TEACHER))
    model.generation_config.eos_token_id = list(range(100, 120))
    return model


def seq_kd(folder, **settings):
    options = {"rows": 12, "max_length": MAX_LENGTH, "skip_long_prompts": True, "teacher": teacher(), **settings}
    return runs.trainer(folder, method="seq_kd", **options)


def written(folder):
    return [json.loads(line) for line in (folder / "teacher_responses" / "responses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run on what the teacher wrote, and its folder."""
    folder = tmp_path_factory.mktemp("taught")
    run = seq_kd(folder, **SAVED)
    run.train()
    return run, folder


SAVED = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def no_writing(*args, **kwargs):
    raise AssertionError("the teacher is asked again")


def test_seq_kd_is_sft_on_what_the_teacher_wrote(tmp_path):
    evaluation = tiny.dataset(6)
    run = seq_kd(tmp_path / "seq_kd", eval_dataset=evaluation)
    assert run.teacher is None and run.projectors is None and run.adversary is None
    rows = written(tmp_path / "seq_kd")
    assert [row["prompt"] for row in rows] == tiny.dataset(12)["prompt"][:]
    assert not {row["completion"] for row in rows} & set(tiny.dataset(12)["completion"])
    options = {"max_length": MAX_LENGTH, "skip_long_prompts": True}
    text = tokenize_dataset(Dataset.from_list(rows), STUDENT, TEACHER, finished_column="finished", **options)[0]
    sft = runs.trainer(tmp_path / "sft", method="sft", train_dataset=text, eval_dataset=evaluation, **options)
    assert run.train_dataset.to_list() == text.to_list()
    # What it is evaluated on is the data itself.
    assert run.eval_dataset.to_list() == sft.eval_dataset.to_list()
    for row, source in zip(run.eval_dataset, evaluation):
        response = response_text(STUDENT, row["input_ids"][row["prompt_length"] :])
        assert source["completion"].startswith(response) and len(response.encode()) == row["response_bytes"]
    run.train()
    sft.train()
    assert runs.history(run, "loss", "ce_loss") == runs.history(sft, "loss", "ce_loss")
    assert_equal_weights(run, sft)
    metrics = [
        {k: v for k, v in one.evaluate().items() if k.endswith(("loss", "byte", "accuracy"))} for one in (run, sft)
    ]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 4


def test_what_the_teacher_did_not_end_does_not_end_for_the_student(taught):
    run, folder = taught
    rows = written(folder)
    kept = {row["example_id"]: row for row in run.train_dataset}
    unfinished = [row["example_id"] for row in rows if not row["finished"] and row["example_id"] in kept]
    finished = [row["example_id"] for row in rows if row["finished"] and row["example_id"] in kept]
    assert unfinished and finished
    for example in unfinished:
        assert kept[example]["cut"] and kept[example]["input_ids"][-1] != STUDENT.eos_token_id
    assert any(kept[example]["input_ids"][-1] == STUDENT.eos_token_id for example in finished)
    for example in finished:
        assert (kept[example]["input_ids"][-1] == STUDENT.eos_token_id) == (not kept[example]["cut"])
    # In the batch, too, the last label is a token of the text.
    batch = run.data_collator([kept[example] for example in unfinished])
    assert not (batch["labels"] == STUDENT.eos_token_id).any()


def test_the_teacher_writes_once(taught, monkeypatch):
    first, folder = taught
    before = (folder / "teacher_responses" / "responses.jsonl").read_bytes()
    monkeypatch.setattr(responses, "sample", no_writing)
    monkeypatch.setattr("hf_dskd.training.pair.load_teacher_model", no_writing)
    again = seq_kd(folder, **SAVED)
    assert again.train_dataset.to_list() == first.train_dataset.to_list()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert_equal_weights(first, again)
    # What other settings would have made it write is refused.
    with pytest.raises(UserError, match="max_length=96, which is now 64: choose another folder or delete") as error:
        seq_kd(folder, max_length=64)
    assert str(folder / "teacher_responses") in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="dtype='float32', which is now 'bfloat16'"):
        seq_kd(folder, bf16=True)
    assert (folder / "teacher_responses" / "responses.jsonl").read_bytes() == before


def test_a_teacher_by_name_is_let_go(taught, tmp_path, monkeypatch):
    teacher().save_pretrained(tmp_path / "teacher")
    TEACHER.save_pretrained(tmp_path / "teacher")
    loaded, load = [], load_module.load_causal_lm

    def watched(name, **options):
        model = load(name, **options)
        loaded.append((name, weakref.ref(model)))
        return model

    monkeypatch.setattr(load_module, "load_causal_lm", watched)
    run = seq_kd(tmp_path / "run", teacher=str(tmp_path / "teacher"), max_steps=1)
    gc.collect()
    assert [(name, reference()) for name, reference in loaded] == [(str(tmp_path / "teacher"), None)]
    # It wrote what the same model writes that is passed as one.
    assert written(tmp_path / "run") == written(taught[1])
    run.train()
    assert run.state.global_step == 1


def test_interrupted_writing_goes_on(taught, tmp_path, monkeypatch):
    sample, prompts = responses.sample, []

    def interrupted(model, batch, **options):
        if len(prompts) == 1:
            prompts.append(0)
            raise KeyboardInterrupt
        prompts.append(len(batch))
        return sample(model, batch, **options)

    monkeypatch.setattr(responses, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        seq_kd(tmp_path)
    assert len(written(tmp_path)) == prompts[0] < 12
    resumed = seq_kd(tmp_path)
    assert sum(prompts) == 12
    assert resumed.train_dataset.to_list() == taught[0].train_dataset.to_list()


def test_a_stream_has_no_end_to_write_to(tmp_path):
    rows = tiny.dataset(4).to_list()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(UserError, match=r"method='seq_kd'.*IterableDataset.*Dataset") as error:
        seq_kd(tmp_path, train_dataset=stream)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "teacher_responses").exists()
