"""
Byte-exact chunks of two tokenizations (those of arXiv 2603.22056, Eqs. 10 and 11, on bytes instead of characters).

A chunk is the smallest span of a response at whose end a token of both models ends. Pieces of one character end at
different bytes, though at the same character, so that on bytes no chunk closes inside a character too early.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def chunk_ids(
    student_ends: list[int],
    teacher_ends: list[int],
    student_closing: int,
    teacher_closing: int,
    student_opening: int = 0,
    teacher_opening: int = 0,
) -> tuple[list[int], list[int]]:
    """
    Numbers the chunk of every token of an answer.

    Every chunk holds at least one token of each side, and ids count up from 0 without gaps. A token that covers no
    byte belongs to the chunk that ends where it does or, where none does, to the next one to end.

    Args:
        student_ends, teacher_ends (`list[int]`):
            Byte at which each token ends, as [`response_tokens`] gives it, then those of the tokens that close the
            answer. Both sides have text tokens and tile the same bytes (see [`check_tiling`]).
        student_closing, teacher_closing (`int`):
            How many tokens close the answer, such as its end-of-sequence token. With some on both sides, these are a
            chunk of their own, the last; on one side alone, they belong to the last chunk of the text.
        student_opening, teacher_opening (`int`, *optional*, defaults to 0):
            How many tokens stand before the text, such as an empty thought. They are in no chunk, -1.

    Returns:
        `tuple[list[int], list[int]]`: chunk ids of the student's and of the teacher's tokens.
    """
    both_close = student_closing > 0 and teacher_closing > 0
    sides = [
        ends[: len(ends) - closing] if both_close else ends
        for ends, closing in ((student_ends, student_closing), (teacher_ends, teacher_closing))
    ]
    boundaries = np.array(sorted(set(sides[0]).intersection(sides[1])))
    student, teacher = (np.searchsorted(boundaries, np.array(ends)).tolist() for ends in sides)
    if both_close:
        student += [len(boundaries)] * student_closing
        teacher += [len(boundaries)] * teacher_closing
    student[:student_opening] = [-1] * student_opening
    teacher[:teacher_opening] = [-1] * teacher_opening
    return student, teacher


def answer_spans(row: Mapping[str, Any], prefix: str = "") -> list[tuple[int, int]]:
    """
    Where the answers of a tokenized row lie: place of the first token of each, and the place after its last.

    Of a row without `spans` one answer goes to the end. `prefix` is `"teacher_"` for the teacher's tokens.
    """
    spans = row.get(f"{prefix}spans")
    if spans is None:
        return [(int(row[f"{prefix}prompt_length"]), len(row[f"{prefix}input_ids"]))]
    return [(int(start), int(stop)) for start, stop in zip(spans[::2], spans[1::2])]


def silent_mask(byte_ends: Sequence[int], lengths: Sequence[int]) -> list[bool]:
    """
    Which tokens are no text of an answer: those before its first byte, and those after its last, which close it.

    `byte_ends` are those of all answers of a row, `lengths` the tokens of each.
    """
    mask: list[bool] = []
    before = 0
    for length in lengths:
        ends = byte_ends[len(mask) : len(mask) + length]
        first = next((index for index, end in enumerate(ends) if end > before), 0)
        last = next((index for index in range(length - 1, 0, -1) if ends[index] > ends[index - 1]), 0)
        mask += [True] * first + [False] * (last - first + 1) + [True] * (length - last - 1)
        before = ends[-1]
    return mask


def check_tiling(byte_ends: list[int], response_bytes: int, example: int, side: str) -> None:
    """
    Checks that the spans of a response's text tokens cover it from its first byte to its last, in order.

    Raises:
        `RuntimeError`: if they don't. No data can bring that about, only a mistake in this library.
    """
    problem = None
    before = 0
    for index, end in enumerate(byte_ends):
        if end < before:
            follows = f", the one before it at byte {before}" if index else ""
            problem = problem or f"token {index} ends at byte {end}{follows}"
        before = end
    if byte_ends[-1] != response_bytes:
        problem = problem or f"the last token ends at byte {byte_ends[-1]} of {response_bytes}"
    if problem:
        raise RuntimeError(
            f"the {side}'s tokens don't cover the response of example {example}: {problem}; this is a bug in hf_dskd, "
            f"please report it with the text of that response and the name of the tokenizer"
        )
