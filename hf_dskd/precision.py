"""In which precision a run trains: as its settings say, else as its launcher does, else as its GPU is best at."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UserError


logger = logging.getLogger(__name__)

# What `accelerate launch` sets, of `--mixed_precision` or of `accelerate config`.
LAUNCHED = "ACCELERATE_MIXED_PRECISION"
# What earlier settings of this process left there, and what the launcher had said.
_left: tuple[str | None, str | None] = (None, None)


def launched_precision() -> str | None:
    """Returns `"bf16"` or `"fp16"` where the launcher of this process says so."""
    said = (_heard() or "no").lower()
    if said not in ("no", "bf16", "fp16"):
        raise UserError(
            f"{LAUNCHED}={said!r} is no precision of a run: launch with --mixed_precision bf16, fp16 or no"
        )
    return None if said == "no" else said


def _heard() -> str | None:
    left, launched = _left
    said = os.environ.get(LAUNCHED)
    return launched if said == left else said


@contextmanager
def told(bf16: bool, fp16: bool) -> Iterator[None]:
    """Lets Trainer hear this precision instead of the launcher's; settings that are made later hear the launcher."""
    global _left
    launched = _heard()
    if not bf16 and not fp16 and os.environ.get(LAUNCHED, "no") != "no":
        # Of two words the nearer one counts, and Trainer would hear the other.
        os.environ[LAUNCHED] = "no"
    try:
        yield
    finally:
        # The settings of transformers 4.57 write there themselves.
        _left = (os.environ.get(LAUNCHED), launched)


def choose_precision(bf16: bool | None, fp16: bool, use_cpu: bool) -> tuple[bool, bool]:
    """Decides whether to train in bf16, and whether in fp16; `bf16=None` says nothing."""
    if fp16 or bf16 is not None:
        return bool(bf16), fp16
    launched = launched_precision()
    if launched is not None:
        return launched == "bf16", launched == "fp16"
    if use_cpu or not gpu_computes_in_bf16():
        return False, False
    if os.environ.get("RANK", "0") == "0":
        logger.warning(
            "training in bf16, in which this GPU computes and nothing else was said: bf16=False for float32"
        )
    return True, False


def gpu_computes_in_bf16() -> bool:
    """Tells whether there is an NVIDIA or AMD GPU that has instructions for it."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
