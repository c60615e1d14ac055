"""Reads one row of a data set, whatever its column names, into a prompt and a response."""

import json
from collections.abc import Iterable, Mapping, Sequence
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

Message = dict[str, Any]
# Columns that are read beside those of the format.
SYSTEM, HISTORY = "system", "history"
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
BESIDE = (SYSTEM, HISTORY, *TEMPLATE_COLUMNS)
# Links a tool's message to its call, and says nothing that a model reads.
LINK = "tool_call_id"
# Arguments of `apply_chat_template` that no row can set.
_DECIDED = {
    *("conversation", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer"),
}


class Columns(NamedTuple):
    """The columns that hold the example: for `"messages"` both are the one that holds the whole conversation."""

    kind: Literal["messages", "pair", "instruction"]  # the last is wrapped in the Alpaca-style template
    prompt: str
    response: str


_FORMATS = (
    Columns("messages", "messages", "messages"),
    Columns("pair", "prompt", "completion"),
    Columns("instruction", "instruction", "output"),
)


class Example(NamedTuple):
    """
    One answer of a row, and what comes before it.

    Attributes:
        messages (`list[dict[str, Any]]`): The conversation up to and without the answer, each message with `role` and
            `content`, and whatever else it has for a chat template (`tool_calls`, `name`, `reasoning_content`, ...).
        prompt (`str`): The same as plain text, for models without a chat template.
        response (`str`): The answer; `""` where the row has none.
        extras (`dict[str, Any]`, *optional*):
            What the answer's message has beside role and content, such as `tool_calls`.
        continued (`bool`, *optional*, defaults to `False`):
            Whether the last of `messages` is an assistant's, which the response goes on with.
        template (`dict[str, Any]`, *optional*):
            What the row has for chat templates beside messages: `tools`, `documents`, `chat_template_kwargs`.
        ended (`bool`, *optional*, defaults to `False`):
            Whether an answer of the row had an end already, which was taken off.
    """

    messages: list[Message]
    prompt: str
    response: str
    extras: dict[str, Any] = {}
    continued: bool = False
    template: dict[str, Any] = {}
    ended: bool = False


def detect_format(
    column_names: Iterable[str], prompt_column: str | None = None, response_column: str | None = None
) -> Columns:
    """
    Finds the columns that hold the prompt and the response.

    Named columns win; where one of the two is named, the other is `"prompt"` or `"completion"`. Otherwise the first
    complete one of `messages`, `prompt`/`completion` and `instruction`/`output` is taken.

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
    for columns in _FORMATS:
        if {columns.prompt, columns.response} <= set(names):
            return columns
    partners = [pair for _, one, other in _FORMATS[1:] for pair in ((one, other), (other, one))]
    missing = next((partner for name, partner in partners if name in names), None)
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
    row: Mapping[str, Any], *, prompt_column: str | None = None, response_column: str | None = None
) -> Example:
    """Reads the last answer of a row; see [`read_examples`]."""
    return read_examples(row, prompt_column=prompt_column, response_column=response_column, train_on="last")[-1]


def read_examples(
    row: Mapping[str, Any],
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
    train_on: str = "all",
    ends: Sequence[str] = (),
) -> list[Example]:
    """
    Reads the answers of a row that are learnt, each with the messages and the plain text before it.

    Understood are `messages` (the last one is the assistant's answer), `prompt` and `completion` (strings, or lists of
    messages), `instruction`, optional `input` and `output` (a string, or a list of references whose first one is
    taken), and any two columns named by the user, which are read like `prompt` and `completion`. Beside them `system`
    (a system message), `history` (pairs of earlier instructions and answers), `tools`, `documents` and
    `chat_template_kwargs`. Contents that are lists of text parts are joined. A `weight` of 0 keeps an assistant's
    message from being learnt.

    Args:
        row (`Mapping[str, Any]`), prompt_column (`str`, *optional*), response_column (`str`, *optional*):
            The row, and columns of it that hold prompt and response.
        train_on (`str`, *optional*, defaults to `"all"`):
            `"all"` for every answer of `messages`, of a completion of several turns and of `history`; `"last"` for the
            last one alone.
        ends (`Sequence[str]`, *optional*):
            Tokens that end an answer, as text: taken off where an answer has them already.

    Returns:
        `list[Example]`: one at least, in the order of the conversation. A response is `""` if it is `None` in the row.

    Raises:
        `UserError`: if a column is missing, or a value isn't of the expected type or can't be encoded.
    """
    columns = detect_format(row, prompt_column, response_column)
    given, continued = _READERS[columns.kind](row, columns)
    turns = [_without_end(turn, ends) for turn in given]
    ended = turns != given
    if turns[0].message["role"] == "system" and row.get(SYSTEM):
        raise UserError(f"a column {SYSTEM!r} and a system message: leave one of them out")
    if row.get(SYSTEM):
        system = _string(row[SYSTEM], SYSTEM)
        plain = _plain("system", system) if columns.kind == "messages" else f"{system}\n\n"
        turns = [_Turn({"role": "system", "content": system}, plain), *turns]
    template = {name: value for name in TEMPLATE_COLUMNS if (value := _template_value(row, name))}
    roles = [turn.message["role"] for turn in turns]
    answers = [place for place in range(1, len(turns)) if roles[place] == "assistant" and turns[place].weight]
    if not answers:
        raise UserError("every answer of the conversation has weight 0: leave the row out, or weigh one with 1")
    return [
        _example(turns, index, continued and index == len(turns) - 1, template, ended)
        for index in (answers[-1:] if train_on == "last" else answers)
    ]


class _Turn(NamedTuple):
    message: Message
    # As plain text, what follows it in the conversation not included.
    plain: str
    # Before an answer to this one, as plain text.
    header: str = ""
    weight: int = 1
    # Whether it is over; the beginning of an answer isn't.
    closed: bool = True


def _without_end(turn: _Turn, ends: Sequence[str]) -> _Turn:
    """Takes an end off an assistant's turn that its text has already; one that goes on has none."""
    content = text = turn.message["content"]
    if turn.message["role"] != "assistant" or not turn.closed:
        return turn
    while end := next((end for end in sorted(ends, key=len, reverse=True) if text.rstrip().endswith(end)), None):
        shorter = text.rstrip().removesuffix(end)
        # "<s>old</s>" is a mark of HTML, whatever else "</s>" is.
        if end.startswith("</") and shorter.rfind(f"<{end[2:]}") > shorter.rfind(end):
            break
        text = shorter
    index = turn.plain.rfind(content) if content else 0
    plain = turn.plain[:index] + text + turn.plain[index + len(content) :]
    return turn if text == content else turn._replace(message={**turn.message, "content": text}, plain=plain)


def _example(turns: list[_Turn], index: int, continued: bool, template: dict[str, Any], ended: bool) -> Example:
    before, answer = turns[:index], turns[index].message
    plain = "".join(turn.plain for turn in before)
    return Example(
        messages=[turn.message for turn in before],
        prompt=plain if continued else plain + before[-1].header,
        response=answer["content"],
        extras={key: value for key, value in answer.items() if key not in ("role", "content")},
        continued=continued,
        template=template,
        ended=ended,
    )


# From a row to its turns, and whether the last one goes on with the one before it.
def _read_instruction(row: Mapping[str, Any], columns: Columns) -> tuple[list[_Turn], bool]:
    turns = []
    for instruction, answer in _history(row):
        turns += [_instruction(instruction), _Turn(_assistant(answer), f"{answer}\n\n")]
    instruction = _string(row[columns.prompt], columns.prompt)
    turns.append(_instruction(instruction, _string(row.get("input") or "", "input")))
    turns.append(_Turn(_assistant(_response_string(row[columns.response], columns.response)), ""))
    return turns, False


def _instruction(instruction: str, context: str = "") -> _Turn:
    if not context:
        return _Turn(_user(instruction), INSTRUCTION_TEMPLATE.format(instruction=instruction))
    plain = INSTRUCTION_INPUT_TEMPLATE.format(instruction=instruction, input=context)
    return _Turn(_user(f"{instruction}\n\n{context}"), plain)


def _read_messages(row: Mapping[str, Any], columns: Columns) -> tuple[list[_Turn], bool]:
    if row.get(HISTORY):
        raise UserError(f"a column {HISTORY!r} beside {columns.prompt!r}: put its turns into the messages")
    turns = _conversation(row[columns.prompt], columns.prompt)
    _check_answer(turns[-1].message, columns.prompt)
    if len(turns) == 1:
        raise UserError(f"column {columns.prompt!r} has no message before the answer; add the user's message")
    return turns, False


def _read_pair(row: Mapping[str, Any], columns: Columns) -> tuple[list[_Turn], bool]:
    prompt, response = row[columns.prompt], row[columns.response]
    turns = [
        _Turn(message, _plain(**message), _HEADER)
        for question, answer in _history(row)
        for message in (_user(question), _assistant(answer))
    ]
    if isinstance(prompt, str):
        text = _string(prompt, columns.prompt)
        turns.append(_Turn(_user(text), _plain("user", text), _HEADER) if turns else _Turn(_user(text), text))
    else:
        # What a prompt says an assistant has answered is given, not learnt.
        turns += [turn._replace(weight=0) for turn in _conversation(prompt, columns.prompt)]
    if not _is_conversation(response):
        last = turns[-1].message
        answer = _assistant(_response_string(response, columns.response))
        continued = last["role"] == "assistant"
        if continued:
            # The prompt is the beginning of the answer, and not closed.
            turns[-1] = _Turn(last, f"{_HEADER}{last['content']}", weight=0, closed=False)
        return [*turns, _Turn(answer, "")], continued
    answers = _conversation(response, columns.response)
    _check_answer(answers[-1].message, columns.response)
    plain = len(answers) == 1 and answers[0].message.keys() == {"role", "content"}
    if plain and turns[-1].message["role"] == "assistant":
        return _read_pair({**row, columns.response: answers[0].message["content"]}, columns)
    if len(answers) > 1 and isinstance(prompt, str):
        turns[-1] = _Turn(turns[-1].message, _plain("user", prompt), _HEADER)
    return [*turns, *answers], False


_READERS = {"instruction": _read_instruction, "messages": _read_messages, "pair": _read_pair}
_HEADER = "### Assistant:\n"


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _plain(role: str, content: str, **extras: Any) -> str:
    return f"### {role.capitalize()}:\n{content}\n\n"


def _check_answer(message: Message, column: str) -> None:
    if message["role"] != "assistant":
        raise UserError(
            f"the last message in column {column!r} has role {message['role']!r}; it must be the answer, with "
            f"role 'assistant'"
        )


def _history(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = row.get(HISTORY) or []
    for pair in pairs if isinstance(pairs, list) else [None]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(
                f"column {HISTORY!r} holds {_shown(pairs)}; it must be a list of pairs, [instruction, answer], or have"
                " another name"
            )
    return [(_string(question, HISTORY), _string(answer, HISTORY)) for question, answer in pairs]


def _template_value(row: Mapping[str, Any], name: str) -> Any:
    """Reads what a row has for chat templates in a column, from JSON where it is a string."""
    given = row.get(name)
    # What JSON says is nothing is so; `datasets` fills in others.
    value = _parsed(given) if isinstance(given, str) else _without_nothing(given)
    kind = dict if name == "chat_template_kwargs" else list
    if value and not isinstance(value, kind):
        raise UserError(f"column {name!r} holds {_shown(value)}; it must be a {kind.__name__}, or JSON of one")
    taken = _DECIDED & set(value or ()) if kind is dict else ()
    if taken:
        raise UserError(f"column {name!r} has {min(taken)!r}, which training decides: leave it out")
    return [_parsed(item) for item in value] if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    """Reads JSON in a string; leaves any other string as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _without_nothing(value: Any) -> Any:
    """Leaves out the keys that `datasets` fills in with `None` where another row has them."""
    if isinstance(value, Mapping):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _conversation(value: Any, column: str) -> list[_Turn]:
    if not _is_conversation(value):
        raise UserError(
            f"column {column!r} holds {_shown(value)}; it must be a list of messages with role and content"
            + (" or a string" if column != "messages" else "")
        )
    turns = []
    for index, given in enumerate(value):
        where = f"of message {index} in column {column!r}"
        if not isinstance(given, Mapping):
            raise UserError(f"message {index} in column {column!r} is {_shown(given)}; it must have role and content")
        message = {key: item for key, item in _without_nothing(given).items() if item not in ([], {})}
        weight = message.pop("weight", 1)
        if weight not in (0, 1):
            raise UserError(f"'weight' {where} is {_shown(weight)}; it must be 1, or 0 for an answer to leave alone")
        calls = message.get("tool_calls")
        content = _joined(message.get("content"))
        if content is None and message.get("role") == "assistant" and (calls or index == len(value) - 1):
            content = ""
        for key, item in (("role", message.get("role")), ("content", content)):
            if not isinstance(item, str):
                raise UserError(f"{key!r} {where} is {_shown(given.get(key))}; it must be a string")
            _check_text(item, f"{key!r} {where}")
        message |= {"content": content}
        if calls:
            message["tool_calls"] = _calls(calls, where)
        ordered = {"role": message.pop("role"), "content": message.pop("content"), **message}
        turns.append(_Turn(ordered, _plain(ordered["role"], content), _HEADER, int(weight)))
    return turns


def _joined(content: Any) -> Any:
    """Joins a content that is a list of text parts; leaves anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    whole = len(parts) == len(content) and all(isinstance(part, str) for part in parts)
    return "".join(map(str, parts)) if whole else content


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools with their arguments as a mapping, as chat templates write them; OpenAI's have JSON there."""
    calls = _parsed(calls)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"'tool_calls' {where} is {_shown(calls)}; it must be a list of calls")
    read = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, Mapping) and "arguments" in function:
            call = {**call, "function": {**function, "arguments": _parsed(function["arguments"])}}
        read.append(dict(call))
    return read


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"column {column!r} holds {_shown(value)}; it must be a string")
    _check_text(value, f"column {column!r}")
    return value


def _check_text(value: str, where: str) -> None:
    # A half of a pair of UTF-16 can be in a Python string, and in no file of text.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has a lone surrogate at character {error.start} ({value[error.start]!r}), which is no text:"
            " repair it where the data are made"
        ) from None


def _response_string(value: Any, column: str) -> str:
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else _string(value, column)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names) or "no columns"
