"""How many bits a model spends on held-out responses."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.collator import DualCollator
from ..models import backbone, lm_head


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
    Bits per UTF-8 byte of the responses' text: comparable between models with different tokenizers.

    The EOS token is left out; it is no text, and each tokenizer has its own.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): A causal language model.
        rows ([`~datasets.Dataset`]): From [`~hf_dskd.tokenize_dataset`].
        side (`str`, *optional*, defaults to `"student"`): Whose columns to read, `"student"` or `"teacher"`.
        batch_size (`int`, *optional*, defaults to `8`): Doesn't change the result.
        dtype (`torch.dtype`, *optional*): Autocast to it.
        description (`str`, *optional*): Of the progress bar; without one there is none.
    """
    from tqdm.auto import tqdm

    prefix = "" if side == "student" else "teacher_"
    # Padding is masked, so any token will do.
    collate = DualCollator(student_pad_token_id=0, teacher_pad_token_id=0 if "teacher_input_ids" in rows[0] else None)
    device = next(model.parameters()).device
    head, body = lm_head(model), backbone(model)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index][f"{prefix}input_ids"]))
    nats, total_bytes = 0.0, 0
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc=description, disable=description is None):
        batch = collate([rows[index] for index in order[start : start + batch_size]])
        ids, ends = batch[f"{prefix}input_ids"].to(device), batch[f"{prefix}byte_ends"].to(device)
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            hidden = body(input_ids=ids, attention_mask=batch[f"{prefix}attention_mask"].to(device), use_cache=False)[
                0
            ]
            text = ends[:, 1:] > ends[:, :-1].clamp_min(0)
            losses = F.cross_entropy(head(hidden[:, :-1][text]).float(), ids[:, 1:][text], reduction="sum")
        nats += losses.item()
        total_bytes += int(batch["response_bytes"].sum())
    model.train(was_training)
    return nats / math.log(2) / total_bytes
