"""A report as Markdown, and as one page of HTML with its pictures in it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ..utils.files import write_text
from ..utils.markup import render, visible


if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token


def write_pages(markdown: str, folder: Path, homes: Sequence[Path] = ()) -> Path:
    """
    Writes a report, whose title comes first, as `report.md` and as `report.html`, and returns the latter.

    `homes` are folders beside `folder` of which the page may show pictures.
    """
    write_text(folder / "report.md", markdown)
    write_text(folder / "report.html", html_page(markdown, folder, homes))
    return folder / "report.html"


def html_page(markdown: str, folder: Path, homes: Sequence[Path] = ()) -> str:
    """Makes a page of a report that lies in `folder`; whatever HTML is in it is shown as text."""
    from markupsafe import Markup

    parser = _parser()
    env = {"folder": folder, "homes": [home.resolve() for home in (folder, *homes)]}
    tokens = _arranged(parser.parse(markdown, env))
    headings = [(token, inline) for token, inline in pairwise(tokens) if token.type == "heading_open"]
    sections = {str(token.attrGet("id")): _text(inline) for token, inline in headings if token.tag == "h2"}
    # The three tokens of the title.
    parts = [Markup(parser.renderer.render(part, parser.options, env)) for part in (tokens[:3], tokens[3:])]
    return render("report/page.html", title=_text(tokens[1]), sections=sections, heading=parts[0], body=parts[1])


def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    renderer: Any = parser.renderer
    renderer.rules["image"] = _figure
    renderer.rules["fence"] = lambda tokens, at, *rest: (
        f'<pre dir="auto">{escape(tokens[at].content.rstrip())}</pre>\n'
    )
    return parser


def _figure(tokens: Sequence[Token], at: int, options: Any, env: dict[str, Any]) -> str:
    """A picture in the page itself; one from elsewhere isn't looked at."""
    caption = escape(_text(tokens[at]))
    path = (env["folder"] / unquote(str(tokens[at].attrGet("src")))).resolve()
    if path.suffix != ".png" or not path.is_file() or not any(path.is_relative_to(home) for home in env["homes"]):
        return caption
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _arranged(tokens: list[Token]) -> list[Token]:
    """Names headings, and what the page's style treats in its own way: numbers, pictures, warnings."""
    left_out: set[int] = set()
    for at, token in enumerate(tokens):
        after = tokens[at + 1] if at + 1 < len(tokens) else token
        if token.type == "heading_open" and token.tag == "h2":
            token.attrSet("id", re.sub(r"[^a-z0-9]+", "-", _text(after).lower()).strip("-"))
        elif token.type == "paragraph_open" and _is_picture(after):
            token.tag = tokens[at + 2].tag = "div"
            token.attrSet("class", "pictures")
        elif token.type in ("th_open", "td_open") and token.attrs.pop("style", "") == "text-align:right":
            token.attrSet("class", "r")
        elif token.type == "table_open":
            end = next(i for i in range(at, len(tokens)) if tokens[i].type == "table_close")
            head = next(i for i in range(at, len(tokens)) if tokens[i].type == "thead_close") + 1
            has_pictures = any(map(_is_picture, tokens[at:end]))
            token.attrSet("class", "pictures" if has_pictures else "wide")
            if has_pictures or not any(part.content for part in tokens[at:head]):
                left_out |= set(range(at + 1, head))
        elif token.type == "blockquote_open" and tokens[at + 2].content == "[!WARNING]":
            token.attrSet("class", "warning")
            left_out |= {at + 1, at + 2, at + 3}
    return [token for at, token in enumerate(tokens) if at not in left_out]


def _is_picture(token: Token) -> bool:
    return bool(token.children) and all(child.type == "image" for child in token.children or ())


def _text(token: Token) -> str:
    return visible("".join(child.content for child in token.children or ()))
