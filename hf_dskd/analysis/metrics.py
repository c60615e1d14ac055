"""
How good an attention between two tokenizations is, in numbers.

An attention is `[n, m]`: what each of n rows (tokens of one model) takes from m columns (tokens of the other). Rows
sum to 1. Everything is computed in float64. The right answer for a row is its chunk: the smallest span of the text at
whose end a token of both models ends (see [`~hf_dskd.alignment.spans.chunk_ids`]).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .heatmap import AlignmentExample, same_chunk


def chunk_mass(attention: Tensor, pairs: Tensor) -> Tensor:
    """Share of each row's attention on the tokens of its own chunk, `[n]`; `pairs` `[n, m]` says which these are."""
    return (attention.double() * pairs).sum(1)


def argmax_in_chunk(attention: Tensor, pairs: Tensor) -> Tensor:
    """
    Whether each row's largest weight lies in its chunk, `[n]`, 0 or 1. Of several equally large ones, the share that
    does, so that uniform attention has what guessing has.
    """
    largest = attention == attention.amax(1, keepdim=True)
    return (largest & pairs).sum(1).double() / largest.sum(1)


def monotonicity(attention: Tensor) -> float:
    """
    Whether later rows attend to later columns: Goodman and Kruskal's gamma of a row's index and its mean column.

    Over all pairs of rows whose mean columns differ, the share that is in order minus the share that is reversed. 1 is
    an alignment that never goes back, −1 one that always does, 0 no order, or that all rows attend to one place. Rows
    at one place don't count: several tokens of one side may belong to a single one of the other.
    """
    attention = attention.double()
    places = attention @ torch.arange(attention.shape[1], dtype=torch.float64) / attention.sum(1)
    # Rounded to float32, weights that are alike put their rows apart, by less than that.
    places = places.round(decimals=5)
    steps = torch.triu(places[None] - places[:, None], diagonal=1)
    forth, back = int((steps > 0).sum()), int((steps < 0).sum())
    return (forth - back) / max(forth + back, 1)


def entropy(attention: Tensor) -> Tensor:
    """Entropy of each row in nats, `[n]`: 0 for one column, log m for uniform attention."""
    return torch.special.entr(attention.double()).sum(1)


def attention_distance(attention: Tensor, row_centres: Tensor, column_centres: Tensor) -> Tensor:
    """
    Expected distance of the attended token's centre from the row's token's, `[n]`, in the unit of the centres.

    These, `[n]` and `[m]`, are where the middle of each token is in the text.
    """
    distances = (row_centres.double()[:, None] - column_centres.double()[None]).abs()
    return (attention.double() * distances).sum(1)


def prior_divergence(attention: Tensor, pairs: Tensor) -> Tensor:
    """
    KL(prior ‖ attention) of each row in nats, `[n]`, where the prior is uniform over the tokens of the row's chunk.

    In this direction it says how badly the attention covers the chunk. The other one is infinite wherever the
    attention has any weight outside. It falls to 0 for attention that is the mean over the chunk (as in CLP), and is
    log(m / tokens of the chunk) for uniform attention. A weight that float32 rounds to 0 counts as its least positive
    number, at 87 nats. Every row of `pairs` `[n, m]`, which tokens lie in the same chunk, has one.
    """
    size = pairs.sum(1).double()
    surprisals = -attention.double().clamp_min(torch.finfo(torch.float32).tiny).log()
    return (surprisals * pairs).sum(1) / size - size.log()


def alignment_metrics(examples: Sequence[AlignmentExample]) -> dict[str, float]:
    """
    Means over the response tokens of all examples, EOS included.

    Rows are student tokens (`t2s`); the same of teacher tokens (`s2t`) has the prefix `s2t_`. Rows without any
    attention (a token without a partner) count in `aligned_rate` alone.

    - `aligned_rate`: Share of the rows that have attention.
    - `chunk_mass`, `argmax_in_chunk`: See [`chunk_mass`] and [`argmax_in_chunk`]. `chunk_mass_uniform` is what both
      would be for uniform attention.
    - `monotonicity`: Of each example (see [`monotonicity`]), weighted by its rows.
    - `entropy` in nats, and `entropy_normalised` by log m (0 where m is 1).
    - `attention_distance_bytes`: See [`attention_distance`]; in UTF-8 bytes of the response, over rows with text. A
      column without text, such as EOS, counts where it stands: were it left out, attention that is lost on it would
      not show. Even a perfect alignment is not at 0 where tokens differ in length.
      `attention_distance_bytes_uniform` is that of uniform attention.
    - `prior_kl`: See [`prior_divergence`].

    Returns:
        `dict[str, float]`; without the names that no row counts in.
    """
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for example in examples:
        pairs = same_chunk(example)
        student, teacher = _centres(example.student_byte_ends), _centres(example.teacher_byte_ends)
        directions = {"": (example.t2s, pairs, student, teacher), "s2t_": (example.s2t, pairs.T, teacher, student)}
        for prefix, arguments in directions.items():
            for name, values in _row_numbers(*arguments).items():
                sums[prefix + name] += float(values.sum())
                counts[prefix + name] += len(values)
    return {name: sums[name] / count for name, count in counts.items() if count}


def _centres(byte_ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Middle of each token in bytes, float64, and whether it has text."""
    ends = torch.tensor(byte_ends)
    starts = ends.roll(1)
    starts[0] = 0
    return (starts + ends).double() / 2, ends > starts


def _row_numbers(
    attention: Tensor, pairs: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """The numbers of [`alignment_metrics`] for each row that counts in them."""
    attention = attention.double()
    aligned = attention.sum(1) > 0
    attention, pairs = attention[aligned], pairs[aligned]
    uniform = torch.full_like(attention, 1 / attention.shape[1])
    centres, with_text = (values[aligned] for values in rows)
    places, column_centres = centres[with_text], columns[0]
    entropies = entropy(attention)
    return {
        "aligned_rate": aligned.double(),
        "chunk_mass": chunk_mass(attention, pairs),
        "chunk_mass_uniform": chunk_mass(uniform, pairs),
        "argmax_in_chunk": argmax_in_chunk(attention, pairs),
        "monotonicity": torch.full((len(attention),), monotonicity(attention), dtype=torch.float64),
        "entropy": entropies,
        "entropy_normalised": entropies / math.log(max(attention.shape[1], 2)),
        "attention_distance_bytes": attention_distance(attention[with_text], places, column_centres),
        "attention_distance_bytes_uniform": attention_distance(uniform[with_text], places, column_centres),
        "prior_kl": prior_divergence(attention, pairs),
    }
