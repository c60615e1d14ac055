"""What a model adds to its own loss is a term of ours: that of Trainer, but a mean over micro-batches."""

from pathlib import Path

import pytest
import runs
import tiny
import torch
from peft import AdaLoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from warm import ranks_of

from hf_dskd import DSKDTrainer
from hf_dskd.models.hidden_states import adds_to_loss, no_cross_entropy


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VOCABULARY = len(runs._STUDENT_TOKENIZER)


def mixtral(share=1.0, **settings):
    torch.manual_seed(0)
    router = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.7 * share}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **{**SIZES, **router, **settings}))


def qwen3_moe(share=1.0, **settings):
    torch.manual_seed(0)
    router = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "output_router_logits": True}
    router |= {"router_aux_loss_coef": 0.5 * share, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=VOCABULARY, **{**SIZES, **router, **settings}))


def adalora(share=1.0):
    config = AdaLoraConfig(
        **{"task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "init_r": 4, "target_r": 2, "total_step": 10},
        orth_reg_weight=0.5 * share,
    )
    torch.manual_seed(0)
    return get_peft_model(tiny.gpt2(VOCABULARY), config)


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "adalora": adalora}
STUDENT_BATCH = ("input_ids", "attention_mask", "labels")


def student_batch(batch):
    return {name: batch[name] for name in STUDENT_BATCH}


@pytest.mark.parametrize("name, method", [(name, "dskd_cma") for name in MODELS] + [("mixtral", "uld")])
def test_a_term_beside_those_of_the_method(name, method, tmp_path):
    student = MODELS[name]()
    run = runs.trainer(tmp_path, student=student, method=method)
    batch = runs.first_batch(run)
    loss = run.compute_loss(run.model, dict(batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    with no_cross_entropy(student):
        added = student(**student_batch(batch)).loss
    assert added > 0.01
    # The same without that term: what a model adds is the difference, with its gradient.
    student.zero_grad()
    run.distiller.last_hidden_state._adds_to_loss, run.distiller.last_hidden_state.added = False, None
    rest = run.compute_loss(run.model, dict(batch))
    torch.testing.assert_close(loss, rest + added)
    (rest + added).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name, padding_free", [*((name, False) for name in MODELS), ("mixtral", True)])
def test_sft_has_the_models_own_loss(name, padding_free, tmp_path):
    """Nothing of the padding is routed to experts."""
    student = MODELS[name]()
    run = runs.trainer(tmp_path, student=student, method="sft", padding_free=padding_free)
    batch = runs.first_batch(run)
    ours = run.compute_loss(run.model, dict(batch))
    torch.testing.assert_close(ours, student(**student_batch(batch)).loss, rtol=1e-4, atol=1e-5)


def test_models_that_add_nothing():
    assert not adds_to_loss(tiny.gpt2()) and not adds_to_loss(mixtral(output_router_logits=False))
    assert not adds_to_loss(mixtral(router_aux_loss_coef=0.0))
    assert all(adds_to_loss(make()) for make in MODELS.values())


def test_a_models_own_loss_stays_its_own():
    student = mixtral()
    own, other = student.loss_function, len
    with no_cross_entropy(student):
        assert student.loss_function is not own
    assert student.loss_function is own
    student.loss_function = other
    with no_cross_entropy(student):
        pass
    assert student.loss_function is other


def test_a_loss_that_cannot_be_told_apart_is_said(caplog):
    class Own(type(tiny.gpt2())):
        def forward(self, input_ids=None, labels=None, **options):
            output = super().forward(input_ids=input_ids, **options)
            logits, labels = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output.loss = torch.nn.functional.cross_entropy(logits, labels) + self.extra
            return output

    student = Own(tiny.gpt2().config)
    student.extra = 0.0
    assert not adds_to_loss(student) and not caplog.records
    student.extra = 0.5
    assert not adds_to_loss(student)
    assert "which can't be told apart" in caplog.text


# ---- Against transformers' Trainer


class InOrder(DSKDTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class PlainInOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def trained(folder, name, size, accumulation, ranks=1):
    """
    Weights after two steps on 16 examples, ours and those of transformers' Trainer, and our log of the steps.

    Trainer adds what the model adds once for every micro-batch of every rank, so that its weight depends on their
    number; ours is the mean. Its model gets the share that makes a mean of the sum.
    """
    settings = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
    }
    ours = InOrder(
        MODELS[name](),
        None,
        runs.config(folder, method="sft", **settings),
        train_dataset=tiny.dataset(16),
        processing_class=runs._STUDENT_TOKENIZER,
    )
    ours.train()
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        logging_steps=1,
        lr_scheduler_type="constant",
        disable_tqdm=True,
        **settings,
    )
    collator = ours.data_collator
    plain = PlainInOrder(
        MODELS[name](share=1 / (accumulation * ranks)),
        arguments,
        data_collator=lambda rows: student_batch(collator(rows)),
        train_dataset=ours.train_dataset,
    )
    plain.train()
    weights = [{name: p.detach() for name, p in one.model.named_parameters()} for one in (ours, plain)]
    losses = [[log["loss"] for log in one.state.log_history if "loss" in log] for one in (ours, plain)]
    return weights, losses, [log for log in ours.state.log_history if "loss" in log]


@pytest.mark.parametrize("name, size, accumulation", [("mixtral", 2, 4), ("qwen3_moe", 4, 1), ("adalora", 2, 4)])
def test_as_trainer_has_it(name, size, accumulation, tmp_path):
    (ours, plain), losses, logs = trained(tmp_path, name, size, accumulation)
    for key, weight in plain.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-4, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for log in logs:
        assert log["loss"] == pytest.approx(log["ce_loss"] + log["aux_loss"], rel=1e-5)


def differences(folder):
    (ours, plain), losses, logs = trained(Path(folder), "mixtral", 2, 2, ranks=2)
    return {
        "weights": max(float((ours[key] - plain[key]).abs().max()) for key in plain),
        "losses": losses,
        "sums": [[log["loss"], log["ce_loss"] + log["aux_loss"]] for log in logs],
    }


def test_as_trainer_has_it_on_two_ranks(tmp_path):
    found, _ = ranks_of("test_model_loss", "differences(folder)", tmp_path)
    assert found["weights"] < 1e-5
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-4)
    for whole, parts in found["sums"]:
        assert whole == pytest.approx(parts, rel=1e-5)


# ---- Log, evaluation, plots


def test_evaluation_has_the_term(tmp_path):
    student = mixtral()
    run = runs.trainer(
        tmp_path, student=student, method="dskd_cma", eval_dataset=tiny.dataset(6), per_device_eval_batch_size=4
    )
    metrics = run.evaluate()
    expected = 0.0
    for rows in (range(4), range(4, 6)):
        batch = student_batch(run.data_collator([run.eval_dataset[row] for row in rows]))
        with no_cross_entropy(run.model), torch.no_grad():
            expected += float(run.model.eval()(**batch).loss) * len(rows) / 6
    assert metrics["eval_aux_loss"] == pytest.approx(expected, rel=1e-5)
    run.distiller.last_hidden_state._adds_to_loss, run.distiller.last_hidden_state.added = False, None
    without = run.evaluate()
    assert "eval_aux_loss" not in without
    assert metrics["eval_loss"] == pytest.approx(without["eval_loss"] + expected, rel=1e-5)


def test_plots_and_gradients_have_the_term(tmp_path):
    from hf_dskd.analysis.curves import training_panels
    from hf_dskd.analysis.record import gradient_norms

    assert "aux_loss" in {key for panel in training_panels() for key in panel.lines.values()}
    run = runs.trainer(tmp_path, student=qwen3_moe(), method="dskd_cma")
    norms = gradient_norms(run.distiller, [run.train_dataset[row] for row in range(2)])
    assert norms["gradient_norm_aux"] > 0
    assert "gradient_norm_aux" not in gradient_norms(
        runs.trainer(tmp_path, method="dskd_cma").distiller, [run.train_dataset[row] for row in range(2)]
    )
