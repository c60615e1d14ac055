"""Tables of numbers as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence


def markdown_table(rows: Sequence[str], columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Lays out cells by column as the lines of a Markdown table; `rows` are the names in its first column."""
    cells = [
        ["", *columns],
        *([row, *(column[index] for column in columns.values())] for index, row in enumerate(rows)),
    ]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in cells]


def spread(numbers: Sequence[float]) -> float | None:
    """Computes the sample standard deviation (n − 1); `None` for a single number."""
    return statistics.stdev(numbers) if len(numbers) > 1 and all(map(math.isfinite, numbers)) else None
