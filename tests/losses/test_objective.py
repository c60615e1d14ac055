"""Which terms, divergences, temperatures and weights a configuration gives."""

import math

import pytest
import runs
import torch

from hf_dskd.losses.divergences import divergence_function
from hf_dskd.losses.likelihood import likelihood_matching
from hf_dskd.losses.logits import mapped_kd
from hf_dskd.losses.objective import Step, Terms, total_loss
from hf_dskd.losses.states import response_states
from hf_dskd.losses.temperature import space_divergence, temperatures
from hf_dskd.losses.terms import TERMS
from hf_dskd.methods import DIVERGENCES
from hf_dskd.models.causal_lm import LMHead
from hf_dskd.training.published import PublishedDistiller, published_settings


EVERYWHERE = ("student", "teacher", "logits")


def taus(config, progress=0.0):
    """(student's, teacher's) temperature in each space."""
    found = {space: temperatures(config, space, progress) for space in EVERYWHERE}
    return {space: (pair.student, pair.teacher) for space, pair in found.items()}


# ---- Temperatures


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"kd_temperature": 3.0}, {"student": (3, 3), "teacher": (3, 3), "logits": (3, 3)}),
        ({"student_temperature": 1.5}, dict.fromkeys(EVERYWHERE, (1.5, 2))),
        ({"teacher_temperature": 4.0}, dict.fromkeys(EVERYWHERE, (2, 4))),
        ({"student_temperature": 1.5, "teacher_temperature": 4.0}, dict.fromkeys(EVERYWHERE, (1.5, 4))),
        ({"teacher_space_temperature": 1.0}, {"student": (2, 2), "teacher": (1, 1), "logits": (2, 2)}),
        (
            {"student_temperature": 1.5, "teacher_temperature": 4.0, "teacher_space_temperature": 0.5},
            {"student": (1.5, 4), "teacher": (0.5, 0.5), "logits": (1.5, 4)},
        ),
    ],
)
def test_temperatures(settings, expected, tmp_path):
    config = runs.config(tmp_path, **settings)
    assert taus(config) == taus(config, 1.0) == expected


def test_temperatures_as_published(tmp_path):
    """There the teacher's temperature divides once more, in student space, where the vocabularies differ."""
    settings = {"as_published": True, "kd_temperature": 2.0, "teacher_temperature": 3.0}
    config = published_settings(runs.config(tmp_path, method="dskd_cma", **settings))
    assert taus(config) == {"student": (2, 6), "teacher": (2, 2), "logits": (2, 6)}
    for method in ("dskd", "kd"):
        config = published_settings(runs.config(tmp_path, method=method, **settings))
        assert taus(config) == dict.fromkeys(EVERYWHERE, (2, 2))
    config = published_settings(runs.config(tmp_path, method="dskd_cma", as_published=True, kd_temperature=2.0))
    assert taus(config) == dict.fromkeys(EVERYWHERE, (2, 2))


def test_a_schedule_moves_every_temperature_by_one_factor(tmp_path):
    temperatures = {"student_temperature": 2.0, "teacher_temperature": 6.0, "teacher_space_temperature": 3.0}
    schedule = {"temperature_schedule": "linear", "kd_temperature": 4.0, "final_kd_temperature": 1.0}
    config = runs.config(tmp_path, **temperatures, **schedule)
    # From 4 to 1: 0.625 half way, 0.25 at the end.
    assert taus(config, 0.5) == {"student": (1.25, 3.75), "teacher": (1.875, 1.875), "logits": (1.25, 3.75)}
    assert taus(config, 1.0) == {"student": (0.5, 1.5), "teacher": (0.75, 0.75), "logits": (0.5, 1.5)}


@pytest.mark.parametrize("final", [1.0, 8.0])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_temperature_schedules(kind, final, tmp_path):
    config = runs.config(tmp_path, kd_temperature=4.0, temperature_schedule=kind, final_kd_temperature=final)
    quarter = {"linear": 0.25, "cosine": 0.5 - 0.5 * math.cos(math.pi / 4)}[kind]
    for progress, way in ((-1.0, 0.0), (0.0, 0.0), (0.25, quarter), (0.5, 0.5), (1.0, 1.0), (2.0, 1.0)):
        expected = 4.0 + (final - 4.0) * way
        for pair in taus(config, progress).values():
            assert pair == pytest.approx((expected, expected))


# ---- Divergences


def logits():
    torch.manual_seed(0)
    return torch.randn(5, 11, dtype=torch.float64) * 3, torch.randn(5, 11, dtype=torch.float64) * 3


def is_divergence(config, space, name, progress=0.0, student=2.0, teacher=2.0, factor=1.0, **parameters):
    z, v = logits()
    expected = factor * DIVERGENCES[name].load()(z / student, v / teacher, **parameters)
    torch.testing.assert_close(space_divergence(config, space, progress)(z, v), expected)


def test_a_divergence_for_each_space(tmp_path):
    spaces = {"student_space_divergence": "js", "teacher_space_divergence": "total_variation"}
    config = runs.config(tmp_path, divergence="reverse_kl", **spaces)
    for space, name in (("student", "js"), ("teacher", "total_variation"), ("logits", "reverse_kl")):
        is_divergence(config, space, name)
    config = runs.config(tmp_path, divergence="reverse_kl", student_space_divergence="js")
    is_divergence(config, "teacher", "reverse_kl")


def test_divergences_as_published(tmp_path):
    """Forward KL in teacher space, unless another is asked for."""
    settings = {"method": "dskd_cma", "divergence": "reverse_kl", "as_published": True}
    config = published_settings(runs.config(tmp_path, **settings))
    for space, name in (("student", "reverse_kl"), ("teacher", "forward_kl"), ("logits", "reverse_kl")):
        is_divergence(config, space, name)
    config = published_settings(runs.config(tmp_path, **settings, teacher_space_divergence="js"))
    is_divergence(config, "teacher", "js")


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("js", {"js_weight": 0.8}),
        ("skewed_forward_kl", {"skew_lambda": 0.4}),
        ("skewed_reverse_kl", {"skew_lambda": 0.4}),
        ("adaptive_kl", {"adaptive_kl_alpha": 0.8}),
    ],
)
def test_parameters_reach_the_divergence(name, parameters, tmp_path):
    z, v = logits()
    function = divergence_function(name)
    assert not torch.allclose(function(z, v, **parameters), function(z, v))
    is_divergence(runs.config(tmp_path, divergence=name, **parameters), "student", name, **parameters)


def test_tau_squared(tmp_path):
    settings = {"divergence": "forward_kl", "temperature_scaling": "tau_squared"}
    is_divergence(runs.config(tmp_path, **settings), "student", "forward_kl", factor=4.0)
    config = runs.config(
        tmp_path, **settings, student_temperature=1.5, teacher_temperature=3.0, teacher_space_temperature=5.0
    )
    is_divergence(config, "logits", "forward_kl", student=1.5, teacher=3.0, factor=4.5)
    is_divergence(config, "teacher", "forward_kl", student=5.0, teacher=5.0, factor=25.0)


def test_a_scheduled_divergence(tmp_path):
    """The factor is that of the temperatures at that time."""
    config = runs.config(
        tmp_path,
        divergence="forward_kl",
        temperature_scaling="tau_squared",
        kd_temperature=4.0,
        temperature_schedule="linear",
        final_kd_temperature=2.0,
    )
    for progress, tau in ((0.0, 4.0), (0.5, 3.0), (1.0, 2.0)):
        is_divergence(config, "student", "forward_kl", progress, student=tau, teacher=tau, factor=tau**2)


# ---- Weights and the loss

DUAL = {"ce": 0.7, "t2s_ce": 0.3, "t2s_kd": 0.3, "s2t_kd": 0.3}


def weights(tmp_path, **settings):
    config = runs.config(tmp_path, kd_rate=0.3, kq_rate=2.0, **settings)
    return runs.objective(config).weights(Step())


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"spaces": "student"}, {"ce": 0.7, "t2s_ce": 0.3, "t2s_kd": 0.3}),
        ({"spaces": "teacher"}, {"ce": 0.7, "s2t_kd": 0.3}),
        ({"matching": "mmd"}, {**DUAL, "kq": 2.0}),
        ({"matching": "moments", "spaces": "teacher"}, {"ce": 0.7, "kq": 2.0, "s2t_kd": 0.3}),
    ],
)
def test_weights_of_changed_rows(settings, expected, tmp_path):
    assert weights(tmp_path, method="dskd_cma", **settings) == expected


def test_on_policy_cross_entropy_has_no_weight(tmp_path):
    objective = runs.objective(runs.config(tmp_path, method="kd", kd_rate=0.3))
    assert objective.weights(Step(on_policy=True)) == {"ce": 0.0, "kd": 0.3}
    assert objective.weights(Step(only="ce")) == {"ce": 0.7, "kd": 0.0}


def test_total_loss():
    terms = Terms({}, torch.tensor([3, 5]), torch.tensor(3.0), torch.tensor(5.0))
    counts = torch.tensor(8), torch.tensor(4)
    assert total_loss(terms, *counts).item() == pytest.approx(3 / 8 + 5 / 4)
    assert PublishedDistiller.loss(None, terms, *counts).item() == pytest.approx(3 / 8 + 5 / 8)
    alone = Terms({}, torch.tensor([3, 5]), torch.tensor(3.0))
    assert total_loss(alone, *counts).item() == pytest.approx(3 / 8)


@pytest.mark.parametrize("name", runs.CASES)
def test_the_loss_of_an_on_policy_step_is_the_weighted_terms(name, tmp_path):
    """Of other steps a run's log shows it (test_methods.py)."""
    run = runs.trainer(tmp_path, **runs.CASES[name])
    rows = run.data_collator([run.train_dataset[i] for i in range(3)])
    terms = run.distiller.terms(run.distiller.views(run.model, rows), Step(on_policy=True, training=True))
    shown = {name: float(value.sum()) for name, value in terms.sums.items()}
    rates = run.distiller.weights() | ({"ce": 0.0} if name != "sft" else {})
    for loss, per in ((terms.student_loss, "student_tokens"), (terms.teacher_loss, "teacher_tokens")):
        expected = sum(rate * shown[name] for name, rate in rates.items() if TERMS[name].per == per)
        assert float(0.0 if loss is None else loss) == pytest.approx(expected, rel=1e-5)
    assert float(terms.ce_rows.sum()) == pytest.approx(shown["ce"], rel=1e-5)


# ---- Likelihoods


def batch():
    """Two examples; the second one's response is one token of the student, two of the teacher."""
    g = torch.Generator().manual_seed(0)
    student_labels = torch.tensor([[-100, -100, 4, 5, 6, 1], [-100, 7, -100, -100, -100, -100]])
    teacher_labels = torch.tensor([[-100, 9, 3, 2, -100], [-100, -100, -100, 11, 2]])
    student_chunks = torch.tensor([[-1, -1, 0, 0, 1, 2], [-1, 0, -1, -1, -1, -1]])
    teacher_chunks = torch.tensor([[-1, 0, 1, 2, -1], [-1, -1, -1, 0, 0]])
    sides = []
    for labels, chunks, width, vocabulary in (
        (student_labels, student_chunks, 6, 13),
        (teacher_labels, teacher_chunks, 8, 17),
    ):
        hidden = torch.randn(*labels.shape, width, generator=g, dtype=torch.float64, requires_grad=True)
        matrix = torch.randn(vocabulary, width, generator=g, dtype=torch.float64) / 3
        states = response_states(hidden, labels.clamp(min=0), labels, matrix, chunks, head=LMHead(matrix))
        sides.append((hidden, matrix, labels, chunks, states))
    return sides


def response_logprobs(hidden, matrix, labels, chunks, boundary):
    """Per example (log-probability, chunk, P(boundary next)) of the response tokens, by a loop."""
    examples = []
    for i in range(len(labels)):
        places = [place for place in range(1, labels.shape[1]) if labels[i, place] != -100]
        rows = [torch.log_softmax(hidden[i, place - 1] @ matrix.T, 0) for place in places]
        after = [row.exp()[boundary].sum() for row in rows[1:]] + [torch.ones((), dtype=torch.float64)]
        values = torch.stack([row[labels[i, place]] for row, place in zip(rows, places)])
        examples.append((values[None], chunks[i, places][None], torch.stack(after)[None]))
    return examples


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("name, tau", [("forward_kl", 100.0), ("total_variation", 3.0), ("binary_ce", 1.0)])
def test_alm_is_likelihood_matching_times_its_temperature(name, tau, threshold, tmp_path):
    config = runs.config(
        tmp_path, method="alm", alm_divergence=name, alm_temperature=tau, alm_bias_threshold=threshold
    )
    boundaries = torch.arange(13) % 3 == 0, torch.arange(17) % 3 == 0
    student, teacher = batch()
    objective = runs.objective(config)
    if threshold is not None:
        objective.boundary_tokens = boundaries
    terms = objective(student[-1], teacher[-1], Step())
    assert set(terms.sums) == {"ce", "correct", "alm"}
    assert terms.student_tokens.tolist() == [4, 1] and terms.teacher_tokens.tolist() == [3, 2]

    sides = (response_logprobs(*side[:4], mask) for side, mask in zip((student, teacher), boundaries))
    expected = []
    for (s_values, s_chunks, s_after), (t_values, t_chunks, t_after) in zip(*sides):
        bias = {"bias_threshold": threshold, "student_boundary": s_after, "teacher_boundary": t_after}
        expected.append(
            likelihood_matching(
                s_values,
                t_values.detach(),
                s_chunks,
                t_chunks,
                divergence=name,
                temperature=tau,
                **({} if threshold is None else bias),
            )
        )
    expected = tau * torch.cat(expected)
    torch.testing.assert_close(terms.sums["alm"], expected)
    assert (expected.abs() > 1e-4).all()
    leaves = (student[0], teacher[0])
    ours, plain = (
        torch.autograd.grad(value.sum(), leaves, allow_unused=True) for value in (terms.sums["alm"], expected)
    )
    torch.testing.assert_close(ours[0], plain[0])
    assert ours[1] is None


def test_alm_leaves_the_end_of_sequence_to_the_cross_entropy(tmp_path):
    run = runs.trainer(tmp_path, method="alm", rows=4, max_length=256)
    rows = run.data_collator([run.train_dataset[i] for i in range(4)])
    assert not any(run.train_dataset["cut"])
    run.model.eval()

    def evaluated():
        return run.distiller.terms(run.distiller.views(run.model, rows), Step())

    without = evaluated()
    # Chunks that end before the last token of each side: the same text without its end.
    for side in ("", "teacher_"):
        last = (rows[f"{side}chunk_ids"] == rows[f"{side}chunk_ids"].amax(1, keepdim=True)) & (
            rows[f"{side}chunk_ids"] >= 0
        )
        assert (last.sum(1) == 1).all()
        assert torch.equal(rows[f"{side}silent"], last)
        rows[f"{side}chunk_ids"] = rows[f"{side}chunk_ids"].masked_fill(last, -1)
        del rows[f"{side}silent"]
    expected = evaluated()
    torch.testing.assert_close(without.sums["alm"], expected.sums["alm"])
    # The cross entropy has the end.
    assert torch.equal(without.sums["ce"], expected.sums["ce"])
    assert (without.student_tokens == rows["labels"].ne(-100).sum(1)).all()


def test_min_edit_knows_the_teachers_temperature(tmp_path, monkeypatch):
    """Of the logits' space, where its schedule stands: the target's floor is below what is divided by it."""
    given = []

    def watched(*args):
        given.append(args[-1])
        return mapped_kd(*args)

    monkeypatch.setattr("hf_dskd.losses.logits.mapped_kd", watched)
    settings = {"kd_temperature": 4.0, "temperature_schedule": "linear", "final_kd_temperature": 2.0}
    runs.trainer(tmp_path, method="min_edit", max_steps=2, **settings).train()
    assert given[0] == 4.0 and given[-1] == 3.0
