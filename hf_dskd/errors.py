"""Errors that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """
    Something in the input has to be changed by the user.

    The message is one line: the offending value and the remedy. Commands print it without a traceback.
    """


class NonFiniteLossError(RuntimeError):
    """
    A loss term became NaN or infinite.

    Training stops before anything is saved, so the last checkpoint on disk is from before the term broke. The message
    names the term, the optimizer step and the ids of the examples in the batch.
    """


def check_name(what: str, value: str, known: Iterable[str]) -> None:
    """Raises a [`UserError`] that suggests the nearest of `known` unless `value` of `what` (as `"method="`) is one."""
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{what}{value!r} is unknown: {hint}one of {', '.join(known)}")
