"""
What a chat template makes of a conversation: the prompt, the answer in it, and the tokens that end the answer.

A template is asked rather than read: it renders the conversation up to the answer, and with it. What it puts after the
answer, up to its last control token, is what a model of this template stops with (`<end_of_turn>`, `<|im_end|>`), and
is often not the tokenizer's own EOS.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from ..errors import UserError
from .formats import LINK, Example, Message


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An answer that no template changes and no text has.
MARK = "Zq7theAnswer7qZ"
_PROBE = [{"role": "user", "content": "Hello"}]


class Turn(NamedTuple):
    """
    One model's view of an answer.

    Attributes:
        prompt (`str`): What comes before the answer, control tokens included.
        lead (`str`): White space that the template puts before the answer's first character.
        answer (`str`): The answer as it is written here.
        closing (`str`): What the template puts after the answer.
        verbatim (`bool`): Whether the answer is the text that was given, not what the template made of it.
    """

    prompt: str
    lead: str
    answer: str
    closing: str
    verbatim: bool = True


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the control tokens: those with a role of their own, and those that are added as special."""
    added = tokenizer.added_tokens_decoder.items()  # type: ignore[attr-defined]
    return {*tokenizer.all_special_ids, *(token for token, content in added if content.special)}


_PATTERNS: WeakKeyDictionary[PreTrainedTokenizerBase, re.Pattern[str]] = WeakKeyDictionary()


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds control tokens in text; nothing where the tokenizer has none."""
    if tokenizer not in _PATTERNS:
        texts = [str(tokenizer.convert_ids_to_tokens(token)) for token in special_ids(tokenizer)]
        # The longest first: one can begin another.
        found = "|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True)))
        _PATTERNS[tokenizer] = re.compile(found or r"(?!)")
    return _PATTERNS[tokenizer]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    """
    Renders messages by the tokenizer's chat template.

    Raises:
        `UserError`: if the template rejects them, whatever it raises: a template is a program of its own.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:
        name = repr(tokenizer.name_or_path or type(tokenizer).__name__)
        kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
        raise UserError(
            f"the chat template of {name} rejects the messages ({kind}{' '.join(str(error).split())}); change them,"
            " set tokenizer.chat_template, or set prompt_style='plain'"
        ) from error


class Template:
    """
    A tokenizer's chat template, with the settings that are the same for every row.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template.
        options (`dict[str, Any]`, *optional*): For the chat template, such as `{"enable_thinking": False}`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None):
        self.tokenizer, self.options = tokenizer, dict(options or {})

    @cached_property
    def frame(self) -> tuple[str, str]:
        """What it puts before and after the plain answer to a plain question."""
        example = Example(_PROBE, "", MARK)
        try:
            prompt = self.prompt(example)
        except UserError:  # it may take other messages than these
            return "", ""
        before, _, after = (self._with_answer(example, MARK) or prompt).partition(MARK)
        return (before[len(prompt) :] if before.startswith(prompt) else ""), after

    def prompt(self, example: Example) -> str:
        """Renders what comes before an answer, up to where the model begins to write."""
        asks = {"continue_final_message": True} if example.continued else {"add_generation_prompt": True}
        return self._render(example, example.messages, **asks)

    def turn(self, example: Example, text: str = MARK) -> Turn | None:
        """
        The turn of an answer that is written as `text`; `None` where the template writes it in another way.

        Where the template writes the conversation with the answer otherwise than the prompt, the prompt is what a
        model is asked with, and only the closing is taken from there.
        """
        prompt = self.prompt(example)
        written = self._with_answer(example, text)
        if written is None:
            return Turn(prompt, "", text, "")
        put, closing = self.frame
        if written != prompt + put + text + closing:
            before, _, closing = (self._with_answer(example, MARK) or "").partition(MARK)
            if before + text + closing != written:
                return None
            if not before.startswith(prompt):
                return Turn(prompt, "", text, closing)
            put = before[len(prompt) :]
        # What else the template writes there, such as an empty thought, is not the answer: it stays in the prompt.
        lead = put[len(put.rstrip()) :]
        return Turn(prompt + put[: len(put) - len(lead)], lead, text, closing)

    def written(self, example: Example) -> Turn | None:
        """The turn of an answer as the template writes it, calls of tools and thoughts included."""
        prompt, written = self.prompt(example), self._with_answer(example, example.response, example.extras)
        if written is None or not written.startswith(prompt):
            return None
        written = written[len(prompt) :]
        closing = self.frame[1]
        if not closing or not written.endswith(closing):
            # Of a call of tools, say, which another token can end.
            end = re.search(rf"\s*(?:{control_pattern(self.tokenizer).pattern})\s*\Z", written)
            closing = "" if end is None else end.group()
        answer = written[: len(written) - len(closing)]
        lead = answer[: len(answer) - len(answer.lstrip())]
        return Turn(prompt, lead, answer[len(lead) :], closing, verbatim=False)

    def renders(self, example: Example, without: Example) -> bool:
        """Whether the template writes something of the one that it doesn't of the other."""
        whole, part = (self._with_answer(e, e.response, e.extras) for e in (example, without))
        return whole != part

    def _with_answer(self, example: Example, text: str, extras: Mapping[str, Any] | None = None) -> str | None:
        answer = {"role": "assistant", "content": text, **(extras or {})}
        messages = example.messages
        if example.continued:
            answer = {**messages[-1], "content": messages[-1]["content"] + text}
            messages = messages[:-1]
        try:
            return self._render(example, [*messages, answer])
        except UserError:
            return None

    def _render(self, example: Example, messages: list[Message], **asks: Any) -> str:
        row = {name: value for name, value in example.template.items() if name != "chat_template_kwargs"}
        options = {**self.options, **example.template.get("chat_template_kwargs", {}), **row}
        return render(self.tokenizer, messages, **options, **asks)


def check_rendered(example: Example, templates: list[Template], sides: int) -> bool:
    """
    Raises a [`UserError`] for what no template writes, which would be dropped without a word.

    Args:
        example (`Example`): The row's last answer.
        templates (`list[Template]`): Those of student and teacher that are used; none where both read plain text.
        sides (`int`): How many models there are.

    Returns:
        `bool`: whether all models get all of it.
    """
    seen = True
    for what, whole, part in _parts(example):
        found = sum(template.renders(whole, part) for template in templates)
        if not found:
            chat = "" if templates else "set prompt_style='chat', "
            raise UserError(
                f"{what} can't be told to the model: no chat template writes it; {chat}take a model whose template"
                " does, or leave it out of the data"
            )
        seen = seen and found == sides
    return seen


def _parts(example: Example) -> Iterator[tuple[str, Example, Example]]:
    """What an example has beside roles and contents: its name, an example that has it, and the same without it."""
    for name in example.template.keys() - {"chat_template_kwargs"}:
        yield f"column {name!r}", example, example._replace(template=_without(example.template, name))
    for index, message in enumerate(example.messages):
        for key in message.keys() - {"role", "content", LINK}:
            what, before = f"{key!r} of message {index}", example.messages[:index]
            if message["role"] == "assistant":
                # Where it is the answer: some templates leave the thoughts behind an earlier answer out.
                extras = _without(message, "role", "content")
                whole = Example(before, "", message["content"], extras, template=example.template)
                yield what, whole, whole._replace(extras=_without(extras, key))
            else:
                messages = [*before, _without(message, key), *example.messages[index + 1 :]]
                yield what, example, example._replace(messages=messages)
    for key in example.extras.keys() - {LINK}:
        yield f"{key!r} of the answer", example, example._replace(extras=_without(example.extras, key))


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in keys}
