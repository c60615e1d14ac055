"""One style of all pictures, and text that their font can draw."""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path
from typing import Any


FONT = "DejaVu Sans Mono"  # comes with matplotlib
DPI = 110
GRID = "#e6e6e6"
# Of runs, terms and the two models, in this order.
COLORS = ("#1f5fa8", "#e4572e", "#3a9d5d", "#8e5bb5", "#d6a11b", "#4ab3c4", "#b3446c", "#7a7a7a")


def new_figure(width: float, height: float, dpi: int = DPI, layout: Any = "constrained") -> Any:
    """Makes an empty white figure of `width` × `height` inches, which no window system has to know."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Any, grid: str | None = None) -> None:
    """Gives axes small labels, no frame above and at the right, and a grid behind (`"x"`, `"y"` or `"both"`)."""
    axes.tick_params(labelsize=8)
    if grid is not None:
        axes.grid(True, axis=grid, color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_figure(figure: Any, path: str | Path, **options: Any) -> None:
    """Writes a PNG, and the folder that it goes to; `options` are those of `Figure.savefig`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", **options)


def drawable(text: str) -> str:
    """Writes escapes (`\\u6771`) for characters that the font lacks or that would fuse with their neighbor."""
    return "".join(
        character
        if ord(character) in _glyphs() and character.isprintable() and not unicodedata.combining(character)
        else character.encode("ascii", "backslashreplace").decode()
        if not character.isascii()
        else repr(character)[1:-1]
        for character in text
    )


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont(FONT)).get_charmap())
