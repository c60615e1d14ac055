"""A run is measured by the parts that train it, and doesn't notice."""

import math
import random

import numpy as np
import pytest
import runs
import tiny
import torch

from hf_dskd import UserError
from hf_dskd.analysis.distributions import auc, distribution_metrics
from hf_dskd.analysis.heatmap import cross_attention
from hf_dskd.analysis.probe import analyse
from hf_dskd.analysis.record import gradient_norms
from hf_dskd.models.causal_lm import lm_head


ATTENTION = {"aligned_rate", "chunk_mass", "chunk_mass_uniform", "argmax_in_chunk", "monotonicity", "prior_kl"}
ATTENTION |= {"entropy", "entropy_normalised", "attention_distance_bytes", "attention_distance_bytes_uniform"}
ATTENTION |= {f"s2t_{name}" for name in ATTENTION}
STUDENT_SPACE = {"t2s_accuracy", "t2s_ce_loss"}
SPACES = STUDENT_SPACE | {"s2t_accuracy", "s2t_agreement"}
QUERIES = {"mmd", "mmd_p_value", "sliced_wasserstein", "mean_gap", "variance_gap", "mean_cosine", "linear_probe_auc"}


def probes(names, *kinds):
    return names | {f"probe_{kind}_{name}" for kind in kinds for name in names}


NAMES = {
    "dskd_cma_ga": ATTENTION | probes(SPACES, "clp", "cla") | QUERIES | {"discriminator_auc"},
    "dskd_cma_ct": ATTENTION | probes(SPACES, "clp", "cla") | QUERIES,
    "dskd_cla": ATTENTION | probes(SPACES, "clp", "cla") | QUERIES,
    "student_space": ATTENTION | probes(STUDENT_SPACE, "clp", "cla") | QUERIES,
    "teacher_space": ATTENTION | probes(SPACES - STUDENT_SPACE, "clp", "cla") | QUERIES | {"discriminator_auc"},
    "dskd_clp": ATTENTION | probes(SPACES, "clp"),
    "dskd_eta": ATTENTION | probes(SPACES, "clp"),
    "dskd": ATTENTION | probes(SPACES, "clp"),
    "alm": ATTENTION,
}


def learnt(folder, steps=25, **settings):
    """A run whose projected states are right now and then."""
    settings = {"learning_rate": 1e-2, "projector_learning_rate": 1e-2, "max_steps": steps, **settings}
    run = runs.trainer(folder, rows=8, **settings)
    run.train()
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return learnt(tmp_path_factory.mktemp("run"))


def loaded(run, folder, **settings):
    """A run of another method with the same models and projectors."""
    other = runs.trainer(folder, rows=8, student=run.model, teacher=run.teacher.model, **settings)
    other.projectors.load_state_dict(run.projectors.state_dict(), strict=False)
    return other


# ---- Which numbers there are


@pytest.mark.parametrize("case", NAMES)
def test_what_applies_is_there(case, tmp_path):
    run = runs.trainer(tmp_path, rows=5, **runs.CASES[case])
    analysis = analyse(run.distiller, run.train_dataset)
    assert set(analysis.numbers) == NAMES[case]
    assert all(type(value) is float and math.isfinite(value) for value in analysis.numbers.values())
    assert analysis.step == 0 and len(analysis.examples) == 5
    assert analysis.examples[3].caption == "example 3"
    assert (analysis.queries is None) == (analysis.keys is None) == (not QUERIES <= NAMES[case])


def test_bad_rows_are_refused(trained):
    with pytest.raises(UserError, match=r"no rows: pass tokenized ones, such as trainer\.eval_dataset"):
        analyse(trained.distiller, [])
    with pytest.raises(UserError, match="no column 'input_ids'"):
        analyse(trained.distiller, tiny.dataset(2))


# ---- What they are


@pytest.mark.parametrize("settings", [{}, {"scale_queries": True}, {"discriminator_dropout": 0.5}], ids=str)
def test_queries_keys_and_discriminator_are_those_of_training(settings, tmp_path):
    run = learnt(tmp_path, steps=3, per_device_train_batch_size=8, **settings)
    rows = [run.train_dataset[index] for index in range(5)]
    analysis = analyse(run.distiller, rows, batch_size=2)
    # What a training pass leaves for the discriminator.
    run.adversary.forget()
    run.model.train()
    run.compute_loss(run.model, run._prepare_inputs(run.data_collator(rows)))
    [features] = run.adversary._features
    queries, keys = features.queries[features.query_mask], features.keys[features.key_mask]
    torch.testing.assert_close(analysis.queries, queries)
    torch.testing.assert_close(analysis.keys, keys)
    assert analysis.queries.dtype == torch.float32 and analysis.queries.device.type == "cpu"
    critic = run.adversary.critic.eval()
    with torch.no_grad():
        expected = auc(critic(queries), critic(keys))
    assert analysis.numbers["discriminator_auc"] == pytest.approx(expected, abs=1e-3)
    groups = [mask.nonzero()[:, 0] for mask in (features.query_mask, features.key_mask)]
    for name, value in distribution_metrics(queries, keys, *groups).items():
        assert analysis.numbers[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("settings", [{"bf16": True}, {"method": "dskd_eta"}], ids=str)
def test_accuracies_are_those_of_evaluate(settings, tmp_path):
    run = learnt(tmp_path, **settings)
    rows = run.train_dataset
    numbers, evaluated = analyse(run.distiller, rows).numbers, run.evaluate(rows)
    for name in ("t2s_accuracy", "t2s_ce_loss", "s2t_agreement"):
        assert numbers[name] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-4), name
    # Or the comparison would say little.
    assert 0.05 < numbers["t2s_accuracy"] < 1 and 0.005 < numbers["s2t_agreement"] < 1


def test_accuracies_by_hand(trained, monkeypatch):
    """One token at a time, in float64, from the models' own states and the attention that is shown."""
    teacher, projectors = trained.teacher.model, trained.projectors
    # In teacher space a few frequent tokens are likely, or nobody would be right about any.
    frequent = torch.cat([torch.tensor(ids) for ids in trained.train_dataset["teacher_input_ids"]]).bincount()
    weight = teacher.lm_head.weight.detach().clone()
    weight[frequent.topk(6).indices] *= 5
    monkeypatch.setattr(teacher.lm_head.weight, "data", weight)
    sums = dict.fromkeys(("t2s_accuracy", "t2s_ce_loss", "s2t_accuracy", "s2t_agreement"), 0.0)
    student_tokens = teacher_tokens = 0
    rows = [trained.train_dataset[index] for index in range(8)]
    for row in rows:
        shown = cross_attention(trained.distiller, row)
        ids, teacher_ids = (torch.tensor(row[f"{side}input_ids"]) for side in ("", "teacher_"))
        first, teacher_first = row["prompt_length"], row["teacher_prompt_length"]
        with torch.no_grad():
            trained.model.eval()
            states = trained.model.transformer(ids[None], attention_mask=torch.ones(1, len(ids)))[0][
                0, first - 1 : -1
            ].double()
            teacher_states = teacher.model(teacher_ids[None])[0][0, teacher_first - 1 : -1].double()
            targets, teacher_targets = ids[first:], teacher_ids[teacher_first:]
            embedded = teacher.model.embed_tokens.weight[teacher_targets].double()
            value = teacher_states / teacher_states.std() + embedded / embedded.std()
            t2s, s2t = ((layer.weight.double(), layer.bias.double()) for layer in (projectors.t2s, projectors.s2t))
            head, teacher_head = lm_head(trained.model).weight.double(), teacher.lm_head.weight.double()
            projected = shown.t2s.double() @ (value @ t2s[0].T + t2s[1]) @ head.T
            projected_student = shown.s2t.double() @ (states @ s2t[0].T + s2t[1]) @ teacher_head.T
            predictions = (teacher_states @ teacher_head.T).argmax(-1)
        for logits, target in zip(projected, targets):
            sums["t2s_accuracy"] += float(logits.argmax() == target)
            sums["t2s_ce_loss"] -= float(logits.log_softmax(-1)[target])
        for logits, target, prediction in zip(projected_student, teacher_targets, predictions):
            sums["s2t_accuracy"] += float(logits.argmax() == target)
            sums["s2t_agreement"] += float(logits.argmax() == prediction)
        student_tokens += len(targets)
        teacher_tokens += len(teacher_targets)
    numbers = analyse(trained.distiller, rows).numbers
    for name, value in sums.items():
        expected = value / (student_tokens if name.startswith("t2s") else teacher_tokens)
        assert numbers[name] == pytest.approx(expected, rel=1e-3), name
        assert expected > 0, name


def test_tokens_without_a_partner_are_never_right(tmp_path):
    """Their projected state is 0, whose likeliest token is the first: here it is the target as well."""
    run = runs.trainer(tmp_path, method="dskd_eta", rows=2)
    row = dict(run.train_dataset[0])
    prompt = row["teacher_prompt_length"]
    row["teacher_input_ids"] = row["teacher_input_ids"][:prompt] + [0] * len(row["teacher_byte_ends"])
    numbers = analyse(run.distiller, [row]).numbers
    assert numbers["s2t_aligned_rate"] < 0.8 and numbers["s2t_accuracy"] < 0.1


@pytest.mark.parametrize(("method", "kind"), [("dskd_clp", "clp"), ("dskd_cla", "cla")])
def test_probing_is_the_other_method_with_the_same_projectors(method, kind, trained, tmp_path):
    other = loaded(trained, tmp_path, method=method)
    rows = trained.train_dataset
    probed, own = analyse(trained.distiller, rows).numbers, analyse(other.distiller, rows).numbers
    for name in SPACES:
        assert probed[f"probe_{kind}_{name}"] == pytest.approx(own[name], rel=1e-5), name
        assert own[f"probe_{kind}_{name}"] == pytest.approx(own[name], rel=1e-5), name
    assert probed[f"probe_{kind}_t2s_ce_loss"] != pytest.approx(probed["t2s_ce_loss"], rel=1e-3)
    assert own["chunk_mass"] == pytest.approx(1)


def test_batches_change_nothing(trained):
    rows = trained.train_dataset
    whole = analyse(trained.distiller, rows, batch_size=8)
    for size in (1, 3):
        parts = analyse(trained.distiller, rows, batch_size=size)
        assert parts.numbers == pytest.approx(whole.numbers, rel=1e-3, abs=1e-3)
        torch.testing.assert_close(parts.queries, whole.queries)
        torch.testing.assert_close(parts.keys, whole.keys)


def test_a_cached_teacher_does_as_well(tmp_path):
    live = runs.trainer(tmp_path / "live", rows=6)
    cached = runs.trainer(tmp_path / "cached", rows=6, teacher_cache=str(tmp_path / "states"))
    expected, numbers = (analyse(run.distiller, run.train_dataset).numbers for run in (live, cached))
    # The cache has bfloat16 states; queries and keys don't read them.
    for name in ATTENTION | QUERIES | {"discriminator_auc"}:
        assert numbers[name] == pytest.approx(expected[name], rel=1e-6), name
    for name in probes(SPACES, "clp", "cla"):
        assert numbers[name] == pytest.approx(expected[name], rel=1e-2, abs=0.02), name
    norms = [gradient_norms(run.distiller, list(run.train_dataset)[:2]) for run in (live, cached)]
    assert norms[1] == pytest.approx(norms[0], rel=0.1, abs=0.05)
    rows = runs.trainer(tmp_path / "more", rows=8).train_dataset
    with pytest.raises(UserError, match="no states of example"):
        analyse(cached.distiller, rows)


def test_as_published_each_row_is_alone(tmp_path):
    run = runs.trainer(tmp_path, rows=4, as_published=True, max_length=200)
    analysis = analyse(run.distiller, run.train_dataset)
    assert set(analysis.numbers) == NAMES["dskd_cma_ga"]
    again = analyse(run.distiller, run.train_dataset, batch_size=1)
    assert again.numbers == analysis.numbers
    assert len(analysis.queries) == sum(len(row["byte_ends"]) for row in run.train_dataset)


# ---- What it leaves alone


def test_modes_gradients_and_random_numbers_stay(trained):
    trained.model.train()
    trained.model.transformer.h[0].eval()
    trained.adversary.critic.train()
    trained.adversary.forget()
    modules = [trained.model, trained.projectors, trained.adversary.critic]
    batch = trained._prepare_inputs(trained.data_collator([trained.train_dataset[0]]))
    trained.compute_loss(trained.model, batch).backward()
    modes = [part.training for module in modules for part in module.modules()]
    gradients = {name: p.grad.clone() for name, p in trained.model.named_parameters()}
    kept = len(trained.adversary._features)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    first = analyse(trained.distiller, trained.train_dataset)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert [part.training for module in modules for part in module.modules()] == modes
    assert True in modes and False in modes
    assert all(torch.equal(p.grad, gradients[name]) for name, p in trained.model.named_parameters())
    assert len(trained.adversary._features) == kept
    assert all(p.grad is None for p in trained.adversary.critic.parameters())
    assert not first.queries.requires_grad and not first.keys.requires_grad
    # The same state gives the same numbers.
    torch.rand(7)
    trained.model.eval()
    assert analyse(trained.distiller, trained.train_dataset).numbers == first.numbers
