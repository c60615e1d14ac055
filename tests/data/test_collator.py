import pytest
import torch

from hf_dskd.data.collator import DualCollator


ROWS = [
    {
        "input_ids": [5, 6, 7, 8, 2],
        "prompt_length": 2,
        "byte_ends": [3, 9, 9],
        "teacher_input_ids": [1, 40, 41, 3],
        "teacher_prompt_length": 2,
        "teacher_byte_ends": [9, 9],
        "chunk_ids": [0, 0, 1],
        "teacher_chunk_ids": [0, 1],
        "response_bytes": 9,
        "example_id": 11,
        "cut": False,
    },
    {
        "input_ids": [9, 10],
        "prompt_length": 1,
        "byte_ends": [4],
        "teacher_input_ids": [1, 42, 43, 44, 45, 46, 47],
        "teacher_prompt_length": 3,
        "teacher_byte_ends": [1, 2, 3, 4],
        "chunk_ids": [0],
        "teacher_chunk_ids": [0, 0, 0, 0],
        "response_bytes": 4,
        "example_id": 3,
        "cut": True,
    },
]


def test_batch():
    # The student's padding token is its end-of-sequence token.
    batch = DualCollator(student_pad_token_id=2, teacher_pad_token_id=0)(ROWS)
    expected = {
        "input_ids": [[5, 6, 7, 8, 2], [9, 10, 2, 2, 2]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "labels": [[-100, -100, 7, 8, 2], [-100, 10, -100, -100, -100]],
        "byte_ends": [[-1, -1, 3, 9, 9], [-1, 4, -1, -1, -1]],
        "chunk_ids": [[-1, -1, 0, 0, 1], [-1, 0, -1, -1, -1]],
        "teacher_input_ids": [[1, 40, 41, 3, 0, 0, 0], [1, 42, 43, 44, 45, 46, 47]],
        "teacher_attention_mask": [[1, 1, 1, 1, 0, 0, 0], [1] * 7],
        "teacher_labels": [[-100, -100, 41, 3, -100, -100, -100], [-100, -100, -100, 44, 45, 46, 47]],
        "teacher_byte_ends": [[-1, -1, 9, 9, -1, -1, -1], [-1, -1, -1, 1, 2, 3, 4]],
        "teacher_chunk_ids": [[-1, -1, 0, 1, -1, -1, -1], [-1, -1, -1, 0, 0, 0, 0]],
        "places": [[-1, -1, 0, 1, 2], [-1, 0, -1, -1, -1]],
        "silent": [[False, False, False, False, True], [False] * 5],
        "teacher_places": [[-1, -1, 0, 1, -1, -1, -1], [-1, -1, -1, 0, 1, 2, 3]],
        "teacher_silent": [[False, False, False, True, False, False, False], [False] * 7],
        "example_ids": [11, 3],
        "response_bytes": [9, 4],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    dtypes = {name: torch.bool if name.endswith("silent") else torch.int64 for name in batch}
    assert {name: tensor.dtype for name, tensor in batch.items()} == dtypes


def test_several_answers():
    row = {
        # Two answers, "ab" and "c", each closed; the second by two tokens, one of which is none of text.
        "input_ids": [5, 6, 7, 2, 5, 8, 4, 2],
        "prompt_length": 1,
        "spans": [1, 4, 5, 8],
        "byte_ends": [1, 2, 2, 3, 3, 3],
        "chunk_ids": [0, 1, 2, 3, 4, 4],
        "response_bytes": 3,
        "example_id": 0,
    }
    batch = DualCollator(0)([row])
    assert batch["labels"].tolist() == [[-100, 6, 7, 2, -100, 8, 4, 2]]
    assert batch["byte_ends"].tolist() == [[-1, 1, 2, 2, -1, 3, 3, 3]]
    assert batch["chunk_ids"].tolist() == [[-1, 0, 1, 2, -1, 3, 4, 4]]
    assert batch["places"].tolist() == [[-1, 0, 1, 2, -1, 2**20, 2**20 + 1, 2**20 + 2]]
    assert batch["silent"].nonzero()[:, 1].tolist() == [3, 6, 7]


def test_without_teacher_or_chunks():
    expected = DualCollator(2, 0)(ROWS)
    for pads, left_out in (((2,), ("teacher_", "chunk_ids")), ((2, 0), ("chunk_ids", "teacher_chunk_ids"))):
        rows = [{name: value for name, value in row.items() if not name.startswith(left_out)} for row in ROWS]
        batch = DualCollator(*pads)(rows)
        assert batch.keys() == {name for name in expected if not name.startswith(left_out)}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in batch.items())


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"pad_to_multiple_of": 4}, (8, 8)),
        ({"pad_to_multiple_of": 5}, (5, 10)),
        ({"pad_to_length": 16}, (16, 16)),
        ({"pad_to_length": 6}, (6, 7)),
        ({"pad_to_length": 9, "pad_to_multiple_of": 8}, (16, 16)),
    ],
)
def test_padded_lengths(options, lengths):
    batch = DualCollator(2, 0, **options)(ROWS)
    for prefix, length in zip(("", "teacher_"), lengths):
        for name in ("input_ids", "attention_mask", "labels", "byte_ends", "chunk_ids"):
            assert batch[prefix + name].shape == (2, length)
        assert batch[f"{prefix}attention_mask"].sum() == sum(len(row[f"{prefix}input_ids"]) for row in ROWS)
        assert (batch[f"{prefix}labels"] != -100).sum() == sum(len(row[f"{prefix}byte_ends"]) for row in ROWS)


def test_single_row_and_tensors():
    row = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in ROWS[0].items()}
    batch = DualCollator(2, 0)([row])
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 2]]
    assert batch["chunk_ids"].tolist() == [[-1, -1, 0, 0, 1]]
