"""
Responses that the teacher writes once, to train on instead of the data's (sequence-level distillation).

    responses.jsonl    a row of the data a line, its response replaced, with example_id and finished
    about.json         what the responses depend on
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from ..data.formats import BESIDE, Columns, Example, detect_format, read_example
from ..data.prompts import Frame, answer_frame, prompt_tokens
from ..errors import UserError
from ..models.causal_lm import base_causal_lm
from ..models.generation import end_token_ids, read_response, sample
from ..utils.files import whole_lines, write_json


if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase


_T = TypeVar("_T")

RESPONSES_NAME = "responses.jsonl"
ABOUT_NAME = "about.json"


def write_responses(
    dataset: Dataset,
    load_teacher: Callable[[], nn.Module],
    teacher_tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    max_length: int,
    prompt_style: str,
    chat_template_kwargs: dict[str, Any] | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    on_bad_row: str = "stop",
    batch_size: int = 8,
    facts: dict[str, Any],
) -> Dataset:
    """
    Lets the teacher write a response to every prompt: sequence-level distillation (Kim and Rush 2016, arXiv
    1606.07947).

    The paper puts the mode of the teacher's distribution in its place, and finds it by beam search. This is the greedy
    approximation of the mode, whatever the teacher's own generation config says: it depends on no seed, so that after
    an interruption the teacher goes on as it would have.

    Batch by batch the rows are added to `folder/responses.jsonl`. Another call goes on after the last whole line, and
    reads a complete file without loading the teacher. Of several processes, one must call it before the others.

    Args:
        dataset ([`~datasets.Dataset`]): Rows in one of the formats of [`read_example`]; their responses can be empty.
        load_teacher (`Callable`): Returns the teacher; called only if responses are missing.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The teacher's tokenizer.
        folder (`str` or `Path`): Made if needed.
        max_length (`int`): The most tokens that prompt, response and EOS may have together.
        prompt_style (`str`), chat_template_kwargs (`dict`, *optional*), prompt_column, response_column (`str`,
            *optional*): As in [`tokenize_dataset`].
        on_bad_row (`str`, *optional*, defaults to `"stop"`):
            What to do about a row that can't be read: `"stop"` with an error, or `"skip"`: its response is `""`.
        batch_size (`int`, *optional*, defaults to `8`): Prompts at a time.
        facts (`dict[str, Any]`):
            What must agree, with the prompts and the settings above, for responses to be used again, such as the
            teacher's name. Values are those of JSON.

    Returns:
        [`~datasets.Dataset`]: the rows in the same order. Of the columns, those of the prompt and the response, under
        the names that they have; in the response the teacher's text, `""` where the prompt leaves no room for one;
        `example_id` (number of the row) and `finished` (false for a response that `max_length` ended, for
        `finished_column` of [`tokenize_dataset`]).

    Raises:
        UserError: If the folder holds responses of other facts, or a row can't be read.
    """
    from datasets import Dataset

    folder = Path(folder)
    columns = detect_format(dataset.column_names, prompt_column, response_column)
    facts = {
        **facts,
        "rows": len(dataset),
        "prompts": _hash_prompts(dataset, columns, on_bad_row),
        "max_length": max_length,
        "prompt_style": prompt_style,
        "chat_template_kwargs": chat_template_kwargs or {},
        "generation": "greedy",
    }
    _check_facts(folder, facts)
    path = folder / RESPONSES_NAME
    done = whole_lines(path)
    if done < len(dataset):
        frame = answer_frame(teacher_tokenizer, prompt_style, chat_template_kwargs)

        def prompt_of(row: dict[str, Any]) -> list[int]:
            return prompt_tokens(teacher_tokenizer, _read(row, columns), prompt_style, chat_template_kwargs)

        # Before the teacher is loaded, and not after hours of writing.
        prompts = [
            _readable(lambda row=row: prompt_of(row), index, on_bad_row)  # type: ignore[misc]
            for index, row in enumerate(dataset)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ABOUT_NAME, facts)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            _write_rows(
                dataset, done, file, columns, load_teacher(), teacher_tokenizer, max_length, frame, prompts, batch_size
            )
    with path.open(encoding="utf-8") as file:
        # Not with `from_json`, which reads a column of dates as dates, whatever features it is given.
        return Dataset.from_list([json.loads(line) for line in file], features=_features(dataset, columns))


def _readable(read: Callable[[], _T], index: int, on_bad_row: str) -> _T | None:
    """Returns what `read` makes of a row, or `None` for one that is skipped."""
    try:
        return read()
    except UserError as error:
        if on_bad_row == "skip":
            return None
        raise UserError(f"train data set, row {index}: {error}") from error


def _write_rows(
    dataset: Dataset,
    done: int,
    file: IO[str],
    columns: Columns,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    frame: Frame,
    prompts: list[list[int] | None],
    batch_size: int,
) -> None:
    from tqdm.auto import tqdm

    with tqdm(total=len(dataset), initial=done, desc="The teacher's responses") as bar:
        for start in range(done, len(dataset), batch_size):
            places = range(start, min(start + batch_size, len(dataset)))
            asked = {index: prompt for index in places if (prompt := prompts[index]) is not None}
            answers = _greedy_texts(teacher, tokenizer, list(asked.values()), max_length, frame) if asked else []
            texts = dict(zip(asked, answers))
            for index in places:
                row = dataset[index]
                # A row that can't be read stays as it is, to be counted where rows are tokenized.
                text, finished = texts.get(index, (None, True))
                kept = {name: row[name] for name in _columns(list(row), columns)}
                line = kept if text is None else _with_response(row, columns, text)
                line |= {"example_id": index, "finished": finished}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            file.flush()
            bar.update(len(places))


def _greedy_texts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_length: int, frame: Frame
) -> list[tuple[str, bool]]:
    from transformers import GenerationConfig

    ends = end_token_ids(tokenizer, base_causal_lm(model).generation_config, frame.end[-1])
    responses = sample(
        model,
        prompts,
        pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_token_ids=ends,
        max_new_tokens=[max_length - len(prompt) for prompt in prompts],
        generation_config=GenerationConfig(do_sample=False),
        batch_size=len(prompts),
    )
    return [read_response(tokenizer, response, ends, frame) for response in responses]


def _read(row: dict[str, Any], columns: Columns) -> Example:
    named = columns.kind == "pair"
    return read_example(
        row,
        prompt_column=columns.prompt if named else None,
        response_column=columns.response if named else None,
    )


def _hash_prompts(dataset: Dataset, columns: Columns, on_bad_row: str) -> str:
    prompts = hashlib.sha256()
    for index, row in enumerate(dataset):
        example = _readable(lambda row=row: _read(row, columns), index, on_bad_row)  # type: ignore[misc]
        content: list[Any] = [None] if example is None else [example.messages, example.prompt]
        if example is not None and example.template:
            content.append(example.template)
        prompts.update(json.dumps(content, default=str).encode())
    return prompts.hexdigest()


def _columns(names: list[str], columns: Columns) -> list[str]:
    own = [columns.prompt, columns.response, *(name for name in BESIDE if name in names)]
    if columns.kind == "instruction" and "input" in names:
        own.insert(1, "input")
    return list(dict.fromkeys(own))


def _with_response(row: dict[str, Any], columns: Columns, text: str) -> dict[str, Any]:
    response = row[columns.response]
    if isinstance(response, list) and response and isinstance(response[0], dict):
        # The last that is to be learnt; the teacher writes text, in the place of calls and thoughts too.
        index = max(i for i, m in enumerate(response) if m["role"] == "assistant" and m.get("weight") != 0)
        answer = {**dict.fromkeys(response[index]), "role": "assistant", "content": text}
        new: Any = [*response[:index], answer]
    else:
        new = text
    return {name: row[name] for name in _columns(list(row), columns)} | {columns.response: new}


def _features(dataset: Dataset, columns: Columns) -> Any:
    from datasets import Features, Value

    # Those of the source, except that a response which is missing or a list of references becomes a string.
    features = {name: dataset.features[name] for name in _columns(dataset.column_names, columns)}
    conversation = any(isinstance(row[0], dict) for row in dataset[:1][columns.response] if isinstance(row, list))
    if not conversation:
        features[columns.response] = Value("string")
    return Features({**features, "example_id": Value("int64"), "finished": Value("bool")})


def _check_facts(folder: Path, facts: dict[str, Any]) -> None:
    about = folder / ABOUT_NAME
    if not about.exists() and not (folder / RESPONSES_NAME).exists():
        return
    try:
        known = dict(json.loads(about.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{str(folder)!r} has no {ABOUT_NAME} that says whose responses are there: choose another folder or delete"
            " this one"
        ) from None
    for name in facts | known:
        if known.get(name) != facts.get(name):
            raise UserError(
                f"{str(folder)!r} holds a teacher's responses with {name}={known.get(name)!r}, which is now"
                f" {facts.get(name)!r}: choose another folder or delete this one"
            )
