"""What a report is made of: blocks, and the Markdown and the HTML that they become."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ..utils.files import write_text


@dataclass(frozen=True)
class Span:
    """A piece of a text that is `"code"`, `"strong"` or a `"link"` to the file `path`."""

    text: str
    kind: str
    path: Path | None = None


Text = str | Span | tuple[str | Span, ...]


@dataclass(frozen=True)
class Heading:
    level: int
    text: str

    def markdown(self, folder: Path) -> str:
        return f"{'#' * self.level} {markdown_text(self.text, folder)}"

    def html(self, folder: Path) -> str:
        anchor = f' id="{_anchor(self.text)}"' if self.level == 2 else ""
        return f"<h{self.level}{anchor}>{html_text(self.text, folder)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    text: Text

    def markdown(self, folder: Path) -> str:
        return markdown_text(self.text, folder)

    def html(self, folder: Path) -> str:
        return f"<p>{html_text(self.text, folder)}</p>"


@dataclass(frozen=True)
class Listing:
    """A list; `warning` makes it stand out."""

    items: Sequence[Text]
    warning: bool = False

    def markdown(self, folder: Path) -> str:
        lines = [f"- {markdown_text(item, folder)}" for item in self.items]
        return "\n".join(["> [!WARNING]", *(f"> {line}" for line in lines)] if self.warning else lines)

    def html(self, folder: Path) -> str:
        kind = ' class="warning"' if self.warning else ""
        return f"<ul{kind}>{''.join(f'<li>{html_text(item, folder)}</li>' for item in self.items)}</ul>"


@dataclass(frozen=True)
class Table:
    """Rows under `columns`; `align` has "l" or "r" for each of them, and its last letter for those that are left."""

    columns: Sequence[Text]
    rows: Sequence[Sequence[Text]]
    align: str = "lr"

    @property
    def _right(self) -> list[bool]:
        return [letter == "r" for letter in self.align.ljust(len(self.columns), self.align[-1])]

    def markdown(self, folder: Path) -> str:
        cells = [[markdown_text(cell, folder) for cell in row] for row in [self.columns, *self.rows]]
        widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(self.columns))]
        padded = [
            [text.rjust(width) if right else text.ljust(width) for text, width, right in zip(row, widths, self._right)]
            for row in cells
        ]
        padded.insert(1, ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, self._right)])
        return "\n".join(f"| {' | '.join(row)} |" for row in padded)

    def html(self, folder: Path) -> str:
        def line(tag: str, row: Sequence[Text]) -> str:
            starts = [f'<{tag} class="r">' if right else f"<{tag}>" for right in self._right]
            cells = [f"{start}{html_text(cell, folder)}</{tag}>" for start, cell in zip(starts, row)]
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        head = f"<thead>{line('th', self.columns)}</thead>" if any(self.columns) else ""
        return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side: file by caption."""

    files: Mapping[str, Path]

    def markdown(self, folder: Path) -> str:
        shown = [(_markdown_escaped(caption), _address(path, folder)) for caption, path in self.files.items()]
        if len(shown) == 1:
            return f"![{shown[0][0]}]({shown[0][1]})"
        cells = [[caption for caption, _ in shown], ["---"] * len(shown), [f"![{text}]({to})" for text, to in shown]]
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)

    def html(self, folder: Path) -> str:
        figures = []
        for caption, path in self.files.items():
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            text = html.escape(_visible(caption))
            image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
            figures.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
        return f'<div class="pictures">{"".join(figures)}</div>'


@dataclass(frozen=True)
class Code:
    """Text as it stands."""

    text: str

    def markdown(self, folder: Path) -> str:
        text = _visible(self.text)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        return f"{fence}text\n{text}\n{fence}"

    def html(self, folder: Path) -> str:
        return f'<pre dir="auto">{html.escape(_visible(self.text))}</pre>'


@dataclass(frozen=True)
class Verbatim:
    """Markdown that another command wrote."""

    text: str

    def markdown(self, folder: Path) -> str:
        return self.text.strip()

    def html(self, folder: Path) -> str:
        parts = [html.escape(_visible(part)) for part in self.text.strip().split("\n\n")]
        return "".join(f'<pre class="table">{part}</pre>' if part[0] == "|" else f"<p>{part}</p>" for part in parts)


Block = Heading | Paragraph | Listing | Table | Pictures | Code | Verbatim


def markdown_text(text: Text, folder: Path) -> str:
    """One line of Markdown in which nothing but a span's kind is markup."""
    if isinstance(text, tuple):
        return "".join(markdown_text(part, folder) for part in text)
    if isinstance(text, str):
        return _markdown_escaped(text)
    if text.kind == "code":
        content = _visible(text.text).replace("|", "\\|")
        fence = "`" * (1 + max(map(len, re.findall("`+", content)), default=0))
        space = " " if "`" in content else ""
        return f"{fence}{space}{content}{space}{fence}"
    if text.path is not None:
        return f"[{_markdown_escaped(text.text)}]({_address(text.path, folder)})"
    return f"**{_markdown_escaped(text.text)}**"


def html_text(text: Text, folder: Path) -> str:
    """HTML in which nothing but a span's kind is markup."""
    if isinstance(text, tuple):
        return "".join(html_text(part, folder) for part in text)
    if isinstance(text, str):
        return html.escape(_visible(text))
    content = html.escape(_visible(text.text))
    if text.path is not None:
        return f'<a href="{html.escape(_address(text.path, folder))}">{content}</a>'
    tag = {"code": "code", "strong": "strong"}[text.kind]
    return f"<{tag}>{content}</{tag}>"


def _visible(text: str) -> str:
    """Without what can't stand in a file of text: control characters and halves of surrogate pairs are escaped."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], text)


def _markdown_escaped(text: str) -> str:
    text = re.sub(r"\s+", " ", _visible(text))
    text = re.sub(r"([\\`*\[\]<>|~$&])", r"\\\1", text)
    # Inside a word, as in kd_rate, it is no markup.
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    text = re.sub(r"^(?=#{1,6}(\s|$)|[+=-](\s|$)|[-=]{3,})", r"\\", text)
    return re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", text)


def _address(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


STYLE = """\
:root { color-scheme: light dark; --text: #1c1e21; --page: #fff; --soft: #f3f4f6; --line: #d8dbe0; --faint: #5c636e;
  --link: #1f5fa8; --alarm: #a8530b; --alarm-page: #fff5e6; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --page: #16181c; --soft: #22252b; --line: #3a3f48;
  --faint: #a0a7b3; --link: #8ab8f0; --alarm: #f0a860; --alarm-page: #33261a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 66rem; color: var(--text); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .3rem 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.3rem 0 .3rem; }
nav { font-size: .85rem; margin: .8rem 0; }
nav a { display: inline-block; margin-right: .9rem; }
a { color: var(--link); }
code, pre { font: .86em/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--soft);
  border-radius: 4px; }
code { padding: .1em .3em; }
pre { padding: .6rem .8rem; white-space: pre-wrap; overflow-x: auto; margin: .4rem 0; }
pre.table { white-space: pre; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
th:first-child, td:first-child { min-width: 6.5rem; }
.r { text-align: right; font-variant-numeric: tabular-nums; }
td.r { white-space: nowrap; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; margin: .6rem 0; }
figure { margin: 0; flex: 1 1 20rem; min-width: 0; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
figcaption { font-size: .8rem; color: var(--faint); }
ul { padding-left: 1.2rem; margin: .5rem 0; }
.warning { list-style: none; padding: .6rem .9rem; border-left: 4px solid var(--alarm); background: var(--alarm-page);
  border-radius: 4px; }
.warning li + li { margin-top: .5rem; }
.warning li::before { content: "⚠ "; color: var(--alarm); }
@media print { nav { display: none; } }"""


def markdown_page(blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as a Markdown file that lies in `folder`."""
    return "\n\n".join(block.markdown(folder) for block in blocks) + "\n"


def html_page(blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as an HTML file that lies in `folder`, with its pictures in it; the first block is the title."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(name)}">{html.escape(_visible(name))}</a>' for name in sections)
    body = [block.html(folder) for block in blocks]
    body.insert(1, f"<nav>{links}</nav>")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(_visible(title))}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def write_pages(blocks: Sequence[Block], folder: Path) -> Path:
    """Writes the blocks as `report.md` and as `report.html` into `folder`, and returns the latter."""
    write_text(folder / "report.md", markdown_page(blocks, folder))
    write_text(folder / "report.html", html_page(blocks, folder))
    return folder / "report.html"
