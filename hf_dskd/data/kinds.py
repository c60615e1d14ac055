"""Rows and tokenizers in the kinds that people have them in."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, kind_of


logger = logging.getLogger(__name__)


def as_dataset(data: Any, parameter: str) -> Any:
    """
    Makes a dataset of lists of rows, data frames and torch datasets of rows; takes a dataset and `None` as they are.

    `parameter` is its name, for errors.
    """
    from datasets import Dataset, IterableDataset

    if data is None or isinstance(data, (Dataset, IterableDataset)):
        return data
    if isinstance(data, (str, os.PathLike)):
        name = os.fspath(data)
        reader = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(name).suffix)
        words = f"{name!r}" if reader is None else f"{reader!r}, data_files={name!r}"
        raise UserError(f"{parameter}={name!r} is a name: pass datasets.load_dataset({words}, split='train')")
    if isinstance(data, Mapping):
        if all(isinstance(split, (Dataset, IterableDataset)) for split in data.values()):
            splits = ", ".join(map(str, data))
            raise UserError(f"{parameter} is {kind_of(data)} of the splits {splits}: pass one of them")
        raise UserError(f"{parameter} is {kind_of(data)}: pass datasets.Dataset.from_dict(...), or a list of rows")
    library = type(data).__module__.partition(".")[0]
    if type(data).__name__ == "DataFrame" and library in ("pandas", "polars"):
        return Dataset.from_pandas(data, preserve_index=False) if library == "pandas" else Dataset.from_polars(data)
    if isinstance(data, type) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise UserError(f"{parameter} is {kind_of(data)}: pass a datasets.Dataset, or a list of rows")
    rows = [data[index] for index in range(len(data))]
    if not rows:
        raise UserError(f"{parameter} has no rows: pass at least one")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{parameter}: row {index} is {kind_of(row)}, not a mapping: write rows as"
                " {'prompt': ..., 'completion': ...}"
            )
    # Dataset.from_list has the columns of the first row alone.
    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except (ValueError, TypeError) as error:  # of pyarrow
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{parameter} is no table ({reason}): give a column values of one kind") from error


def as_datasets(data: Any, parameter: str) -> Any:
    """Makes a dataset, or several by name (see [`as_dataset`])."""
    if isinstance(data, Mapping):
        return {name: as_dataset(part, f"{parameter}[{name!r}]") for name, part in data.items()}
    return as_dataset(data, parameter)


def as_tokenizer(tokenizer: Any, parameter: str) -> Any:
    """Takes a tokenizer, that of a processor included."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, (str, os.PathLike)):
        name = os.fspath(tokenizer)
        raise UserError(f"{parameter}={name!r} is a name: pass AutoTokenizer.from_pretrained({name!r})")
    inner = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "eos_token_id") and callable(inner):
        logger.info("%s is a %s, of which its tokenizer is taken", parameter, type(tokenizer).__name__)
        return inner
    if not hasattr(tokenizer, "eos_token_id") or isinstance(tokenizer, type):
        wrapped = type(tokenizer).__module__.startswith("tokenizers")
        remedy = "PreTrainedTokenizerFast(tokenizer_object=...)" if wrapped else "AutoTokenizer.from_pretrained(...)"
        raise UserError(f"{parameter} is {kind_of(tokenizer)}, which is no tokenizer of transformers: pass {remedy}")
    return tokenizer
