"""
Which methods there are, and which parts.

Every method: how student and teacher positions are aligned, the spaces that are compared, how queries are matched to
keys, and where it comes from. Then every alignment, matching and divergence, with its formula: p is the teacher's
distribution, q the student's.

    hf-dskd methods | less
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping

from ..errors import UserError
from ..methods import ALIGNMENTS, BINARY_DIVERGENCES, DIVERGENCES, MATCHINGS, METHODS, Row


USAGE = ""
# Further tables, each under the setting that names a row of it.
PARTS: dict[str, Mapping[str, Row]] = {
    "alignment": ALIGNMENTS,
    "matching": MATCHINGS,
    "divergence": DIVERGENCES,
    "alm_divergence": BINARY_DIVERGENCES,
}


def add_arguments(parser: ArgumentParser) -> None:
    """Tells the parser of nothing but what can be refused with a remedy."""
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)


def run(given: Namespace) -> int:
    """Prints the tables."""
    if given.names:
        raise UserError(f"hf-dskd methods takes no {given.names[0]!r}: it lists them all")
    width = shutil.get_terminal_size().columns
    print("\n\n".join([methods_table(width), *(part_table(name, width) for name in PARTS)]))
    return 0


def compositions() -> list[tuple[str, ...]]:
    """Collects name, alignment, spaces and matching of every method, a dash where it has none."""
    return [
        (name, method.alignment or "–", ", ".join(method.spaces) or "–", method.matching or "–")
        for name, method in METHODS.items()
    ]


def methods_table(width: int) -> str:
    """Lays out what each method is composed of, and below it what that means, wrapped to `width` columns."""
    rows = [("method", "alignment", "spaces", "matching"), *compositions()]
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    lines = []
    for row in rows:
        line = "".join(cell.ljust(column) for cell, column in zip(row, widths)).rstrip()
        lines += _wrapped(line, width, "", " " * widths[0])
        if row is not rows[0]:
            method = METHODS[row[0]]
            lines += [line for text in (method.summary, method.source) for line in _wrapped(text, width, " " * 4)]
        lines.append("")
    return "\n".join(lines[:-1])


def part_table(setting: str, width: int) -> str:
    """Lays out name, formula and source of the rows that `setting` chooses from, wrapped to `width` columns."""
    rows = PARTS[setting]
    indent = " " * (max(map(len, [setting, *rows])) + 2)
    lines = [setting]
    for name, row in rows.items():
        lines += _wrapped(f"{row.formula}; {row.source}".strip("; "), width, name.ljust(len(indent)), indent)
    return "\n".join(lines)


def _wrapped(text: str, width: int, first: str, others: str | None = None) -> list[str]:
    later = first if others is None else others
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=later, break_long_words=False)


def markdown_methods() -> str:
    """Lays out the methods as the table of the README."""
    rows = [
        (f"`{name}`", METHODS[name].summary, *(cell.replace("_", " ") for cell in parts))
        for name, *parts in compositions()
    ]
    head = ("`method`", "what it does", "alignment", "spaces", "matching")
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows])
