"""Dual-space distillation against a plain formulation: loops over examples and positions, float64."""

import math

import pytest
import torch

from hf_dskd.alignment.cross_model import cross_model_attention, unit_std
from hf_dskd.losses.divergences import divergence_function
from hf_dskd.losses.dual_space import dual_space_terms, queries_and_keys
from hf_dskd.losses.projectors import Projectors
from hf_dskd.losses.states import response_states
from hf_dskd.losses.temperature import Temperatures, with_temperature
from hf_dskd.methods import ALIGNMENTS, DIVERGENCES
from hf_dskd.models.causal_lm import LMHead


def make(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    ds, dt, vs, vt = 6, 10, 23, 31
    # Two examples; -100 marks prompt and padding. Response lengths differ on both sides.
    student_labels = torch.tensor([[-100, -100, 4, 5, 6, 1, -100], [-100, 7, 8, 1, -100, -100, -100]])
    teacher_labels = torch.tensor([[-100, 9, 3, 2, -100], [-100, -100, -100, 11, 2]])
    batch = {
        "student_labels": student_labels,
        "teacher_labels": teacher_labels,
        # In the first example the chunks have 2:1, 1:1 and 1:1 tokens of the two, in the second 1:1 and 2:1.
        "student_chunks": torch.tensor([[-1, -1, 0, 0, 1, 2, -1], [-1, 0, 0, 1, -1, -1, -1]]),
        "teacher_chunks": torch.tensor([[-1, 0, 1, 2, -1], [-1, -1, -1, 0, 1]]),
        # The student's token for each of the teacher's, or none.
        "label_map": torch.tensor([token % vs if token % 3 else -1 for token in range(vt)]),
        "student_ids": torch.randint(0, vs, student_labels.shape, generator=g),
        "teacher_ids": torch.randint(0, vt, teacher_labels.shape, generator=g),
        "student_hidden": rand(2, 7, ds),
        "teacher_hidden": rand(2, 5, dt),
        "student_embedding": rand(vs, ds),
        "teacher_embedding": rand(vt, dt),
        "student_head": rand(vs, ds),
        "teacher_head": rand(vt, dt),
    }
    projectors = Projectors(ds, dt).to(dtype)
    return batch, projectors


CMA = ("cross_model_attention", "state_and_target", "response")


def plain_weights(alignment, scores, student_chunks, teacher_chunks):
    """One example: scores [n_s, n_t] or None -> t2s [n_s, n_t] and s2t [n_t, n_s]; rows of zeros have no partner."""
    n_s, n_t = len(student_chunks), len(teacher_chunks)
    same = student_chunks[:, None] == teacher_chunks[None, :]
    if alignment == "identity":
        same = torch.eye(n_s, n_t, dtype=torch.bool)
    if alignment == "exact_tokens":
        alone = [(student_chunks == c).sum() == 1 and (teacher_chunks == c).sum() == 1 for c in student_chunks]
        same = same & torch.tensor(alone)[:, None]
    if alignment == "cross_model_attention":
        same = torch.ones(n_s, n_t, dtype=torch.bool)
    both = []
    for pairs, scored in ((same, scores), (same.T, None if scores is None else scores.T)):
        rows = []
        for i in range(len(pairs)):
            if not pairs[i].any():
                rows.append(torch.zeros(pairs.shape[1], dtype=torch.float64))
            elif alignment in ("cross_model_attention", "chunk_attention"):
                rows.append(torch.softmax(torch.where(pairs[i], scored[i], -torch.inf), 0))
            else:
                rows.append(pairs[i].double() / pairs[i].sum())
        both.append(torch.stack(rows))
    return both


def plain_terms(b, projectors, divergence, tau, masked, scale_queries, composition=CMA):
    """Sums over the batch."""
    alignment, teacher_value, label = composition
    out = {"ce": 0.0, "t2s_ce": 0.0, "t2s_kd": 0.0, "s2t_kd": 0.0, "queries": [], "keys": []}
    for i in range(2):
        # Positions that predict a response token, [n_s] and [n_t].
        s = [p for p in range(6) if b["student_labels"][i, p + 1] != -100]
        t = [p for p in range(4) if b["teacher_labels"][i, p + 1] != -100]
        ys = torch.stack([b["student_labels"][i, p + 1] for p in s])
        yt = torch.stack([b["teacher_labels"][i, p + 1] for p in t])
        xs, xt = b["student_ids"][i, s], b["teacher_ids"][i, t]
        es, et = b["student_embedding"], b["teacher_embedding"]
        hs, ht = b["student_hidden"][i, s], b["teacher_hidden"][i, t]
        scores = None
        if alignment in ("cross_model_attention", "chunk_attention"):
            q = projectors.query(torch.cat([es[xs], es[ys]], -1))  # [n_s, 2dt]
            k = torch.cat([et[xt], et[yt]], -1)  # [n_t, 2dt]
            k = k / k.std()
            if scale_queries:
                q = q / q.std()
            out["queries"].append(q)
            out["keys"].append(k)
            scores = q @ k.T / math.sqrt(k.shape[-1])  # [n_s, n_t]
        chunks = [b[f"{side}_chunks"][i, [p + 1 for p in places]] for side, places in (("student", s), ("teacher", t))]
        t2s, s2t = plain_weights(alignment, scores, *chunks)
        value = ht / ht.std() + et[yt] / et[yt].std() if teacher_value == "state_and_target" else ht
        t2s_logits = t2s @ projectors.t2s(value) @ b["student_head"].T  # [n_s, Vs]
        s2t_logits = s2t @ projectors.s2t(hs) @ b["teacher_head"].T  # [n_t, Vt]
        student_logits = hs @ b["student_head"].T
        teacher_logits = ht @ b["teacher_head"].T
        for r in range(len(s)):
            out["ce"] = out["ce"] - torch.log_softmax(student_logits[r], 0)[ys[r]]
            y = ys[r]
            if label == "teacher" and t2s[r].any():
                y = b["label_map"][teacher_logits[t2s[r].argmax()].argmax()]
            if not t2s[r].any() or y < 0:
                continue
            out["t2s_ce"] = out["t2s_ce"] - torch.log_softmax(t2s_logits[r], 0)[y]
            if not masked or t2s_logits[r].argmax() == y:
                out["t2s_kd"] = out["t2s_kd"] + divergence(student_logits[r] / tau, t2s_logits[r].detach() / tau)
        for r in range(len(t)):
            if s2t[r].any():
                out["s2t_kd"] = out["s2t_kd"] + divergence(s2t_logits[r] / tau, teacher_logits[r].detach() / tau)
    return out


def our_terms(b, projectors, divergence, tau, masked, scale_queries, composition=CMA, spaces=("student", "teacher")):
    alignment, teacher_value, label = composition
    student, teacher = (
        response_states(
            *(b[f"{side}_{part}"] for part in ("hidden", "ids", "labels", "embedding", "chunks")),
            head=LMHead(b[f"{side}_head"]),
        )
        for side in ("student", "teacher")
    )
    queries = keys = None
    if alignment in ("cross_model_attention", "chunk_attention"):
        queries, keys = queries_and_keys(student, teacher, projectors, scale_queries=scale_queries)
    divergence = with_temperature(divergence, Temperatures(tau, tau))
    _, terms, *_ = dual_space_terms(
        student,
        teacher,
        ALIGNMENTS[alignment].load()(student, teacher, queries, keys),
        projectors,
        student_space_divergence=divergence if "student" in spaces else None,
        teacher_space_divergence=divergence if "teacher" in spaces else None,
        teacher_value=teacher_value,
        label_map=b["label_map"] if label == "teacher" else None,
        correctness_mask=masked,
    )
    packed = (None, None) if queries is None else (queries[student.mask], keys[teacher.mask])
    return terms, *packed


def compare(name, masked, scale_queries, dtype, tolerance, composition=CMA):
    divergence, tau = divergence_function(name), 2.0
    results = []
    for terms_of, precision in ((plain_terms, torch.float64), (our_terms, dtype)):
        b, projectors = make(precision)
        b["student_hidden"].requires_grad_()
        b["student_head"].requires_grad_()
        output = terms_of(b, projectors, divergence, tau, masked, scale_queries, composition)
        if terms_of is our_terms:
            terms, *features = output
        else:
            terms, features = output, [torch.cat(output[key]) if output[key] else None for key in ("queries", "keys")]
        sums = {key: torch.as_tensor(terms[key]).sum() for key in ("ce", "t2s_ce", "t2s_kd", "s2t_kd")}
        leaves = [b["student_hidden"], b["student_head"], *projectors.parameters()]
        # The head is the student's own in `ce` and `t2s_kd`, and a constant across spaces: leave it out there.
        gradients = torch.autograd.grad(
            sums["t2s_ce"] + sums["s2t_kd"], [leaves[0], *leaves[2:]], retain_graph=True, allow_unused=True
        )
        own = torch.autograd.grad(sums["ce"] + sums["t2s_kd"], leaves[:2])
        results.append((sums, [*gradients, *own, *features]))
    (expected, expected_tensors), (actual, tensors) = results
    close = {"rtol": tolerance, "atol": tolerance}
    for key in expected:
        assert expected[key] != 0 or masked
        torch.testing.assert_close(actual[key].double(), expected[key].double(), **close)
    for a, e in zip(tensors, expected_tensors, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a.detach().double(), e.detach(), **close)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_terms_and_gradients_match_the_plain_formulation(name, masked, dtype, tolerance):
    for scale_queries in (False, True):
        compare(name, masked, scale_queries, dtype, tolerance)


# The teacher's own prediction needs one teacher token per student token.
LABELLED = [(alignment, "response") for alignment in ALIGNMENTS]
LABELLED += [("exact_tokens", "teacher"), ("identity", "teacher")]


@pytest.mark.parametrize("alignment, label", LABELLED)
@pytest.mark.parametrize("teacher_value", ["state_and_target", "state"])
@pytest.mark.parametrize("masked", [True, False])
def test_every_alignment_value_and_label_matches_the_plain_formulation(alignment, label, teacher_value, masked):
    compare("forward_kl", masked, False, torch.float64, 1e-9, (alignment, teacher_value, label))


@pytest.mark.parametrize("spaces", [("student",), ("teacher",)])
def test_one_space_alone_has_the_same_terms(spaces):
    b, projectors = make()
    divergence = divergence_function("forward_kl")
    both, *_ = our_terms(b, projectors, divergence, 1.0, True, False)
    alone, *_ = our_terms(b, projectors, divergence, 1.0, True, False, spaces=spaces)
    assert set(alone) == (
        {"ce", "correct", "t2s_ce", "t2s_kd", "t2s_correct", "t2s_rows"}
        if "student" in spaces
        else {"ce", "correct", "s2t_kd", "s2t_agree"}
    )
    for key, value in alone.items():
        torch.testing.assert_close(value, both[key])


def test_positions_without_a_partner_count_in_no_term():
    b, projectors = make()
    terms, *_ = our_terms(
        b, projectors, divergence_function("forward_kl"), 1.0, False, False, ("exact_tokens", "state", "response")
    )
    # Of each example the chunks with one token on both sides: two of the first, one of the second.
    assert terms["t2s_rows"].tolist() == [2, 1]


def test_heads_across_spaces_and_embeddings_are_constants():
    b, projectors = make()
    for key in ("student_head", "teacher_head", "student_embedding", "teacher_embedding", "teacher_hidden"):
        b[key].requires_grad_()
    terms, *_ = our_terms(b, projectors, divergence_function("forward_kl"), 1.0, False, False)
    loss = terms["t2s_ce"].sum() + terms["s2t_kd"].sum()
    for key in ("student_head", "teacher_head", "student_embedding", "teacher_embedding"):
        (gradient,) = torch.autograd.grad(loss, b[key], retain_graph=True, allow_unused=True)
        assert gradient is None or not gradient.any()
    # Nor does the target of the divergence train the projectors.
    gradients = torch.autograd.grad(terms["t2s_kd"].sum(), list(projectors.parameters()), allow_unused=True)
    assert not any(gradient is not None and gradient.any() for gradient in gradients)


def test_attention_rows_sum_to_one_and_masked_positions_have_none():
    queries, keys = torch.randn(2, 4, 6), torch.randn(2, 3, 6)
    query_mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    key_mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    t2s, s2t = cross_model_attention(queries, keys, query_mask, key_mask)
    torch.testing.assert_close(t2s.sum(-1), query_mask.float())
    torch.testing.assert_close(s2t.sum(-1), key_mask.float())
    assert (t2s[0, :, 2] == 0).all() and (s2t[:, :, 3] == 0).all()


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_an_example_without_response_gives_zero_and_no_nan(alignment):
    b, projectors = make()
    for side in ("student", "teacher"):
        b[f"{side}_labels"][1] = -100
        b[f"{side}_chunks"][1] = -1
    b["student_hidden"].requires_grad_()
    terms, *_ = our_terms(
        b,
        projectors,
        divergence_function("forward_kl"),
        1.0,
        False,
        False,
        (alignment, "state_and_target", "response"),
    )
    for value in terms.values():
        assert value[1] == 0 and torch.isfinite(value).all()
    loss = sum(terms[key].sum() for key in ("ce", "t2s_ce", "t2s_kd", "s2t_kd"))
    (gradient,) = torch.autograd.grad(loss, b["student_hidden"])
    assert torch.isfinite(gradient).all() and (gradient[1] == 0).all()


def test_unit_std_is_per_example_over_real_rows():
    values = torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    scaled = unit_std(values, mask)
    torch.testing.assert_close(scaled[0, :3], values[0, :3] / values[0, :3].std())
    torch.testing.assert_close(scaled[1], values[1] / values[1].std())
    torch.testing.assert_close(unit_std(values), values / values.std())
