"""Markdown and HTML by templates, in which values are text and never markup."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote


ROOT = Path(__file__).resolve().parents[1]


class Markdown(str):
    """Text that is Markdown already: templates leave it as it is."""


def render(template: str, **values: Any) -> str:
    """
    Fills in a template, a file of this package such as `"report/one.md"`.

    In a `.md` every value is escaped that isn't [`Markdown`], in a `.html` all that isn't [`~markupsafe.Markup`].
    """
    return _templates(template.endswith(".html")).get_template(template).render(values)


@functools.cache
def _templates(html: bool) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ROOT),
        autoescape=html,
        # Jinja's own escaping is that of HTML.
        finalize=None if html else lambda value: value if isinstance(value, Markdown) else escaped(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Code, in a line and in a block, isn't escaped but fenced; raw is for text that stands in a fence.
    environment.filters |= {"code": code, "block": block, "raw": Markdown}
    return environment


def visible(text: str) -> str:
    """Escapes what can't stand in a file of text: control characters and halves of surrogate pairs."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], text)


def escaped(text: str) -> Markdown:
    """Makes one line of Markdown that shows a text as it is."""
    if isinstance(text, Markdown):
        return text
    text = re.sub(r"\s+", " ", visible(text))
    text = re.sub(r"([\\`*\[\]<>|~$&])", r"\\\1", text)
    # Inside a word, as in kd_rate, it is no markup.
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    text = re.sub(r"^(?=#{1,6}(\s|$)|[+=-](\s|$)|[-=]{3,})", r"\\", text)
    return Markdown(re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", text))


def strong(text: str) -> Markdown:
    """Makes a text bold."""
    return Markdown(f"**{escaped(text)}**")


def code(text: str) -> Markdown:
    """Makes a text code within a line, not in a table, where a bar would end the cell."""
    content = visible(text)
    fence = _fence(content, 1)
    space = " " if "`" in content else ""
    return Markdown(f"{fence}{space}{content}{space}{fence}")


def block(text: str) -> Markdown:
    """Makes a block of a text as it stands."""
    text = visible(text)
    fence = _fence(text, 3)
    return Markdown(f"{fence}text\n{text}\n{fence}")


def _fence(text: str, least: int) -> str:
    """More backticks than the text has in a row."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def link(text: str, path: Path, folder: Path) -> Markdown:
    """Links to a file from a page in `folder`."""
    return Markdown(f"[{escaped(text)}]({_address(path, folder)})")


def pictures(files: Mapping[str, Path], folder: Path) -> Markdown:
    """Shows pictures side by side, file by caption, on a page in `folder`."""
    shown = [(escaped(caption), _address(path, folder)) for caption, path in files.items()]
    if len(shown) == 1:
        return Markdown(f"![{shown[0][0]}]({shown[0][1]})")
    images = [f"![{text}]({to})" for text, to in shown]
    cells: list[list[str]] = [[caption for caption, _ in shown], ["---"] * len(shown), images]
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in cells))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], align: str = "lr") -> Markdown:
    """Makes a table; `align` has "l" or "r" for each column, and its last letter for those that are left."""
    right = [letter == "r" for letter in align.ljust(len(columns), align[-1])]
    cells = [[escaped(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(columns))]
    padded: list[list[str]] = [
        [text.rjust(width) if at_right else text.ljust(width) for text, width, at_right in zip(row, widths, right)]
        for row in cells
    ]
    padded.insert(1, ["-" * (width - 1) + (":" if at_right else "-") for width, at_right in zip(widths, right)])
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in padded))


def _address(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())
