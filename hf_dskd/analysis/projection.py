"""Queries and keys in two dimensions: whether matching moved the ones onto the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..utils.figures import COLORS, drawable, new_figure, plain_axes, save_figure


_SETS = ("queries (student)", "keys (teacher)")
_SIDE = 4.2  # inches
_MOST_COLUMNS = 3


def plot_projection(
    panels: Mapping[str, tuple[Tensor, Tensor]], path: str | Path, explained: tuple[float, float]
) -> None:
    """
    Writes a PNG with a scatter of queries and keys per panel, such as before and after training.

    All panels have the same limits and one scale for both axes, so that distances can be compared by eye; the points
    of all panels must therefore come from one projection. A cross marks each set's mean.

    Args:
        panels (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`):
            Projected queries `[n, 2]` and keys `[m, 2]` by the panel's title; neither is empty.
        path (`str` or `Path`): File to write; its folder is made if need be.
        explained (`tuple[float, float]`): Share of the variance that lies along each axis, from 0 to 1.

    Raises:
        UserError: If `panels` is empty.
    """
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D

    if not panels:
        raise UserError("plot_projection got no panels: pass at least one pair of queries and keys")
    columns = min(len(panels), _MOST_COLUMNS)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(_SIDE * columns + 0.4, _SIDE * rows + 0.7)
    everything = torch.cat([points.float() for pair in panels.values() for points in pair])
    centre = (everything.amax(0) + everything.amin(0)) / 2
    half = 0.54 * float((everything.amax(0) - everything.amin(0)).max()) or 0.5
    for index, (title, pair) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        counts = [len(points) for points in pair]
        # Few points are solid, many add up to a density.
        alpha = min(0.8, max(0.08, 12 / math.sqrt(sum(counts))))
        size = min(28.0, max(5.0, 600 / math.sqrt(sum(counts))))
        # In random order: drawn one set after the other, the second would hide the first.
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))
        points = torch.cat([part.float() for part in pair])[order].numpy()
        sides = [to_rgba(COLORS[int(place >= counts[0])], alpha) for place in order.tolist()]
        axes.scatter(points[:, 0], points[:, 1], s=size, c=sides, linewidths=0)
        # Of two sizes, so that both show where they coincide.
        for part, color, cross in zip(pair, COLORS, (12, 9)):
            x, y = part.float().mean(0).tolist()
            axes.plot([x], [y], marker="X", markersize=cross, color=color, markeredgecolor="white")
        axes.set_xlim(float(centre[0]) - half, float(centre[0]) + half)
        axes.set_ylim(float(centre[1]) - half, float(centre[1]) + half)
        axes.set_aspect("equal")
        axes.set_title(drawable(title), fontsize=10, loc="left", parse_math=False)
        axes.set_xlabel(f"first component ({explained[0]:.0%} of the variance)", fontsize=8)
        if index % columns == 0:
            axes.set_ylabel(f"second component ({explained[1]:.0%})", fontsize=8)
        plain_axes(axes, grid="both")

    shape: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 7}
    handles = [Line2D([], [], color=color, **shape) for color in COLORS[:2]]
    handles.append(Line2D([], [], color="#555555", **{**shape, "marker": "X"}))
    figure.legend(handles, [*_SETS, "mean"], loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)
