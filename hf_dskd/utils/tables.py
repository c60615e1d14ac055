"""Tables of numbers as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from .markup import Markdown, table


def markdown_table(rows: Sequence[str], columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Lays out cells by column as the lines of a Markdown table; `rows` are the names in its first column."""
    cells = [[Markdown(cell) for cell in row] for row in zip(rows, *columns.values())]
    return table(["", *map(Markdown, columns)], cells, align="l").splitlines()


def spread(numbers: Sequence[float]) -> float | None:
    """Computes the sample standard deviation (n − 1); `None` for a single number."""
    return statistics.stdev(numbers) if len(numbers) > 1 and all(map(math.isfinite, numbers)) else None
