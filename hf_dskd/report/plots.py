"""The pictures that a report draws itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from ..analysis.curves import Runs, plot_curves
from ..errors import UserError
from ..utils.figures import COLORS, new_figure, plain_axes, save_figure
from ..utils.markup import Markdown, pictures


def curves(histories: Runs, path: Path) -> Markdown | None:
    """Draws the logs of runs, by their name, for a page beside the picture; `None` if nothing was logged."""
    try:
        plot_curves(histories, path)
    except UserError:  # nothing to draw
        return None
    return pictures({"Every loss term and what else was logged, over optimizer steps": path}, path.parent)


def plot_gradient_shares(norms: Mapping[int, Mapping[str, float]], path: str | Path) -> None:
    """Writes a PNG: a stacked bar for each step at which the norms, by step and loss term, were measured."""
    terms = list(dict.fromkeys(term for part in norms.values() for term in part))
    totals = [sum(part.values()) or math.inf for part in norms.values()]
    width = min(max(3.6, 1.6 + 0.45 * len(norms)), 11.0)
    figure = new_figure(width + 1.2, 2.8)
    axes = figure.add_subplot()
    bottom = [0.0] * len(norms)
    for index, term in enumerate(terms):
        shares = [part.get(term, 0.0) / total for part, total in zip(norms.values(), totals)]
        axes.bar(range(len(norms)), shares, bottom=bottom, width=0.8, color=COLORS[index % len(COLORS)], label=term)
        bottom = [low + share for low, share in zip(bottom, shares)]
    every = math.ceil(len(norms) / 12)
    axes.set_xticks(range(0, len(norms), every), [f"{step:,}" for step in list(norms)[::every]])
    axes.set_ylim(0, 1)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_ylabel("share of the gradients' norms", fontsize=8)
    plain_axes(axes)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, reverse=True)
    save_figure(figure, path)
