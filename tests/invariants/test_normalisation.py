"""Every term is a mean per response token of the global batch: how the batch is cut up changes nothing."""

import pytest
import runs
import torch


CASES = list(runs.CASES)
# What a log has for a whole step, whatever the batch was cut into.
PER_STEP = ("loss", "rate", "agreement", "norm", "accuracy", "cost", "real", "fake")


def gradients_of(run, batches):
    """Gradients of one optimizer step made of `batches`, by tensor."""
    run.model.train()
    items = run._get_num_items_in_batch(batches, run.args.device)
    loss = sum(run.compute_loss(run.model, batch, num_items_in_batch=items) for batch in batches)
    run.model.zero_grad()
    if run.projectors is not None:
        run.projectors.zero_grad()
    loss.backward()
    parts = [run.model] + ([run.projectors] if run.projectors is not None else [])
    gradients = [p.grad.clone() for part in parts for p in part.parameters() if p.grad is not None]
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("case", CASES)
def test_gradient_accumulation(case, tmp_path):
    logs, finals = [], []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        run = runs.trainer(
            tmp_path / str(batch_size),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            discriminator_steps=2,
            discriminator_dropout=0.3,
            **runs.CASES[case],
        )
        run.train()
        # Trainer's own gradient norm is the student's.
        names = [name for name in run.state.log_history[0] if name.endswith(PER_STEP)]
        assert any(name.endswith("_loss") for name in names)
        logs.append(torch.tensor(runs.history(run, *names)))
        finals.append(runs.weights(run))
    torch.testing.assert_close(logs[0], logs[1], rtol=1e-5, atol=1e-6)
    for name in finals[0]:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_padding_order_and_composition(case, tmp_path):
    run = runs.trainer(tmp_path, scale_queries=True, divergence="adaptive_kl", **runs.CASES[case])
    rows = [run.train_dataset[i] for i in range(6)]
    collate = run.data_collator
    whole = gradients_of(run, [collate(rows)])
    turned = gradients_of(run, [collate(rows[::-1])])
    single = gradients_of(run, [collate([row]) for row in rows])
    uneven = gradients_of(run, [collate(rows[:1]), collate(rows[1:])])
    collate.pad_to_length = 512
    padded = gradients_of(run, [collate(rows)])
    for other in (turned, single, uneven, padded):
        torch.testing.assert_close(other[0], whole[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other[1], whole[1], rtol=1e-4, atol=1e-6)


def test_kq_rate_means_the_same_for_every_batch_size(tmp_path):
    run = runs.trainer(tmp_path, method="dskd_cma_ga")
    rows = [run.train_dataset[i] for i in range(2)]
    few = gradients_of(run, [run.data_collator(rows)])
    many = gradients_of(run, [run.data_collator(rows * 4)])
    torch.testing.assert_close(few[0], many[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(few[1], many[1], rtol=1e-4, atol=1e-6)


def test_as_published_depends_on_padding(tmp_path):
    """The released code's statistics do; if this fails, `as_published` doesn't reproduce it."""
    run = runs.trainer(tmp_path, as_published=True, max_length=128)
    rows = [run.train_dataset[i] for i in (0, 1)]
    assert run.data_collator(rows)["input_ids"].shape[1] == 129
    gradients = []
    for length in (129, 257):
        run.data_collator.pad_to_length = length
        gradients_of(run, [run.data_collator(rows)])
        gradients.append(run.projectors.query.weight.grad.clone())
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_exact_for_every_batch_size(case, tmp_path):
    metrics = []
    run = runs.trainer(tmp_path, rows=10, **runs.CASES[case])
    for run.args.per_device_eval_batch_size in (1, 3, 7):
        metrics.append(run.evaluate(run.train_dataset))
    for key, value in metrics[0].items():
        if key.endswith(("loss", "bits_per_byte", "accuracy", "agreement")):
            for other in metrics[1:]:
                assert other[key] == pytest.approx(value, rel=1e-5), key
