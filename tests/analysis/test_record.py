"""Analyses of a run: when they are made, what they leave, and that they leave the run as it is."""

import json

import pytest
import runs
import tiny
import torch

from hf_dskd import UserError
from hf_dskd.analysis import record
from hf_dskd.analysis.record import gradient_norms, probe_rows, read_numbers
from hf_dskd.losses.objective import Step, total_loss
from hf_dskd.training.run_folder import remove_run


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out the pictures, which take most of the time."""
    for name in ("draw", "draw_projections"):
        monkeypatch.setattr(record, name, lambda *_: None)


def analysed(run):
    return [entry["step"] for entry in read_numbers(run.analysis_folder)]


def test_before_on_the_way_and_after(tmp_path):
    run = runs.trainer(tmp_path, rows=8, max_steps=4, analysis_steps=2, analysis_examples=2)
    run.train()
    assert analysed(run) == [0, 2, 4]
    before = read_numbers(run.analysis_folder)[0]
    terms = {"ce", "t2s_ce", "t2s_kd", "s2t_kd", "kq"}
    assert {f"gradient_norm_{name}" for name in terms} <= before.keys()
    assert {"chunk_mass", "linear_probe_auc", "discriminator_auc", "t2s_accuracy"} <= before.keys()
    # Pictures at both ends only.
    assert {path.name for path in run.analysis_folder.glob("step-*")} == {"step-0", "step-4"}
    for step in (0, 4):
        names = {path.name for path in (run.analysis_folder / f"step-{step}").iterdir()}
        expected = {"contact_sheet.png", "alignment.html", "vectors.safetensors"}
        assert names == expected | {f"alignment-{place}.png" for place in range(2)}
    assert (run.analysis_folder / "projection.png").is_file()
    logged = [entry["step"] for entry in run.state.log_history if "analysis_chunk_mass" in entry]
    assert logged == [0, 2, 4]


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"padding_free": True, "method": "dskd_cma"}], ids=str)
def test_leaves_training_as_it_is(tmp_path, undrawn, settings):
    settings |= {"rows": 8, "discriminator_dropout": 0.2, "gradient_accumulation_steps": 2, "max_steps": 2}
    logs, weights = [], []
    for analysis in ({}, {"analysis_steps": 1, "analysis_examples": 1}):
        student = tiny.gpt2(len(runs._STUDENT_TOKENIZER), dropout=0.1)
        run = runs.trainer(
            tmp_path / str(len(logs)), student=student, per_device_train_batch_size=2, **settings, **analysis
        )
        run.train()
        logs.append(runs.history(run, "loss", "grad_norm", "token_accuracy", "t2s_ce_loss"))
        weights.append(runs.weights(run))
    assert analysed(run) == [0, 1, 2]
    assert logs[0] == logs[1]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_resumed_run_makes_anew_what_came_after_its_checkpoint(tmp_path, undrawn):
    settings = {"rows": 8, "analysis_steps": 1, "analysis_examples": 1, "max_steps": 2}
    saved = {"save_strategy": "steps", "save_steps": 1}
    runs.trainer(tmp_path, **settings, **saved).train()
    numbers = read_numbers(tmp_path / "analysis")
    with (tmp_path / "analysis" / "numbers.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "chunk_mass": 0.0}) + "\n")
    run = runs.trainer(tmp_path, **settings, **saved)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert read_numbers(tmp_path / "analysis") == numbers
    # One that starts anew drops all of it.
    remove_run(tmp_path)
    fresh = runs.trainer(tmp_path, **{**settings, "max_steps": 1})
    fresh.train()
    assert analysed(fresh) == [0, 1]


@pytest.mark.parametrize("method", ["sft", "uld", "alm", "dskd_clp"])
def test_methods_with_less_to_analyse(tmp_path, undrawn, method):
    run = runs.trainer(tmp_path, rows=4, max_steps=1, method=method, analysis_steps=0, analysis_examples=1)
    run.train()
    entries = read_numbers(run.analysis_folder)
    if method == "sft":
        assert not entries
        return
    distillation = {"uld": "kd", "alm": "alm", "dskd_clp": "s2t_kd"}[method]
    assert [entry["step"] for entry in entries] == [0, 1]
    assert all(entry["gradient_norm_ce"] > 0 and entry[f"gradient_norm_{distillation}"] > 0 for entry in entries)
    assert ("chunk_mass" in entries[0]) == (method != "uld")


def test_gradient_norms_are_those_of_the_terms(tmp_path):
    """By hand: the terms alone and the difference that leaving one out makes, in the gradient of everything."""
    run = runs.trainer(tmp_path, rows=4, kd_rate=0.3)
    rows = probe_rows(run.train_dataset, 4)
    norms = gradient_norms(run.distiller, rows)
    parameters = [p for p in run.model.parameters() if p.requires_grad] + list(run.projectors.parameters())
    assert all(parameter.grad is None for parameter in parameters)
    run.model.eval()
    batch = run.data_collator(rows)

    def gradient(**settings):
        for name, value in settings.items():
            setattr(run.args, name, value)
        terms = run.distiller.terms(run.distiller.views(run.model, batch), Step())
        loss = total_loss(terms, terms.student_tokens.sum(), terms.teacher_tokens.sum())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found)])

    only_ce = gradient(kd_rate=0.0, kq_rate=0.0)
    with_kq = gradient(kd_rate=0.0, kq_rate=1.0)
    assert norms["gradient_norm_ce"] == pytest.approx(0.7 * only_ce.norm().item(), rel=1e-4)
    assert norms["gradient_norm_kq"] == pytest.approx((with_kq - only_ce).norm().item(), rel=1e-3)
    assert norms["gradient_norm_kq"] > 0


def test_rows_are_spread_over_the_data():
    data = tiny.dataset(10)
    assert [row["prompt"] for row in probe_rows(data, 4)] == [data[place]["prompt"] for place in (0, 2, 5, 7)]
    assert len(probe_rows(data, 50)) == 10
    streamed = data.to_iterable_dataset()
    assert [row["prompt"] for row in probe_rows(streamed, 3)] == data["prompt"][:3]


@pytest.mark.parametrize(
    ("setting", "value"), [("analysis_steps", -1), ("analysis_examples", 0), ("eval_generation_samples", -2)]
)
def test_settings_that_mean_nothing(tmp_path, setting, value):
    with pytest.raises(UserError, match=f"{setting}={value} must be at least"):
        runs.config(tmp_path, **{setting: value})


def test_generation_in_evaluation_and_the_best_model_by_it(tmp_path):
    source = tiny.dataset(5)
    each_step = {
        f"{what}_{key}": value for what in ("eval", "save") for key, value in (("strategy", "steps"), ("steps", 1))
    }
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rouge_l", "greater_is_better": True}
    run = runs.trainer(
        tmp_path, rows=8, max_steps=2, eval_dataset=source, eval_generation_samples=3, **each_step, **best
    )
    run.train()
    scores = {entry["step"]: entry["eval_rouge_l"] for entry in run.state.log_history if "eval_rouge_l" in entry}
    assert set(scores) == {1, 2} and run.state.best_metric == max(scores.values())
    metrics = run.evaluate()
    assert 0 <= metrics["eval_rouge_l"] <= 100 and 0 <= metrics["eval_exact_match"] <= 100
    assert 0 <= metrics["eval_unfinished"] <= 1
    assert [sample["reference"] for sample in run.samples] == source["completion"][:3]
    assert all(prompt in sample["prompt"] for sample, prompt in zip(run.samples, source["prompt"]))
