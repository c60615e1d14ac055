"""
Rows of a file: JSON lines, a JSON list, CSV, TSV or Parquet; of the first four also gzipped, in UTF-8 or UTF-16.

A cell of CSV is the text that is written there: `NA`, `None` and `007` too. What can't be read is named by its line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from ..errors import UserError


if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

logger = logging.getLogger(__name__)

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# Rows at a time, for the types of their columns.
ROWS = 10_000

# Told of a row that can't be read: of which kind that is, and a message that names file and line.
Refuse = Callable[[str, str], None]


def format_of(name: str) -> str | None:
    """Finds the suffix that says of what format a file is, without `.gz`; `None` if none of [`FORMATS`]."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in FORMATS else None


def load_file(name: str, *, streaming: bool = False, skip_bad: bool = False) -> Dataset | IterableDataset:
    """
    Loads the rows of a file whose path ends as one of [`FORMATS`], or as one of them and `.gz`.

    With `streaming` it is read while it is used; with `skip_bad` rows that can't be read are left out with a warning.

    Raises:
        UserError: It names the file, the line and the remedy.
    """
    from datasets import Dataset, IterableDataset, load_dataset
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    if not Path(name).is_file():
        raise UserError(f"dataset {name!r}: there is no such file; check the path")
    if not Path(name).stat().st_size:
        raise UserError(f'dataset {name!r} is empty: write one row a line, such as {{"prompt": ..., ...}}')
    if format_of(name) == ".parquet":
        try:
            count = ParquetFile(name).metadata.num_rows
        except ArrowException as error:
            raise UserError(f"{name!r} isn't a whole Parquet file ({error}): fetch or write it again") from None
        if not count:
            raise UserError(f"dataset {name!r} has no rows: write at least one")
        return load_dataset("parquet", data_files=name, split="train", streaming=streaming)
    given: dict[str, Any] = {"name": name, "skip_bad": skip_bad}
    if streaming:
        if next(rows_of(**given), None) is None:
            raise UserError(f"dataset {name!r} has no rows: write at least one")
        return IterableDataset.from_generator(rows_of, gen_kwargs=given)
    counts, first = Counter[str](), dict[str, str]()

    def note(kind: str, message: str) -> None:
        counts[kind] += 1
        first.setdefault(kind, message)

    features = _features(name, read_rows(name, note if skip_bad else _stop))
    for kind, count in counts.items():
        logger.warning("%r: %d rows are left out because each %s; the first: %s", name, count, kind, first[kind])
    # Kept on disk by what they are made of: another file of the same name is another one.
    stat = Path(name).stat()
    # Tuples, for lists would be taken for shards.
    given |= {"version": (stat.st_size, stat.st_mtime_ns), "columns": tuple(features)}
    return Dataset.from_generator(rows_of, features=features, gen_kwargs=given)


def rows_of(name: str, skip_bad: bool, version: Any = None, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Makes [`read_rows`] a generator that datasets can keep; all rows have these `columns`."""
    for row in read_rows(name, (lambda *_: None) if skip_bad else _stop):
        yield {**dict.fromkeys(columns), **row}


def read_rows(name: str, refuse: Refuse) -> Iterator[dict[str, Any]]:
    """Reads the rows of a text file; `refuse` raises an error, or else the row is left out."""
    read = {".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows}.get(str(format_of(name)), _json_lines)
    try:
        yield from read(name, refuse)
    except UnicodeDecodeError as error:
        raise UserError(_of_another_encoding(name, *_undecodable(name, error))) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{name!r} isn't a whole gzip file ({error}): fetch or pack it again") from None


def _stop(kind: str, message: str) -> None:
    raise UserError(message)


# ---- Text


def _open(name: str, newline: str = "\n") -> io.TextIOWrapper:
    """Opens the text of a file, gzipped or not, without its byte-order mark."""
    with open(name, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    binary: Any = gzip.open(name) if packed else open(name, "rb")
    # As JSON's own standard has it: marks, and where the zeros of the first characters are.
    encoding = json.detect_encoding(binary.read(4))
    binary.seek(0)
    return io.TextIOWrapper(binary, "utf-8-sig" if encoding == "utf-8" else encoding, newline=newline)


def _undecodable(name: str, error: UnicodeDecodeError) -> tuple[int, int, str]:
    """Finds line and byte where the text ends to be in its encoding, and that."""
    with _open(name) as file:
        encoding = file.encoding.removesuffix("-sig").upper()
        if encoding == "UTF-8":
            for number, line in enumerate(cast(IO[bytes], file.buffer), start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as found:
                    return number, line[found.start], encoding
    return 1, error.object[error.start], encoding


def _of_another_encoding(name: str, line: int, byte: int, encoding: str) -> str:
    return (
        f"{name!r}, line {line} isn't {encoding} (byte {byte:#04x}): convert the file, if it is Latin-1 with"
        f" `iconv -f latin1 -t utf-8 {name}`"
    )


# ---- JSON


def _json_lines(name: str, refuse: Refuse) -> Iterator[dict[str, Any]]:
    with _open(name) as file:
        if file.encoding == "utf-8-sig":
            # What isn't UTF-8 is the fault of its line, not the end of the file.
            file.reconfigure(errors="surrogateescape")
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{name!r}, line {number}"
                foreign = None if line.isascii() else re.search("[\udc80-\udcff]", line)
                if foreign is not None:
                    refuse("isn't UTF-8", _of_another_encoding(name, number, ord(foreign[0]) - 0xDC00, "UTF-8"))
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    refuse("isn't JSON", f"{where} isn't JSON ({error}): mend it, or delete that line")
                    continue
                if _is_row(row, line, where, refuse):
                    yield row


def _json_rows(name: str, refuse: Refuse) -> Iterator[dict[str, Any]]:
    """Reads a file that holds one list, columns of one length, or after all a row a line."""
    with _open(name) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Rows a line begin with a whole one.
        if text.lstrip()[:1] == "{" and "Extra data" in str(error):
            yield from _json_lines(name, refuse)
            return
        raise UserError(f"{name!r} isn't JSON ({error}): mend it, or write one object a line (.jsonl)") from None
    if isinstance(content, dict):
        cells = list(content.values())
        table = all(isinstance(column, list) and len(column) == len(cells[0]) for column in cells)
        if table and not any(isinstance(cell, dict) for column in cells for cell in column):
            content = [dict(zip(content, row)) for row in zip(*cells)]
        elif "\n" not in text.strip():
            content = [content]
        else:
            names = ", ".join(map(repr, content))
            raise UserError(f"{name!r} holds one object, with {names}: write a list of objects, one a row")
    if not isinstance(content, list):
        raise UserError(f"{name!r} holds {json.dumps(content)[:50]}: write a list of objects, one a row")
    for number, row in enumerate(content, start=1):
        if _is_row(row, text, f"{name!r}, row {number}", refuse):
            yield row


def _is_row(row: Any, text: str, where: str, refuse: Refuse) -> bool:
    if not isinstance(row, dict):
        refuse("isn't an object", f'{where} is {json.dumps(row)[:50]}, not an object: write {{"prompt": ..., ...}}')
        return False
    # Half of a pair of them is a character that no encoding can write. Only an escape can have made one.
    if re.search(r"\\u[dD][89a-fA-F]", text):
        half = re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))
        if half is not None:
            shown = f"\\u{ord(half[0]):x}"
            refuse("has half a character", f"{where} has half a character ({shown}): mend it, or leave it out")
            return False
    return True


# ---- CSV


def _csv_rows(name: str, refuse: Refuse) -> Iterator[dict[str, Any]]:
    delimiter = "\t" if format_of(name) == ".tsv" else ","
    # The module's own would refuse a long text.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a C long, of 32 bits on Windows
    with _open(name, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = _header(next(reader, []), name, delimiter)
            for number, cells in enumerate(reader, start=1):
                # An empty line.
                if not cells:
                    continue
                if len(cells) != len(header):
                    refuse(
                        "has another number of cells",
                        f"{name!r}, row {number} (line {reader.line_num}) has {len(cells)} cells, and the header"
                        f" {len(header)}: quote a text that has the delimiter or a line's end in it",
                    )
                    continue
                yield dict(zip(header, cells))
        except csv.Error as error:
            raise UserError(
                f'{name!r}, line {reader.line_num}: {error}: quote texts as "...", and write a quote in them twice'
            ) from None


def _header(cells: list[str], name: str, delimiter: str) -> list[str]:
    """Names the columns; one without a name, such as a data frame's index, is called by its place."""
    header = [cell.strip() or f"column {index}" for index, cell in enumerate(cells, start=1)]
    other = next((mark for mark in ";\t," if mark != delimiter and len(header) == 1 and mark in header[0]), None)
    if other is not None:
        remedy = "name the file .tsv" if other == "\t" else f"save it with {delimiter!r}"
        raise UserError(f"{name!r} has one column, {header[0]!r}: its delimiter seems to be {other!r}, {remedy}")
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise UserError(f"{name!r} has two columns {twice!r}: rename one of them")
    return header


# ---- Types


def _features(name: str, rows: Iterator[dict[str, Any]]) -> Features:
    """Finds the types of all columns; a column of several kinds keeps what JSON says of each cell."""
    import datasets
    import pyarrow as pa
    from datasets import Features

    types: dict[str, Any] = {}
    mixed: dict[str, int] = {}
    count = 0
    while part := list(islice(rows, ROWS)):
        for column in dict.fromkeys(column for row in part for column in row):
            cells = [row.get(column) for row in part]
            before = types.setdefault(column, pa.null())
            try:
                types[column] = _common(before, pa.array(cells).type)
            except (pa.ArrowException, OverflowError):
                mixed.setdefault(column, count)
        count += len(part)
    if not count:
        raise UserError(f"dataset {name!r} has no rows: write at least one")
    plain = Features.from_arrow_schema(pa.schema(list(types.items())))
    if mixed and not hasattr(datasets, "Json"):
        column, row = next(iter(mixed.items()))
        raise UserError(
            f"{name!r}: column {column!r} has values of several kinds (in the {ROWS:,} rows from row {row + 1:,} on):"
            " write them as one, such as text, or take datasets>=4.7"
        )
    return Features({column: datasets.Json() if column in mixed else plain[column] for column in types})


def _common(one: Any, other: Any) -> Any:
    """Finds a type of Arrow that holds values of both."""
    import pyarrow as pa

    schemas = [pa.schema([("column", kind)]) for kind in (one, other)]
    return pa.unify_schemas(schemas, promote_options="permissive").field("column").type
