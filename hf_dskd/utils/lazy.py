"""Public names of a package that are imported when somebody first asks for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def public(package: str, **modules: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """
    Make a package's `__getattr__`, `__dir__` and `__all__` of the names that each of its `modules` gives.

    Nothing heavy is imported before it is used: torch and transformers take seconds.
    """
    home = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return get, lambda: sorted(home), sorted(home)
