"""
Which methods there are.

Every method: how student and teacher positions are aligned, the spaces that are compared, how queries are matched to
keys, and where it comes from.

    hf-dskd methods | less
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from argparse import ArgumentParser, Namespace

from ..errors import UserError
from ..methods import METHODS


USAGE = ""


def add_arguments(parser: ArgumentParser) -> None:
    """Tells the parser of nothing but what can be refused with a remedy."""
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)


def run(given: Namespace) -> int:
    """Prints the table."""
    if given.names:
        raise UserError(f"hf-dskd methods takes no {given.names[0]!r}: it lists them all")
    print(methods_table(shutil.get_terminal_size().columns))
    return 0


def methods_table(width: int) -> str:
    """Lays out what each method is composed of, and below it what that means, wrapped to `width` columns."""
    names = ("alignment", "spaces", "matching")
    rows: list[tuple[str, ...]] = [("method", *names)]
    for name, method in METHODS.items():
        parts = [getattr(method, part) for part in names]
        rows.append((name, *(", ".join(part) if isinstance(part, tuple) else part or "" for part in parts)))
    rows = [tuple(cell or "–" for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(len(names) + 1)]
    lines = []
    for row in rows:
        line = "".join(cell.ljust(column) for cell, column in zip(row, widths)).rstrip()
        lines += textwrap.wrap(line, width, subsequent_indent=" " * widths[0], break_long_words=False)
        if row is not rows[0]:
            method = METHODS[row[0]]
            for text in (method.summary, method.source):
                if text.strip("–"):
                    lines += textwrap.wrap(
                        text, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False
                    )
        lines.append("")
    return "\n".join(lines[:-1])
