"""Errors that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from .redaction import redact


class UserError(ValueError):
    """
    Says that the user has to change something in the input.

    The message is one line: the offending value and the remedy, without tokens. Commands print it without a traceback.
    """

    def __init__(self, message: str):
        super().__init__(redact(message))


class NonFiniteLossError(RuntimeError):
    """
    Says that a loss term, a gradient or a weight became NaN or infinite.

    Training stops before anything is saved, so the last checkpoint on disk is from before it broke. The message names
    the term or the part, the optimizer step and the ids of the examples in the batch.
    """


def nearest(value: str, known: Iterable[str]) -> str | None:
    """Finds the one of `known` that `value` is a slip or the beginning of; `None` where none is near."""
    plain = {name.casefold().replace("-", "_"): name for name in known}
    word = value.casefold().replace("-", "_")
    begun = [name for name in plain if len(word) > 1 and name.startswith(word)]
    near = difflib.get_close_matches(word, plain, n=1, cutoff=0.6) or begun[:1]
    return plain[near[0]] if near else None


def check_name(what: str, value: Any, known: Iterable[str]) -> None:
    """Raises a [`UserError`] that suggests the nearest of `known` unless `value` of `what` (as `"method="`) is one."""
    known = list(known)
    if value not in known:
        near = nearest(str(value), known)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(f"{what}{value!r} is unknown: {hint}one of {', '.join(known)}")


def kind_of(value: Any) -> str:
    """Says what a value is, as in a sentence: `"a list"`."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
