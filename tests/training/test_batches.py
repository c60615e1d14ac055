"""Which examples lie in a batch, how the student runs on it, and where the teacher is."""

import pytest
import runs
import test_models
import tiny
import torch
import transformers

from hf_dskd.data.sampler import LengthGroupedEpochSampler
from hf_dskd.errors import UserError
from hf_dskd.training.arguments import check_launch


GROUPED = (
    {"group_by_length": True} if transformers.__version__ < "5" else {"train_sampling_strategy": "group_by_length"}
)


def test_grouped_batches_are_padded_less_and_follow_the_data_seed(tmp_path):
    padded, orders = [], []
    for number, settings in enumerate(
        ({}, GROUPED, {**GROUPED, "data_seed": 1}, {**GROUPED, "seed": 7, "data_seed": 0})
    ):
        run = runs.trainer(tmp_path / str(number), rows=60, max_length=512, **settings)
        batches = list(run.get_train_dataloader())
        padded.append(sum(batch["input_ids"].numel() for batch in batches))
        orders.append(torch.cat([batch["example_ids"] for batch in batches]).tolist())
        assert sorted(orders[-1]) == list(range(60))
        assert isinstance(run._get_train_sampler(), LengthGroupedEpochSampler) == bool(settings)
    assert max(padded[1:]) < 0.95 * padded[0]
    assert orders[1] == orders[3] != orders[2]


def test_grouped_resume(tmp_path):
    settings = {"rows": 8, "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2, **GROUPED}
    settings |= {"save_strategy": "steps", "save_steps": 3}
    whole = runs.trainer(tmp_path, **settings)
    whole.train()
    again = runs.trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, value in runs.weights(whole).items():
        assert torch.equal(runs.weights(again)[name], value), name


@pytest.mark.parametrize("method", ["dskd_cma_ga", "sft", "alm"])
def test_padding_free_changes_nothing(method, tmp_path):
    finals, logs = [], []
    for padding_free in (False, True):
        folder, data = tmp_path / str(padding_free), tiny.dataset(7)
        run = runs.trainer(folder, method=method, padding_free=padding_free, eval_dataset=data, max_steps=2)
        run.train()
        finals.append(runs.weights(run))
        logs.append(run.evaluate()["eval_loss"])
        assert run.distiller.last_hidden_state.padding_free == padding_free
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, rtol=1e-4, atol=1e-5)
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_padding_free_compiled_bf16_and_refused(tmp_path):
    losses = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        run = runs.trainer(tmp_path / str(len(losses)), padding_free=True, max_steps=1, **settings)
        run.train()
        losses.append(torch.tensor(runs.history(run, "loss", "s2t_kd_loss")))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    runs.trainer(tmp_path / "b", padding_free=True, bf16=True, max_steps=1).train()
    with pytest.raises(UserError, match="Lfm2ForCausalLM"):
        runs.trainer(tmp_path / "c", padding_free=True, student=test_models.lfm2())
    with pytest.raises(UserError, match="padding_free=True: as_published"):
        runs.trainer(tmp_path / "d", padding_free=True, as_published=True)


def test_teacher_device(tmp_path):
    results = []
    for place in (None, "cpu"):
        run = runs.trainer(tmp_path / str(place), teacher_device=place)
        run.train()
        results.append(runs.weights(run))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    with pytest.raises(UserError, match="teacher_device='cuda:9'"):
        runs.trainer(tmp_path / "x", teacher_device="cuda:9")


def test_opt_student(tmp_path):
    runs.trainer(tmp_path, student=test_models.opt(), max_steps=1).train()


def test_two_gpus_in_one_process(tmp_path, monkeypatch):
    """As on a machine with two GPUs: the second is the teacher's, and the student isn't spread over both."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for place, ok in ((None, False), ("cpu", False), ("cuda:1", True)):
        config = runs.config(tmp_path, teacher_device=place)
        config._n_gpu = 2
        if ok:
            check_launch(config)
            assert config.n_gpu == 1 and config.train_batch_size == 4
        else:
            with pytest.raises(UserError, match="2 GPUs are visible"):
                check_launch(config)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has no such strategy")
def test_a_strategy_of_student_lengths_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train_sampling_strategy='batch_rebalance' .*use 'group_by_length'"):
        runs.config(tmp_path, train_sampling_strategy="batch_rebalance")
