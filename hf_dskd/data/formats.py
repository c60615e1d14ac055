"""Reads one row of a data set, whatever its column names, into a prompt and a response."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from hf_dskd.errors import UserError


INSTRUCTION_TEMPLATE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
INSTRUCTION_INPUT_TEMPLATE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

Message = dict[str, str]


class Columns(NamedTuple):
    """
    The columns that hold the example.

    Attributes:
        kind (`str`):
            `"messages"`, `"pair"` (a prompt and a response) or `"instruction"` (wrapped in the Alpaca-style template).
        prompt (`str`):
            Column of the prompt. For `"messages"` it is the column that holds the whole conversation.
        response (`str`):
            Column of the response. For `"messages"` it is the same column.
    """

    kind: Literal["messages", "pair", "instruction"]
    prompt: str
    response: str


class Example(NamedTuple):
    """
    One row, read.

    Attributes:
        messages (`list[dict[str, str]]`):
            The conversation up to and without the answer, each message with `role` and `content`.
        prompt (`str`):
            The same as plain text, for models without a chat template.
        response (`str`):
            The answer; `""` where the row has none.
    """

    messages: list[Message]
    prompt: str
    response: str


def detect_format(
    column_names: Iterable[str], prompt_column: str | None = None, response_column: str | None = None
) -> Columns:
    """
    Finds the columns that hold the prompt and the response.

    Named columns win. Otherwise the first complete one of `messages`, `prompt`/`completion` and
    `instruction`/`output` is taken.

    Args:
        column_names (`Iterable[str]`):
            Columns of the data set.
        prompt_column (`str`, *optional*):
            Column of the prompt. If only the response column is named, it is `"prompt"`.
        response_column (`str`, *optional*):
            Column of the response. If only the prompt column is named, it is `"completion"`.

    Returns:
        `Columns`: the kind of format and its columns.

    Raises:
        `UserError`: if a needed column is missing.
    """
    names = list(column_names)
    if prompt_column is not None or response_column is not None:
        columns = Columns("pair", prompt_column or "prompt", response_column or "completion")
        for option, column in (("prompt_column", columns.prompt), ("response_column", columns.response)):
            if column not in names:
                raise UserError(
                    f"column {column!r} is missing: the data set has {_listed(names)}; set {option} to one of these"
                )
        return columns
    if "messages" in names:
        return Columns("messages", "messages", "messages")
    if "prompt" in names and "completion" in names:
        return Columns("pair", "prompt", "completion")
    if "instruction" in names and "output" in names:
        return Columns("instruction", "instruction", "output")

    partners = {"prompt": "completion", "completion": "prompt", "instruction": "output", "output": "instruction"}
    missing = next((partners[name] for name in partners if name in names), None)
    if missing is None:
        raise UserError(
            f"no column 'messages', 'prompt' and 'completion', or 'instruction' and 'output': the data set has "
            f"{_listed(names)}; rename them or set prompt_column and response_column"
        )
    raise UserError(
        f"column {missing!r} is missing: the data set has {_listed(names)}; add it or set prompt_column and "
        f"response_column"
    )


def read_example(
    example: Mapping[str, Any],
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
) -> Example:
    """
    Reads one row into messages, plain prompt text and response.

    Understood are `messages` (the last one is the assistant's answer), `prompt` and `completion` (strings, or lists of
    messages), `instruction`, optional `input` and `output` (a string, or a list of references whose first one is
    taken), and any two columns named by the user, which are read like `prompt` and `completion`.

    Args:
        example (`Mapping[str, Any]`):
            The row.
        prompt_column (`str`, *optional*):
            Column of the prompt.
        response_column (`str`, *optional*):
            Column of the response.

    Returns:
        `Example`: messages, prompt and response. The response is `""` if it is `None` in the row.

    Raises:
        `UserError`: if a column is missing or a value isn't of the expected type.
    """
    kind, prompt_column, response_column = detect_format(example, prompt_column, response_column)
    if kind == "instruction":
        instruction = _string(example[prompt_column], prompt_column)
        context = _string(example.get("input") or "", "input")
        response = _response_string(example[response_column], response_column)
        if not context:
            messages = [{"role": "user", "content": instruction}]
            return Example(messages, INSTRUCTION_TEMPLATE.format(instruction=instruction), response)
        messages = [{"role": "user", "content": f"{instruction}\n\n{context}"}]
        prompt = INSTRUCTION_INPUT_TEMPLATE.format(instruction=instruction, input=context)
        return Example(messages, prompt, response)

    if kind == "messages":
        *messages, answer = _messages(example[prompt_column], prompt_column)
        response = _answer(answer, prompt_column)
        if not messages:
            raise UserError(f"column {prompt_column!r} has no message before the answer; add the user's message")
        return Example(messages, _plain_text(messages), response)

    prompt, response = example[prompt_column], example[response_column]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, prompt_column)
    plain = prompt if isinstance(prompt, str) else _plain_text(messages)
    if not _is_conversation(response):
        return Example(messages, plain, _response_string(response, response_column))
    *turns, answer = _messages(response, response_column)
    messages += turns
    return Example(messages, _plain_text(messages) if turns else plain, _answer(answer, response_column))


def _answer(message: Message, column: str) -> str:
    if message["role"] != "assistant":
        raise UserError(
            f"the last message in column {column!r} has role {message['role']!r}; it must be the answer, with "
            f"role 'assistant'"
        )
    return message["content"]


def _plain_text(messages: list[Message]) -> str:
    turns = "".join(f"### {message['role'].capitalize()}:\n{message['content']}\n\n" for message in messages)
    return turns + "### Assistant:\n"


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _messages(value: Any, column: str) -> list[Message]:
    if not _is_conversation(value):
        raise UserError(
            f"column {column!r} holds {_shown(value)}; it must be a list of messages with role and content"
            + (" or a string" if column != "messages" else "")
        )
    messages = []
    for index, message in enumerate(value):
        role, content = message.get("role"), message.get("content")
        if content is None and role == "assistant" and index == len(value) - 1:
            content = ""
        for key, item in (("role", role), ("content", content)):
            if not isinstance(item, str):
                raise UserError(
                    f"{key!r} of message {index} in column {column!r} is {_shown(item)}; it must be a string"
                )
        messages.append({"role": role, "content": content})
    return messages


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"column {column!r} holds {_shown(value)}; it must be a string")
    return value


def _response_string(value: Any, column: str) -> str:
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else _string(value, column)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names) or "no columns"
