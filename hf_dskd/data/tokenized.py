"""Rows that were tokenized elsewhere, looked at once: what they say must fit the two tokenizers and itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

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
    """Yields rows of the batch that can't be right, with what is wrong."""
    import pyarrow.compute as pc

    lengths, ids = _lengths(batch, f"{prefix}input_ids"), batch[f"{prefix}input_ids"]
    tokens = pc.list_flatten(ids)
    # Tokens are many: only where one is wrong they are looked at one by one.
    if len(tokens) and not (tokens.null_count == 0 <= pc.min(tokens).as_py() <= pc.max(tokens).as_py() < size):
        for row, of_row in enumerate(ids.to_pylist()):
            for token in of_row or ():
                if token is None or not 0 <= token < size:
                    yield row, f"has the token {token} in {prefix}input_ids, and the tokenizer knows 0 to {size - 1}"
    prompts = _checked(batch, f"{prefix}prompt_length").to_pylist()
    if f"{prefix}spans" in batch.column_names:
        _lengths(batch, f"{prefix}spans")
        spans = [of_row or [] for of_row in batch[f"{prefix}spans"].to_pylist()]
    else:
        spans = [[prompt, length] for prompt, length in zip(prompts, lengths)]
    counts = {
        name: _lengths(batch, name) for name in (prefix + name for name in _PER_TOKEN) if name in batch.column_names
    }
    for row, (length, prompt, places) in enumerate(zip(lengths, prompts, spans)):
        if length > max_length:
            yield row, f"has {length} tokens in {prefix}input_ids, more than max_length={max_length} (raise that)"
        if prompt is None or not 0 <= prompt < length:
            yield row, f"has {prefix}prompt_length={prompt} of {length} tokens, which leaves no response"
        if not places or len(places) % 2:
            yield row, f"has {len(places)} numbers in {prefix}spans, which come in pairs"
        if places[0] != prompt:
            yield row, f"has {prefix}prompt_length={prompt}, and {prefix}spans begin at {places[0]}"
        if None in places or places != sorted(places) or places[-1] > length:
            yield row, f"has {prefix}spans that lie outside of its tokens or overlap"
        responses = sum(places[1::2]) - sum(places[::2])
        if responses < 1:
            yield row, f"has no response token in {prefix}spans"
        for name, of_column in counts.items():
            if of_column[row] != responses:
                yield row, f"has {of_column[row]} numbers in {name} for {responses} response tokens"


def _checked(batch: pa.Table, name: str, lists: bool = False) -> Any:
    """Takes a column of integers, or of lists of them."""
    import pyarrow.types as types

    kind = batch[name].type
    if not lists and not types.is_integer(kind):
        raise UserError(f"the column {name} of the tokenized data is of type {kind}, not integer: {_REMEDY}")
    if lists:
        # A column of empty lists alone is of no type.
        inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else None
        if inner is None or not (types.is_integer(inner) or types.is_null(inner)):
            raise UserError(
                f"the column {name} of the tokenized data is of type {kind}, not lists of integers: {_REMEDY}"
            )
    return batch[name]


def _lengths(batch: pa.Table, name: str) -> list[int]:
    import pyarrow.compute as pc

    return pc.fill_null(pc.list_value_length(_checked(batch, name, lists=True)), 0).to_pylist()


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
