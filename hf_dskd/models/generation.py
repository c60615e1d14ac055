"""What a model writes itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.templates import control_pattern
from ..data.tokens import token_bytes
from ..errors import UserError
from .causal_lm import base_causal_lm


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from ..data.prompts import Frame

# SplitMix64's increment, as a signed number.
_STEP = -7046029254386353131


def sample(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    pad_token_id: int,
    eos_token_ids: list[int],
    max_new_tokens: int | list[int],
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
    example_ids: Sequence[int] | None = None,
    batch_size: int = 8,
    description: str | None = None,
) -> list[list[int]]:
    """
    Continues tokenized prompts.

    The model writes in eval mode, whatever mode it is in, and is as before afterwards.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): A causal language model, not wrapped for DDP.
        prompts (`list[list[int]]`): Token ids, at least one each.
        pad_token_id (`int`): Put before the shorter prompts of a batch.
        eos_token_ids (`list[int]`): Tokens that end a response (see [`end_token_ids`]).
        max_new_tokens (`int` or `list[int]`):
            Most tokens of a continuation, its end-of-sequence token included; for all prompts or for each. No
            continuation goes past the model's last position.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            How tokens are chosen; the model's own by default. Its lengths and special tokens aren't used.
        seed (`int`, *optional*):
            Seeds the sampling; PyTorch's generators on CPU and CUDA are then afterwards as they were. Without one,
            sampling takes from them.
        example_ids (sequence of `int`, *optional*):
            A number for each prompt. What is sampled for a prompt then depends on the seed (0 without one), its number
            and the model's logits alone, not on the batch, the order, or what was sampled before (see
            [`gumbel_noise`]). Of the ways to change the distribution, temperature, top_k and top_p are used.
        batch_size (`int`, *optional*, defaults to `8`): Prompts at a time.
        description (`str`, *optional*): Of the progress bar; without one there is none.

    Returns:
        `list[list[int]]`: continuations in the order of the prompts, without the prompt and without padding. Those
        that the model ended itself end with one of `eos_token_ids`; one without room is empty.

    Raises:
        UserError: If there is neither a `generation_config` nor one of the model.
    """
    from tqdm.auto import tqdm

    plain = base_causal_lm(model)
    config = copy.deepcopy(generation_config or plain.generation_config)
    check_generation_config(config, "the model")
    config.update(
        max_length=None,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_ids or None,
        num_return_sequences=1,
        return_dict_in_generate=False,
        use_cache=True,
    )
    warpers: list[Any] | None = None
    if example_ids is not None and config.do_sample:
        warpers = _take_warpers(config)
    positions = getattr(plain.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    rooms = [int(min(limit, positions - len(prompt))) for limit, prompt in zip(limits, prompts)]
    # Prompts of about one length share a batch; the longest come first, so that too little memory shows at once.
    order = sorted((index for index, room in enumerate(rooms) if room > 0), key=lambda index: -len(prompts[index]))
    responses: list[list[int]] = [[] for _ in prompts]
    with (
        _writing(model, config),
        _random_stream(seed),
        tqdm(total=len(prompts), desc=description, disable=description is None) as bar,
    ):
        bar.update(len(prompts) - len(order))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            bar.update(len(rows))
            while rows:
                sequences = [prompts[row] + responses[row] for row in rows]
                # A batch goes on for all of its rows at once, also for those that are done, so a row with a long
                # prompt would go past the last position where one with a short prompt has room left.
                left = max(rooms[row] - len(responses[row]) for row in rows)
                steps = int(min(left, positions - max(map(len, sequences))))
                processors = None
                if example_ids is not None and warpers is not None:
                    names, starts = [example_ids[row] for row in rows], [len(responses[row]) for row in rows]
                    processors = [*warpers, GumbelNoise(seed or 0, names, starts, max(map(len, sequences)))]
                for row, tokens in zip(rows, _continue(plain, sequences, config, pad_token_id, steps, processors)):
                    responses[row] += _ended(tokens[: rooms[row] - len(responses[row])], eos_token_ids)
                rows = [
                    row for row in rows if len(responses[row]) < rooms[row] and responses[row][-1] not in eos_token_ids
                ]
    return responses


def gumbel_noise(seed: int, example_ids: Tensor, positions: Tensor, width: int) -> Tensor:
    """
    Makes Gumbel noise as a function of seed, example, position and token alone.

    The token with the largest logit + noise is a sample of the softmax of the logits (Gumbel, 1954; "Gumbel-max"). A
    random generator would give an example other numbers in another batch, on another rank, or after a resume; a hash
    (SplitMix64) doesn't. Its 53 bits lie densest where the noise is largest, so that rare tokens get their share.

    Args:
        seed (`int`): Another one gives other numbers.
        example_ids (`torch.Tensor` of shape `[B]`, int64): A number for each row's example.
        positions (`torch.Tensor` of shape `[B]`, int64): Tokens that each row's response has already.
        width (`int`): V, size of the vocabulary.

    Returns:
        `torch.Tensor` of shape `[B, V]`, float32.
    """
    row = torch.full_like(example_ids, seed)
    # From 1 on, because a hash of 0 is 0.
    for part in (example_ids, positions):
        row = _mixed((row + 1) * _STEP) + part
    tokens = torch.arange(1, width + 1, device=example_ids.device)
    bits = (_mixed(_mixed((row + 1) * _STEP).unsqueeze(1) + tokens * _STEP) >> 11) & (2**53 - 1)
    # -log of the chance to be larger: exact near 0, which is where the large noise comes from.
    uniform = ((bits.float() + 0.5) * 2.0**-53).clamp_max(1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mixed(x: Tensor) -> Tensor:
    # Right shifts are arithmetic on signed integers: mask what they drag in.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


class GumbelNoise:
    """
    A logits processor, the last one, under which the greedy choice is a sample (see [`gumbel_noise`]).

    Each row has the number of its example and, in `starts`, the tokens that its response had before this call of
    `generate`, for which `prompt_length` tokens were there, padding included.
    """

    def __init__(self, seed: int, example_ids: Sequence[int], starts: Sequence[int], prompt_length: int):
        self.seed, self.prompt_length = seed, prompt_length
        self.example_ids, self.starts = torch.tensor(example_ids), torch.tensor(starts)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        positions = self.starts + (input_ids.shape[1] - self.prompt_length)
        device = scores.device
        return scores + gumbel_noise(self.seed, self.example_ids.to(device), positions.to(device), scores.shape[1])


def _take_warpers(config: GenerationConfig) -> list[Any]:
    """Takes out what `generate` would do to the logits before it samples; `config` is greedy afterwards."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if config.temperature is not None and config.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    config.update(do_sample=False, temperature=None, top_k=None, top_p=None)
    return warpers


def read_response(
    tokenizer: PreTrainedTokenizerBase, response: list[int], eos_token_ids: list[int], frame: Frame | None = None
) -> tuple[str, bool]:
    """Reads the text of a response without what `frame` puts around it, and whether the model ended it itself."""
    finished = bool(response) and response[-1] in eos_token_ids
    if finished:
        end = [] if frame is None else frame.end
        response = response[: -len(end)] if end and response[-len(end) :] == end else response[:-1]
    text = response_text(tokenizer, response)
    if frame is not None:
        # Control tokens are none of the text, those that the template puts before it too.
        text = text.removeprefix(control_pattern(tokenizer).sub("", frame.lead))
    # An unfinished one can end within a character.
    return (text if finished else text.rstrip("\ufffd")), finished


def padding_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Chooses a token for padding; it is masked, so that any will do where the tokenizer has none."""
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None, *ends: int
) -> list[int]:
    """
    Lists the tokens that end a response: the tokenizer's, then those that the generation config has besides, then
    `ends`, such as the last that a chat template puts there (see [`~hf_dskd.data.prompts.answer_frame`]).
    """
    configured = None if generation_config is None else generation_config.eos_token_id
    others = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *others, *ends] if token is not None))


def add_end_tokens(model: nn.Module, *ends: int) -> None:
    """Puts `ends`, tokens that end an answer, among those at which the model's own generation config stops."""
    config = base_causal_lm(model).generation_config
    if config is not None:
        configured = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        missing = [end for end in ends if end not in configured]
        if missing:
            config.eos_token_id = [token for token in [*configured, *missing] if token is not None]


def save_generation_config(model: nn.Module, folder: str) -> None:
    """Writes the generation config of the plain model below an adapter, if it has one."""
    config = base_causal_lm(model).generation_config
    if config is not None:
        config.save_pretrained(folder)


def response_text(tokenizer: PreTrainedTokenizerBase, response: list[int]) -> str:
    """
    Decodes a response's tokens, without special tokens.

    A space at the beginning stays, which the `decode` of SentencePiece tokenizers would take for the one that they put
    before any text. Bytes that are no UTF-8 become U+FFFD.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}  # type: ignore[attr-defined]
    ids = [token for token in response if token not in special]
    pieces = token_bytes(tokenizer)
    if all(token in pieces for token in ids):
        return b"".join(pieces[token] for token in ids).decode(errors="replace")
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def check_generation_config(model: nn.Module | GenerationConfig | None, role: str) -> None:
    """
    Raises a [`UserError`] for a model, or a model's generation config, with which nothing can be written.

    `role` says whose it is, such as `"the student"`.
    """
    config = base_causal_lm(model).generation_config if isinstance(model, nn.Module) else model
    if config is None:
        raise UserError(
            f"generation_config of {role} is None, so that it can't write responses: set model.generation_config ="
            " GenerationConfig(do_sample=True, temperature=1.0)"
        )


def check_saved_generation(config: GenerationConfig | None, name: str) -> None:
    """Raises a [`UserError`] for a generation config that transformers refuses to save: the student would be lost."""
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        names = dict.fromkeys(re.findall(r"^- `(\w+)`", str(error), re.MULTILINE))
        found = " and ".join(f"{each}={getattr(config, each)!r}" for each in names)
        found = found or " ".join(str(error).split())[:200]
        remedy = "leave these out" if config.do_sample else "set do_sample to true, or leave these out"
        raise UserError(
            f"the generation config of the student {name!r} has {found}, with which transformers refuses to save it"
            f" after training: {remedy}, in its generation_config.json or in model.generation_config"
        ) from error


@contextmanager
def _writing(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    plain = base_causal_lm(model)
    # Not only the outermost one: parts of the model may be in eval mode already. Layers use no checkpointing in it.
    training = [module for module in model.modules() if module.training]
    own = plain.generation_config
    model.eval()
    # `generate` takes what a config leaves open, and in some versions what it has at a default, from the model's own.
    plain.generation_config = config
    try:
        yield
    finally:
        for module in training:
            module.training = True
        plain.generation_config = own


@contextmanager
def _random_stream(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    # All devices, because the seed is set on all of them: what is sampled is sampled where the model is.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _continue(
    model: Any,
    sequences: list[list[int]],
    config: GenerationConfig,
    pad_token_id: int,
    steps: int,
    processors: list[Any] | None,
) -> list[list[int]]:
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad_token_id] * (longest - len(tokens)) + tokens for tokens in sequences])
    mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in sequences])
    device = model.get_input_embeddings().weight.device
    config.max_new_tokens = steps
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        logits_processor=processors,
    )
    return output[:, longest:].tolist()


def _ended(tokens: list[int], eos_token_ids: list[int]) -> list[int]:
    end = next((index for index, token in enumerate(tokens) if token in eos_token_ids), len(tokens))
    return tokens[: end + 1]
