"""Attention distillation against loops over examples, heads, rows and keys in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dskd.errors import UserError
from hf_dskd.losses.attention import AttentionInputs, attention_kl, chunk_attention_kl, common_heads


# Tokens, and how many of them are the prompt. The fourth has no response, the fifth no prompt.
LENGTHS, PROMPTS = (9, 6, 7, 4, 5), (3, 4, 1, 4, 0)
# Chunk of each response token, of student and teacher; other lengths than those above.
STUDENT_CHUNKS = [[0, 0, 1, 2], [0, 1, 1, 1, 2, 3], [0], []]
TEACHER_CHUNKS = [[0, 1, 1, 1, 2], [0, 0, 1, 2, 3], [0, 0], []]
STUDENT_PROMPTS, TEACHER_PROMPTS = (2, 3, 1, 5), (4, 2, 3, 2)


def inputs(rows: int, length: int, heads: int, key_heads: int, size: int, seed: int, scale=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(rows, heads, length, size, generator=generator, dtype=torch.float64).to(dtype)
    keys = torch.randn(rows, key_heads, length, size, generator=generator, dtype=torch.float64).to(dtype)
    return AttentionInputs(queries.requires_grad_(), keys.requires_grad_(), scale or size**-0.5)


def layers(rows: int, lengths: tuple[int, int], teacher_heads=(4, 4, 6), **options):
    """Two pairs of layers: the student's have four heads of eight, in the first grouped."""
    return [
        (
            inputs(rows, lengths[0], 4, key_heads, 8, seed, **options),
            inputs(rows, lengths[1], *theirs, seed + 1, **options),
        )
        for seed, key_heads, theirs in ((10, 2, teacher_heads), (20, 4, (teacher_heads[0], 1, 8)))
    ]


def same_tokens(length: int = max(LENGTHS)) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.full((len(LENGTHS), length), -100)
    attention_mask = torch.zeros(len(LENGTHS), length, dtype=torch.long)
    for row, (end, prompt) in enumerate(zip(LENGTHS, PROMPTS)):
        labels[row, prompt:end] = 5
        attention_mask[row, :end] = 1
    return labels, attention_mask


def chunk_ids(chunks: list[list[int]], prompts: tuple[int, ...], length: int) -> torch.Tensor:
    ids = torch.full((len(chunks), length), -1)
    for row, (own, prompt) in enumerate(zip(chunks, prompts)):
        ids[row, prompt : prompt + len(own)] = torch.tensor(own, dtype=torch.long)
    return ids


def head(side: AttentionInputs, row: int, number: int, heads: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Queries and keys `[N, size]` of one of `heads` heads, which are cut out of all heads side by side."""
    own, size = side.queries.shape[1], side.queries.shape[3]
    group = own // side.keys.shape[1]
    queries = torch.cat([side.queries[row, h] for h in range(own)], 1)
    keys = torch.cat([side.keys[row, h // group] for h in range(own)], 1)
    width = own * size // heads
    cut = slice(number * width, (number + 1) * width)
    return queries[:, cut], keys[:, cut], side.scale * math.sqrt(size / width)


def kl_of_scores(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    log_p, log_q = teacher.log_softmax(0), student.log_softmax(0)
    return (log_p.exp() * (log_p - log_q)).sum()


def dense(pairs, labels: torch.Tensor, heads: int) -> torch.Tensor:
    sums = []
    for row in range(len(labels)):
        total = torch.zeros((), dtype=torch.float64)
        for place in range(labels.shape[1] - 1):
            if labels[row, place + 1] == -100:
                continue
            for student, teacher in pairs:
                for number in range(heads):
                    scores = []
                    for side in (teacher, student):
                        queries, keys, scale = head(side, row, number, heads)
                        scores.append(scale * keys[: place + 1] @ queries[place])
                    total = total + kl_of_scores(*scores) / heads / len(pairs)
        sums.append(total)
    return torch.stack(sums)


def dense_chunks(pairs, chunks: tuple[torch.Tensor, torch.Tensor], heads: int) -> torch.Tensor:
    sums = []
    for row in range(len(chunks[0])):
        # Of each chunk the positions before its tokens.
        places = [
            [[n - 1 for n in range(1, ids.shape[1]) if ids[row, n] == c] for c in range(int(chunks[0].max()) + 1)]
            for ids in chunks
        ]
        total = torch.zeros((), dtype=torch.float64)
        for c, own in enumerate(places[0]):
            if not own:
                continue
            for student, teacher in pairs:
                for number in range(heads):
                    scores = []
                    for side, of_side in ((teacher, places[1]), (student, places[0])):
                        queries, keys, scale = head(side, row, number, heads)
                        query = queries[of_side[c]].mean(0)
                        scores.append(torch.stack([scale * query @ keys[of_side[j]].mean(0) for j in range(c + 1)]))
                    total = total + len(own) * kl_of_scores(*scores) / heads / len(pairs)
        sums.append(total)
    return torch.stack(sums)


def assert_same_with_gradients(actual: torch.Tensor, expected: torch.Tensor, pairs) -> None:
    """Value, and gradient of a sum that weighs every example its own way; the teacher has none."""
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    weights = torch.arange(1, len(actual) + 1, dtype=torch.float64)
    tensors = [tensor for own, _ in pairs for tensor in (own.queries, own.keys)]
    of_teacher = [tensor for _, theirs in pairs for tensor in (theirs.queries, theirs.keys)]
    assert torch.autograd.grad(actual.sum(), of_teacher, retain_graph=True, allow_unused=True) == (None,) * len(
        of_teacher
    )
    ours, theirs = (torch.autograd.grad((values * weights).sum(), tensors) for values in (actual, expected))
    for mine, plain in zip(ours, theirs):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(mine, plain, atol=1e-10, rtol=1e-8)


# Heads, key heads and head size of the teacher's first layer; relation heads; the heads that they make.
HEADS = [((4, 4, 6), None, 4), ((4, 1, 5), None, 4), ((6, 2, 4), None, 2), ((3, 3, 8), None, 1), ((4, 4, 6), 8, 8)]


@pytest.mark.parametrize(("teacher_heads", "relation_heads", "heads"), HEADS)
def test_same_tokens(teacher_heads, relation_heads, heads):
    pairs = layers(len(LENGTHS), (9, 9), teacher_heads)
    labels, attention_mask = same_tokens()
    actual = attention_kl(pairs, labels, attention_mask, relation_heads)
    assert actual[3] == 0 and (actual[[0, 1, 2, 4]] > 0).all()
    assert_same_with_gradients(actual, dense(pairs, labels, heads), pairs)


@pytest.mark.parametrize(("teacher_heads", "relation_heads", "heads"), HEADS)
def test_chunks(teacher_heads, relation_heads, heads):
    pairs = layers(len(STUDENT_CHUNKS), (9, 10), teacher_heads)
    chunks = chunk_ids(STUDENT_CHUNKS, STUDENT_PROMPTS, 9), chunk_ids(TEACHER_CHUNKS, TEACHER_PROMPTS, 10)
    actual = chunk_attention_kl(pairs, *chunks, relation_heads)
    # A lone chunk sees itself alone.
    assert (actual[:2] > 0).all() and actual[2:].tolist() == [0, 0]
    assert_same_with_gradients(actual, dense_chunks(pairs, chunks, heads), pairs)


def test_a_response_in_several_parts():
    pairs = layers(1, (9, 9))
    labels = torch.tensor([[-100, -100, 5, 5, -100, -100, 5, -100, -100]])
    actual = attention_kl(pairs, labels, torch.ones_like(labels))
    assert_same_with_gradients(actual, dense(pairs, labels, 4), pairs)


def test_equal_attention_has_no_divergence():
    """Other numbers that give the same scores: every head turned by one rotation."""
    own = inputs(5, 9, 4, 2, 8, 3)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    pairs = [(own, AttentionInputs(own.queries @ rotation, 2 * own.keys @ rotation, own.scale / 2))]
    labels, attention_mask = same_tokens()
    assert attention_kl(pairs, labels, attention_mask).abs().max() < 1e-12
    # Relation heads that cut through heads see the turn.
    assert attention_kl(pairs, labels, attention_mask, 2).abs().max() < 1e-12
    assert attention_kl(pairs, labels, attention_mask, 8).abs().max() > 1e-3


def test_a_token_a_chunk_is_token_by_token_without_the_prompt():
    pairs = layers(2, (9, 9))
    labels = torch.full((2, 9), -100)
    labels[0, 1:], labels[1, 1:6] = 5, 5
    ids = torch.where(labels == 5, torch.arange(9) - 1, -1)
    torch.testing.assert_close(
        chunk_attention_kl(pairs, ids, ids), attention_kl(pairs, labels, torch.ones_like(labels))
    )


def test_padding_and_the_batch_change_nothing():
    pairs = layers(len(LENGTHS), (9, 9))
    labels, attention_mask = same_tokens()
    whole = attention_kl(pairs, labels, attention_mask)

    def part(tensor: torch.Tensor, rows: list[int], padding: int) -> torch.Tensor:
        shape = (len(rows), tensor.shape[1], padding, tensor.shape[3])
        return torch.cat([tensor[rows], torch.full(shape, 1e4, dtype=tensor.dtype)], 2)

    for rows, padding in (([0], 4), ([3], 0), ([4, 1], 0), ([2, 0, 4, 3, 1], 3)):
        padded = [
            tuple(AttentionInputs(*(part(x, rows, padding) for x in (s.queries, s.keys)), s.scale) for s in pair)
            for pair in pairs
        ]
        more_labels, more_mask = (x[rows] for x in same_tokens(9 + padding))
        torch.testing.assert_close(attention_kl(padded, more_labels, more_mask), whole[rows])


def test_padding_on_the_left():
    pairs = layers(len(LENGTHS), (9, 9))
    labels, attention_mask = same_tokens()
    shifts = 9 - torch.tensor(LENGTHS)
    places = (torch.arange(9) - shifts.unsqueeze(1)) % 9

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x.gather(2, places[:, None, :, None].expand_as(x))

    left = [
        tuple(AttentionInputs(moved(side.queries), moved(side.keys), side.scale) for side in pair) for pair in pairs
    ]
    actual = attention_kl(left, labels.gather(1, places), attention_mask.gather(1, places))
    torch.testing.assert_close(actual, attention_kl(pairs, labels, attention_mask))


def test_padding_and_the_batch_change_nothing_with_chunks():
    pairs = layers(len(STUDENT_CHUNKS), (9, 10))
    chunks = chunk_ids(STUDENT_CHUNKS, STUDENT_PROMPTS, 9), chunk_ids(TEACHER_CHUNKS, TEACHER_PROMPTS, 10)
    whole = chunk_attention_kl(pairs, *chunks)
    for rows in ([0], [3], [1, 2], [3, 2, 1, 0]):
        part = [
            tuple(AttentionInputs(side.queries[rows], side.keys[rows], side.scale) for side in pair) for pair in pairs
        ]
        padded = [torch.nn.functional.pad(ids[rows], (0, 3), value=-1) for ids in chunks]
        longer = [
            tuple(
                AttentionInputs(
                    *(torch.nn.functional.pad(x, (0, 0, 0, 3), value=1e4) for x in (s.queries, s.keys)), s.scale
                )
                for s in pair
            )
            for pair in part
        ]
        torch.testing.assert_close(chunk_attention_kl(longer, *padded), whole[rows])


def test_without_any_response():
    pairs = layers(2, (5, 5))
    nothing = torch.full((2, 5), -100)
    values = attention_kl(pairs, nothing, torch.ones_like(nothing)), chunk_attention_kl(pairs, *[nothing * 0 - 1] * 2)
    for value in values:
        assert value.tolist() == [0, 0]
        value.sum().backward()
    assert all(tensor.grad.abs().max() == 0 for own, _ in pairs for tensor in (own.queries, own.keys))


def test_bf16_and_mixed_precision():
    labels, attention_mask = same_tokens()
    chunks = chunk_ids(STUDENT_CHUNKS + [[]], STUDENT_PROMPTS + (1,), 9)
    low, high = (layers(len(LENGTHS), (9, 9), dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    # A norm that runs in float32 leaves its side there.
    mixed = [(AttentionInputs(own.queries.float(), own.keys, own.scale), theirs) for own, theirs in low]
    for function in (
        lambda pairs: attention_kl(pairs, labels, attention_mask),
        lambda pairs: chunk_attention_kl(pairs, chunks, chunks),
    ):
        for pairs in (low, mixed):
            value = function(pairs)
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), function(high), rtol=0.05, atol=0.01)
            gradient = torch.autograd.grad(value.sum(), pairs[0][0].queries)[0]
            assert gradient.isfinite().all() and gradient.dtype == pairs[0][0].queries.dtype


def test_a_teacher_of_inference_mode():
    labels, attention_mask = same_tokens()
    pairs = layers(len(LENGTHS), (9, 9))
    expected = attention_kl(pairs, labels, attention_mask)
    with torch.inference_mode():
        frozen = [
            (own, AttentionInputs(theirs.queries.clone(), theirs.keys.clone(), theirs.scale)) for own, theirs in pairs
        ]
    for relation_heads in (None, 8):
        value = attention_kl(frozen, labels, attention_mask, relation_heads)
        value.sum().backward()
    torch.testing.assert_close(attention_kl(frozen, labels, attention_mask), expected)


class Largest(TorchDispatchMode):
    """The most numbers that one tensor has had."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_tensor_of_queries_times_keys():
    length = 3000
    pairs = [tuple(inputs(1, length, 1, 1, 4, seed, dtype=torch.float32) for seed in (1, 2))]
    labels = torch.full((1, length), 5)
    with Largest() as largest:
        attention_kl(pairs, labels, torch.ones_like(labels)).sum().backward()
        chunk_attention_kl(pairs, *[torch.arange(length).unsqueeze(0)] * 2).sum().backward()
    assert largest.numbers < length**2 / 4


def test_common_heads():
    assert common_heads((12, 64), (12, 128)) == 12
    assert common_heads((14, 64), (32, 128)) == 2
    assert common_heads((14, 64), (32, 128), 64) == 64
    with pytest.raises(
        UserError, match="doesn't divide the 14 x 64 numbers of the student's queries: choose a divisor of 128"
    ):
        common_heads((14, 64), (32, 128), 48)
