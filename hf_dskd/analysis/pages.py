"""
The alignment of some responses as a page to point at: a token of one model lights the tokens of the other.

Each token stands for the position that predicts it (see [`~hf_dskd.analysis.heatmap`]).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..utils.markup import render
from .heatmap import AlignmentExample, check_given, chunks_of, shares


if TYPE_CHECKING:
    from markupsafe import Markup

_WHITESPACE_MARKS = re.compile("([·↵⇥]+)")
_JOINERS = "\u200c\u200d"


def write_page(examples: Sequence[AlignmentExample], path: str | Path, title: str) -> None:
    """
    Writes one HTML file that needs nothing else, with both models' tokens of each example, underlined by chunk.

    Pointing at a token, tapping it or going to it by keyboard lights the other model's tokens in proportion to its
    attention (`t2s` from the student's, `s2t` from the teacher's tokens) and tells the numbers of the strongest. All
    examples share one scale. Without JavaScript the texts and chunks can be read still.

    Each example is a section, with the attention in thousandths. The folder of the file is made if need be.

    Raises:
        UserError: If `examples` is empty.
    """
    check_given(examples, "write_page")
    full = max(_thousandths(weights).max() for example in examples for weights in (example.t2s, example.s2t))
    sections = [_section(example) for example in examples]
    page = render("analysis/page.html", title=_visible(title), full=int(full), sections=sections)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", newline="\n")


def _section(example: AlignmentExample) -> dict[str, Any]:
    from markupsafe import Markup

    attention = {name: _thousandths(getattr(example, name)).tolist() for name in ("t2s", "s2t")}
    tokens = {"Student": example.student_tokens, "Teacher": example.teacher_tokens}
    return {
        "caption": _visible(example.caption),
        **{name: f"{share:.1%}" for name, share in shares(example).items()},
        "sides": [
            {"name": name, "count": len(side), "chunks": list(_chunks(side, chunks))}
            for (name, side), chunks in zip(tokens.items(), chunks_of(example))
        ],
        # Numbers alone, which can't end the element that they stand in.
        "attention": Markup(json.dumps(attention, separators=(",", ":"))),
    }


def _chunks(tokens: Sequence[str], chunks: Sequence[int]) -> Iterator[list[tuple[Markup, bool]]]:
    """The tokens of each chunk, with whether a line ends there."""
    for _, pairs in groupby(zip(tokens, chunks), key=lambda pair: pair[1]):
        yield [(_token(token), "↵" in token) for token, _ in pairs]


def _token(text: str) -> Markup:
    """The text with marks of whitespace set off."""
    from markupsafe import Markup, escape

    # Every second part is one of marks.
    parts = enumerate(_WHITESPACE_MARKS.split(_visible(text)))
    return Markup("").join(Markup("<i>{}</i>").format(part) if index % 2 else escape(part) for index, part in parts)


def _visible(text: str) -> str:
    """
    The text with escapes (`\\xa0`) for invisible characters, and a circle to carry a mark that begins it.

    Joiners inside of the text stay: they shape their neighbours, as in some scripts and in emoji.
    """
    shown = "".join(
        character
        if character.isprintable() or (character in _JOINERS and 0 < index < len(text) - 1)
        else character.encode("unicode_escape").decode()
        for index, character in enumerate(text)
    )
    return f"◌{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown


def _thousandths(weights: Tensor) -> Tensor:
    return (weights * 1000).round().int()
