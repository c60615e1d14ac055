"""
Byte-exact chunks of two tokenizations (those of arXiv 2603.22056, Eqs. 10 and 11, on bytes instead of characters).

A chunk is the smallest span of a response at whose end a token of both models ends. Pieces of one character end at
different bytes, though at the same character, so that on bytes no chunk closes inside a character too early.
"""

import numpy as np


def chunk_ids(
    student_ends: list[int], teacher_ends: list[int], student_has_eos: bool, teacher_has_eos: bool
) -> tuple[list[int], list[int]]:
    """
    Numbers the chunk of every response token.

    Every chunk holds at least one token of each side, and ids count up from 0 without gaps. A token that covers no
    byte belongs to the chunk that ends where it does or, where none does, to the next one to end.

    Args:
        student_ends, teacher_ends (`list[int]`):
            Byte at which each response token ends, as [`response_tokens`] gives it, then that of the end-of-sequence
            token if there is one. Both sides have text tokens and tile the same bytes (see [`check_tiling`]).
        student_has_eos, teacher_has_eos (`bool`):
            Whether the last one is the end-of-sequence token. On both sides, the two are a chunk of their own, the
            last; on one side alone, it belongs to the last chunk of the text.

    Returns:
        `tuple[list[int], list[int]]`: chunk ids of the student's and of the teacher's tokens.
    """
    both_end = student_has_eos and teacher_has_eos
    sides = [ends[:-1] if both_end else ends for ends in (student_ends, teacher_ends)]
    boundaries = np.array(sorted(set(sides[0]).intersection(sides[1])))
    student, teacher = (np.searchsorted(boundaries, np.array(ends)).tolist() for ends in sides)
    if both_end:
        student.append(len(boundaries))
        teacher.append(len(boundaries))
    return student, teacher


def check_tiling(byte_ends: list[int], response_bytes: int, example: int, side: str) -> None:
    """
    Checks that the spans of a response's text tokens cover it from its first byte to its last, in order.

    Args:
        byte_ends (`list[int]`): Byte at which each token ends, without the end-of-sequence token.
        response_bytes (`int`): UTF-8 bytes of the response.
        example (`int`): Id of the example, for the message.
        side (`str`): `"student"` or `"teacher"`, for the message.

    Raises:
        `RuntimeError`: if they don't. No data can bring that about, only a mistake in this library.
    """
    problem = None
    if byte_ends != sorted(byte_ends):
        index = next(i for i in range(1, len(byte_ends)) if byte_ends[i] < byte_ends[i - 1])
        problem = f"token {index} ends at byte {byte_ends[index]}, the one before it at byte {byte_ends[index - 1]}"
    elif byte_ends[0] < 0:
        problem = f"token 0 ends at byte {byte_ends[0]}"
    elif byte_ends[-1] != response_bytes:
        problem = f"the last token ends at byte {byte_ends[-1]} of {response_bytes}"
    if problem:
        raise RuntimeError(
            f"the {side}'s tokens don't cover the response of example {example}: {problem}; this is a bug in hf_dskd, "
            f"please report it with the text of that response and the name of the tokenizer"
        )
