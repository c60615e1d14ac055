"""What every way of composing a loss must do in a run, whatever its terms are."""

import math

import pytest
import runs
import tiny
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_dskd.config import _PUBLISHED_METHODS
from hf_dskd.losses.objective import Step
from hf_dskd.losses.terms import TERMS


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
STILL = {"learning_rate": 0.0, "projector_learning_rate": 0.0, "discriminator_learning_rate": 0.0}


def assert_finite(run):
    logs = [log for log in run.state.log_history if "loss" in log]
    assert logs
    for log in logs:
        assert {name: value for name, value in log.items() if not math.isfinite(value)} == {}
    for name, value in runs.weights(run).items():
        assert torch.isfinite(value).all(), name


def terms_of(run, batch):
    return run.distiller.terms(run.distiller.views(run.model, batch), Step(training=True))


def without_response(batch, indices):
    """The batch with no response token left in these examples, on either side."""
    batch = dict(batch)
    for name in ("labels", "teacher_labels"):
        batch[name] = batch[name].clone()
        batch[name][indices] = -100
    return batch


def step(run, batch):
    """Loss and gradients of an optimizer step on the batch, and what it does to a critic."""
    run.model.train()
    parts = [part for part in (run.model, run.projectors) if part is not None]
    for part in parts:
        part.zero_grad()
    items = run._get_num_items_in_batch([batch], run.args.device)
    loss = run.compute_loss(run.model, batch, num_items_in_batch=items)
    loss.backward()
    gradients = {
        f"{type(part).__name__}.{name}": parameter.grad.clone()
        for part in parts
        for name, parameter in part.named_parameters()
        if parameter.grad is not None
    }
    if run.adversary is not None:
        if run.adversary.optimizer is None:
            run.adversary.create_optimizer(10)
        report = run.adversary.update(*run._items, run.accelerator)
        assert all(torch.isfinite(value) for value in report.values())
    return loss.detach(), gradients


# ---- Every case


@pytest.mark.parametrize("case", runs.CASES)
def test_bf16_is_finite(case, tmp_path):
    run = runs.trainer(tmp_path, bf16=True, max_steps=2, rows=8, **runs.CASES[case])
    run.train()
    assert_finite(run)


@pytest.mark.parametrize("case", runs.CASES)
def test_what_has_no_response_is_nothing(case, tmp_path):
    run = runs.trainer(tmp_path, rows=4, discriminator_learning_rate=0.0, scale_queries=True, **runs.CASES[case])
    rows = [run.train_dataset[i] for i in range(4)]
    batch = without_response(run.data_collator(rows), [1])
    terms = terms_of(run, batch)
    for name, values in terms.sums.items():
        assert values.shape == (4,)
        assert values[1] == 0, name
        assert torch.isfinite(values).all(), name
    assert any(values[0] != 0 for values in terms.sums.values())

    loss, gradients = step(run, batch)
    others, expected = step(run, run.data_collator([rows[i] for i in (0, 2, 3)]))
    torch.testing.assert_close(loss, others, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", runs.CASES)
def test_a_batch_without_response_is_nothing(case, tmp_path):
    """A critic's Adam, which at its first step moves by the sign of a gradient, has nothing to do either."""
    run = runs.trainer(tmp_path, rows=4, **runs.CASES[case])
    before = runs.weights(run)
    batch = without_response(runs.first_batch(run), range(4))
    loss, gradients = step(run, batch)
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())
    assert all(torch.equal(value, before[name]) for name, value in runs.weights(run).items())
    run.model.eval()
    with torch.no_grad():
        assert run.compute_loss(run.model, batch) == 0


@pytest.mark.parametrize("case", runs.CASES)
def test_lora_trains_the_adapter_and_saves_a_plain_one(case, tmp_path):
    base = tiny.gpt2(len(runs._STUDENT_TOKENIZER))
    original = {name: value.clone() for name, value in base.state_dict().items()}
    run = runs.trainer(
        tmp_path, student=base, peft_config=LORA, max_steps=1, rows=8, weight_decay=0.1, **runs.CASES[case]
    )
    before = runs.weights(run)
    run.train()
    after = runs.weights(run)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    # B begins as zero, so that after one step A has had no gradient yet.
    assert {name for name in after if "lora_B" in name} <= moved
    assert not any(name.startswith("student.") and "lora_" not in name for name in moved)
    # Each of the other networks that the loss has a use for, whole.
    row = run.args.method_row
    used = {"t2s"} if "student" in row.spaces else set()
    used |= {"s2t"} if "teacher" in row.spaces else set()
    used |= {"query"} if row.has_queries else set()
    used |= {name.split(".")[1] for name in after if name.startswith("critic.")}
    expected = {name for name in after if not name.startswith("student.") and name.split(".")[1] in used}
    assert {name for name in moved if not name.startswith("student.")} == expected

    run.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "model.safetensors").exists()
    plain = AutoModelForCausalLM.from_config(base.config)
    plain.load_state_dict(original)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "final").eval()
    ids = torch.arange(5).unsqueeze(0)
    expected = run.model.eval()(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("case", runs.CASES)
def test_loss_is_the_weighted_sum_of_the_terms_beside_it(case, tmp_path):
    run = runs.trainer(
        tmp_path,
        kd_rate=0.3,
        kq_rate=0.6,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        rows=8,
        **runs.CASES[case],
    )
    run.train()
    weight_of = {TERMS[name].log: weight for name, weight in run.distiller.weights().items()}
    expected = {"ce_loss": 1.0 if case == "sft" else 0.7, "kq_loss": 0.6, "attention_loss": 1.0}
    assert weight_of == {name: pytest.approx(expected.get(name, 0.3)) for name in weight_of}
    for log in run.state.log_history[:2]:
        # A term that is logged has a weight, but for what the discriminator minimises.
        assert {name for name in log if name.endswith("_loss")} - {"discriminator_loss"} == set(weight_of)
        total = sum(weight * log[name] for name, weight in weight_of.items())
        assert log["loss"] == pytest.approx(total, rel=1e-5, abs=1e-4)


# ---- As published


@pytest.mark.parametrize("method", _PUBLISHED_METHODS)
def test_as_published_runs(method, tmp_path):
    run = runs.trainer(tmp_path, method=method, as_published=True, max_length=96, rows=8, max_steps=2)
    before = runs.weights(run)
    run.train()
    assert_finite(run)
    after = runs.weights(run)
    # Nothing trains the networks of the matching there; that of position-wise logits needs none.
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"student"} | ({"projectors"} if run.args.method_row.dual_space else set())
    for batch_log in run.state.log_history[:2]:
        assert {TERMS[name].log for name in run.distiller.weights()} <= set(batch_log)


# ---- Temperature schedule


@pytest.mark.parametrize(("case", "kind"), [("dskd_cma_ga", "cosine"), ("min_edit", "linear")])
def test_scheduled_temperature(case, kind, tmp_path):
    """With weights that don't move, each step is that of a run whose temperatures are the schedule's at that step."""
    steps, first, last = 3, 3.0, 1.0
    options = {"max_steps": steps, "rows": 12, "divergence": "forward_kl", **STILL, **runs.CASES[case]}
    options |= {"student_temperature": 1.5} if case == "dskd_cma_ga" else {}
    options |= {"temperature_scaling": "tau_squared"} if case == "min_edit" else {}
    # Where the projected teacher is right nowhere yet, the mask would leave nothing to soften.
    options |= {"correctness_mask": False}
    run = runs.trainer(
        tmp_path / "run", kd_temperature=first, temperature_schedule=kind, final_kd_temperature=last, **options
    )
    run.train()
    scheduled = [loss for (loss,) in runs.history(run, "loss")]
    constant = []
    for k in range(steps):
        done = k / steps if kind == "linear" else (1 - math.cos(math.pi * k / steps)) / 2
        temperature = first + (last - first) * done
        at_k = dict(options)
        if "student_temperature" in at_k:
            # All temperatures have the one common factor.
            at_k["student_temperature"] *= temperature / first
        run = runs.trainer(tmp_path / str(k), kd_temperature=temperature, **at_k)
        run.train()
        constant.append([loss for (loss,) in runs.history(run, "loss")])
    for k in range(steps):
        assert scheduled[k] == pytest.approx(constant[k][k], rel=1e-6, abs=1e-6)
        # At each of these steps the temperature matters.
        assert all(abs(constant[k][k] - constant[other][k]) > 1e-4 for other in range(steps) if other != k)


# ---- Matching


@pytest.mark.parametrize("case", ["moments", "mmd", "dskd_cma_ct", "dskd_cma_ga", "non_saturating"])
def test_matching_moves_the_query_projector(case, tmp_path):
    finals = []
    for kq_rate in (0.0, 1.0):
        # Of plain gradient descent, because Adam's first steps hardly depend on the size of a gradient.
        run = runs.trainer(
            tmp_path / str(kq_rate), kq_rate=kq_rate, max_steps=1, optim="sgd", learning_rate=0.1, **runs.CASES[case]
        )
        run.train()
        finals.append(runs.weights(run))
    different = {name for name in finals[0] if not torch.equal(finals[0][name], finals[1][name])}
    # Neither the student nor the other projectors are in the matching: embeddings enter queries as constants.
    assert "projectors.query.weight" in different
    assert different <= {"projectors.query.weight", "projectors.query.bias"}


CRITICS = {
    "dskd_cma_ga": {"highway", "linear1", "linear2"},
    "dskd_cma_ct": {"critic1", "navigator1", "critic2", "navigator2"},
}


@pytest.mark.parametrize("method", CRITICS)
def test_a_critic_has_no_gradient_of_the_students_and_moves_whole(method, tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            seen.append([parameter.grad for parameter in run.adversary.critic.parameters()])

    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "rows": 8}
    run = runs.trainer(tmp_path, method=method, max_length=96, callbacks=[Look()], **settings)
    before = runs.weights(run)
    batch = runs.first_batch(run)
    run.training_step(run.model, batch, run._get_num_items_in_batch([batch], run.args.device))
    assert all(parameter.grad is None for parameter in run.adversary.critic.parameters())
    assert run.projectors.query.weight.grad.abs().sum() > 0
    run.adversary.forget()
    run.train()
    after = runs.weights(run)
    moved = {
        name.split(".")[1]
        for name in after
        if name.startswith("critic") and not torch.equal(before[name], after[name])
    }
    assert moved == CRITICS[method]
    assert seen and not any(gradient is not None for gradients in seen for gradient in gradients)
    assert all(parameter.grad is None for parameter in run.adversary.critic.parameters())
