"""DSKD-CMA against a plain formulation: loops over examples and positions, float64, shapes in comments."""

import math

import pytest
import torch

from hf_dskd.alignment.cross_model import cross_model_attention, unit_std
from hf_dskd.losses.divergences import DIVERGENCES, divergence_function
from hf_dskd.losses.dual_space import dual_space_terms, queries_and_keys, response_states, token_cross_entropy
from hf_dskd.models import LMHead
from hf_dskd.projectors import Projectors


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


def plain_terms(b, projectors, divergence, tau, masked, scale_queries):
    """Sums over the batch."""
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
        q = projectors.query(torch.cat([es[xs], es[ys]], -1))  # [n_s, 2dt]
        k = torch.cat([et[xt], et[yt]], -1)  # [n_t, 2dt]
        k = k / k.std()
        if scale_queries:
            q = q / q.std()
        out["queries"].append(q)
        out["keys"].append(k)
        scores = q @ k.T / math.sqrt(k.shape[-1])  # [n_s, n_t]
        v_t2s = projectors.t2s(ht / ht.std() + et[yt] / et[yt].std())  # [n_t, ds]
        t2s_logits = torch.softmax(scores, 1) @ v_t2s @ b["student_head"].T  # [n_s, Vs]
        s2t_logits = torch.softmax(scores.T, 1) @ projectors.s2t(hs) @ b["teacher_head"].T  # [n_t, Vt]
        student_logits = hs @ b["student_head"].T
        teacher_logits = ht @ b["teacher_head"].T
        for r in range(len(s)):
            out["ce"] = out["ce"] - torch.log_softmax(student_logits[r], 0)[ys[r]]
            out["t2s_ce"] = out["t2s_ce"] - torch.log_softmax(t2s_logits[r], 0)[ys[r]]
            if not masked or t2s_logits[r].argmax() == ys[r]:
                out["t2s_kd"] = out["t2s_kd"] + divergence(student_logits[r] / tau, t2s_logits[r].detach() / tau)
        for r in range(len(t)):
            out["s2t_kd"] = out["s2t_kd"] + divergence(s2t_logits[r] / tau, teacher_logits[r].detach() / tau)
    return out


def our_terms(b, projectors, divergence, tau, masked, scale_queries):
    student = response_states(b["student_hidden"], b["student_ids"], b["student_labels"], b["student_embedding"])
    teacher = response_states(b["teacher_hidden"], b["teacher_ids"], b["teacher_labels"], b["teacher_embedding"])
    queries, keys = queries_and_keys(student, teacher, projectors, scale_queries=scale_queries)
    head = LMHead(b["student_head"])
    logits = head(student.packed(student.hidden))
    terms = dual_space_terms(
        student,
        teacher,
        queries,
        keys,
        projectors,
        head,
        LMHead(b["teacher_head"]),
        student_logits=logits,
        student_space_divergence=divergence,
        teacher_space_divergence=divergence,
        temperature=tau,
        correctness_mask=masked,
    )
    terms["ce"] = student.per_example(token_cross_entropy(student, logits))
    return terms, queries[student.mask], keys[teacher.mask]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scale_queries", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_terms_and_gradients_match_the_plain_formulation(name, masked, scale_queries, dtype, tolerance):
    divergence, tau = divergence_function(name), 2.0
    results = []
    for terms_of, precision in ((plain_terms, torch.float64), (our_terms, dtype)):
        b, projectors = make(precision)
        b["student_hidden"].requires_grad_()
        b["student_head"].requires_grad_()
        output = terms_of(b, projectors, divergence, tau, masked, scale_queries)
        if terms_of is our_terms:
            terms, queries, keys = output
        else:
            terms, queries, keys = output, torch.cat(output["queries"]), torch.cat(output["keys"])
        sums = {key: torch.as_tensor(terms[key]).sum() for key in ("ce", "t2s_ce", "t2s_kd", "s2t_kd")}
        leaves = [b["student_hidden"], b["student_head"], *projectors.parameters()]
        # The head is the student's own in `ce` and `t2s_kd`, and a constant across spaces: leave it out there.
        gradients = torch.autograd.grad(
            sums["t2s_ce"] + sums["s2t_kd"], [leaves[0], *leaves[2:]], retain_graph=True, allow_unused=True
        )
        own = torch.autograd.grad(sums["ce"] + sums["t2s_kd"], leaves[:2])
        results.append((sums, [*gradients, *own], queries.detach(), keys.detach()))
    (expected, expected_gradients, q, k), (actual, gradients, our_q, our_k) = results
    close = {"rtol": tolerance, "atol": tolerance}
    for key in expected:
        torch.testing.assert_close(actual[key].double(), expected[key].double(), **close)
    for a, e in zip(gradients, expected_gradients):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a.double(), e, **close)
    torch.testing.assert_close(our_q.double(), q, **close)
    torch.testing.assert_close(our_k.double(), k, **close)


def test_heads_across_spaces_and_embeddings_are_constants():
    b, projectors = make()
    for key in ("student_head", "teacher_head", "student_embedding", "teacher_embedding", "teacher_hidden"):
        b[key].requires_grad_()
    terms, *_ = our_terms(b, projectors, divergence_function("forward_kl"), 1.0, True, False)
    loss = terms["t2s_ce"].sum() + terms["s2t_kd"].sum()
    for key in ("student_head", "teacher_head", "student_embedding", "teacher_embedding"):
        assert torch.autograd.grad(loss, b[key], retain_graph=True, allow_unused=True)[0] is None


def test_t2s_target_carries_no_gradient_to_the_projectors():
    b, projectors = make()
    b["student_hidden"].requires_grad_()
    terms, *_ = our_terms(b, projectors, divergence_function("forward_kl"), 1.0, False, False)
    gradients = torch.autograd.grad(terms["t2s_kd"].sum(), list(projectors.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)


def test_attention_rows_sum_to_one_and_masked_positions_have_none():
    queries, keys = torch.randn(2, 4, 6), torch.randn(2, 3, 6)
    query_mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    key_mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    t2s, s2t = cross_model_attention(queries, keys, query_mask, key_mask)
    torch.testing.assert_close(t2s.sum(-1), query_mask.float())
    torch.testing.assert_close(s2t.sum(-1), key_mask.float())
    assert (t2s[0, :, 2] == 0).all() and (s2t[:, :, 3] == 0).all()


def test_an_example_without_response_gives_zero_and_no_nan():
    b, projectors = make()
    b["student_labels"][1] = -100
    b["teacher_labels"][1] = -100
    b["student_hidden"].requires_grad_()
    terms, *_ = our_terms(b, projectors, divergence_function("forward_kl"), 1.0, False, False)
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
