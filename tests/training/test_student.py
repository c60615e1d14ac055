"""The student that is trained is the one that was asked for, and something of it is trained."""

import pytest
import runs
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model

from hf_dskd import DSKDConfig, UserError
from hf_dskd.models.causal_lm import backbone, input_embedding, lm_head
from hf_dskd.training.prepare import check_steps


LORA = {"r": 2, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}


def lora(**settings):
    return LoraConfig(**{**LORA, **settings})


# ---- A student of which nothing would be trained


@pytest.fixture
def adapter(tmp_path):
    get_peft_model(tiny.gpt2(), lora(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_an_adapter_loaded_for_inference(tmp_path, adapter):
    for method in ("dskd_cma_ga", "sft"):
        student = PeftModel.from_pretrained(tiny.gpt2(), adapter)
        with pytest.raises(UserError, match="is_trainable=True"):
            runs.trainer(tmp_path, student=student, method=method)
    with pytest.raises(UserError, match=r"peft_config\.inference_mode=True"):
        runs.trainer(tmp_path, peft_config=lora(inference_mode=True))


def test_an_adapter_loaded_to_be_trained(tmp_path, adapter):
    student = PeftModel.from_pretrained(tiny.gpt2(), adapter, is_trainable=True)
    run = runs.trainer(tmp_path, student=student, max_steps=1)
    before = runs.weights(run)
    run.train()
    moved = {name for name, value in runs.weights(run).items() if not value.equal(before[name])}
    assert {name for name in before if "lora_" in name and name.startswith("student")} <= moved
    assert not any(name.startswith("student") and "lora_" not in name for name in moved)


def test_a_frozen_model(tmp_path):
    frozen = tiny.gpt2().requires_grad_(False)
    with pytest.raises(UserError, match=r"no parameter of the student is trainable.*requires_grad_\(True\)"):
        runs.trainer(tmp_path, student=frozen)
    run = runs.trainer(tmp_path, student=frozen, train_dataset=None, eval_dataset=tiny.dataset(4))
    assert run.evaluate()["eval_bits_per_byte"] > 0
    runs.trainer(tmp_path, student=frozen, peft_config=lora(), max_steps=1).train()


def test_changed_between_making_and_training(tmp_path):
    run = runs.trainer(tmp_path)
    run.model.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of the student is trainable"):
        run.train()
    run.args.max_steps = 0
    with pytest.raises(UserError, match="max_steps=0"):
        run.train()


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


# ---- Tokens of their own


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_are_read_as_they_are_trained(tied, tmp_path):
    """PEFT's trainable_token_indices: queries read the embedding and the losses the head, with these tokens' rows."""
    tokens = [3, 7, 11]
    vocabulary = len(runs._STUDENT_TOKENIZER)
    plain = tiny.gpt2(vocabulary) if tied else tiny.qwen2(vocabulary)
    name = "wte" if tied else "embed_tokens"
    adapter = LoraConfig(
        r=2,
        target_modules=["c_attn" if tied else "q_proj"],
        trainable_token_indices={name: tokens},
        task_type="CAUSAL_LM",
    )
    run = runs.trainer(tmp_path, student=plain, peft_config=adapter, max_steps=2, learning_rate=0.1)
    deltas = {key: p for key, p in run.model.named_parameters() if "trainable_tokens_delta" in key and p.requires_grad}
    before = {key: delta.detach().clone() for key, delta in deltas.items()}
    run.train()
    assert deltas and all(not torch.equal(deltas[key], value) for key, value in before.items())
    ids = torch.arange(vocabulary).unsqueeze(0)
    with torch.no_grad():
        base = run.model.eval().get_base_model()
        torch.testing.assert_close(input_embedding(run.model), base.get_input_embeddings()(ids)[0])
        hidden = backbone(run.model)(input_ids=ids[:, :9])[0]
        torch.testing.assert_close(lm_head(run.model)(hidden), base(input_ids=ids[:, :9]).logits, rtol=1e-4, atol=1e-5)
    # What is read carries the gradient to these rows and to no other.
    weighted = torch.randn(vocabulary, hidden.shape[-1])
    (input_embedding(run.model) * weighted).sum().backward()
    [delta] = deltas.values()
    torch.testing.assert_close(delta.grad, weighted[tokens])
