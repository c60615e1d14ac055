"""The student that is trained is the one that was asked for, and something of it is trained."""

import pytest
import runs
import tiny
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model

from hf_dskd import DSKDConfig, UserError
from hf_dskd.checks import check_steps


LORA = {"r": 2, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}


def lora(**settings):
    return LoraConfig(**{**LORA, **settings})


# ---- A student of which nothing would be trained


@pytest.fixture
def adapter(tmp_path):
    get_peft_model(tiny.gpt2(), lora(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.mark.parametrize("method", ["dskd_cma_ga", "uld", "sft"])
def test_an_adapter_loaded_for_inference(tmp_path, adapter, method):
    student = PeftModel.from_pretrained(tiny.gpt2(), adapter)
    with pytest.raises(UserError, match="is_trainable=True"):
        runs.trainer(tmp_path, student=student, method=method)


def test_an_adapter_loaded_to_be_trained(tmp_path, adapter):
    student = PeftModel.from_pretrained(tiny.gpt2(), adapter, is_trainable=True)
    run = runs.trainer(tmp_path, student=student, max_steps=1)
    before = runs.weights(run)
    run.train()
    moved = {name for name, value in runs.weights(run).items() if not value.equal(before[name])}
    assert {name for name in before if "lora_" in name and name.startswith("student")} <= moved
    assert not any(name.startswith("student") and "lora_" not in name for name in moved)


@pytest.mark.parametrize("method", ["dskd_cma_ga", "sft"])
def test_a_frozen_model(tmp_path, method):
    with pytest.raises(UserError, match=r"no parameter of the student is trainable.*requires_grad_\(True\)"):
        runs.trainer(tmp_path, student=tiny.gpt2().requires_grad_(False), method=method)


def test_frozen_between_making_and_training(tmp_path):
    run = runs.trainer(tmp_path)
    run.model.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of the student is trainable"):
        run.train()


def test_a_frozen_model_below_a_new_adapter_is_trained(tmp_path):
    runs.trainer(tmp_path, student=tiny.gpt2().requires_grad_(False), peft_config=lora(), max_steps=1).train()


def test_a_frozen_student_can_be_evaluated(tmp_path):
    run = runs.trainer(
        tmp_path, student=tiny.gpt2().requires_grad_(False), train_dataset=None, eval_dataset=tiny.dataset(4)
    )
    assert run.evaluate()["eval_bits_per_byte"] > 0


def test_an_adapter_config_for_inference(tmp_path):
    with pytest.raises(UserError, match=r"peft_config\.inference_mode=True"):
        runs.trainer(tmp_path, peft_config=lora(inference_mode=True))


# ---- A run that would take no step


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"max_steps": 0}, "max_steps=0 takes no step"),
        ({"max_steps": -5}, "max_steps=-5 takes no step"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0 takes no step"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 9},
            "drops all of 8 examples, fewer than per_device_train_batch_size=9:",
        ),
    ],
)
def test_no_step(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        runs.trainer(tmp_path, rows=8, **settings)


def test_settings_changed_after_the_trainer_was_made(tmp_path):
    run = runs.trainer(tmp_path)
    run.args.max_steps = 0
    with pytest.raises(UserError, match="max_steps=0"):
        run.train()


def test_no_examples(tmp_path):
    empty = Dataset.from_dict({"prompt": [], "completion": []})
    with pytest.raises(UserError):
        runs.trainer(tmp_path, train_dataset=empty)


def test_a_batch_over_several_processes_that_is_dropped(tmp_path, monkeypatch):
    config = runs.config(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=3)
    monkeypatch.setattr(DSKDConfig, "world_size", 3)
    with pytest.raises(UserError, match="fewer than per_device_train_batch_size=3 on 3 processes"):
        check_steps(config, tiny.dataset(8))
    check_steps(config, tiny.dataset(9))
    config.accelerator_config.split_batches = True  # the processes share a batch
    check_steps(config, tiny.dataset(3))


def test_accumulation_beyond_the_data_still_makes_a_step(tmp_path):
    settings = {"dataloader_drop_last": True, "gradient_accumulation_steps": 16, "method": "sft"}
    run = runs.trainer(tmp_path, rows=8, per_device_train_batch_size=8, max_steps=-1, num_train_epochs=1, **settings)
    run.train()
    assert run.state.global_step == 1


def test_a_stream_without_a_batch(tmp_path):
    rows = [{"prompt": "Nothing is answered: ", "completion": ""}] * 3
    run = runs.trainer(
        tmp_path,
        method="sft",
        train_dataset=IterableDataset.from_generator(lambda: iter(rows)),
        max_steps=2,
        accelerator_config={"dispatch_batches": False},
    )
    with pytest.raises(UserError, match="no step was taken"):
        run.train()
