import random

import pytest
import tiny

from hf_dskd.alignment.spans import check_tiling, chunk_ids
from hf_dskd.data.tokens import response_tokens


def test_end_of_sequence_on_one_side_only():
    assert chunk_ids([1, 2, 2], [1, 2], True, False) == ([0, 1, 1], [0, 1])
    assert chunk_ids([2], [1, 2, 2], False, True) == ([0], [0, 0, 0])
    # The teacher's last token covers nothing either, but it isn't the end of the sequence.
    assert chunk_ids([1, 2, 2], [1, 2, 2], True, False) == ([0, 1, 1], [0, 1, 1])


def test_against_the_definition():
    generator = random.Random(0)
    for _ in range(500):
        size = generator.randint(1, 12)
        sides = [sorted(generator.choices(range(size + 1), k=generator.randint(0, 9))) + [size] for _ in range(2)]
        common = set(sides[0]) & set(sides[1])
        expected = tuple([sum(end < token for end in common) for token in side] for side in sides)
        assert chunk_ids(*sides, False, False) == expected
        # With an end-of-sequence token on both sides, which is a chunk of its own.
        last = len(common)
        with_eos = chunk_ids(*([*side, size] for side in sides), True, True)
        assert with_eos == tuple([*chunks, last] for chunks in expected)


def test_byte_level_against_byte_fallback():
    student, teacher = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    text = "large moon 東京"
    student_ids, student_ends = response_tokens(student, text)
    teacher_ids, teacher_ends = response_tokens(teacher, text)
    student_chunks, teacher_chunks = chunk_ids(student_ends, teacher_ends, False, False)
    # 'Ŀ±äº' is the last two bytes of one character and the first two of the next.
    assert student.convert_ids_to_tokens(student_ids) == "l a r ge Ġmoon Ġ æ Ŀ±äº ¬".split()
    pieces = "l a r ge ▁moon ▁ <0xE6> <0x9D> <0xB1> <0xE4> <0xBA> <0xAC>".split()
    assert teacher.convert_ids_to_tokens(teacher_ids) == pieces
    assert student_chunks == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert teacher_chunks == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 8]
    # Rows are written by Arrow, and compared with lists.
    assert {type(chunk) for chunk in student_chunks + teacher_chunks} == {int}


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
