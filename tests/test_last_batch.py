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


def logs_of_runs(folder, size):
    """Two epochs of 11 examples, 8 to a step."""
    logs = {}
    rows = tiny.dataset(11).to_list()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    cases: dict = {"stream": ({"method": "dskd_cma_ga"}, {"train_dataset": stream, "eval_dataset": stream})}
    cases["stream"][1]["eval_generation_samples"] = 3
    cases |= {name: (settings, {}) for name, settings in runs.CASES.items()}
    cases["grouped"] = (
        {"method": "dskd_cma_ga"},
        {"group_by_length": True}
        if "group_by_length" in vars(runs.config(folder))
        else {"train_sampling_strategy": "group_by_length"},
    )
    cases["workers"] = ({"method": "kd"}, {"dataloader_num_workers": 1})
    cases["cached"] = ({"method": "dskd_cma"}, {"teacher_cache": f"{folder}/cache"})
    cases["on_policy"] = ({"method": "uld"}, {"on_policy_fraction": 1.0, "max_length": 96})
    for case, (settings, options) in cases.items():
        run = runs.trainer(
            folder,
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            rows=11,
            max_steps=4,
            optim="sgd",
            learning_rate=0.1,
            **settings,
            **{"eval_dataset": tiny.dataset(7), **options},
        )
        if case == "on_policy":
            run.model.generation_config.update(max_new_tokens=8, do_sample=False)
        run.train()
        ends = ("loss", "rate", "agreement", "norm", "real", "cost")
        names = sorted(name for name in run.state.log_history[0] if name.endswith(ends))
        logs[case] = [[log[name] for name in names] for log in run.state.log_history if "loss" in log]
        metrics = run.evaluate()
        ends = ("loss", "byte", "agreement", "rouge_l")
        logs[case].append([metrics[name] for name in sorted(metrics) if name.endswith(ends)])
        logs[case].append([weight.double().sum().item() for weight in runs.weights(run).values()])
    return logs


def test_any_number_of_processes_equals_one(tmp_path):
    """With two, the last three of an epoch are rank 0's; with four, two ranks have none."""
    expected = logs_of_runs(str(tmp_path / "one"), 8)
    for processes in (2, 4):
        folder = tmp_path / str(processes)
        folder.mkdir()
        several, *_ = ranks_of("test_last_batch", "logs_of_runs(folder, 8 // ranks)", folder, processes)
        assert several.keys() == expected.keys()
        for case in expected:
            for one, two in zip(expected[case], several[case], strict=True):
                assert two == pytest.approx(one, rel=1e-4, abs=1e-5), case


def resumed_runs(folder):
    """What runs that go on in the middle of an epoch end at, beside uninterrupted ones; 11 examples, 4 to a step."""
    found = {}
    for case, settings in {
        "fillers": {},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        "dropped": {"dataloader_drop_last": True},
        "none to fill": {"rows": 16},
    }.items():
        options = {
            "method": "sft",
            "per_device_train_batch_size": 2,
            "rows": 11,
            "max_steps": 4,
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
