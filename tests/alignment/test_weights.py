"""Alignments against loops, and attention in tiles against attention by matrices."""

import pytest
import runs
import torch
from torch.nn.functional import pad

from hf_dskd.alignment import weights as module
from hf_dskd.alignment.cross_model import cross_model_attention
from hf_dskd.alignment.weights import (
    AlignmentWeights,
    Side,
    TiledAttention,
    chunk_mask,
    exact_pairs,
    identity_mask,
    input_chunks,
    mean_weights,
)


# Two examples, R_s = 5 and R_t = 6; the second is padded on both sides.
STUDENT = torch.tensor([[0, 1, 1, 2, 3], [0, 0, 1, -1, -1]])
TEACHER = torch.tensor([[0, 0, 1, 1, 2, 3], [0, 1, -1, -1, -1, -1]])


def random_chunks(batch, length, seed):
    """Chunk ids `[batch, length]` of rows of 1 to `length` tokens, the first row being empty."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 2, (batch, length), generator=generator)
    steps[:, 0] = 0
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    lengths[0] = 0
    return steps.cumsum(1).masked_fill(torch.arange(length) >= lengths, -1)


CASES = [(STUDENT, TEACHER), (random_chunks(8, 9, 0), random_chunks(8, 7, 1))]


@pytest.mark.parametrize("case", CASES)
def test_masks_against_loops(case):
    student, teacher = case
    mask = chunk_mask(student, teacher)
    exact = exact_pairs(mask)
    assert mask.dtype == exact.dtype == torch.bool
    for b in range(len(student)):
        for i, s in enumerate(student[b].tolist()):
            for j, t in enumerate(teacher[b].tolist()):
                assert mask[b, i, j] == (s == t and s != -1)
                alone = student[b].tolist().count(s) == 1 and teacher[b].tolist().count(t) == 1
                assert exact[b, i, j] == (s == t and s != -1 and alone)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("restrict", [lambda mask: mask, exact_pairs])
def test_mean_weights_are_means(case, restrict):
    mask = restrict(chunk_mask(*case))
    t2s, s2t = mean_weights(mask)
    assert t2s.dtype == s2t.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    teacher_values = torch.randn(*case[1].shape, 3, generator=generator)
    student_values = torch.randn(*case[0].shape, 3, generator=generator)
    for pairs, weights, values in ((mask, t2s, teacher_values), (mask.transpose(1, 2), s2t, student_values)):
        assert weights.shape == pairs.shape
        projected = weights @ values
        for b, i in torch.cartesian_prod(torch.arange(pairs.shape[0]), torch.arange(pairs.shape[1])).tolist():
            partners = [values[b, j].double() for j in range(pairs.shape[2]) if pairs[b, i, j]]
            expected = sum(partners) / len(partners) if partners else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(projected[b, i].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("restrict", [lambda mask: mask, exact_pairs])
def test_padding_and_batch_order(restrict):
    student, teacher = CASES[1]
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    padded = [pad(side[order], (0, extra), value=-1) for side, extra in ((student, 2), (teacher, 5))]
    t2s, s2t = mean_weights(restrict(chunk_mask(student, teacher)))
    wide_t2s, wide_s2t = mean_weights(restrict(chunk_mask(*padded)))
    assert torch.equal(wide_t2s, pad(t2s[order], (0, 5, 0, 2))) and torch.equal(
        wide_s2t, pad(s2t[order], (0, 2, 0, 5))
    )


def test_identity():
    student = torch.tensor([[True, True, False], [True, True, True]])
    # Padded to another length, with fewer tokens in one row.
    teacher = torch.tensor([[True, False, False, False], [True, True, True, True]])
    assert identity_mask(student, teacher).nonzero().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1], [1, 2, 2]]


def test_input_chunks_match_the_tokens_that_are_read():
    """The prompts' last tokens match each other, and a later position those whose input lies in the same chunk."""
    students, teachers = (input_chunks(side, side >= 0) for side in (STUDENT, TEACHER))
    assert students.tolist() == [[0, 1, 2, 2, 3], [0, 1, 1, -1, -1]]
    shifted = chunk_mask(students, teachers)
    assert shifted[:, 0, 0].all() and shifted[:, 0].sum() == shifted[:, :, 0].sum() == 2
    of_inputs = chunk_mask(STUDENT, TEACHER)[:, :-1, :-1].clone()
    # What is predicted last is never read.
    of_inputs[1, 2], of_inputs[1, :, 1] = False, False
    assert torch.equal(shifted[:, 1:, 1:], of_inputs)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("at_once", [1, 3 * 5 * 2, 10**6])
def test_tiles_equal_matrices(chunked, at_once):
    g = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(3, r, 8, generator=g, dtype=torch.float64).requires_grad_() for r in (7, 5))
    values = [torch.randn(3, r, 4, generator=g, dtype=torch.float64).requires_grad_() for r in (5, 7)]
    # The second example has fewer rows, the third none of the teacher's.
    query_mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    key_mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    # The first has tokens in no chunk on both sides, and one chunk of the second none of the teacher within its mask.
    query_chunks = torch.tensor([[-1, 0, 1, 2, 2, 3, 3], [0, 1, 1, 2, -1, -1, -1], [0, 1, -1, -1, -1, -1, -1]])
    key_chunks = torch.tensor([[-1, 1, 1, 2, 3], [0, 1, -1, -1, -1], [-1] * 5])
    pairs = chunk_mask(query_chunks, key_chunks) if chunked else None
    whole = AlignmentWeights(*cross_model_attention(queries, keys, query_mask, key_mask, pairs))
    chunks = (query_chunks, key_chunks) if chunked else (None, None)
    sides = Side(queries, query_mask, chunks[0]), Side(keys, key_mask, chunks[1])
    tiled = TiledAttention(*sides, scores_at_once=at_once)
    assert torch.equal(tiled.has_teacher, whole.has_teacher) and torch.equal(tiled.has_student, whole.has_student)
    assert whole.has_teacher.any() and not whole.has_teacher.all()
    results = []
    for alignment in (whole, tiled):
        outputs = alignment.to_student(values[0]), alignment.to_teacher(values[1])
        loss = sum((output * torch.linspace(1, 2, 4, dtype=torch.float64)).square().sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [queries, keys, *values])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("method", ["dskd_cma", "dskd_cla"])
def test_a_loss_in_tiles_is_the_same(method, tmp_path, monkeypatch):
    run = runs.trainer(tmp_path, method=method)
    rows = run.data_collator([run.train_dataset[i] for i in range(3)])
    results, kinds, shown = [], [], []
    for above in (module.TILED_ABOVE, 0):
        monkeypatch.setattr(module, "TILED_ABOVE", above)
        views = run.distiller.views(run.model, rows)
        aligned = run.distiller.align(views.student, views.teacher)
        kinds.append(type(aligned))
        shown.append((aligned.t2s, aligned.s2t))
        loss = run.compute_loss(run.model, rows)
        results.append([loss, *torch.autograd.grad(loss, list(run.projectors.parameters()))])
    assert kinds == [AlignmentWeights, TiledAttention]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*shown)
