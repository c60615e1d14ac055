"""Text in pictures: a font has not every character."""

from __future__ import annotations

import functools
import unicodedata


FONT = "DejaVu Sans Mono"  # comes with matplotlib


def drawable(text: str) -> str:
    """The text with escapes (`\\u6771`) for characters that the font lacks or that would fuse with their neighbour."""
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
