import random
from itertools import accumulate

import pytest
import tiny

from hf_dskd.alignment.spans import check_tiling, chunk_ids
from hf_dskd.data.tokens import response_tokens


def covered(pieces):
    """Bytes of tokens given as the text or the bytes that they cover."""
    return [piece.encode() if isinstance(piece, str) else piece for piece in pieces]


def ends(pieces):
    return list(accumulate(map(len, covered(pieces))))


def bytes_of(text):
    return [bytes([byte]) for byte in text.encode()]


FAMILY = "👩\u200d👧"

CASES = {
    "same": (["The", " cat"], ["The", " cat"], [0, 1], [0, 1]),
    "one_token_against_two": (["The", " cat"], ["Th", "e", " cat"], [0, 1], [0, 0, 1]),
    "overlap": (["ab", "cd", "e"], ["a", "bc", "de"], [0, 0, 0], [0, 0, 0]),
    "nothing_in_common_but_the_end": (["abc", "d"], ["a", "bcd"], [0, 0], [0, 0]),
    # 'é' whole for one and as its two bytes for the other, which end at one character but at two bytes.
    "bytes_of_a_character": (["caf", "é", "!"], ["caf", b"\xc3", b"\xa9", "!"], [0, 1, 2], [0, 1, 1, 2]),
    "byte_that_merges_with_what_follows": (
        ["日", "本"],
        [b"\xe6\x97", b"\xa5\xe6", b"\x9c\xac"],
        [0, 0],
        [0, 0, 0],
    ),
    "bytes_on_both_sides": ([b"\xc3", b"\xa9"], [b"\xc3", b"\xa9"], [0, 1], [0, 1]),
    "byte_fallback_of_an_emoji": (["ok ", "👍"], ["ok", " ", *bytes_of("👍")], [0, 1], [0, 0, 1, 1, 1, 1]),
    "combining_mark": (["xe\u0301", "y"], ["x", "e", "\u0301", "y"], [0, 1], [0, 0, 0, 1]),
    "combining_mark_in_bytes": (
        ["e", "\u0301", "o"],
        ["e", b"\xcc", b"\x81o"],
        [0, 1, 1],
        [0, 1, 1],
    ),
    "zero_width_joiner": (
        [FAMILY, " ok"],
        ["👩", "\u200d", *bytes_of("👧"), " ", "ok"],
        [0, 1],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ),
    "zero_width_joiner_apart_on_both_sides": (
        ["👩", "\u200d👧"],
        ["👩", *bytes_of("\u200d"), "👧"],
        [0, 1],
        [0, 1, 1, 1, 1],
    ),
    # A space is the mark 'Ġ' or '▁' of a vocabulary, and one byte of the text for both.
    "runs_of_spaces": (["x", "   ", " y"], ["x", "  ", "  ", "y"], [0, 1, 1], [0, 1, 1, 1]),
    "space_before_or_after": (["a", " b"], ["a ", "b"], [0, 0], [0, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_literal(name):
    student, teacher, student_chunks, teacher_chunks = CASES[name]
    assert b"".join(covered(student)) == b"".join(covered(teacher))
    student, teacher = ends(student), ends(teacher)
    assert chunk_ids(student, teacher, False, False) == (student_chunks, teacher_chunks)
    assert chunk_ids(teacher, student, False, False) == (teacher_chunks, student_chunks)
    # With an end-of-sequence token on both sides, which is a chunk of its own.
    last = student_chunks[-1] + 1
    with_eos = chunk_ids([*student, student[-1]], [*teacher, teacher[-1]], True, True)
    assert with_eos == ([*student_chunks, last], [*teacher_chunks, last])


def test_end_of_sequence_on_one_side_only():
    assert chunk_ids([1, 2, 2], [1, 2], True, False) == ([0, 1, 1], [0, 1])
    assert chunk_ids([2], [1, 2, 2], False, True) == ([0], [0, 0, 0])
    # The teacher's last token covers nothing either, but it isn't the end of the sequence.
    assert chunk_ids([1, 2, 2], [1, 2, 2], True, False) == ([0, 1, 1], [0, 1, 1])


def test_tokens_that_cover_no_byte():
    # First on one side: part of the first chunk.
    assert chunk_ids([0, 3, 5], [3, 5], False, False) == ([0, 0, 1], [0, 1])
    assert chunk_ids([0, 0, 3], [1, 3], False, False) == ([0, 0, 0], [0, 0])
    # First on both: both end at byte 0.
    assert chunk_ids([0, 3], [0, 0, 3], False, False) == ([0, 1], [0, 0, 1])
    # Later: part of the chunk that ends there.
    assert chunk_ids([3, 3, 5], [3, 5], False, False) == ([0, 0, 1], [0, 1])
    assert chunk_ids([3, 5], [3, 5, 5], False, False) == ([0, 1], [0, 1, 1])
    # Between two ends of the other side: part of the chunk around it.
    assert chunk_ids([2, 2, 5], [3, 5], False, False) == ([0, 0, 0], [0, 0])


def test_against_the_definition():
    generator = random.Random(0)
    for _ in range(500):
        size = generator.randint(1, 12)
        sides = [sorted(generator.choices(range(size + 1), k=generator.randint(0, 9))) + [size] for _ in range(2)]
        common = set(sides[0]) & set(sides[1])
        expected = tuple([sum(end < token for end in common) for token in side] for side in sides)
        assert chunk_ids(*sides, False, False) == expected


def test_plain_integers():
    # Rows are written by Arrow, and compared with lists.
    for side in chunk_ids([1, 2, 2], [2, 2], True, True):
        assert {type(chunk) for chunk in side} == {int}


def test_byte_level_against_byte_fallback():
    student, teacher = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    text = "large moon 東京"
    student_ids, student_ends = response_tokens(student, text)
    teacher_ids, teacher_ends = response_tokens(teacher, text)
    student_chunks, teacher_chunks = chunk_ids(student_ends, teacher_ends, False, False)
    # 'Ŀ±äº' is the last two bytes of one character and the first two of the next.
    assert list(zip(student.convert_ids_to_tokens(student_ids), student_chunks)) == [
        ("l", 0),
        ("a", 1),
        ("r", 2),
        ("ge", 3),
        ("Ġmoon", 4),
        ("Ġ", 5),
        ("æ", 6),
        ("Ŀ±äº", 7),
        ("¬", 8),
    ]
    assert list(zip(teacher.convert_ids_to_tokens(teacher_ids), teacher_chunks)) == [
        ("l", 0),
        ("a", 1),
        ("r", 2),
        ("ge", 3),
        ("▁moon", 4),
        ("▁", 5),
        ("<0xE6>", 6),
        ("<0x9D>", 7),
        ("<0xB1>", 7),
        ("<0xE4>", 7),
        ("<0xBA>", 7),
        ("<0xAC>", 8),
    ]


def test_check_tiling():
    check_tiling([0, 2, 2, 5], 5, 7, "student")
    with pytest.raises(RuntimeError) as error:
        check_tiling([2, 4], 5, 7, "teacher")
    assert str(error.value) == (
        "the teacher's tokens don't cover the response of example 7: the last token ends at byte 4 of 5; this is a "
        "bug in hf_dskd, please report it with the text of that response and the name of the tokenizer"
    )
    with pytest.raises(RuntimeError, match=r"student's tokens .* example 8: the last token ends at byte 6 of 5;"):
        check_tiling([2, 6], 5, 8, "student")
    with pytest.raises(RuntimeError, match="token 2 ends at byte 3, the one before it at byte 4;"):
        check_tiling([2, 4, 3, 5], 5, 8, "student")
    with pytest.raises(RuntimeError, match="token 0 ends at byte -1;"):
        check_tiling([-1, 5], 5, 8, "student")
