import ast
import random
import sys
import textwrap

import pytest

from hf_dskd.errors import UserError
from hf_dskd.offline import python_functions as module
from hf_dskd.offline.python_functions import load_python_functions, python_functions


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return python_functions()


def test_prompt_and_completion_are_a_function(rows):
    assert len(rows) > 400
    for row in rows:
        (function,) = ast.parse(row["prompt"] + row["completion"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert not function.decorator_list
        assert row["source"].endswith("." + function.name)
        # The prompt alone is the same function without its body.
        (start,) = ast.parse(row["prompt"]).body
        assert ast.get_docstring(start, clean=False) == ast.get_docstring(function, clean=False) is not None
        assert len(start.body) == 1 < len(function.body)
        assert 80 <= len(row["completion"]) <= 450 and len(row["prompt"]) <= 600
        assert row["prompt"].endswith("\n") and row["completion"] == row["completion"].rstrip()
        assert "\r" not in row["prompt"] + row["completion"]
    short = python_functions(minimum=10, maximum=60, maximum_prompt=100)
    assert short
    assert all(10 <= len(row["completion"]) <= 60 and len(row["prompt"]) <= 100 for row in short)


def test_methods_keep_their_indentation_and_bodies_are_distinct(rows):
    with_methods = python_functions(methods=True)
    assert len(with_methods) > 2 * len(rows)
    for row in with_methods:
        text = row["prompt"] + row["completion"]
        assert len(ast.parse("class _:\n" + text if text[0] == " " else text).body) == 1
        # Neither tests nor code of others.
        parts = row["source"].split(".")
        assert parts[0] not in ("site-packages", "idlelib", "lib2to3", "turtledemo", "encodings")
        assert not {"test", "tests"} & {*parts[:-1]}
    bodies = [textwrap.dedent(row["completion"]).strip() for row in with_methods]
    assert len(set(bodies)) == len(bodies)
    shorten = next(row for row in rows if row["source"] == "textwrap.shorten")
    assert shorten["completion"].startswith("    w = TextWrapper(")
    fill = python_functions(methods=True, minimum=1, modules=["textwrap"])
    assert any(row["source"] == "textwrap.TextWrapper.fill" for row in fill)


def test_splits_share_no_module():
    state = random.getstate()
    data = load_python_functions(150, 30, seed=3)
    assert random.getstate() == state
    assert {name: len(split) for name, split in data.items()} == {"train": 150, "held_out": 30}
    assert data["train"].column_names == ["prompt", "completion", "source"]
    modules = {name: {source.split(".")[0] for source in data[name]["source"]} for name in data}
    assert not modules["train"] & modules["held_out"]
    assert len(modules["held_out"]) >= 8
    description = data["held_out"].info.description
    assert f"Python {sys.version.split()[0]}" in description and "150 training and 30 held-out" in description
    data = load_python_functions(5, 0)
    assert (len(data["train"]), len(data["held_out"])) == (5, 0)
    assert data["held_out"].column_names == ["prompt", "completion", "source"]


def test_splits_follow_the_seed():
    first, again, other, longer = (
        {name: split.to_list() for name, split in load_python_functions(size, 20, seed=seed).items()}
        for size, seed in ((60, 1), (60, 1), (60, 2), (90, 1))
    )
    assert first == again and first["held_out"] != other["held_out"]
    # A learning curve over train_size: same held-out functions, nested training functions.
    assert longer["train"][:60] == first["train"] and longer["held_out"] == first["held_out"]


def test_too_many_asked_for(rows):
    with pytest.raises(UserError, match=rf"has {len(rows)} with these bounds; .*methods=True"):
        load_python_functions(len(rows), 1)
    with pytest.raises(UserError, match="must not be negative"):
        load_python_functions(-1, 1)


def test_too_many_asked_for_once_modules_are_split(monkeypatch):
    rows = [{"prompt": "", "completion": str(n), "source": f"{'ab'[n % 2]}.f"} for n in range(10)]
    monkeypatch.setattr(module, "python_functions", lambda **_: rows)
    with pytest.raises(UserError, match="has 5 training functions left"):
        load_python_functions(8, 1)
    data = load_python_functions(5, 1)
    assert len(set(data["train"]["completion"]) | set(data["held_out"]["completion"])) == 6


def test_only_named_modules():
    rows = python_functions(modules=["textwrap", "shutil"])
    # The same every time, whatever a caller does to them.
    python_functions(modules=["textwrap", "shutil"])[0]["prompt"] = "changed by a caller"
    assert python_functions(modules=["textwrap", "shutil"]) == rows
    module._functions.cache_clear()
    assert python_functions(modules=["textwrap", "shutil"]) == rows
    assert {row["source"].split(".")[0] for row in rows} == {"textwrap", "shutil"}
    with pytest.raises(UserError, match="no module 'numpy'"):
        python_functions(modules=["numpy"])


@pytest.mark.parametrize("bounds", [{"minimum": 0}, {"minimum": 500}, {"maximum_prompt": 0}])
def test_bounds_without_room(bounds):
    with pytest.raises(UserError, match="leave no room"):
        python_functions(**bounds)


def test_cut_odd_functions(tmp_path):
    path = tmp_path / "odd.py"
    path.write_bytes(
        b"# -*- coding: latin-1 -*-\n"
        b"@staticmethod\n"
        b"def kept(\n    a,\n):\n    '''Caf\xe9.\n\n    More.\n    '''  # note\n\n    return a   \n\x0c\n"
        b"async def waits():\n    'Doc.'\n    return 1\n"
        b"def one_line(): 'Doc.'; return 1\n"
        b"def same_line():\n    'Doc.'; return 1\n"
        b"def only_doc():\n    'Doc.'\n"
        b"def no_doc():\n    return 1\n"
        b"class C:\n    def m(self):\n        'Doc.'\n        return 2\n"
    )
    found = list(module._functions("odd", path))
    assert [row["source"] for row in found] == ["odd.kept", "odd.waits", "odd.C.m"]
    assert found[0]["prompt"] == "def kept(\n    a,\n):\n    '''Café.\n\n    More.\n    '''  # note\n"
    assert found[0]["completion"] == "\n    return a"
    assert found[1]["prompt"].startswith("async def waits")
    assert found[2]["completion"] == "        return 2"
    broken = tmp_path / "broken.py"
    broken.write_text("def broken(:\n")
    assert module._functions("broken", broken) == ()
