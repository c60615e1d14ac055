"""What a model reads before an answer and after it: prompts in plain text or a chat template, and ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from .formats import Example
from .templates import Template, Turn, control_pattern, special_ids
from .tokens import answer_tokens, encode, name_of, response_tokens, traits_of


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Frame(NamedTuple):
    """
    What stands around an answer.

    The tokens that end it are those that the chat template puts there, or else the end-of-sequence token. They go up
    to the template's last control token, at which a model stops: white space after it belongs to the next prompt.
    Where a template ends answers with ordinary text, the end-of-sequence token follows it.
    """

    # What the chat template puts between where the model begins to write and the answer: white space, or an empty
    # thought. The model is to write it.
    lead: str
    end: list[int]


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    prompt_style: str = "chat",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """
    Tokenizes a prompt, the same way for training and for generation.

    Control tokens in the messages are text, as far as the chat template lets them be told from its own.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast one.
        example (`Example`): Its messages are rendered by the chat template, or its plain prompt text is taken.
        prompt_style (`str`, *optional*, defaults to `"chat"`):
            `"chat"` renders the chat template, which then decides on every special token, and is plain for tokenizers
            without one. `"plain"` takes the plain text after the special tokens with which the tokenizer begins.
        chat_template_kwargs (`dict[str, Any]`, *optional*): Such as `{"enable_thinking": False}`.

    Raises:
        `UserError`: if the chat template rejects the messages.
    """
    if not uses_template(tokenizer, prompt_style):
        return plain_tokens(tokenizer, example.prompt)
    return rendered_tokens(Template(tokenizer, chat_template_kwargs), example)[0]


def uses_template(tokenizer: PreTrainedTokenizerBase, prompt_style: str) -> bool:
    """Tells whether a model's prompts are written by its chat template."""
    return prompt_style == "chat" and bool(tokenizer.chat_template)


def answer_frame(
    tokenizer: PreTrainedTokenizerBase,
    prompt_style: str = "chat",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Frame:
    """Finds what stands around an answer; the arguments are those of [`prompt_tokens`]."""
    if not uses_template(tokenizer, prompt_style):
        return Frame("", [tokenizer.eos_token_id])
    put, closing = Template(tokenizer, chat_template_kwargs).frame
    return Frame(put, closing_tokens(tokenizer, closing))


def closing_tokens(tokenizer: PreTrainedTokenizerBase, closing: str) -> list[int]:
    """Tokenizes what a template puts after an answer, up to the last control token; one is added if there is none."""
    closings, end = traits_of(tokenizer).closings, tokenizer.eos_token_id
    if (closing, end) not in closings:
        ids = response_tokens(tokenizer, closing, control=True)[0] if closing.strip() else []
        control = {*special_ids(tokenizer), end}
        last = max((index for index, token in enumerate(ids) if token in control), default=None)
        if last is None:
            visible = closing.rstrip()
            ids = [*response_tokens(tokenizer, visible, control=True)[0], end] if visible else [end]
        closings[closing, end] = ids if last is None else ids[: last + 1]
    return closings[closing, end]


def plain_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    return traits_of(tokenizer).start_ids + encode(tokenizer, prompt, control=False)


def rendered_tokens(template: Template, example: Example, cut: int = 0) -> tuple[list[int], str | None]:
    """
    Tokenizes a prompt without its last `cut` characters; in it control tokens are those of the template, not those
    in the messages.

    To tell the two apart the prompt is rendered once more with stand-ins of the same length for the latter.

    Returns:
        Token ids, and `"control_as_text"` or `"control_live"` where messages have control tokens, else `None`.
    """

    def render(example: Example) -> str:
        prompt = template.prompt(example)
        return prompt[: len(prompt) - cut]

    tokenizer, rendered = template.tokenizer, render(example)
    masks = _Masks.of(tokenizer, (example.messages, example.template))
    if masks is None:
        return encode(tokenizer, rendered, control=True), None
    masked = render(masks.hidden(example))

    def pieces(whole: str, continued: bool) -> list[int]:
        ids: list[int] = []
        for part, first, control in masks.pieces(whole, masked):
            ids += response_tokens(tokenizer, part)[0] if continued and not first else encode(tokenizer, part, False)
            ids += control
        return ids

    # What is put together must be what the tokenizer itself makes where there is nothing to tell apart. Some put a
    # space before every part, some only before the first.
    for continued in (False, True) if masks.shown(masked) == rendered else ():
        if pieces(masked, continued) == encode(tokenizer, masked, control=True):
            return pieces(rendered, continued), "control_as_text"
    return encode(tokenizer, rendered, control=True), "control_live"


def written_tokens(template: Template, example: Example, turn: Turn) -> tuple[list[int], list[int], bool, str | None]:
    """
    Finds the tokens of an answer in the template's own format, and the bytes at which they end; control tokens are
    those of the template, not those in the example's text. Also whether they give the text back, and a note as of
    [`rendered_tokens`].
    """
    tokenizer = template.tokenizer
    ids, ends, whole = answer_tokens(tokenizer, turn.lead, turn.answer, control=True)
    masks = _Masks.of(tokenizer, (example.response, example.extras))
    if masks is None:
        return ids, ends, whole, None
    masked = template.written(masks.hidden(example))
    if masked is None or masks.shown(masked.answer) != turn.answer or masked.lead != turn.lead:
        return ids, ends, whole, "control_live"
    ids, ends = [], []
    for part, first, control in masks.pieces(turn.answer, masked.answer):
        new, new_ends, same = answer_tokens(tokenizer, turn.lead if first else "", part)
        start = ends[-1] if ends else 0
        ids += new
        ends += [start + end for end in new_ends]
        whole = whole and same
        for token in control:
            ids.append(token)
            name = str(tokenizer.convert_ids_to_tokens(token))
            ends.append((ends[-1] if ends else 0) + len(name.encode()))
    return ids, ends, whole, "control_as_text"


class _Masks(NamedTuple):
    """Stand-ins of the same length for the control tokens that texts have."""

    tokenizer: PreTrainedTokenizerBase
    names: dict[str, str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, texts: Any) -> _Masks | None:
        pattern = control_pattern(tokenizer)
        found = sorted({name for text in _texts(texts) for name in pattern.findall(text)})
        names = {name: chr(0xF0000 + index) * len(name) for index, name in enumerate(found)}
        return cls(tokenizer, names) if names else None

    def hidden(self, example: Example) -> Example:
        pattern = control_pattern(self.tokenizer)
        return _mapped(example, lambda text: pattern.sub(lambda match: self.names.get(match[0], match[0]), text))

    def shown(self, text: str) -> str:
        for name, stand_in in self.names.items():
            text = text.replace(stand_in, name)
        return text

    def pieces(self, whole: str, masked: str) -> Iterator[tuple[str, bool, list[int]]]:
        """Yields parts of `whole`, whether each is the first, and the template's own control token after it."""
        start = 0
        for match in [*control_pattern(self.tokenizer).finditer(masked), None]:
            end = len(whole) if match is None else match.start()
            control = [] if match is None else [int(self.tokenizer.convert_tokens_to_ids(match.group()))]  # type: ignore[arg-type]
            yield whole[start:end], not start, control
            start = end if match is None else match.end()


def _texts(value: Any) -> Iterator[str]:
    """Yields every text in a value but roles and names of keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(_texts(item) for key, item in value.items() if key != "role")
    elif isinstance(value, (list, tuple)):
        yield from chain.from_iterable(map(_texts, value))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Changes every text in a value."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: item if key == "role" else _mapped(item, change) for key, item in value.items()}
    if isinstance(value, Example):
        return Example(*(_mapped(item, change) for item in value))
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def check_eos(tokenizer: Any, role: str) -> None:
    """Refuses a tokenizer with which no response can end."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the {role}'s tokenizer {name_of(tokenizer)} has no EOS token: set tokenizer.eos_token to the token that"
            " ends an answer"
        )


def set_pad_token(tokenizer: PreTrainedTokenizerBase, name: str) -> str | None:
    """
    Lets the end-of-sequence token serve as padding where the tokenizer has no padding token.

    Returns a sentence for the log about the tokenizer of `name`, such as `"student"`, or `None` without a change.
    """
    if tokenizer.pad_token_id is not None:
        return None
    tokenizer.pad_token = tokenizer.eos_token
    return f"the {name}'s tokenizer has no padding token: its end-of-sequence token {tokenizer.eos_token!r} is used"


def depends_on_the_day(
    tokenizer: PreTrainedTokenizerBase, name: str, chat_template_kwargs: dict[str, Any] | None = None
) -> str | None:
    """
    Tells of a chat template that writes today's date into every prompt: a sentence for the log about the tokenizer of
    `name`, such as `"student"`, or `None`. Llama's template takes the date as `date_string`.
    """
    template = json.dumps(tokenizer.chat_template or "")
    takes_date = "date_string" in template
    if "strftime_now" not in template or (takes_date and "date_string" in (chat_template_kwargs or {})):
        return None
    remedy = (
        """set chat_template_kwargs={"date_string": "26 Jul 2024"}, or another date"""
        if takes_date
        else "change tokenizer.chat_template, or set prompt_style='plain'"
    )
    return (
        f"the {name}'s chat template writes today's date into the prompts, so that a run which goes on tomorrow, or a"
        f" teacher_cache, sees other prompts: {remedy}"
    )
