"""What a saved student may not tell of the machine that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def saved_for_others(trainer: Any) -> Iterator[None]:
    """Keeps tokens out of the settings that Trainer saves, and PEFT from its card, whose base may be a folder here."""
    args, model = trainer.args, trainer.model
    trainer.args = args.without_tokens()
    writes_card = hasattr(model, "create_or_update_model_card")
    if writes_card:
        model.create_or_update_model_card = _no_card
    try:
        yield
    finally:
        trainer.args = args
        if writes_card:
            del model.create_or_update_model_card


def _no_card(folder: str) -> None:
    pass
