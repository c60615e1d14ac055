"""The questions that an evaluation asks: the sets of the papers, from the hub or from files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.formats import Example

PROMPT_STYLES = ("alpaca", "plain", "chat")


class HubSet(NamedTuple):
    """Where a set of the papers lies on the hub, and how many of its examples, the first ones, the papers take."""

    repository: str
    file: str
    limit: int | None = None


# As MiniLLM (arXiv 2306.08543) publishes them. Of the two large ones the papers take the part with the long
# references, and DSKD's scripts take no more than this of the larger one.
HUB_SETS = {
    "dolly": HubSet("MiniLLM/dolly", "valid.jsonl"),
    "self_inst": HubSet("MiniLLM/self-inst", "valid.jsonl"),
    "vicuna": HubSet("MiniLLM/Vicuna", "valid.jsonl"),
    "s_ni": HubSet("MiniLLM/sinst", "11_/valid.jsonl"),
    "un_ni": HubSet("MiniLLM/uinst", "11_/valid.jsonl", 10_000),
}


class Question(NamedTuple):
    """One example: its prompt, as messages and as text, and right answers, one at least."""

    example: Example
    references: list[str]


class QuestionSet(NamedTuple):
    """
    A set of examples, in the order of its file.

    `name` is how it is called in the scores and in the names of files, `source` the file, or the repository on the hub
    and its file, and `sha256` that of the file.
    """

    name: str
    source: str
    sha256: str
    questions: list[Question]


def parse_sets(text: str) -> dict[str, str | None]:
    """
    Reads names of sets such as `"dolly=path/test.jsonl,vicuna"`, each with a file or, from the hub, with `None`.

    Raises:
        UserError: For a name that is no set on the hub and has no file, can't name a file, or is there twice.
    """
    sets: dict[str, str | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, path = part.partition("=")
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(f"--sets has {name!r}, which can't name a file: use letters, digits and . _ + -")
        if name in sets:
            raise UserError(f"--sets has {name!r} twice: name it once")
        if equals and not path:
            raise UserError(f"--sets has {part!r} without a file: write {name}=FILE.jsonl")
        if not equals and name not in HUB_SETS:
            raise UserError(
                f"--sets has {name!r}, which isn't one of {', '.join(HUB_SETS)}: give it a file, as {name}=FILE.jsonl"
            )
        sets[name] = path or None
    if not sets:
        raise UserError(f"--sets is empty: name some of {', '.join(HUB_SETS)}, or name=FILE.jsonl")
    return sets


def load_set(name: str, path: str | None = None, limit: int | None = None) -> QuestionSet:
    """
    Reads a set from a JSONL file (see [`read_question`]) or, without one, by its name in `HUB_SETS` from the hub.

    With a `limit` the first ones only.

    Raises:
        UserError: If the set can't be had, or for the first row that is wrong, with its file and line.
    """
    if path is not None:
        file, source = Path(path), path
    else:
        hub_set = HUB_SETS[name]
        file, source = _fetch(name, hub_set), f"{hub_set.repository}/{hub_set.file}"
        limits = [number for number in (limit, hub_set.limit) if number is not None]
        limit = min(limits, default=None)
    if not file.is_file():
        raise UserError(f"{name}={source} isn't a file: name a JSONL file")
    data = file.read_bytes()
    questions: list[Question] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if limit is not None and len(questions) == limit:
            break
        if not line.strip():
            continue
        try:
            questions.append(read_question(_row(line)))
        except UserError as error:
            raise UserError(f"{source}, line {number}: {error}") from None
    if not questions:
        raise UserError(f"{source} has no examples: name another file for {name}")
    return QuestionSet(name, source, hashlib.sha256(data).hexdigest(), questions)


def read_question(row: Mapping[str, Any]) -> Question:
    """
    Reads one row: `instruction` and, where there is one, `input`; or, without an instruction, a `prompt`, which is
    used as it is. And `output`, a string or a list of them.

    Raises:
        UserError: If something is missing, empty, or no string.
    """
    from ..data.formats import read_example

    references = row.get("output")
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise UserError("'output' must be a string or a list of strings: the references to compare with")
    if not references or not all(text.strip() for text in references):
        raise UserError("'output' has an empty reference: give every example a right answer, or leave the row out")
    column = "prompt" if row.get("instruction") is None else "instruction"
    prompt = row.get(column)
    if not isinstance(prompt, str) or not prompt.strip():
        missing = "neither 'instruction' nor 'prompt'" if prompt is None else f"{column!r} is empty or no string"
        raise UserError(f"{missing}: give the row a prompt")
    if column == "prompt":
        return Question(read_example({"prompt": prompt, "completion": references[0]}), references)
    given = {"instruction": prompt, "input": row.get("input"), "output": references}
    return Question(read_example(given), references)


def question_tokens(
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    prompt_style: str,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """
    Tokenizes a prompt as in training.

    Style `"alpaca"` wraps an instruction in MiniLLM's template (training's `prompt_style="plain"`), `"plain"` takes
    instruction and input alone, `"chat"` renders the tokenizer's chat template with `chat_template_kwargs`. A row's
    own `prompt` stays as it is with the first two.

    Raises:
        UserError: If there is no chat template where one is asked for.
    """
    from ..data.prompts import name_of, prompt_tokens

    example = question.example
    if prompt_style == "chat":
        if not tokenizer.chat_template:
            raise UserError(
                f"tokenizer {name_of(tokenizer)} has no chat template: evaluate with --prompt_style alpaca or plain,"
                " or set tokenizer.chat_template and save it"
            )
        return prompt_tokens(tokenizer, example, "chat", chat_template_kwargs)
    if prompt_style == "plain":
        example = example._replace(prompt=example.messages[0]["content"])
    return prompt_tokens(tokenizer, example, "plain")


def _fetch(name: str, hub_set: HubSet) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_set.repository, hub_set.file, repo_type="dataset"))
    except Exception as error:  # the hub's client raises some thirty kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} can't be had from {hub_set.repository} on the hub ({type(error).__name__}: {reason}): give a"
            f" file, as --sets {name}=FILE.jsonl, or check the network"
        ) from None


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"no JSON ({error}): write one object a line, in UTF-8") from None
    if not isinstance(row, dict):
        raise UserError("no JSON object: write one with 'instruction', 'input' and 'output', or 'prompt' and 'output'")
    return row
