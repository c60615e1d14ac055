"""Rows that were tokenized elsewhere, looked at once: what they say must fit the two tokenizers and itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError


if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

_REMEDY = "tokenize the text with hf_dskd.tokenize_dataset, or pass the text itself"
# Columns with one number per response token; the others are there for some methods only.
_PER_TOKEN = ("byte_ends", "chunk_ids", "partners")


def check_tokenized(
    dataset: Dataset | IterableDataset,
    split: str,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    max_length: int,
) -> Dataset | IterableDataset:
    """
    Checks a dataset with the columns of [`tokenize_dataset`]: a map-style one now, a stream as it is read.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Returned, a stream so that it is checked.
        split (`str`): Its name, for errors.
        tokenizers (`Mapping`): The student's tokenizer as `""`, the teacher's as `"teacher_"`, for methods with one.
        max_length (`int`): Most tokens that a row may have.

    Raises:
        UserError: For the first row that can't be right, by its number.
    """
    sizes = {prefix: max(tokenizer.get_vocab().values()) + 1 for prefix, tokenizer in tokenizers.items()}
    columns = dataset.column_names
    if columns is not None:
        _check_columns(columns, split, sizes)
    if not hasattr(dataset, "__len__"):

        def check_row(row: dict[str, Any], index: int) -> dict[str, Any]:
            import pyarrow as pa

            _check_columns(list(row), split, sizes)
            _check_batch(pa.Table.from_pylist([row]), index, split, sizes, max_length)
            return row

        return dataset.map(check_row, with_indices=True)  # type: ignore[call-arg]
    if not len(dataset):
        raise UserError(f"the {split} data has no rows: pass at least one")
    names = [name for name in columns or () if name.removeprefix("teacher_") in _READ]
    start = 0
    for batch in dataset.select_columns(names).with_format("arrow").iter(1000):
        _check_batch(batch, start, split, sizes, max_length)
        start += len(batch)
    if len(tokenizers) == 2:
        _check_texts([dataset[index] for index in range(min(5, len(dataset)))], split, tokenizers)
    return dataset


_READ = ("input_ids", "prompt_length", "spans", *_PER_TOKEN)


def _check_columns(columns: list[str], split: str, sizes: Mapping[str, int]) -> None:
    needed = [f"{prefix}{name}" for prefix in sizes for name in ("input_ids", "prompt_length", "byte_ends")]
    missing = [name for name in (*needed, "example_id", "response_bytes") if name not in columns]
    if missing:
        raise UserError(f"the {split} data is tokenized, without the columns {', '.join(missing)}: {_REMEDY}")


def _check_batch(batch: pa.Table, start: int, split: str, sizes: Mapping[str, int], max_length: int) -> None:
    for prefix, size in sizes.items():
        for row, what in _faults(batch, prefix, size, max_length):
            raise UserError(f"the {split} data is tokenized, and its row {start + row} {what}: {_REMEDY}")


def _faults(batch: pa.Table, prefix: str, size: int, max_length: int) -> Iterator[tuple[int, str]]:
    """Yields rows of the batch that can't be right, the first of each kind, with what is wrong."""
    ids, lengths = _lists(batch, f"{prefix}input_ids")
    for token in _first(~((ids >= 0) & (ids < size))):
        what = f"has the token {ids[token]} in {prefix}input_ids, and the tokenizer knows 0 to {size - 1}"
        yield _row_of(token, lengths), what
    for row in _first(lengths > max_length):
        yield row, f"has {lengths[row]} tokens in {prefix}input_ids, more than max_length={max_length} (raise that)"
    prompt = _numbers(batch, f"{prefix}prompt_length")
    for row in _first(~((prompt >= 0) & (prompt < lengths))):
        yield row, f"has {prefix}prompt_length={prompt[row]} of {lengths[row]} tokens, which leaves no response"
    responses = lengths - prompt
    if f"{prefix}spans" in batch.column_names:
        spans, counts = _lists(batch, f"{prefix}spans")
        for row in _first((counts == 0) | (counts % 2 == 1)):
            yield row, f"has {counts[row]} numbers in {prefix}spans, which come in pairs"
        begins = np.cumsum(counts) - counts
        for row in _first(spans[begins] != prompt):
            yield row, f"has {prefix}prompt_length={prompt[row]}, and {prefix}spans begin at {spans[begins[row]]}"
        limit = np.repeat(lengths, counts)
        place = np.arange(len(spans)) - np.repeat(begins, counts)
        rising = np.concatenate([[True], spans[1:] >= spans[:-1]])[: len(spans)]
        for number in _first(~((spans >= 0) & (spans <= limit) & (rising | (place == 0)))):
            yield _row_of(number, counts), f"has {prefix}spans that lie outside of its tokens or overlap"
        responses = np.add.reduceat(np.where(place % 2 == 1, spans, -spans), begins)
        for row in _first(responses < 1):
            yield row, f"has no response token in {prefix}spans"
    for name in _PER_TOKEN:
        if f"{prefix}{name}" in batch.column_names:
            _, counts = _lists(batch, f"{prefix}{name}")
            for row in _first(counts != responses):
                yield row, f"has {counts[row]} numbers in {prefix}{name} for {responses[row]} response tokens"


def _first(wrong: np.ndarray) -> list[int]:
    return [int(place) for place in np.flatnonzero(wrong)[:1]]


def _row_of(place: int, lengths: np.ndarray) -> int:
    """Finds the row that an element of a flat column belongs to."""
    return int(np.searchsorted(np.cumsum(lengths), place, side="right"))


def _numbers(batch: pa.Table, name: str) -> np.ndarray:
    import pyarrow as pa

    column = batch[name]
    if not pa.types.is_integer(column.type):
        raise UserError(f"the column {name} of the tokenized data is of type {column.type}, not integer: {_REMEDY}")
    # A missing number is NaN, which no comparison is true of.
    return column.to_numpy()


def _lists(batch: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads all numbers of a column of lists, and how many each row has."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = batch[name]
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    # A column of empty lists alone is of no type.
    if not lists or not (pa.types.is_integer(column.type.value_type) or pa.types.is_null(column.type.value_type)):
        raise UserError(
            f"the column {name} of the tokenized data is of type {column.type}, not lists of integers: {_REMEDY}"
        )
    return pc.list_flatten(column).to_numpy(), pc.fill_null(pc.list_value_length(column), 0).to_numpy()


def _check_texts(rows: list[dict[str, Any]], split: str, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """
    Checks that the first responses say the same to both tokenizers; those of another pair say anything.

    A tokenizer may lose characters, so that it is what the shorter text has of the longer that counts.
    """
    shown = None
    for index, row in enumerate(rows):
        responses = (row[f"{prefix}input_ids"][int(row[f"{prefix}prompt_length"]) :] for prefix in tokenizers)
        student, teacher = (
            str(tokenizer.decode(list(map(int, response)), skip_special_tokens=True))[:400]
            for tokenizer, response in zip(tokenizers.values(), responses)
        )
        blocks = SequenceMatcher(None, student, teacher, autojunk=False).get_matching_blocks()
        if sum(block.size for block in blocks) >= 0.6 * min(len(student), len(teacher)):
            return
        shown = shown or (index, student[:40], teacher[:40])
    if shown is not None:
        raise UserError(
            f"the {split} data is tokenized, and the response of its row {shown[0]} is {shown[1]!r} to the student's"
            f" tokenizer and {shown[2]!r} to the teacher's: tokenize the text with these two"
        )
