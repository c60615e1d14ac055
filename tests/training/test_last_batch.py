"""Examples of the last batch of an epoch count once, however many ranks have to be filled."""

import pytest
import runs
import tiny
import torch
from datasets import IterableDataset
from warm import ranks_of

from hf_dskd.data.fillers import first_examples


def batch(run, rows):
    return run.data_collator([run.train_dataset[i] for i in range(rows)])


@pytest.mark.parametrize("count", [-3, 0, 1, 3, 4, 9])
def test_first_examples(count, tmp_path):
    run = runs.trainer(tmp_path, method="alm", rows=4)
    whole = batch(run, 4)
    copies = {name: value.clone() for name, value in whole.items()}
    first = first_examples(whole, count)
    assert first.keys() == whole.keys()
    nothing = dict.fromkeys(("labels", "teacher_labels"), -100)
    for column, value in (("byte_ends", -1), ("chunk_ids", -1), ("places", -1), ("silent", False)):
        nothing |= {f"{side}{column}": value for side in ("", "teacher_")}
    for name, value in first.items():
        expected = copies[name][: max(count, 1)]
        if count < 1 and name in nothing:
            expected = torch.full_like(expected, nothing[name])
        assert torch.equal(value, expected), name
        assert torch.equal(whole[name], copies[name]), name


# Every loss, and where ranks share something else: streams, samplers, caches, samples.
CASES: dict = {
    **runs.CASES,
    "stream": {"method": "dskd_cma_ga", "eval_generation_samples": 3},
    "grouped": {"method": "dskd_cma_ga", "train_sampling_strategy": "group_by_length"},
    "workers": {"method": "kd", "dataloader_num_workers": 1},
    "cached": {"method": "dskd_cma"},
    "on_policy": {"method": "uld", "on_policy_fraction": 1.0, "max_length": 96},
}
if not hasattr(runs.config("out"), "train_sampling_strategy"):  # as in transformers 4
    CASES["grouped"] = {"method": "dskd_cma_ga", "group_by_length": True}
# Two ranks show what hangs on their number; four have some without any example.
FEW = ("dskd_cma_ga", "alm", "attention", "stream")


def logs_of_runs(folder, size, names=tuple(CASES)):
    """An epoch of 11 examples, 8 to a step, and of streams the next one's beginning."""
    logs = {}
    rows = tiny.dataset(11).to_list()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    for case in names:
        data = {"train_dataset": stream, "eval_dataset": stream} if case == "stream" else {}
        cache = {"teacher_cache": f"{folder}/cache"} if case == "cached" else {}
        run = runs.trainer(
            folder,
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            rows=11,
            max_steps=3 if case == "stream" else 2,
            optim="sgd",
            learning_rate=0.1,
            **{"eval_dataset": tiny.dataset(7), **CASES[case], **data, **cache},
        )
        if case == "on_policy":
            run.model.generation_config.update(max_new_tokens=8, do_sample=False)
        run.train()
        metrics = run.evaluate()
        shown = [log for log in run.state.log_history if "loss" in log] + [metrics]
        ends = ("loss", "rate", "agreement", "norm", "real", "cost", "byte", "rouge_l")
        logs[case] = [[log[name] for name in sorted(log) if name.endswith(ends)] for log in shown]
        logs[case].append([weight.double().sum().item() for weight in runs.weights(run).values()])
    return logs


def test_any_number_of_processes_equals_one(tmp_path):
    """With two, the last three of an epoch are rank 0's; with four, two ranks have none."""
    expected = logs_of_runs(str(tmp_path / "one"), 8)
    for processes, names in ((2, tuple(CASES)), (4, FEW)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        several, *_ = ranks_of("test_last_batch", f"logs_of_runs(folder, 8 // ranks, {names})", folder, processes)
        assert several.keys() == set(names)
        for case in names:
            for one, two in zip(expected[case], several[case], strict=True):
                assert two == pytest.approx(one, rel=1e-4, abs=1e-5), case


def resumed_runs(folder):
    """What runs that go on in the middle of an epoch end at, beside uninterrupted ones; 11 examples, 4 to a step."""
    found = {}
    for case, settings in {
        "fillers": {},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        "dropped": {"dataloader_drop_last": True},
        "none to fill": {"rows": 16, "max_steps": 2},
    }.items():
        options = {
            "method": "sft",
            "per_device_train_batch_size": 2,
            "rows": 11,
            "max_steps": 3,
            "optim": "sgd",
            "learning_rate": 0.1,
            "save_strategy": "steps",
            "save_steps": 1,
            **settings,
        }
        whole = runs.trainer(f"{folder}/{case}", **options)
        whole.train()
        resumed = runs.trainer(f"{folder}/{case}, resumed", **options)
        resumed.train(resume_from_checkpoint=f"{folder}/{case}/checkpoint-1")
        weights = runs.weights(resumed)
        found[case] = max(float((value - weights[name]).abs().max()) for name, value in runs.weights(whole).items())
    return found


def test_fillers_are_left_out_of_an_epoch_that_a_run_goes_on_in(tmp_path):
    found, _ = ranks_of("test_last_batch", "resumed_runs(folder)", tmp_path)
    assert found == dict.fromkeys(found, 0.0) and len(found) == 4
