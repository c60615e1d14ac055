"""The examples of a run: where they come from, and which of them are trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import FORMATS, format_of, load_file
from ..errors import UserError
from ..offline.python_functions import PYTHON_FUNCTIONS, load_python_functions


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..config import DSKDConfig
    from .settings import Run


def load_data(run: Run) -> tuple[Dataset, Dataset | None]:
    """
    Loads training and evaluation examples from the hub, a folder, or a file (see [`~hf_dskd.data.files`]).

    `python_functions`, where no folder has that name, is [`~hf_dskd.offline.python_functions.load_python_functions`].
    """
    from datasets import Dataset, DatasetDict, IterableDatasetDict, load_from_disk

    name = run.script.dataset_name
    if not name:
        raise UserError(
            f"dataset_name is not set: name a dataset on the hub, a folder, a .jsonl file or {PYTHON_FUNCTIONS} with"
            " --dataset_name, or a configuration file that does with --config"
        )
    streaming = run.script.dataset_streaming
    if streaming:
        check_streaming(run.config)
    if name == PYTHON_FUNCTIONS and not Path(name).exists():
        return choose_splits(run, standard_library(run))
    if format_of(name) is None and Path(name).is_file():
        raise UserError(
            f"dataset {name!r} can't be read: the formats are {', '.join(FORMATS)}, all but the last also .gz"
        )
    try:
        if format_of(name) is not None:
            of_kind: Any = IterableDatasetDict if streaming else DatasetDict
            skip_bad = run.config.on_bad_row == "skip"
            data = of_kind(train=load_file(name, streaming=streaming, skip_bad=skip_bad))
        elif (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            data = load_from_disk(name)
        else:
            data = load_named(name, run.script.dataset_config, streaming)
    except UserError:
        raise
    except Exception as error:  # the hub's client and the file readers raise some thirty kinds
        raise UserError(f"dataset {name!r} can't be loaded: {_why_not_loaded(name, error)}") from None
    splits = DatasetDict(train=data) if isinstance(data, Dataset) else data
    return choose_splits(run, splits)


def load_named(name: str, config: str | None, streaming: bool) -> Any:
    """Loads a dataset of the hub or of a folder. Cells of CSV are what is written there: `NA` is a word."""
    from datasets import load_dataset, load_dataset_builder

    kind = type(load_dataset_builder(name, config).config).__name__
    return load_dataset(name, config, streaming=streaming, **({"na_filter": False} if kind == "CsvConfig" else {}))


def _why_not_loaded(name: str, error: Exception) -> str:
    """Says what stood in the way of a dataset, and what to do about it."""
    from huggingface_hub import constants

    # datasets puts what was wrong with a file into the cause of an error that says less.
    reason = " ".join(str(error.__cause__ or error).split())[:200]
    local = "give --dataset_name a local .jsonl, .csv or .parquet file"
    if "gated" in reason:
        return (
            f"it is gated; accept its conditions at {constants.ENDPOINT}/datasets/{name}, then `hf auth login` or set"
            f" HF_TOKEN, or {local}"
        )
    if Path(name).suffix or Path(name).is_dir() or name.count("/") > 1:
        return f"{type(error).__name__}: {reason}; check the path and the file"
    offline = [
        flag for flag in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(flag, "0") not in ("0", "")
    ]
    if offline:
        return (
            f"it was never downloaded, and {offline[0]}={os.environ[offline[0]]} keeps from it; unset that, or {local}"
        )
    if type(error).__name__ == "DatasetNotFoundError":
        return f"the hub has none of that name, or it is private; check the name, `hf auth login`, or {local}"
    return f"{type(error).__name__}: {reason}; check the network and your access to it, or {local}"


def check_streaming(config: DSKDConfig) -> None:
    """Refuses what needs to know all examples, or how many there are, before the first of a stream is read."""
    for name, wanted, why in (
        ("max_steps", config.max_steps > 0, "says when to stop, for a stream has no length: set it"),
        ("teacher_cache", config.teacher_cache is None, "needs the number of examples: leave one of them out"),
    ):
        if not wanted:
            raise UserError(f"dataset_streaming=True: {name}={getattr(config, name)!r} {why}")


def standard_library(run: Run) -> DatasetDict:
    """Takes functions of the standard library, under the names of the splits that are asked for."""
    from datasets import DatasetDict

    options = run.options
    if options.train_size is None:
        raise UserError(f"train_size is not set: say how many of {PYTHON_FUNCTIONS} to train on, such as 320")
    longest = options.maximum_characters
    data = load_python_functions(options.train_size, options.held_out_size, maximum=longest, maximum_prompt=longest)
    splits = DatasetDict({run.script.dataset_train_split: data["train"]})
    if options.held_out_size:
        splits[run.script.dataset_test_split] = data["held_out"]
    return splits


def choose_splits(run: Run, data: Any) -> tuple[Any, Any]:
    """
    Chooses the training split, with its columns renamed, and the test split or examples held out.

    Of a stream the first `held_out_size` examples are held out, and kept in memory.
    """
    from datasets import Dataset

    train_name, test_name = run.script.dataset_train_split, run.script.dataset_test_split
    if train_name not in data:
        raise UserError(f"dataset_train_split={train_name!r} isn't there: the splits are {', '.join(data)}")
    # Without a word about it, there may be none.
    if test_name != "test" and (test_name not in data or test_name == train_name):
        why = "is what is trained on" if test_name == train_name else f"isn't there: the splits are {', '.join(data)}"
        raise UserError(f"dataset_test_split={test_name!r} {why}; name another, or leave it out and set held_out_size")
    streamed = not hasattr(data[train_name], "__len__")
    if run.options.rename_columns:
        pairs = [pair.partition("=") for pair in run.options.rename_columns.split(",")]
        names = data[train_name].column_names or list(next(iter(data[train_name])))
        for old, _, new in pairs:
            if old not in names or not new:
                raise UserError(
                    f"rename_columns={run.options.rename_columns!r}: write old=new,old=new with columns out of"
                    f" {', '.join(names)}"
                )
        data = data.rename_columns({old: new for old, _, new in pairs})
    train, held_out, size = data[train_name], None, run.options.train_size
    held_out_size = run.options.held_out_size
    if test_name in data and test_name != train_name:
        held_out = data[test_name]
    elif held_out_size and streamed:
        held_out, train = Dataset.from_list(list(train.take(held_out_size))), train.skip(held_out_size)
    elif held_out_size:
        if held_out_size >= len(train):
            raise UserError(
                f"held_out_size={held_out_size} leaves nothing of {len(train)} examples to train on: set it to less,"
                f" such as {max(len(train) // 10, 1)}"
            )
        parts = train.train_test_split(held_out_size, seed=0)
        train, held_out = parts["train"], parts["test"]
    if size is not None and streamed:
        train = train.take(size)
    elif size is not None:
        if not 0 < size <= len(train):
            raise UserError(f"train_size={size}: there are {len(train)} examples to train on")
        train = train.select(range(size))
    return train, held_out
