"""Attention distillation in the trainer: that it is learnt, logged and refused where it can't be."""

import json

import pytest
import runs
import tiny

from hf_dskd import UserError
from hf_dskd.analysis.record import gradient_norms, probe_rows


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """transformers 4 leaves a run's precision in the environment, where the next run takes it from."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.mark.parametrize("method", ["kd", "dskd_cma"])
@pytest.mark.parametrize("layers", ["last", "0:1,1:0"])
def test_twenty_steps_lower_it(tmp_path, method, layers):
    """`kd` has one tokenizer on both sides, `dskd_cma` two."""
    run = runs.trainer(
        tmp_path,
        method=method,
        attention_kd_rate=5.0,
        attention_layers=layers,
        max_steps=20,
        learning_rate=1e-2,
        rows=8,
        per_device_train_batch_size=8,
    )
    assert run.distiller._same_tokens == (method == "kd")
    run.train()
    values = [value for (value,) in runs.history(run, "attention_loss")[:20]]
    assert values[0] > 0 and values[-1] < 0.9 * values[0]
    norms = gradient_norms(run.distiller, probe_rows(run.train_dataset, 4))
    assert norms["gradient_norm_attention"] > 0


def test_checkpointing_and_evaluation(tmp_path):
    run = runs.trainer(
        tmp_path,
        method="dskd_cma_ga",
        attention_kd_rate=1.0,
        gradient_checkpointing=True,
        eval_dataset=tiny.dataset(4),
    )
    run.train()
    assert run.evaluate()["eval_attention_loss"] > 0
    plain = runs.trainer(tmp_path / "plain", method="dskd_cma_ga", attention_kd_rate=1.0)
    plain.train()
    own, expected = (runs.history(each, "attention_loss", "loss") for each in (run, plain))
    assert json.loads(json.dumps(own)) == [pytest.approx(list(pair), rel=1e-4) for pair in expected]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "sft"}, "method='sft' runs no teacher"),
        ({"as_published": True}, "released code has no attention_kd_rate"),
        ({"teacher_cache": "cache"}, "a cache holds last hidden states alone"),
        ({"padding_free": True}, "compares queries and keys of padded batches"),
        ({"attention_kd_rate": -1.0}, "must be at least 0"),
        ({"attention_layers": "first"}, "attention_layers='first'"),
        ({"attention_relation_heads": 0}, "attention_relation_heads=0"),
    ],
    ids=str,
)
def test_refused(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        runs.config(tmp_path, **{"attention_kd_rate": 1.0, **settings})


def test_data_that_does_not_say_what_tokens_cover(tmp_path):
    data = runs.trainer(tmp_path, rows=4).train_dataset.remove_columns(["chunk_ids", "teacher_chunk_ids"])
    with pytest.raises(UserError, match="no column chunk_ids"):
        runs.trainer(tmp_path, method="uld", attention_kd_rate=1.0, train_dataset=data)
