"""Answers of a model, and how they compare with references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..models.causal_lm import base_causal_lm
from ..models.generation import end_token_ids, padding_token_id, read_response, sample


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.prompts import Frame


def complete(model: nn.Module, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int = 96) -> str:
    """Continues a tokenized prompt greedily, and decodes that without special tokens."""
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


class Scores(NamedTuple):
    """What a model wrote, in the order of the examples, and how it compares with the references."""

    metrics: dict[str, float]  # `rouge_l` and `exact_match` in percent, `unfinished` as a share
    responses: list[str]


def score_generation(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[list[int], list[str]]],
    *,
    max_length: int,
    frame: Frame | None = None,
    batch_size: int = 8,
    description: str | None = None,
) -> Scores:
    """
    Answers prompts greedily and compares the answers with references.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): A causal language model, not wrapped for DDP.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        examples (sequence of `tuple[list[int], list[str]]`): Token ids of a prompt and its references, one at least.
        max_length (`int`): Most tokens of prompt and answer together; an answer that runs into it is unfinished.
        frame ([`~hf_dskd.data.prompts.Frame`], *optional*): What a chat template puts around an answer.
        batch_size (`int`, *optional*, defaults to `8`): Prompts at a time.
        description (`str`, *optional*): Of the progress bar; without one there is none.
    """
    from transformers import GenerationConfig

    from .scores import exact_match, rouge_l

    ends = () if frame is None else frame.end[-1:]
    stops = end_token_ids(tokenizer, base_causal_lm(model).generation_config, *ends)
    responses = sample(
        model,
        [prompt for prompt, _ in examples],
        pad_token_id=padding_token_id(tokenizer),
        eos_token_ids=stops,
        max_new_tokens=[max(max_length - len(prompt), 0) for prompt, _ in examples],
        generation_config=GenerationConfig(do_sample=False),
        batch_size=batch_size,
        description=description,
    )
    texts, finished = zip(*(read_response(tokenizer, response, stops, frame) for response in responses))
    values: dict[str, Callable[[str, list[str]], float]] = {"rouge_l": rouge_l, "exact_match": exact_match}
    metrics = {
        name: 100.0 * sum(value(text, references) for text, (_, references) in zip(texts, examples)) / len(examples)
        for name, value in values.items()
    }
    return Scores({**metrics, "unfinished": 1.0 - sum(finished) / len(examples)}, list(texts))
