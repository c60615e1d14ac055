"""Puts tokenized rows into padded batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_dskd.alignment.spans import answer_spans, silent_mask


# Tokens that an answer of a conversation may have, for places to be distinct.
ANSWER_STRIDE = 2**20


@dataclass
class DualCollator:
    """
    Pads the student's and the teacher's tokens of the same examples, each to its own length, on the right.

    Args:
        student_pad_token_id (`int`): Padding token of the student.
        teacher_pad_token_id (`int`, *optional*):
            Padding token of the teacher. Without it, the batch has no tensors for the teacher.
        pad_to_multiple_of (`int`, *optional*): Rounds both lengths up to a multiple of this.
        pad_to_length (`int`, *optional*):
            Pads both sides at least to this length, so that every batch has the same shape.
        teacher_states (`Callable`, *optional*):
            From rows to the teacher's last hidden states at their response tokens, `[B, R, d_t]`
            ([`~hf_dskd.teacher.cache.TeacherCache.batch`]).
        prefix_plan (`Callable`, *optional*):
            From rows and a length to what a byte-prefix target is made of
            ([`~hf_dskd.alignment.byte_prefix.ByteTables.plan`]).
    """

    student_pad_token_id: int
    teacher_pad_token_id: int | None = None
    pad_to_multiple_of: int | None = None
    pad_to_length: int | None = None
    teacher_states: Callable[[list[dict[str, Any]]], torch.Tensor] | None = None
    prefix_plan: Callable[[list[dict[str, Any]], int], torch.Tensor] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Makes a batch of rows as [`tokenize_dataset`] writes them.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask`, `labels` (not shifted; -100 on the prompt and the
            padding), `byte_ends` (in bytes), `places` (number of the answer x `ANSWER_STRIDE` + place in its text)
            and, if the rows have them, `chunk_ids` and `partners` (all four -1 where there is no response token), all
            int64 of shape `(B, S)`; `silent`, bool, which tokens are no text of an answer; the same with the prefix
            `teacher_`, `(B, T)`; `example_ids` and `response_bytes`, `(B,)`; with a cache `teacher_states`,
            `(B, R, d_t)`, and with a plan `prefix_plan`, `(B, S, F)`.
        """
        batch = self._padded(rows, "", self.student_pad_token_id)
        if self.teacher_pad_token_id is not None:
            batch |= self._padded(rows, "teacher_", self.teacher_pad_token_id)
        if self.teacher_states is not None:
            batch["teacher_states"] = self.teacher_states(rows)
        if self.prefix_plan is not None:
            batch["prefix_plan"] = self.prefix_plan(rows, batch["input_ids"].shape[1])
        batch["example_ids"] = torch.tensor([row["example_id"] for row in rows])
        batch["response_bytes"] = torch.tensor([row["response_bytes"] for row in rows])
        return batch

    def _padded(self, rows: list[dict[str, Any]], prefix: str, pad_token_id: int) -> dict[str, torch.Tensor]:
        length = max(self.pad_to_length or 0, *(len(row[f"{prefix}input_ids"]) for row in rows))
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        shape = (len(rows), length)
        input_ids = torch.full(shape, pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, -100)
        places, silent = torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)
        positions = {f"{prefix}byte_ends": torch.full(shape, -1)}
        # The first isn't in rows that the user has tokenized, the second only with `min_edit`.
        for name in (f"{prefix}chunk_ids", f"{prefix}partners"):
            if name in rows[0]:
                positions[name] = torch.full(shape, -1)
        for index, row in enumerate(rows):
            ids = torch.as_tensor(row[f"{prefix}input_ids"])
            spans = answer_spans(row, prefix)
            response = torch.cat([torch.arange(start, stop) for start, stop in spans])
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            # From the row and not from the padded ids: the padding token can be the end-of-sequence token.
            labels[index, response] = ids[response]
            lengths = [stop - start for start, stop in spans]
            silent[index, response] = torch.tensor(silent_mask(row[f"{prefix}byte_ends"], lengths))
            for answer, (start, stop) in enumerate(spans):
                # Counted from the first token of the text: what a template puts before it is the template's own.
                first = start + int((~silent[index, start:stop]).int().argmax())
                places[index, first:stop] = torch.arange(stop - first) + answer * ANSWER_STRIDE
            for name, padded in positions.items():
                padded[index, response] = torch.as_tensor(row[name])
        return {
            f"{prefix}input_ids": input_ids,
            f"{prefix}attention_mask": attention_mask,
            f"{prefix}labels": labels,
            f"{prefix}places": places,
            f"{prefix}silent": silent,
            **positions,
        }
