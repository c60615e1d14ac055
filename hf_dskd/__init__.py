"""Distil a large language model into a small one whose tokenizer is different, with the Hugging Face Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import DSKDConfig
    from .data.collator import DualCollator
    from .data.tokenization import tokenize_dataset
    from .errors import NonFiniteLossError, UserError
    from .trainer import DSKDTrainer

__version__ = "0.1.0"

# Nothing heavy is imported before it is used: torch and transformers take seconds, `hf_dskd` alone takes none.
_HOME = {
    "DSKDConfig": ".config",
    "DSKDTrainer": ".trainer",
    "DualCollator": ".data.collator",
    "NonFiniteLossError": ".errors",
    "UserError": ".errors",
    "tokenize_dataset": ".data.tokenization",
}
__all__ = [
    "DSKDConfig",
    "DSKDTrainer",
    "DualCollator",
    "NonFiniteLossError",
    "UserError",
    "__version__",
    "tokenize_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
