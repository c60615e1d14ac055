"""
The alignment of some responses as a page to point at: a token of one model lights the tokens of the other.

Each token stands for the position that predicts it (see [`~hf_dskd.analysis.heatmap`]).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from .heatmap import (
    AlignmentExample,
    attention_in_chunk,
    attention_on_text,
    chunks_of,
    uniform_in_chunk,
    uniform_on_text,
)


_WHITESPACE_MARKS = re.compile("[·↵⇥]+")
_JOINERS = "\u200c\u200d"

_STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --ink: #1b1e23; --faint: #6b727c; --mark: #a3aab3; --line: #d9dce0;
  --chunk: #9aa3ad; --other-chunk: #d3d7dc; --lit: 255 159 28; --partner: #1f5fa8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --ink: #e7e9ec; --faint: #9aa2ac; --mark: #666e78; --line: #343a41;
    --chunk: #78818b; --other-chunk: #3d444c; --lit: 30 122 212; --partner: #ffb454; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .4rem; }
h2 { font-size: 1.1rem; margin: 0; }
h3 { font-size: .95rem; margin: .8rem 0 .2rem; }
p { margin: .2rem 0; }
.note, .numbers { color: var(--faint); font-size: .9rem; max-width: 60rem; }
section { border-top: 1px solid var(--line); margin-top: 1.2rem; padding-top: .8rem; }
.sides { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.tokens { font: .95rem/2 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.chunk { margin-right: 4px; }
.token { display: inline-block; max-width: 100%; min-width: .6em; margin-right: 1.5px; padding: 0 1px;
  line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; border-bottom: 3px solid var(--other-chunk);
  border-radius: 2px; cursor: default; background-color: rgb(var(--lit) / var(--weight, 0)); }
.chunk:nth-of-type(odd) > .token { border-color: var(--chunk); }
.token.partner { border-color: var(--partner); }
.token.active { outline: 2px solid var(--partner); outline-offset: 1px; }
.token i { font-style: normal; color: var(--mark); }
.readout:empty { display: none; }
.readout { position: sticky; bottom: 0; min-height: 4.1em; margin-top: .5rem; padding: .3rem 0; font-size: .9rem;
  background: var(--page); border-top: 1px solid var(--line); }
.readout ol { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1.4rem; margin: 0; padding: 0; }
.readout code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.readout b { font-variant-numeric: tabular-nums; }
"""

# Weights are in thousandths. Text goes into the page as text content only, never as markup.
_SCRIPT = """
"use strict";

function strongest(row, count) {
  return row.map((weight, index) => index).sort((a, b) => row[b] - row[a] || a - b).slice(0, count)
    .filter(index => row[index] > 0);
}

function percent(thousandths) {
  return (thousandths / 10).toFixed(1) + "%";
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function prepare(section, full) {
  const attention = JSON.parse(section.querySelector("script").textContent);
  const readout = section.querySelector(".readout");
  const texts = [...section.querySelectorAll(".tokens")];
  const sides = texts.map(text => [...text.querySelectorAll(".token")]);
  const chunks = texts.map(text => [...text.querySelectorAll(".chunk")]);
  const names = ["student", "teacher"];

  function show(side, index) {
    const other = 1 - side, token = sides[side][index];
    const row = (side === 0 ? attention.t2s : attention.s2t)[index];
    for (const any of sides[side].concat(sides[other])) {
      any.classList.remove("active", "partner");
      any.style.removeProperty("--weight");
    }
    token.classList.add("active");
    sides[other].forEach((any, place) => any.style.setProperty("--weight", row[place] / full));
    const partners = [...chunks[other][chunks[side].indexOf(token.parentNode)].querySelectorAll(".token")];
    partners.forEach(partner => partner.classList.add("partner"));
    const inside = row.reduce((sum, weight, place) => sum + (partners.includes(sides[other][place]) ? weight : 0), 0);

    const heading = element("div", names[side] + " token " + (index + 1) + " ");
    heading.append(element("code", token.textContent), " attends to the " + names[other] + "\\u2019s tokens (in its "
      + "chunk: " + percent(inside) + ")");
    const list = document.createElement("ol");
    for (const place of strongest(row, 5)) {
      const item = element("li", place + 1 + " ");
      item.append(element("code", sides[other][place].textContent), " ", element("b", percent(row[place])));
      list.append(item);
    }
    readout.replaceChildren(heading, list);
  }

  texts.forEach((text, side) => {
    const tokens = sides[side];
    tokens.forEach((token, index) => { token.tabIndex = index === 0 ? 0 : -1; });
    const meet = event => {
      const index = tokens.indexOf(event.target.closest(".token"));
      if (index >= 0) show(side, index);
    };
    for (const kind of ["pointerover", "focusin", "click"]) text.addEventListener(kind, meet);
    text.addEventListener("keydown", event => {
      const from = tokens.indexOf(event.target), last = tokens.length - 1;
      const goal = { ArrowRight: from + 1, ArrowDown: from + 1, ArrowLeft: from - 1, ArrowUp: from - 1, Home: 0,
        End: last }[event.key];
      if (goal === undefined || goal < 0 || goal > last) return;
      event.preventDefault();
      // Tab leads to the token that was left, the others are reached by arrows.
      tokens[from].tabIndex = -1;
      tokens[goal].tabIndex = 0;
      tokens[goal].focus();
    });
  });
}

for (const section of document.querySelectorAll("section")) prepare(section, Number(document.body.dataset.full));
"""


def write_page(examples: Sequence[AlignmentExample], path: str | Path, title: str) -> None:
    """
    Writes one HTML file that needs nothing else, with both models' tokens of each example, underlined by chunk.

    Pointing at a token, tapping it or going to it by keyboard lights the other model's tokens in proportion to its
    attention (`t2s` from the student's, `s2t` from the teacher's tokens) and tells the numbers of the strongest. All
    examples share one scale. Without JavaScript the texts and chunks can be read still.

    Args:
        examples (`Sequence[AlignmentExample]`): One section each. The attention is kept in thousandths.
        path (`str` or `Path`): File to write; its folder is made if need be.
        title (`str`): Stands above the page.

    Raises:
        UserError: If `examples` is empty.
    """
    if not examples:
        raise UserError("write_page got no examples: pass at least one from cross_attention")
    full = max(_thousandths(weights).max() for example in examples for weights in (example.t2s, example.s2t))
    heading = escape(_visible(title))
    sections = "\n".join(_section(example) for example in examples)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>{_STYLE}</style>
</head>
<body data-full="{int(full)}">
<h1>{heading}</h1>
<p class="note">Point at a token, tap it, or reach it with Tab and the arrow keys: the other model's tokens light up
in proportion to the attention of the position that predicts it (full colour is {full / 1000:.1%}). Lines below tokens
change their shade where a chunk ends, after the same byte of both texts. · is a space, ↵ a line break, ⇥ a tab;
\\x… is a byte of a character in pieces.</p>
<noscript><p class="note">JavaScript is off: only the texts and their chunks are shown.</p></noscript>
{sections}
<script>{_SCRIPT}</script>
</body>
</html>
"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", newline="\n")


def _section(example: AlignmentExample) -> str:
    student_chunks, teacher_chunks = chunks_of(example)
    attention = {name: _thousandths(getattr(example, name)).tolist() for name in ("t2s", "s2t")}
    caption = f"<h2>{escape(_visible(example.caption))}</h2>\n" if example.caption else ""
    sides = "\n".join(
        f'<div><h3>{name} ({len(tokens)} tokens)</h3>\n<p class="tokens" dir="ltr" translate="no">'
        f"{''.join(_chunks(tokens, chunks))}</p></div>"
        for name, tokens, chunks in (
            ("Student", example.student_tokens, student_chunks),
            ("Teacher", example.teacher_tokens, teacher_chunks),
        )
    )
    return f"""<section>
{caption}<p class="numbers">Attention of the student's tokens on the same text: {attention_on_text(example):.1%}
(if uniform {uniform_on_text(example):.1%}), in the same chunk: {attention_in_chunk(example):.1%}
(if uniform {uniform_in_chunk(example):.1%}).</p>
<div class="sides">
{sides}
</div>
<div class="readout" aria-live="polite"></div>
<script type="application/json">{json.dumps(attention, separators=(",", ":"))}</script>
</section>"""


def _chunks(tokens: Sequence[str], chunks: Sequence[int]) -> Iterator[str]:
    for _, pairs in groupby(zip(tokens, chunks), key=lambda pair: pair[1]):
        yield f'<span class="chunk">{"".join(_token(token) for token, _ in pairs)}</span>'


def _token(text: str) -> str:
    marked = _WHITESPACE_MARKS.sub(lambda match: f"<i>{match[0]}</i>", escape(_visible(text)))
    return f'<span class="token">{marked}</span>' + ("<br>" if "↵" in text else "")


def _visible(text: str) -> str:
    """
    The text with escapes (`\\xa0`) for invisible characters, and a circle to carry a mark that begins it.

    Joiners inside of the text stay: they shape their neighbours, as in some scripts and in emoji.
    """
    shown = "".join(
        character
        if character.isprintable() or (character in _JOINERS and 0 < place < len(text) - 1)
        else character.encode("unicode_escape").decode()
        for place, character in enumerate(text)
    )
    return f"◌{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown


def _thousandths(weights: Tensor) -> Tensor:
    return (weights * 1000).round().int()
