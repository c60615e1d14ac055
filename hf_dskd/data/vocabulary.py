"""What two vocabularies have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from .templates import special_ids
from .tokens import token_bytes


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def shared_tokens(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    ends: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Pairs tokens of two vocabularies that stand for the same bytes, and as one pair the two tokens that end an answer.

    Where several tokens of a vocabulary stand for the same bytes, the one with the lowest id is taken. The tokens that
    end an answer are `ends` (see [`~hf_dskd.data.prompts.answer_frame`]), by default the end-of-sequence tokens.

    Returns:
        Ids of the student and of the teacher, sorted by the student's, int64, `[n]` each.

    Raises:
        UserError: If no token but the end-of-sequence token is shared.
    """
    student, teacher = map(_ids_by_bytes, (student_tokenizer, teacher_tokenizer))
    pairs = {student[data]: teacher[data] for data in student.keys() & teacher.keys()}
    if not pairs:
        raise UserError(
            f"the vocabularies of {student_tokenizer.name_or_path or 'the student'!r} and"
            f" {teacher_tokenizer.name_or_path or 'the teacher'!r} share no token: use what compares neither tokens"
            " nor heads, such as alm, or dskd_cma with its own projector_init"
        )
    ends = ends or (student_tokenizer.eos_token_id, teacher_tokenizer.eos_token_id)
    pairs = {s: t for s, t in pairs.items() if s != ends[0] and t != ends[1]}
    pairs[ends[0]] = ends[1]
    ids = torch.tensor(sorted(pairs.items()), dtype=torch.int64)
    return ids[:, 0].contiguous(), ids[:, 1].contiguous()


def same_vocabulary(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells whether every token that both have is the same piece under the same id; one may have more at its end."""
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    common = min(max(student.values()), max(teacher.values())) + 1
    first = {piece: token for piece, token in student.items() if token < common}
    return first == {piece: token for piece, token in teacher.items() if token < common}


def _ids_by_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    special, size = special_ids(tokenizer), len(tokenizer)
    found: dict[bytes, int] = {}
    for token, data in sorted(token_bytes(tokenizer).items()):
        if data and token not in special and token < size:
            found.setdefault(data, token)
    return found
