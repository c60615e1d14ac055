"""A step that is NaN or infinite never reaches a file: the run stops with its name, or leaves the step out."""

import json
import os

import pytest
import runs
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from warm import ranks_of

from hf_dskd.errors import NonFiniteLossError
from hf_dskd.losses.matching import AdversarialMatching
from hf_dskd.training.finite import largest


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], task_type="CAUSAL_LM")
PARTS = {
    "student": {"method": "sft"},
    "projectors": {"method": "dskd_cma", "max_grad_norm": None},
    "discriminator": {"method": "dskd_cma_ga", "discriminator_steps": 2},
    "transport critics": {"method": "dskd_cma_ct", "max_grad_norm": 0.0},
    "lora": {"method": "dskd_cma_ga", "peft_config": LORA, "gradient_accumulation_steps": 2},
}


class Spoil(TrainerCallback):
    """Puts one NaN, or infinity, where a part of the step at `steps` comes from; keeps what a run trains around it."""

    def __init__(self, part, steps=(1,), value=torch.nan):
        self.part, self.steps, self.value = part, steps, value
        self.before, self.after = {}, {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.before[state.global_step] = everything(self.run)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step not in self.steps:
            return
        if self.part in ("discriminator", "transport critics"):
            self.run.adversary._features[-1].queries.view(-1)[0] = self.value
        else:
            module = self.run.projectors if self.part == "projectors" else self.run.model
            next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[0] = self.value

    def on_step_end(self, args, state, control, **kwargs):
        self.after[state.global_step - 1] = everything(self.run)


def everything(run):
    """Weights, and the state of optimizers and schedules."""
    found = runs.weights(run)
    optimizers = {"main": (run.optimizer, run.lr_scheduler)}
    if run.adversary is not None:
        optimizers["critic"] = (run.adversary.optimizer, run.adversary.scheduler)
    for name, (optimizer, schedule) in optimizers.items():
        for key, values in optimizer.state_dict()["state"].items():
            found |= {f"{name}.{key}.{part}": torch.as_tensor(value).clone() for part, value in values.items()}
        found[f"{name}.schedule"] = torch.tensor(schedule.last_epoch)
        found[f"{name}.rates"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    return found


def different(one, two):
    return {name for name in one.keys() | two.keys() if name not in one or not torch.equal(one[name], two[name])}


def make(folder, part, spoil, **settings):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "lr_scheduler_type": "linear",
        "discriminator_lr_scheduler_type": "linear",
        **PARTS[part],
        **settings,
    }
    spoil.run = runs.trainer(folder, callbacks=[spoil], **settings)
    return spoil.run


@pytest.mark.parametrize("part, value", [*((part, torch.nan) for part in PARTS), ("projectors", torch.inf)])
def test_a_gradient_stops_the_run_before_it_is_saved(part, value, tmp_path):
    run = make(tmp_path, part, Spoil(part, value=value), logging_steps=100)
    name = "student" if part == "lora" else part
    with pytest.raises(NonFiniteLossError, match=rf"the {name}'? ?.*gradient.* at step 1 \(examples \[\d+") as error:
        run.train()
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    for path in tmp_path.glob("checkpoint-1/*.safetensors"):
        for key, tensor in load_file(path).items():
            assert torch.isfinite(tensor).all(), (path.name, key)


def test_the_last_step_counts_too(tmp_path):
    """Nothing is logged or saved after it."""
    run = make(tmp_path, "student", Spoil("student", steps=(3,)), logging_steps=100, save_strategy="no")
    with pytest.raises(NonFiniteLossError, match="step 3"):
        run.train()
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("part", ["student", "projectors", "critic"])
def test_weights_that_are_not_finite_are_not_saved(part, tmp_path):
    run = runs.trainer(tmp_path, max_steps=1, save_strategy="no")
    run.train()
    modules = {"student": run.model, "projectors": run.projectors, "critic": run.adversary.critic}
    weight = list(modules[part].parameters())[-1]
    weight.data.view(-1)[-1] = torch.inf
    name = "discriminator" if part == "critic" else part
    for save in (run.save_model, run.write_report, lambda: run._save_checkpoint(run.model, None)):
        with pytest.raises(NonFiniteLossError, match=f"weights of the {name} are NaN or infinite after step 1"):
            save()
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("part", PARTS)
def test_a_step_that_is_left_out_changes_nothing(part, tmp_path):
    spoil = Spoil(part)
    run = make(tmp_path, part, spoil, on_nonfinite="skip", save_strategy="no")
    result = run.train()
    assert run.state.global_step == 4 and run.skipped_steps == 1
    assert different(spoil.before[1], spoil.after[1]) == set()
    for step in (0, 2, 3):
        moved = different(spoil.before[step], spoil.after[step])
        assert {"main.schedule"} < moved and (run.adversary is None or "critic.schedule" in moved)
    logs = [log for log in run.state.log_history if "learning_rate" in log]
    assert [log.get("skipped_steps") for log in logs] == [None, 1, 1, 1]
    numbers = [value for log in run.state.log_history for value in log.values()]
    assert all(torch.isfinite(torch.tensor(float(value))) for value in numbers if not isinstance(value, str))
    kept = [log["loss"] for step, log in enumerate(logs) if step != 1]
    assert result.training_loss == result.metrics["train_loss"] == pytest.approx(sum(kept) / 3)
    if part == "student":
        run.write_report()
        assert json.loads((tmp_path / "result.json").read_text())["skipped_steps"] == 1


def test_a_loss_that_is_not_finite_is_left_out_of_the_means(tmp_path):
    """One of two micro-batches has a NaN loss; what is logged of two steps is the other step's."""

    class Break(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            self.kept = run.projectors.t2s.weight.data.clone()
            if state.global_step == 1:
                run.projectors.t2s.weight.data.fill_(torch.nan)

        def on_step_end(self, *args, **kwargs):
            run.projectors.t2s.weight.data.copy_(self.kept)

    logs = []
    for broken in (False, True):
        run = runs.trainer(
            tmp_path / str(broken),
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            max_steps=2 if broken else 1,
            logging_steps=2 if broken else 1,
            learning_rate=0.0,
            projector_learning_rate=0.0,
            on_nonfinite="skip",
            callbacks=[Break()] if broken else [],
        )
        logs.append((run.train().training_loss, run.state.log_history[0]))
    (one, expected), (two, log) = logs
    assert two == pytest.approx(one)
    for name in expected:
        if name.endswith(("loss", "accuracy", "rate", "real", "fake", "projector_grad_norm")):
            assert log[name] == pytest.approx(expected[name]), name


def test_the_second_step_of_the_discriminator_takes_the_first_back(tmp_path, monkeypatch):
    loss, calls = AdversarialMatching.critic_loss, []

    def spoilt(*args):
        calls.append(args)
        value, report = loss(*args)
        return (value * torch.nan if len(calls) == 4 else value), report

    monkeypatch.setattr(AdversarialMatching, "critic_loss", spoilt)
    spoil = Spoil("discriminator", steps=())
    run = make(tmp_path, "discriminator", spoil, on_nonfinite="skip")
    run.train()
    assert run.skipped_steps == 1 and different(spoil.before[1], spoil.after[1]) == set()


def test_nothing_but_steps_that_are_left_out_is_no_run(tmp_path):
    run = make(tmp_path, "student", Spoil("student", range(99)), on_nonfinite="skip", max_steps=20)
    with pytest.raises(NonFiniteLossError, match=r"at step 9 .*10 steps in a row were left out"):
        run.train()


def test_the_largest_of_nothing_and_of_what_has_none():
    assert largest([]) == 0 and largest([None, torch.zeros(0), torch.tensor([-3.0, 2.0])]) == 3
    assert torch.isnan(largest([torch.tensor([torch.inf]), torch.tensor([torch.nan])]))
    # The square of it isn't a float32.
    assert torch.isfinite(largest([torch.tensor([1e30])]))


def rank_run(folder, mode):
    """On rank 1 alone a gradient is NaN, after gradients were averaged."""
    spoil = Spoil("projectors" if mode == "skip" else "student")
    if int(os.environ["RANK"]) != 1:
        spoil.steps = ()
    run = make(f"{folder}/{mode}", "projectors", spoil, on_nonfinite=mode)
    try:
        run.train()
        message = None
    except NonFiniteLossError as error:
        message = str(error)
    return {
        "message": message,
        "skipped": run.skipped_steps,
        "sum": sum(map(float, map(torch.sum, runs.weights(run).values()))),
    }


def rank_runs(folder):
    return {mode: rank_run(folder, mode) for mode in ("stop", "skip")}


def test_one_rank_stops_or_skips_for_all(tmp_path):
    one, two = ranks_of("test_nonfinite", "rank_runs(folder)", tmp_path)
    for found in (one, two):
        assert "the student's gradient became NaN or infinite at step 1" in found["stop"]["message"]
        assert found["skip"]["message"] is None and found["skip"]["skipped"] == 1
    assert one["skip"]["sum"] == two["skip"]["sum"]
    assert [path.name for path in (tmp_path / "stop").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "method, mode, optim",
    [
        ("dskd_cma_ga", "stop", "adamw_torch"),
        ("dskd_cma_ga", "skip", "adamw_torch_fused"),
        ("dskd_cma_ct", "skip", "adamw_torch"),
    ],
)
def test_steps_that_a_scaler_has_left_out(method, mode, optim, tmp_path):
    """Two of four overflow; means are those of the steps that they are made of, as of a run of the last two."""
    logs = []
    for scale in (None, 2.0**10):
        run = runs.trainer(
            tmp_path / str(scale),
            method=method,
            max_steps=4,
            logging_steps=4,
            max_grad_norm=None,
            learning_rate=0.0,
            projector_learning_rate=0.0,
            discriminator_learning_rate=0.0,
            optim=optim,
            on_nonfinite=mode,
        )
        if scale is not None:
            run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            weight = next(run.model.parameters())
            weight.register_hook(lambda grad, run=run: grad * torch.inf if run.state.global_step < 2 else grad)
        run.train()
        logs.append((run.state.log_history[0], run.state.log_history[-1]["train_loss"]))
    (expected, whole), (log, scaled) = logs
    assert log["loss"] == pytest.approx(expected["loss"]) and scaled == pytest.approx(whole)
    assert log.keys() - {"skipped_steps"} == expected.keys()
    # The batches of the other two steps are others.
    names = ("projector_grad_norm", "discriminator_loss", "discriminator_accuracy_real", "discriminator_accuracy_fake")
    for name in expected.keys() & {*names, "transport_cost", "discriminator_grad_norm"}:
        assert log[name] == pytest.approx(expected[name], rel=0.1), name
