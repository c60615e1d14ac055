"""What a model writes itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def complete(model: nn.Module, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int = 96) -> str:
    """The model's greedy continuation of a tokenized prompt, without special tokens."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt_ids], device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    return tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True)
