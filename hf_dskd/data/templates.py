"""
What a chat template makes of a conversation: the prompt, the answer in it, and the tokens that end the answer.

A template is asked rather than read: it renders the conversation up to the answer, and with it. What it puts after the
answer, up to its last control token, is what a model of this template stops with (`<end_of_turn>`, `<|im_end|>`), and
is often not the tokenizer's own EOS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from ..errors import UserError
from .formats import LINK, Example, Message
from .tokens import name_of


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An answer that no template changes and no text has.
MARK = "Zq7theAnswer7qZ"
_PROBE = [{"role": "user", "content": "Hello"}]
# A thought that a prompt begins, for the model to go on with.
_THOUGHT = re.compile(r"<[^<>/|\s]+>\s*\Z")


class Turn(NamedTuple):
    """One model's view of an answer."""

    prompt: str  # what the model is asked with, control tokens included
    lead: str  # what the template puts between that and the answer: white space, or an empty thought
    answer: str  # as it is written here
    closing: str  # what the template puts after the answer
    verbatim: bool = True  # the answer is the text that was given, not what the template made of it
    asked: bool = True  # the answer stands where the template asks for one


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the control tokens: those with a role of their own, and those that are added as special."""
    added = tokenizer.added_tokens_decoder.items()  # type: ignore[attr-defined]
    return {*tokenizer.all_special_ids, *(token for token, content in added if content.special)}


_PATTERNS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, re.Pattern[str]]] = WeakKeyDictionary()


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds control tokens in text; nothing where the tokenizer has none."""
    known = _PATTERNS.get(tokenizer)
    # Tokens can be added.
    if known is None or known[0] != len(tokenizer.added_tokens_decoder):  # type: ignore[attr-defined]
        texts = [str(tokenizer.convert_ids_to_tokens(token)) for token in special_ids(tokenizer)]
        # The longest first: one can begin another.
        found = "|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True)))
        known = len(tokenizer.added_tokens_decoder), re.compile(found or r"(?!)")  # type: ignore[attr-defined]
        _PATTERNS[tokenizer] = known
    return known[1]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    """Renders messages; whatever a template raises is a [`UserError`], for it is a program of its own."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:
        kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
        raise UserError(
            f"the chat template of {name_of(tokenizer)} rejects the messages ({kind}{' '.join(str(error).split())});"
            " change them, set tokenizer.chat_template, or set prompt_style='plain'"
        ) from error


class Template:
    """A tokenizer's chat template, with the settings of all rows, such as `{"enable_thinking": False}`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None):
        self.tokenizer, self.options = tokenizer, dict(options or {})
        self._rendered: dict[str, str] = {}

    @cached_property
    def frame(self) -> tuple[str, str]:
        """Finds what it puts before and after a plain answer."""
        for messages in (_PROBE, [{"role": "system", "content": "Hello"}, *_PROBE]):
            example = Example(messages, "", MARK)
            written = self._with_answer(example, MARK)
            # It may take other messages than these.
            if written is not None and MARK in written:
                before, _, after = written.partition(MARK)
                prompt = self.prompt(example)
                return (before[len(prompt) :] if before.startswith(prompt) else ""), after
        return "", ""

    def prompt(self, example: Example) -> str:
        """Renders what comes before an answer, up to where the model begins to write."""
        asks = {"continue_final_message": True} if example.continued else {"add_generation_prompt": True}
        return self._render(example, example.messages, **asks)

    def turn(self, example: Example, text: str = MARK) -> Turn | None:
        """Finds the turn of an answer that is written as `text`; `None` where the template writes it otherwise."""
        prompt = self.prompt(example)
        written = self._with_answer(example, text)
        if written is None:
            return Turn(prompt, "", text, "")
        put, closing = self.frame
        if written == prompt + put + text + closing:
            return Turn(prompt, put, text, closing)
        before, _, closing = (self._with_answer(example, MARK) or "").partition(MARK)
        if before + text + closing != written:
            return None
        if before.startswith(prompt):
            return Turn(prompt, before[len(prompt) :], text, closing)
        begun = _THOUGHT.search(prompt)
        if begun is not None and prompt.startswith(before):
            # The template asks for a thought, which this answer hasn't: not behind one that would never end.
            thought = text.lstrip().startswith(begun.group().strip())
            return Turn(before, "", text, closing, asked=thought)
        return Turn(prompt, "", text, closing)

    def written(self, example: Example) -> Turn | None:
        """Finds the turn of an answer as the template writes it, calls of tools and thoughts included."""
        prompt, written = self.prompt(example), self._with_answer(example, example.response, example.extras)
        if written is None or not written.startswith(prompt):
            return None
        begun = _THOUGHT.search(prompt)
        if begun is not None and begun.group().strip().replace("<", "</") in written[len(prompt) :]:
            # A thought that the prompt begins is the answer's all the same: the other model may begin none.
            prompt = prompt[: begun.start()]
        written = written[len(prompt) :]
        closing = self.frame[1]
        if not closing or not written.endswith(closing):
            # Of a call of tools, say, which another token can end.
            end = re.search(rf"\s*(?:{control_pattern(self.tokenizer).pattern})\s*\Z", written)
            closing = "" if end is None else end.group()
        answer = written[: len(written) - len(closing)]
        lead = answer[: len(answer) - len(answer.lstrip())]
        return Turn(prompt, lead, answer[len(lead) :], closing, verbatim=False)

    def foreign(self, example: Example, text: str) -> Turn:
        """Writes the turn of an answer in another format than the template's."""
        prompt = self.prompt(example)
        begun = _THOUGHT.search(prompt)
        if begun is not None and text.lstrip().startswith(begun.group().strip()):
            # The text begins the thought itself.
            prompt = prompt[: begun.start()]
        return Turn(prompt, "", text, self.frame[1])

    def renders(self, example: Example, without: Example) -> bool:
        """Tells whether the template writes something of the one that it doesn't of the other."""
        whole, part = (self._with_answer(e, e.response, e.extras) for e in (example, without))
        return whole is not None and whole != part

    def refusal(self, example: Example) -> str:
        """Says why the template takes no conversation like this one; nothing if it does."""
        try:
            self._render(example, _answered(example, example.response, example.extras))
        except UserError as error:
            return str(error)
        return ""

    def _with_answer(self, example: Example, text: str, extras: Mapping[str, Any] | None = None) -> str | None:
        try:
            return self._render(example, _answered(example, text, extras or {}))
        except UserError:
            return None

    def _render(self, example: Example, messages: list[Message], **asks: Any) -> str:
        row = {name: value for name, value in example.template.items() if name != "chat_template_kwargs"}
        options = {**self.options, **example.template.get("chat_template_kwargs", {}), **row, **asks}
        # A long conversation asks for the same again and again.
        key = json.dumps([messages, options], default=str)
        if key not in self._rendered:
            if len(self._rendered) >= 256:
                self._rendered.clear()
            try:
                self._rendered[key] = render(self.tokenizer, messages, **options)
            except UserError as error:
                # Some templates want the arguments of a call as JSON, most as what it says.
                as_json = _arguments_as_json(messages)
                if as_json == messages:
                    raise
                try:
                    self._rendered[key] = render(self.tokenizer, as_json, **options)
                except UserError:
                    raise error from None
        return self._rendered[key]


def _answered(example: Example, text: str, extras: Mapping[str, Any]) -> list[Message]:
    """Adds its answer to the conversation."""
    if not example.continued:
        return [*example.messages, {"role": "assistant", "content": text, **extras}]
    *before, last = example.messages
    return [*before, {**last, "content": last["content"] + text}]


def _arguments_as_json(messages: list[Message]) -> list[Message]:
    def changed(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not isinstance(function, Mapping) or isinstance(function.get("arguments", ""), str):
            return dict(call)
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [{**m, "tool_calls": list(map(changed, m["tool_calls"]))} if m.get("tool_calls") else m for m in messages]


def check_rendered(example: Example, templates: list[Template], sides: int) -> bool:
    """
    Raises a [`UserError`] for what no template writes, which would be dropped without a word.

    `example` is the row's last answer, `templates` are those of the `sides` models that use one. Returns whether all
    models get all of it.
    """
    seen = True
    for what, whole, part, plain in _parts(example):
        found = sum(template.renders(whole, part) for template in templates)
        if plain:
            found += sides - len(templates)
        if not found:
            reasons = [template.refusal(whole) for template in templates]
            if reasons and all(reasons):
                raise UserError(reasons[0])
            reason = next((f" ({reason})" for reason in reasons if reason), "")
            chat = "" if templates else "set prompt_style='chat', "
            raise UserError(
                f"{what} can't be told to the model: no chat template writes it{reason}; {chat}take a model whose"
                " template does, or leave it out of the data"
            )
        seen = seen and found == sides
    return seen


def _parts(example: Example) -> Iterator[tuple[str, Example, Example, bool]]:
    """
    Yields what an example has beside the user's and the assistant's words: its name, an example that has it, the same
    without it, and whether plain text has it. Of what is alike, as each result of a tool, the first.
    """
    for name in example.template.keys() - {"chat_template_kwargs"}:
        yield f"column {name!r}", example, example._replace(template=_without(example.template, name)), False
    seen = set()
    for index, message in enumerate(example.messages):
        role, content, before = message["role"], message["content"], example.messages[:index]
        for key in message.keys() - {"role", "content", LINK}:
            if (role, key) in seen:
                continue
            seen.add((role, key))
            if role == "assistant":
                # Where it is the answer: some templates leave the thoughts behind an earlier answer out.
                whole = Example(before, "", content, _without(message, "role", "content"), template=example.template)
                yield from _of_answer(whole, key, f"message {index}")
            else:
                messages = [*before, _without(message, key), *example.messages[index + 1 :]]
                yield f"{key!r} of message {index}", example, example._replace(messages=messages), False
        # There can be several system messages of which a template takes one.
        if content.strip() and role not in ("user", "assistant") and (role == "system" or role not in seen):
            seen.add(role)
            messages = [*before, {**message, "content": content + MARK}, *example.messages[index + 1 :]]
            yield f"message {index}, of role {role!r},", example, example._replace(messages=messages), True
    for key in example.extras.keys() - {LINK}:
        yield from _of_answer(example, key, "the answer")


def _of_answer(example: Example, key: str, where: str) -> Iterator[tuple[str, Example, Example, bool]]:
    """Yields the `key` of an answer, and its text beside that."""
    yield f"{key!r} of {where}", example, example._replace(extras=_without(example.extras, key)), False
    if example.response.strip():
        yield f"the text of {where} beside {key!r}", example, example._replace(response=example.response + MARK), False


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in keys}
