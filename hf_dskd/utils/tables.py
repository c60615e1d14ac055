"""Tables of numbers as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from .markup import Markdown, strong, table


def markdown_table(rows: Sequence[str], columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Lays out cells by column as the lines of a Markdown table; `rows` are the names in its first column."""
    cells = [[Markdown(cell) for cell in row] for row in zip(rows, *columns.values())]
    return table(["", *map(Markdown, columns)], cells, align="l").splitlines()


def mean_column(
    numbers: Sequence[Sequence[float]], better: str | None, write: Callable[[float], str] = "{:.4f}".format
) -> list[str]:
    """
    Writes the mean ± sample standard deviation of each row's numbers.

    The best mean is bold where there are several and one end of the measure is `better`, `"lower"` or `"higher"`.
    """
    # As they are printed: what looks equal is equally good.
    means = [round(statistics.fmean(found), 4) if found else math.nan for found in numbers]
    finite = [mean for mean in means if math.isfinite(mean)]
    best = (min if better == "lower" else max)(finite) if better is not None and len(finite) > 1 else None
    cells: list[str] = []
    for mean, found in zip(means, numbers):
        deviation = spread(found)
        text = (write(mean) if found else "–") + ("" if deviation is None else f" ± {write(deviation)}")
        cells.append(strong(text) if found and mean == best else text)
    return cells


def spread(numbers: Sequence[float]) -> float | None:
    """Computes the sample standard deviation (n − 1); `None` for a single number."""
    return statistics.stdev(numbers) if len(numbers) > 1 and all(map(math.isfinite, numbers)) else None
