"""Numbers of an attention: known answers, and plain loops."""

import math

import pytest
import torch

from hf_dskd.alignment.spans import chunk_ids
from hf_dskd.analysis.heatmap import AlignmentExample
from hf_dskd.analysis.metrics import (
    alignment_metrics,
    argmax_in_chunk,
    attention_distance,
    chunk_mass,
    entropy,
    monotonicity,
    prior_divergence,
)


# "The" "·cat" "·sat" EOS and "Th" "e" "·cat·s" "at" EOS: chunks "The", "·cat·sat" and EOS.
STUDENT_ENDS, TEACHER_ENDS = (3, 7, 11, 11), (2, 3, 9, 11, 11)
PAIRS = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)


def example(t2s, student_ends=STUDENT_ENDS, teacher_ends=TEACHER_ENDS, s2t=None, has_eos=True, chunks=True):
    student, teacher = chunk_ids(list(student_ends), list(teacher_ends), has_eos, has_eos)
    return AlignmentExample(
        student_tokens=("s",) * len(student_ends),
        teacher_tokens=("t",) * len(teacher_ends),
        student_byte_ends=tuple(student_ends),
        teacher_byte_ends=tuple(teacher_ends),
        has_eos=has_eos,
        t2s=t2s,
        s2t=uniform(t2s.shape[1], t2s.shape[0]) if s2t is None else s2t,
        student_chunks=tuple(student) if chunks else None,
        teacher_chunks=tuple(teacher) if chunks else None,
    )


def uniform(rows, columns):
    return torch.full((rows, columns), 1 / columns)


def attention(rows, columns, seed=0, sharpness=2.0):
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(sharpness * scores, -1)


def same_tokens(t2s):
    """Both sides have the same n − 1 tokens of two bytes, and EOS."""
    count = len(t2s)
    ends = (*range(2, 2 * count, 2), 2 * count - 2)
    return example(t2s, ends, ends, s2t=t2s.T)


def test_a_perfect_diagonal():
    numbers = alignment_metrics([same_tokens(torch.eye(7))])
    best = {"chunk_mass": 1, "argmax_in_chunk": 1, "monotonicity": 1, "aligned_rate": 1, "entropy": 0, "prior_kl": 0}
    best |= {"entropy_normalised": 0, "attention_distance_bytes": 0, "chunk_mass_uniform": pytest.approx(1 / 7)}
    for name, value in best.items():
        assert numbers[name] == numbers[f"s2t_{name}"] == value, name


def test_uniform_attention():
    numbers = alignment_metrics([example(uniform(4, 5))])
    assert numbers["entropy"] == pytest.approx(math.log(5))
    assert numbers["entropy_normalised"] == pytest.approx(1)
    # Chunks of 2, 2, 2 and 1 of 5 columns.
    for name in ("chunk_mass", "chunk_mass_uniform", "argmax_in_chunk"):
        assert numbers[name] == pytest.approx(7 / 20)
    assert numbers["monotonicity"] == 0
    assert numbers["prior_kl"] == pytest.approx((3 * math.log(5 / 2) + math.log(5)) / 4)
    assert numbers["attention_distance_bytes"] == pytest.approx(numbers["attention_distance_bytes_uniform"])
    # The same from the teacher's tokens, by which s2t is uniform: 1, 1, 2, 2 and 1 of 4.
    assert numbers["s2t_chunk_mass"] == pytest.approx(7 / 20)
    assert numbers["s2t_entropy"] == pytest.approx(math.log(4))


def test_the_mean_over_the_chunk_has_no_divergence_from_it():
    prior = PAIRS / PAIRS.sum(1, keepdim=True)
    numbers = alignment_metrics([example(prior)])
    assert numbers["prior_kl"] == pytest.approx(0, abs=1e-7)
    assert numbers["chunk_mass"] == pytest.approx(1) and numbers["argmax_in_chunk"] == 1
    # Rows 1 and 2 attend to one place: they don't count against it.
    assert numbers["monotonicity"] == 1
    assert numbers["entropy"] == pytest.approx(3 / 4 * math.log(2))


def test_divergence_from_the_chunk_by_hand():
    weights = torch.tensor([[0.5, 0.25, 0.25]])
    pairs = torch.tensor([[True, True, False]])
    assert prior_divergence(weights, pairs).item() == pytest.approx(0.5 * math.log(2))
    assert prior_divergence(weights, pairs.roll(1)).item() == pytest.approx(math.log(2))
    # A weight that vanished keeps it finite.
    assert prior_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[False, True]])).item() == pytest.approx(
        87.3, abs=0.1
    )


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0, 1, 2, 3], 1),
        ([3, 2, 1, 0], -1),
        ([0, 0, 2, 2], 1),
        ([1, 1, 1, 1], 0),
        ([1, 0, 2, 3], (5 - 1) / 6),
        ([0], 0),
    ],
)
def test_monotonicity_by_hand(places, expected):
    assert monotonicity(torch.eye(4)[places]) == pytest.approx(expected)


def test_rounding_makes_no_order():
    weights = uniform(50, 41)
    noise = torch.randn(50, 41, generator=torch.Generator().manual_seed(0)) * 1e-9
    assert monotonicity(weights.double() + noise) == 0
    # Long rows don't sum to 1 exactly.
    sums = 1 + 3e-7 * torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    assert monotonicity(uniform(50, 2000) * sums) == 0


def test_several_largest_weights():
    weights = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.1, 0.2, 0.7]])
    pairs = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 0]], dtype=torch.bool)
    assert argmax_in_chunk(weights, pairs).tolist() == [1, 0.5, 0]


# ---- Plain loops


def loops(rows, pairs, row_ends, column_ends):
    """The numbers of one example in one direction, one row and one pair at a time."""
    n, m = rows.shape

    def centre(ends, i):
        return (ends[i] + (ends[i - 1] if i else 0)) / 2

    weights = [[float(w) / sum(map(float, row)) for w in row] for row in rows]
    sums = dict.fromkeys(("chunk_mass", "argmax_in_chunk", "entropy", "prior_kl"), 0.0)
    distances = []
    for i in range(n):
        chunk = [j for j in range(m) if pairs[i][j]]
        sums["chunk_mass"] += sum(weights[i][j] for j in chunk)
        sums["argmax_in_chunk"] += max(range(m), key=lambda j: weights[i][j]) in chunk
        sums["entropy"] -= sum(w * math.log(w) for w in weights[i])
        sums["prior_kl"] += sum(math.log(1 / len(chunk) / weights[i][j]) / len(chunk) for j in chunk)
        if row_ends[i] > (row_ends[i - 1] if i else 0):
            distances.append(sum(weights[i][j] * abs(centre(row_ends, i) - centre(column_ends, j)) for j in range(m)))
    numbers = {name: value / n for name, value in sums.items()}
    numbers["entropy_normalised"] = numbers["entropy"] / math.log(m)
    numbers["attention_distance_bytes"] = sum(distances) / len(distances)
    places = [sum(j * w for j, w in enumerate(row)) for row in weights]
    signs = [(places[j] > places[i]) - (places[j] < places[i]) for i in range(n) for j in range(i + 1, n)]
    numbers["monotonicity"] = sum(signs) / sum(map(abs, signs))
    return numbers


@pytest.mark.parametrize("seed", range(5))
def test_against_loops(seed):
    t2s, s2t = attention(4, 5, seed), attention(5, 4, seed + 100)
    numbers = alignment_metrics([example(t2s, s2t=s2t)])
    for prefix, expected in (
        ("", loops(t2s, PAIRS, STUDENT_ENDS, TEACHER_ENDS)),
        ("s2t_", loops(s2t, PAIRS.T, TEACHER_ENDS, STUDENT_ENDS)),
    ):
        for name, value in expected.items():
            assert numbers[prefix + name] == pytest.approx(value, rel=1e-6), prefix + name


def test_row_numbers_do_not_depend_on_the_columns_order():
    weights, order = attention(4, 5).double(), torch.tensor([3, 0, 4, 1, 2])
    rows, columns = torch.arange(4.0), torch.arange(5.0) ** 2
    for function in (chunk_mass, argmax_in_chunk, prior_divergence):
        torch.testing.assert_close(function(weights[:, order], PAIRS[:, order]), function(weights, PAIRS))
    torch.testing.assert_close(entropy(weights[:, order]), entropy(weights))
    moved = attention_distance(weights[:, order], rows, columns[order])
    torch.testing.assert_close(moved, attention_distance(weights, rows, columns))
    # In another unit, and from another beginning of the text.
    torch.testing.assert_close(attention_distance(weights, 3 * rows + 7, 3 * columns + 7) / 3, moved)
    assert monotonicity(weights.flip(1)) == monotonicity(weights.flip(0)) == pytest.approx(-monotonicity(weights))


# ---- Several examples


def test_means_are_over_tokens():
    short, long = same_tokens(torch.eye(2)), same_tokens(uniform(8, 8))
    one, other = alignment_metrics([short]), alignment_metrics([long])
    both = alignment_metrics([short, long])
    for name in ("chunk_mass", "argmax_in_chunk", "monotonicity", "entropy", "prior_kl"):
        assert both[name] == pytest.approx((2 * one[name] + 8 * other[name]) / 10), name
    # Rows with text only.
    name = "attention_distance_bytes"
    assert both[name] == pytest.approx((1 * one[name] + 7 * other[name]) / 8)
    assert alignment_metrics([long, short]) == pytest.approx(both)
    assert alignment_metrics([long] * 3) == pytest.approx(other)


def test_rows_without_a_partner():
    t2s = torch.zeros(4, 5)
    t2s[0, 1] = t2s[3, 4] = 1
    numbers = alignment_metrics([example(t2s)])
    assert numbers["aligned_rate"] == 0.5
    assert numbers["chunk_mass"] == numbers["argmax_in_chunk"] == 1
    # The one row with text: centres 1.5 and 2.5.
    assert numbers["attention_distance_bytes"] == 1
    nothing = alignment_metrics([example(torch.zeros(4, 5))])
    assert {name for name in nothing if not name.startswith("s2t_")} == {"aligned_rate"}
    assert nothing["aligned_rate"] == 0


def test_chunks_are_worked_out_where_they_are_missing():
    weights = attention(4, 5)
    assert alignment_metrics([example(weights, chunks=False)]) == alignment_metrics([example(weights)])
    cut = example(weights, (3, 5, 7, 11), (2, 3, 4, 7, 11), has_eos=False, chunks=False)
    # Chunks "3", "7" and "11": 2 + 2 + 2 + 1 of 5 columns.
    assert alignment_metrics([cut])["chunk_mass_uniform"] == pytest.approx(7 / 20)


def test_one_token_on_each_side():
    numbers = alignment_metrics([example(torch.ones(1, 1), (3,), (3,), has_eos=False)])
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers["chunk_mass"] == 1 and numbers["entropy_normalised"] == 0
