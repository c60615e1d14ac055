import pytest
import torch

from hf_dskd.alignment.chunked import chunk_mask, exact_pairs, identity_mask, input_chunks, mean_weights


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


def test_exact_pairs_literal():
    pairs = exact_pairs(chunk_mask(STUDENT, TEACHER)).nonzero().tolist()
    assert pairs == [[0, 3, 4], [0, 4, 5], [1, 2, 1]]


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


def test_mean_weights_sum_to_one_where_there_are_partners():
    t2s, s2t = mean_weights(chunk_mask(STUDENT, TEACHER))
    assert t2s.sum(2).tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert s2t.sum(2).tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]
    t2s, s2t = mean_weights(exact_pairs(chunk_mask(STUDENT, TEACHER)))
    assert t2s.sum(2).tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]
    assert s2t.sum(2).tolist() == [[0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0]]


def test_examples_without_a_token():
    nothing = torch.full((2, 3), -1)
    mask = chunk_mask(nothing, nothing)
    assert not mask.any() and not exact_pairs(mask).any()
    assert all(weights.count_nonzero() == 0 for weights in mean_weights(mask))
    # One empty side.
    assert not chunk_mask(nothing, torch.zeros(2, 4, dtype=torch.long)).any()


def test_padding_and_batch_order():
    student, teacher = CASES[1]
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    padded = [
        torch.nn.functional.pad(side[order], (0, extra), value=-1) for side, extra in ((student, 2), (teacher, 5))
    ]
    for restrict in (lambda mask: mask, exact_pairs):
        t2s, s2t = mean_weights(restrict(chunk_mask(student, teacher)))
        wide_t2s, wide_s2t = mean_weights(restrict(chunk_mask(*padded)))
        rows, columns = student.shape[1], teacher.shape[1]
        assert torch.equal(wide_t2s[:, :rows, :columns], t2s[order])
        assert torch.equal(wide_s2t[:, :columns, :rows], s2t[order])
        assert wide_t2s.sum() == t2s.sum() and wide_s2t.sum() == s2t.sum()


def test_gradient_of_what_is_averaged():
    # A value's gradient is the sum of its weights: one over the teacher tokens of its chunk, for each student token.
    values = torch.randn(2, 6, 1, requires_grad=True)
    (mean_weights(chunk_mask(STUDENT, TEACHER))[0] @ values).sum().backward()
    assert values.grad.squeeze(-1).tolist() == [[0.5, 0.5, 1, 1, 1, 1], [2, 1, 0, 0, 0, 0]]


def test_identity():
    student = torch.tensor([[True, True, False], [True, True, True]])
    assert identity_mask(student, student).nonzero().tolist() == [
        [0, 0, 0],
        [0, 1, 1],
        [1, 0, 0],
        [1, 1, 1],
        [1, 2, 2],
    ]
    # Padded to other lengths, with fewer tokens in one row.
    teacher = torch.tensor([[True, False, False, False], [True, True, True, True]])
    assert identity_mask(student, teacher).nonzero().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1], [1, 2, 2]]


def test_input_chunks():
    mask = STUDENT >= 0
    assert input_chunks(STUDENT, mask).tolist() == [[0, 1, 2, 2, 3], [0, 1, 1, -1, -1]]
    empty = torch.full((1, 3), -1)
    assert input_chunks(empty, empty >= 0).tolist() == [[-1, -1, -1]]


def test_input_chunks_match_the_tokens_that_are_read():
    # The prompts' last tokens match each other, and a later position those whose input lies in the same chunk.
    students, teachers = (input_chunks(side, side >= 0) for side in (STUDENT, TEACHER))
    shifted = chunk_mask(students, teachers)
    assert shifted[:, 0, 0].all() and shifted[:, 0].sum() == shifted[:, :, 0].sum() == 2
    of_inputs = chunk_mask(STUDENT, TEACHER)[:, :-1, :-1].clone()
    # What is predicted last is never read.
    of_inputs[1, 2], of_inputs[1, :, 1] = False, False
    assert torch.equal(shifted[:, 1:, 1:], of_inputs)
