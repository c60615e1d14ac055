"""Files of rows as people have them: the right rows, or one line that names file, row and remedy."""

import gzip
import json
import logging
from types import SimpleNamespace

import pytest

from hf_dskd import UserError
from hf_dskd.data.files import format_of, load_file
from hf_dskd.run.data import load_data


ROWS = [
    {"prompt": "Größe?", "completion": "naïve, “quoted”\nand 🎉"},
    {"prompt": "NA", "completion": "None"},
    {"prompt": "null", "completion": "007"},
    {"prompt": "nan", "completion": "1e5"},
    {"prompt": "", "completion": "true"},
    {"prompt": "N/A", "completion": 'a "word"\tand\u2028more'},
]


def csv_text(rows, delimiter=","):
    def cell(text):
        return '"' + text.replace('"', '""') + '"' if set(text) & set('"\n\r' + delimiter) else text

    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(delimiter.join(map(cell, line)) + "\n" for line in lines)


def lines_of(rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


TEXTS = {
    "rows.csv": csv_text(ROWS),
    "rows.tsv": csv_text(ROWS, "\t"),
    "rows.jsonl": lines_of(ROWS),
    "more.jsonl": "\n\n" + lines_of(ROWS, ensure_ascii=False).replace("\n", "\n \n"),
    "rows.ndjson": lines_of(ROWS).rstrip(),
    "windows.jsonl": lines_of(ROWS).replace("\n", "\r\n"),
    "rows.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "lines.json": lines_of(ROWS),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}, indent=1),
}


def read(name, **options):
    return [dict(row) for row in load_file(str(name), **options)]


def refused(name, *words, **options):
    with pytest.raises(UserError) as error:
        read(name, **options)
    text = str(error.value)
    assert "\n" not in text and str(name) in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("name", TEXTS)
def test_the_same_rows_however_they_are_written(tmp_path, name):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        content = TEXTS[name].encode(encoding)
        for file, written in ((name, content), (f"{name}.gz", gzip.compress(content)), (name, gzip.compress(content))):
            (tmp_path / file).write_bytes(written)
            assert read(tmp_path / file, streaming=True) == ROWS, (encoding, file)
    # From then on they are in a table.
    assert read(tmp_path / name) == ROWS


def test_line_ends_of_csv(tmp_path):
    rows = [row for row in ROWS if "\n" not in row["completion"]]
    for end in ("\r\n", "\r", "\n\n"):
        (tmp_path / "rows.csv").write_bytes(csv_text(rows).replace("\n", end).encode())
        assert read(tmp_path / "rows.csv", streaming=True) == rows


def test_a_changed_file_of_the_same_name_is_read_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    for number in (1, 2):
        path.write_text(lines_of([{"prompt": "a", "completion": str(number)}]))
        assert read(path) == [{"prompt": "a", "completion": str(number)}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b"", ("is empty",)),
        ("a.csv", b"", ("is empty",)),
        ("a.json", b"", ("is empty",)),
        ("a.parquet", b"", ("is empty",)),
        ("a.jsonl", b"\n \n", ("has no rows",)),
        ("a.json", b"[]", ("has no rows",)),
        ("a.csv", b"prompt,completion\n", ("has no rows",)),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), ("has no rows",)),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "comp', ("line 2 isn't JSON", "delete that line")),
        ("a.jsonl", b'{"prompt": "a"}\n\n["b"]\n', ('line 3 is ["b"], not an object',)),
        ("a.jsonl", b'{"prompt": "a"}\n' + b"[" * 10**5 + b"]" * 10**5, ("line 2 isn't JSON", "recursion")),
        ("a.json", b"[" * 10**5 + b"]" * 10**5, ("isn't JSON", "recursion")),
        ("a.json", b'[{"prompt": "a"}, 3]', ("row 2 is 3, not an object",)),
        ("a.json", b'[{"prompt": "a"},\n {"prompt": "b"', ("isn't JSON", "line 2 column")),
        ("a.json", b'{"version": 1,\n "data": [{"prompt": "a"}]}', ("holds one object, with 'version', 'data'",)),
        ("a.json", b'"text"', ('holds "text": write a list',)),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "é"}\n'.encode("latin-1"),
            ("line 2 isn't UTF-8 (byte 0xe9)", "iconv"),
        ),
        ("a.csv", "prompt\na\nb\né\n".encode("latin-1"), ("line 4 isn't UTF-8 (byte 0xe9)", "iconv")),
        ("a.json", '[{"prompt":\n"ü"}]'.encode("cp1252"), ("line 2 isn't UTF-8 (byte 0xfc)",)),
        ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16")[:-1], ("line 1 isn't UTF-16",)),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-9], ("isn't a whole gzip file",)),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', ("line 2 has half a character (\\ud83d)",)),
        ("a.jsonl", b'{"a": [{"b": "\\uDE00 \\ud83c\\udf89"}]}\n', ("line 1 has half a character (\\ude00)",)),
        ("a.json", b'[{"prompt": "\\ud83c\\udf89"}, {"prompt": "\\ud83c"}]', ("row 2 has half a character",)),
        ("a.csv", b"prompt,completion\na,b\nc,d,e\n", ("row 2 (line 3) has 3 cells", "the header 2", "quote")),
        ("a.csv", b'prompt,completion\n"a\nb",c\nd\n', ("row 2 (line 4) has 1 cells",)),
        ("a.csv", b'prompt,completion\na,"b\n', ("unexpected end of data",)),
        ("a.csv", b'prompt,completion\na,"b" c\n', ("line 2", "expected after", "twice")),
        ("a.csv", b"prompt;completion\na;b\n", ("its delimiter seems to be ';'", "save it with ','")),
        ("a.csv", b"prompt\tcompletion\na\tb\n", ("name the file .tsv",)),
        ("a.csv", b"prompt,prompt\na,b\n", ("two columns 'prompt'",)),
    ],
    ids=lambda value: None if isinstance(value, tuple) else repr(value)[:40],
)
def test_what_cant_be_read_is_named(tmp_path, name, content, words, streaming):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, *words, streaming=streaming)


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"p": "a"}\n{"p": \n[1]\n{"p": "\\ud800"}\n{"p"}\n{"p": "b"}\n')
    for streaming in (False, True):
        assert read(path, skip_bad=True, streaming=streaming) == [{"p": "a"}, {"p": "b"}]
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        read(path, skip_bad=True)
    assert len(caplog.messages) == 3
    assert "2 rows are left out because each isn't JSON; the first: " in caplog.text and "line 2 isn't" in caplog.text
    mark = b"\xef\xbb\xbf"
    path.write_bytes(mark + '{"p": "ü"}\n'.encode() + '{"p": "é"}\n'.encode("latin-1") + b'{"p": "b"}\n')
    for streaming in (False, True):
        assert read(path, skip_bad=True, streaming=streaming) == [{"p": "ü"}, {"p": "b"}]
    assert "1 rows are left out because each isn't UTF-8; the first: " in caplog.text and "line 2 isn't" in caplog.text
    (tmp_path / "a.csv").write_text("p,c\na,b\nc\nd,e\n")
    assert read(tmp_path / "a.csv", skip_bad=True) == [{"p": "a", "c": "b"}, {"p": "d", "c": "e"}]


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": 1}, {"id": "x2"}, {"id": None}],
        [
            {"m": [{"role": "user", "content": "a"}]},
            {"m": [{"role": "user", "content": [{"type": "text", "text": "b"}]}]},
        ],
        [{"t": {"city": "x"}}, {"t": {"city": 3}}],
        [{"n": 1}, {"n": 2**63 + 1}],
        [{"b": True}, {"b": 1}],
        [{"a": 1, "b": None}, {"a": None, "b": 2.5}],
        [{"a": []}, {"a": ["x"]}],
    ],
    ids=str,
)
def test_columns_of_several_kinds_keep_each_value(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of(rows))
    assert read(path, streaming=True) == rows
    assert read(path) == rows
    # Also where the kinds come far apart.
    from hf_dskd.data import files

    files.ROWS, kept = 1, files.ROWS
    try:
        path.write_text(lines_of(rows + rows))
        assert read(path) == rows + rows
    finally:
        files.ROWS = kept


def test_a_row_may_lack_a_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"p": "a"}\n{"p": "b", "c": "d"}\n')
    assert read(path) == [{"p": "a", "c": None}, {"p": "b", "c": "d"}]


def test_a_data_frames_index_and_long_texts(tmp_path):
    long = "x" * 300_000
    (tmp_path / "a.csv").write_text(f",prompt\n0,{long}\n")
    assert read(tmp_path / "a.csv") == [{"column 1": "0", "prompt": long}]


def test_parquet(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ROWS == read(tmp_path / "a.parquet", streaming=True)
    Dataset.from_list(ROWS).select([]).to_parquet(tmp_path / "b.parquet")
    refused(tmp_path / "b.parquet", "has no rows")
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (whole[:-9], b"not Parquet at all"):
        (tmp_path / "b.parquet").write_bytes(content)
        refused(tmp_path / "b.parquet", "isn't a whole Parquet file")


def test_formats():
    assert [format_of(name) for name in ("a.JSONL", "a.csv.gz", "a.b/c", "a.txt", "a.gz", "a.tsv.GZ")] == [
        *(".jsonl", ".csv", None, None, None, ".tsv"),
    ]


# ---- What a run takes


def given(name, **changes):
    script = SimpleNamespace(
        dataset_name=str(name),
        dataset_config=None,
        dataset_streaming=False,
        dataset_train_split="train",
        dataset_test_split="test",
    )
    options = SimpleNamespace(rename_columns=None, held_out_size=0, train_size=None)
    return SimpleNamespace(script=script, options=options, config=SimpleNamespace(on_bad_row="stop", **changes))


def test_a_run_reads_files_and_folders(tmp_path):
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        (tmp_path / f"{split}.csv").write_text(csv_text(rows))
    train, _ = load_data(given(tmp_path / "train.csv"))
    assert train.to_list() == ROWS
    # A folder of CSV is read by datasets, and NA is a word there as well.
    train, held_out = load_data(given(tmp_path))
    assert [row["prompt"] for row in train] == [row["prompt"] for row in ROWS]
    assert held_out["completion"][:] == [row["completion"] for row in ROWS[:2]]


def test_a_run_names_what_it_cant_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": ')
    with pytest.raises(UserError, match="line 1 isn't JSON"):
        load_data(given(tmp_path / "a.jsonl"))
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UserError, match=r"a.docx' can't be read: the formats are .jsonl, .ndjson, .json, .csv"):
        load_data(given(tmp_path / "a.docx"))
    with pytest.raises(UserError, match=r"none.jsonl.gz': there is no such file; check the path"):
        load_data(given(tmp_path / "none.jsonl.gz"))
