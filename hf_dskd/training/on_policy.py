"""Batches whose responses the student has just written itself (on-policy distillation, GKD, arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..alignment.spans import answer_spans
from ..data.collator import ANSWER_STRIDE
from ..data.prompts import Frame, answer_frame
from ..data.tokenization import encode_response
from ..data.tokens import response_tokens
from ..models.generation import end_token_ids, read_response, sample


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


PREFIXES = {"student": "", "teacher": "teacher_"}


def is_on_policy(step: int, fraction: float) -> bool:
    """
    Tells whether an optimizer step, counted from 0, is one of the on-policy ones.

    Their share of any first steps is `fraction`, evenly spread; only the step's number matters, so that all ranks
    agree, and a resumed run with the one that was stopped.
    """
    # 100 * 0.29 is below 29 in floating point.
    share = Fraction(fraction).limit_denominator(10**9)
    return floor((step + 1) * share) > floor(step * share)


def on_policy_batch(
    batch: dict[str, Tensor],
    model: nn.Module,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    *,
    max_length: int,
    generation_config: GenerationConfig,
    seed: int | None,
    autocast: AbstractContextManager | None = None,
    align: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    frames: dict[str, Frame] | None = None,
) -> dict[str, Tensor]:
    """
    Replaces the responses of a batch by those that the student writes now.

    Of a conversation it writes the last answer, which is then the only one of the example. What it has written is
    decoded, and the text tokenized for both models as data is. An example for which it writes nothing, or for whose
    response there is no room, keeps the response that it has.

    Args:
        batch (`dict[str, torch.Tensor]`): From `collator`, with the teacher's tensors.
        model: The student, not wrapped for DDP.
        max_length (`int`): The most tokens that prompt, response and EOS may have together, on either side.
        generation_config: How the student writes, at most `max_new_tokens` where that is set.
        seed (`int`, *optional*): Of the sampling. No other random stream moves.
        align (`Callable`, *optional*): Gives a row the columns that come after tokenization.
        frames (`dict[str, Frame]`, *optional*): What stands around an answer of the `"student"` and of the `"teacher"`
            (see [`~hf_dskd.data.prompts.answer_frame`]); the end-of-sequence tokens by default.

    Returns:
        A batch with the same keys, examples and device.
    """
    device = batch["input_ids"].device
    read = {name: tensor.cpu() for name, tensor in batch.items()}
    rows = [_row(read, index) for index in range(len(batch["input_ids"]))]
    prompts = [
        {name: row[f"{prefix}input_ids"][: answer_spans(row, prefix)[-1][0]] for name, prefix in PREFIXES.items()}
        for row in rows
    ]
    tokenizers = {"student": student_tokenizer, "teacher": teacher_tokenizer}
    frames = frames or {name: answer_frame(tokenizer, "plain") for name, tokenizer in tokenizers.items()}
    rooms = [
        max_length - max(len(tokens) + len(frames[name].end) for name, tokens in prompt.items()) for prompt in prompts
    ]
    if generation_config.max_new_tokens is not None:
        rooms = [min(room, generation_config.max_new_tokens) for room in rooms]
    stops = end_token_ids(student_tokenizer, generation_config, frames["student"].end[-1])
    with autocast or nullcontext():
        responses = sample(
            model,
            [prompt["student"] for prompt in prompts],
            pad_token_id=student_tokenizer.pad_token_id,  # type: ignore[arg-type]
            eos_token_ids=stops,
            max_new_tokens=rooms,
            generation_config=generation_config,
            seed=seed,
            batch_size=len(rows),
        )

    for index, (prompt, response) in enumerate(zip(prompts, responses)):
        text, finished = read_response(student_tokenizer, response, stops, frames["student"])
        # What the student has written without, such as a thought in the place of an empty one, is read without.
        own = frames if _begins(student_tokenizer, response, frames["student"]) else _bare(frames)
        if not text.strip():
            continue
        written = encode_response(
            prompt,
            tokenizers,
            text,
            max_length,
            example_id=rows[index]["example_id"],
            finished=finished,
            frames=own,
        )
        if written is not None:
            # Rows that the user has tokenized may be without chunks.
            rows[index] = {name: written[name] for name in rows[index]}
    if align is not None:
        rows = [row | align(row) for row in rows]
    return {name: tensor.to(device) for name, tensor in collator(rows).items()}


def _begins(tokenizer: PreTrainedTokenizerBase, response: list[int], frame: Frame) -> bool:
    """Tells whether a response begins with what the template puts before an answer."""
    lead = response_tokens(tokenizer, frame.lead, control=True)[0] if frame.lead.strip() else []
    return response[: len(lead)] == lead


def _bare(frames: dict[str, Frame]) -> dict[str, Frame]:
    return {name: frame._replace(lead="") for name, frame in frames.items()}


def _edges(is_response: Tensor, places: Tensor) -> list[int]:
    """Finds where the answers of an example begin and end, `[start, stop, start, ...]`; they can be adjacent."""
    before, number = torch.cat([is_response.new_zeros(1), is_response[:-1]]), places // ANSWER_STRIDE
    # What a template puts before an answer has no place.
    ended = torch.cat([places.new_full((1,), -1), places[:-1]]) >= 0
    other = (places < 0) | (number != torch.cat([number[:1], number[:-1]]))
    starts = (is_response & (~before | (ended & other))).nonzero()[:, 0].tolist()
    stops = (before & ~is_response).nonzero()[:, 0].tolist()
    ends = [next((stop for stop in [*stops, len(places)] if stop > start), len(places)) for start in starts]
    return [
        edge
        for start, end, after in zip(starts, ends, [*starts[1:], len(places)])
        for edge in (start, min(end, after))
    ]


def _row(batch: dict[str, Tensor], index: int) -> dict[str, Any]:
    """Rebuilds the row, as [`tokenize_dataset`] writes it, that an example of the batch was made of."""
    row: dict[str, Any] = {
        "example_id": int(batch["example_ids"][index]),
        "response_bytes": int(batch["response_bytes"][index]),
    }
    for prefix in PREFIXES.values():
        real = batch[f"{prefix}attention_mask"][index].bool()
        is_response = batch[f"{prefix}labels"][index][real] != -100
        edges = _edges(is_response, batch[f"{prefix}places"][index][real])
        row[f"{prefix}input_ids"] = batch[f"{prefix}input_ids"][index][real].tolist()
        row[f"{prefix}prompt_length"], row[f"{prefix}spans"] = edges[0], edges
        for name in (f"{prefix}byte_ends", f"{prefix}chunk_ids"):
            if name in batch:
                row[name] = batch[name][index][real][is_response].tolist()
    return row
