"""Batches made in processes of their own are the same batches."""

import pickle

import pytest
import runs
import torch


def stop_workers(*loaders):
    """Of a trainer that is left to the garbage collector, torch waits five seconds for each that lives on."""
    for loader in loaders:
        loader.base_dataloader._iterator = None


def run_with(folder, **settings):
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = runs.trainer(folder, max_steps=-1, num_train_epochs=2, rows=12, **batches, **settings)
    run.train()
    stop_workers(run.callback_handler.train_dataloader)
    return run


WORKERS = {
    "dataloader_num_workers": 2,
    "dataloader_pin_memory": True,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
}


@pytest.mark.parametrize(("cached", "settings"), [(False, {"dataloader_num_workers": 2}), (True, WORKERS)])
def test_workers_change_nothing(cached, settings, tmp_path):
    """Two epochs: a worker that lives on, and one that is made anew, must both see the order of the second."""
    cache = {"teacher_cache": str(tmp_path / "cache")} if cached else {}
    reference, run = run_with(tmp_path / "none", **cache), run_with(tmp_path / "workers", **settings, **cache)
    assert runs.history(run, "loss", "kq_loss") == runs.history(reference, "loss", "kq_loss")
    expected = runs.weights(reference)
    assert all(torch.equal(value, expected[name]) for name, value in runs.weights(run).items())


def test_workers_evaluate_the_same(tmp_path):
    data = runs.tiny.dataset(9)
    metrics = []
    for name, settings in (("none", {}), ("workers", WORKERS)):
        run = runs.trainer(tmp_path / name, eval_dataset=data, **settings)
        values = [run.evaluate() for _ in range(2)]
        stop_workers(*getattr(run, "_eval_dataloaders", {}).values())
        metrics.append(
            [{k: v for k, v in value.items() if "per_second" not in k and "time" not in k} for value in values]
        )
    assert metrics[0] == metrics[1] and metrics[0][0] == metrics[0][1]


def test_collator_and_rows_go_to_another_process(tmp_path):
    """As they must where workers are started and not forked."""
    run = runs.trainer(tmp_path, teacher_cache=str(tmp_path / "cache"))
    collator, dataset = pickle.loads(pickle.dumps((run.data_collator, run.train_dataset)))
    batch, expected = collator([dataset[i] for i in range(4)]), runs.first_batch(run)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
