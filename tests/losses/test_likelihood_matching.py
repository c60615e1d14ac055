import math

import numpy as np
import pytest
import tiny
import torch

from hf_dskd.losses.likelihood import (
    binary_divergence,
    boundary_after,
    boundary_probability,
    boundary_tokens,
    likelihood_matching,
    merge_chunks,
)
from hf_dskd.methods import BINARY_DIVERGENCES


# Chunks of each example's student and teacher tokens; the third example has no response.
CHUNKS = [
    ([0, 0, 1, 2, 2, 2, 3], [0, 1, 1, 2, 3]),
    ([0, 1, 1], [0, 0, 0, 1]),
    ([], []),
    ([0, 1, 2, 2, 3, 3], [0, 1, 1, 2, 2, 3]),
]
BOUNDARY = [[0.9, 0.02, 0.05, 0.3, 1.0], [0.5, 0.7, 0.01, 1.0], [], [0.04, 0.8, 0.09, 0.2, 0.03, 1.0]]


def padded(rows, fill, width):
    return torch.stack([torch.cat([row, torch.full((width - len(row),), fill, dtype=row.dtype)]) for row in rows])


def make(seed=0, scale=2.0, dtype=torch.float64, extra=0):
    """A dict of padded tensors; `extra` columns of padding more, padding that would show if it counted."""
    generator = torch.Generator().manual_seed(seed)

    def logprob(n):
        return torch.nn.functional.logsigmoid(scale * torch.randn(n, generator=generator, dtype=torch.float64))

    student, teacher = ([logprob(len(c[side])) for c in CHUNKS] for side in (0, 1))
    student_boundary = [torch.rand(len(c[0]), generator=generator, dtype=torch.float64) for c in CHUNKS]
    width = [max(len(c[side]) for c in CHUNKS) + extra for side in (0, 1)]
    return {
        "student_logprob": padded([x.to(dtype) for x in student], -7.0, width[0]),
        "teacher_logprob": padded([x.to(dtype) for x in teacher], -7.0, width[1]),
        "student_chunks": padded([torch.tensor(c[0], dtype=torch.int64) for c in CHUNKS], -1, width[0]),
        "teacher_chunks": padded([torch.tensor(c[1], dtype=torch.int64) for c in CHUNKS], -1, width[1]),
        "teacher_boundary": padded([torch.tensor(b, dtype=torch.float64) for b in BOUNDARY], 0.5, width[1]),
        "student_boundary": padded(student_boundary, 0.5, width[0]),
    }


def plain_divergence(t, s, name, tau):
    """Scalars, from probabilities."""
    p, q = (t / tau).exp(), (s / tau).exp()
    if name == "total_variation":
        return ((p - q).abs() + ((1 - p) - (1 - q)).abs()) / 2
    if name == "reverse_kl":
        p, q = q, p
    cross = -(p * q.log() + (1 - p) * (1 - q).log())
    return cross if name == "binary_ce" else cross + p * p.log() + (1 - p) * (1 - p).log()


def plain(batch, name, tau, threshold=None, append=False):
    """A loop over examples, chunks and tokens."""
    sums = []
    for b in range(len(batch["student_logprob"])):
        chunks = [[c for c in batch[side][b].tolist() if c >= 0] for side in ("student_chunks", "teacher_chunks")]
        groups, members = [], []
        for chunk in range(max(chunks[1], default=-1) + 1):
            members.append(chunk)
            last = max(i for i, c in enumerate(chunks[1]) if c == chunk)
            if threshold is None or batch["teacher_boundary"][b, last] > threshold:
                groups.append(members)
                members = []
        groups += [members] if members else []
        total = batch["student_logprob"].new_zeros(())
        for members in groups:
            logp, tokens = [], 0
            for side, of_side in (("student", chunks[0]), ("teacher", chunks[1])):
                rows = [i for i, c in enumerate(of_side) if c in members]
                value = sum(batch[f"{side}_logprob"][b, i] for i in rows)
                if append:
                    value = value + batch[f"{side}_boundary"][b, rows[-1]].log()
                logp.append(value)
                tokens = len(rows)
            total = total + plain_divergence(logp[1].detach(), logp[0], name, tau) * tokens
        sums.append(total)
    return torch.stack(sums)


def ours(batch, name, tau, threshold=None, append=False):
    keys = ["student_logprob", "teacher_logprob", "student_chunks", "teacher_chunks"]
    boundaries = {"teacher_boundary": batch["teacher_boundary"]} if threshold is not None or append else {}
    if append:
        boundaries["student_boundary"] = batch["student_boundary"]
    return likelihood_matching(
        *(batch[key] for key in keys), divergence=name, temperature=tau, bias_threshold=threshold, **boundaries
    )


@pytest.mark.parametrize("name", BINARY_DIVERGENCES)
@pytest.mark.parametrize("tau", [1.0, 100.0])
@pytest.mark.parametrize("threshold, append", [(None, False), (0.1, False), (None, True), (0.1, True)])
def test_value_and_gradient_match_the_loop(name, tau, threshold, append):
    results = []
    for function in (plain, ours):
        batch = make()
        leaves = [batch["student_logprob"].requires_grad_(), batch["student_boundary"].requires_grad_()]
        batch["teacher_logprob"].requires_grad_()
        value = function(batch, name, tau, threshold, append)
        value.sum().backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves[: 1 + append])))
        assert batch["teacher_logprob"].grad is None or not batch["teacher_logprob"].grad.any()
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-12)
    assert results[1][0][2] == 0 and results[1][0][[0, 1, 3]].abs().min() > 0


def published_binary_ce(batch, tau, threshold):
    """
    The published computation in numpy: alignment matrices [tokens, chunks], chunks numbered from the end, and merging
    by a product of matrices. Without its ε, and as a sum of each example.
    """
    sums = []
    for b in range(len(batch["student_logprob"])):
        matrices = []
        for side in ("student_chunks", "teacher_chunks"):
            chunks = batch[side][b].numpy()
            matrices.append((chunks[:, None] == np.arange(batch["teacher_chunks"].shape[1])).astype(float))
        s = batch["student_logprob"][b].detach().numpy() @ matrices[0]
        t = batch["teacher_logprob"][b].numpy() @ matrices[1]
        count = matrices[1].sum(0)
        last = [np.flatnonzero(column)[-1] if column.any() else 0 for column in matrices[1].T]
        s_space, t_space = (np.log(batch[f"{side}_boundary"][b].numpy()) for side in ("student", "teacher"))
        s_last = [np.flatnonzero(column)[-1] if column.any() else 0 for column in matrices[0].T]
        s_space, t_space = s_space[s_last], t_space[last]
        index = np.cumsum((np.exp(t_space) > threshold)[::-1])[::-1]
        index = index.max() - index
        merging = np.zeros((len(count), len(count)))
        merging[np.arange(len(count)), index] = count > 0
        last_chunk = [np.flatnonzero(column)[-1] if column.any() else 0 for column in merging.T]
        s, t, count = s @ merging + s_space[last_chunk], t @ merging + t_space[last_chunk], count @ merging
        p, q = np.exp(t[count > 0] / tau), np.exp(s[count > 0] / tau)
        sums.append((-(p * np.log(q) + (1 - p) * np.log(1 - q)) * count[count > 0]).sum())
    return torch.tensor(np.array(sums))


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_equals_the_published_computation(tau):
    batch = make(seed=3)
    actual = ours(batch, "binary_ce", tau, 0.1, append=True)
    torch.testing.assert_close(actual, published_binary_ce(batch, tau, 0.1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_neither_padding_nor_the_rest_of_the_batch_matters(threshold):
    batch = make(dtype=torch.float32)
    expected = ours(batch, "forward_kl", 100.0, threshold)
    wide = make(dtype=torch.float32, extra=5)
    torch.testing.assert_close(ours(wide, "forward_kl", 100.0, threshold), expected, rtol=0, atol=0)
    order = [3, 1, 0, 2]
    shuffled = {key: value[order] for key, value in batch.items()}
    torch.testing.assert_close(ours(shuffled, "forward_kl", 100.0, threshold), expected[order], rtol=0, atol=0)
    alone = {key: value[1:2] for key, value in batch.items()}
    torch.testing.assert_close(ours(alone, "forward_kl", 100.0, threshold), expected[1:2], rtol=0, atol=0)


@pytest.mark.parametrize("name", BINARY_DIVERGENCES)
def test_what_stands_in_the_padding_is_ignored(name):
    batch = make(dtype=torch.float32)
    batch["student_logprob"][batch["student_chunks"] < 0] = float("-inf")
    batch["teacher_logprob"][batch["teacher_chunks"] < 0] = float("nan")
    batch["student_logprob"].requires_grad_()
    value = ours(batch, name, 100.0, 0.1, append=True)
    value.sum().backward()
    torch.testing.assert_close(value, ours(make(dtype=torch.float32), name, 100.0, 0.1, append=True))
    assert torch.isfinite(value).all() and value[2] == 0
    gradient = batch["student_logprob"].grad
    assert torch.isfinite(gradient).all() and not gradient[batch["student_chunks"] < 0].any()


@pytest.mark.parametrize("name", BINARY_DIVERGENCES)
@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_bf16_input_is_computed_in_float32(name, tau):
    # Rounded to bf16 once, the values are the same numbers in float64: what is left is the precision inside.
    batch = make(dtype=torch.bfloat16)
    exact = {key: value.double() if value.dtype == torch.bfloat16 else value for key, value in batch.items()}
    batch["student_logprob"].requires_grad_()
    value = ours(batch, name, tau, 0.1)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), ours(exact, name, tau, 0.1), rtol=1e-4, atol=1e-6)
    value.sum().backward()
    assert torch.isfinite(batch["student_logprob"].grad).all()


def test_chunks_merge_until_the_teacher_expects_a_boundary():
    batch = make()
    keys = ("student_chunks", "teacher_chunks", "teacher_boundary")
    student, teacher = merge_chunks(*(batch[key] for key in keys), 0.1)
    # After the chunks' last teacher tokens: .9, .05, .3, 1 in the first example; .01, 1; none; .04, .09, .03, 1. That
    # the second example has .5 and .7 inside a chunk doesn't matter.
    assert teacher.tolist() == [
        [0, 1, 1, 1, 2, -1],
        [0, 0, 0, 0, -1, -1],
        [-1] * 6,
        [0] * 6,
    ]
    assert student.tolist() == [
        [0, 0, 1, 1, 1, 1, 2],
        [0, 0, 0, -1, -1, -1, -1],
        [-1] * 7,
        [0] * 6 + [-1],
    ]
    # A threshold of 0 leaves every chunk as it is; a greater probability is what it takes, not an equal one.
    same = merge_chunks(*(batch[key] for key in keys), 0.0)
    assert torch.equal(same[0], batch["student_chunks"]) and torch.equal(same[1], batch["teacher_chunks"])
    equal = merge_chunks(batch["student_chunks"], batch["teacher_chunks"], torch.full((4, 6), 0.5), 0.5)
    assert equal[1].max() == 0


@pytest.mark.parametrize("name", BINARY_DIVERGENCES)
@pytest.mark.parametrize("tau", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_every_likelihood(name, tau, dtype):
    levels = torch.tensor(
        [0.0, -1e-30, -1e-15, -1e-8, -2e-7, -1e-4, -0.5, -0.7, -20.0, -100.0, -1e4, -1e5], dtype=dtype
    )
    teacher, student = torch.meshgrid(levels, levels, indexing="ij")
    student = student.clone().requires_grad_()
    value = binary_divergence(teacher, student, name, tau)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    assert (value >= -1e-6).all()
    if name != "binary_ce":
        torch.testing.assert_close(value.diagonal(), torch.zeros_like(levels), rtol=0, atol=0)
        # Subtractions of equal numbers: no gradient at equality but rounding's, large only as certainty makes it.
        assert gradient.diagonal()[6:].abs().max() < 1e-6


@pytest.mark.parametrize("name", BINARY_DIVERGENCES)
def test_float32_is_exact_near_certainty(name):
    # 1 − exp(x) as such would have no digit left here.
    teacher, student = torch.tensor([-1e-5, -3e-6, -1e-3]), torch.tensor([-4e-6, -2e-5, -5e-3])
    exact = binary_divergence(teacher.double(), student.double(), name, 100.0)
    p, q = (math.exp(x / 100.0) for x in (-1e-3, -5e-3))
    if name == "total_variation":
        assert exact[2].item() == pytest.approx(p - q, rel=1e-6)
    torch.testing.assert_close(binary_divergence(teacher, student, name, 100.0).double(), exact, rtol=1e-4, atol=0)


def test_gradients_reach_logits_of_a_student_that_is_certain():
    # d logp / d logit vanishes as fast as the divergence's slope grows: the product is 1 − P_T at most, per τ.
    for confidence in (5.0, 14.0, 17.0, 60.0):
        logits = torch.tensor([[confidence, 0.0, 0.0]], requires_grad=True)
        logp = torch.log_softmax(logits, -1)[:, 0]
        binary_divergence(torch.tensor([-1.0]), logp, "forward_kl", 1.0).sum().backward()
        assert torch.isfinite(logits.grad).all() and logits.grad.abs().max() < 2.0
        if confidence < 15:
            assert logits.grad[0, 0].item() == pytest.approx(1 - math.exp(-1.0), rel=0.1)


def test_boundary_probability_and_what_it_is_the_probability_of():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64)
    boundary = torch.tensor([True, False, False, True, False, False, True])
    probability = boundary_probability(logits, boundary)
    for row in range(5):
        exact = sum(logits[row, i].exp() for i in (0, 3, 6)) / sum(logits[row, i].exp() for i in range(7))
        torch.testing.assert_close(probability[row], exact)
    assert boundary_probability(logits.bfloat16(), boundary).dtype == torch.float32
    # Row i + 1 predicts what follows token i; nothing follows the last one, nor anything in an empty response.
    mask = torch.tensor([[True, True, True, False], [False] * 4, [True, True, False, False]])
    one = torch.ones((), dtype=torch.float64)
    p = probability
    expected = torch.stack([p[1], p[2], one, one, one, one, one, one, p[4], one, one, one]).view(3, 4)
    torch.testing.assert_close(boundary_after(probability, mask), expected)
    whole = torch.ones(1, 5, dtype=torch.bool)
    torch.testing.assert_close(boundary_after(probability, whole)[0], torch.cat([p[1:], one[None]]))


@pytest.mark.parametrize("make_tokenizer", [tiny.byte_level_tokenizer, tiny.sentencepiece_tokenizer])
def test_boundary_tokens_begin_with_white_space_or_are_special(make_tokenizer):
    tokenizer = make_tokenizer()
    mask = boundary_tokens(tokenizer, len(tokenizer) + 3)
    assert mask.shape == (len(tokenizer) + 3,) and not mask[-3:].any()
    for text, expected in ((" the", True), ("\n", True), ("the", False), ("tan", False)):
        ids = tokenizer("x" + text, add_special_tokens=False)["input_ids"]
        first = [tokenizer.decode(ids[:i]) for i in range(len(ids) + 1)].index("x")
        assert mask[ids[first]] == expected, text
    assert mask[tokenizer.eos_token_id]
    assert 0 < mask.sum() < len(tokenizer) / 2
    # A head with fewer rows than the tokenizer has tokens.
    assert torch.equal(boundary_tokens(tokenizer, 100), mask[:100])
