"""How many bits a model spends on held-out responses, and how many of their tokens it would have chosen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.collator import DualCollator
from ..models.causal_lm import backbone, lm_head
from .scores import bits_of_a_byte


# Logits that are there at a time, in bytes of float32.
LOGITS_BYTES = 2**28


class RowLikelihood(NamedTuple):
    """What a model makes of one response."""

    nats: float  # spent on its text; the EOS token is no text, and each tokenizer has its own
    bytes: int  # UTF-8 bytes of its text
    correct: int  # tokens that are the most likely one where they stand, EOS included
    tokens: int  # EOS included


def row_likelihoods(
    model: nn.Module, rows: list[dict[str, Any]], *, side: str = "student", dtype: torch.dtype | None = None
) -> list[RowLikelihood]:
    """
    Computes the likelihood of each response, in one batch. The model is taken in the mode it is in.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): A causal language model.
        rows (`list[dict[str, Any]]`): Rows of [`~hf_dskd.tokenize_dataset`].
        side (`str`, *optional*, defaults to `"student"`): Whose columns to read, `"student"` or `"teacher"`.
        dtype (`torch.dtype`, *optional*): Autocast to it.
    """
    prefix = "" if side == "student" else "teacher_"
    # Padding is masked, so any token will do.
    collate = DualCollator(student_pad_token_id=0, teacher_pad_token_id=0 if "teacher_input_ids" in rows[0] else None)
    batch = collate(rows)
    device = next(model.parameters()).device
    ids, ends = batch[f"{prefix}input_ids"].to(device), batch[f"{prefix}byte_ends"].to(device)
    response = batch[f"{prefix}labels"][:, 1:].to(device) != -100
    head = lm_head(model)
    tokens_at_once = max(1, LOGITS_BYTES // (4 * head.weight.shape[0]))
    losses, correct = [], []
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        mask = batch[f"{prefix}attention_mask"].to(device)
        hidden = backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)[0][:, :-1][response]
        targets = ids[:, 1:][response]
        for part, target in zip(hidden.split(tokens_at_once), targets.split(tokens_at_once)):
            logits = head(part).float()
            losses.append(F.cross_entropy(logits, target.to(logits.device), reduction="none"))
            correct.append(logits.argmax(-1) == target.to(logits.device))
    text = covers_text(ends)[response].cpu()
    row_of_token = response.nonzero()[:, 0].cpu()
    sums = torch.zeros(len(rows), 2, dtype=torch.float64)
    values = torch.stack([torch.cat(losses).cpu().double() * text, torch.cat(correct).cpu().double()], 1)
    sums.index_add_(0, row_of_token, values)
    counts = response.sum(1).tolist()
    return [
        RowLikelihood(nats, row["response_bytes"], int(right), count)
        for (nats, right), row, count in zip(sums.tolist(), rows, counts)
    ]


def covers_text(byte_ends: Tensor) -> Tensor:
    """
    Tells which tokens cover a byte of an answer. Those that close it don't: each tokenizer has its own.

    Of `byte_ends` `[B, S]`, -1 outside the answers, for the tokens that are predicted, those from the second on:
    `[B, S - 1]`, bool.
    """
    return byte_ends[:, 1:] > byte_ends.cummax(1).values[:, :-1].clamp_min(0)


def bits_per_byte(
    model: nn.Module,
    rows: Any,
    *,
    side: str = "student",
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    description: str | None = None,
) -> float:
    """
    Computes bits per UTF-8 byte of the responses' text: comparable between models with different tokenizers.

    The EOS token is left out; it is no text, and each tokenizer has its own. Arguments are those of
    [`row_likelihoods`]; `batch_size` doesn't change the result, and without a `description` there is no progress bar.
    """
    from tqdm.auto import tqdm

    prefix = "" if side == "student" else "teacher_"
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index][f"{prefix}input_ids"]))
    found: list[RowLikelihood] = []
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc=description, disable=description is None):
        batch = [rows[index] for index in order[start : start + batch_size]]
        found += row_likelihoods(model, batch, side=side, dtype=dtype)
    model.train(was_training)
    return bits_of_a_byte(sum(row.nats for row in found), sum(row.bytes for row in found))
