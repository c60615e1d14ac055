"""How many processes a launcher has started, and whether a run has them."""

from __future__ import annotations

import os

from .errors import UserError


# What torchrun (and so `accelerate launch`) and three kinds of MPI set in each process.
VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_processes() -> int:
    """How many processes there are, as the launcher of this one says; 1 without a launcher."""
    return max(int(os.environ.get(name) or 1) for name in VARIABLES)


def must_use_cpu() -> bool:
    """
    Whether Accelerate is to be told that the processes of a launcher run on the CPU.

    Where it isn't and finds no accelerator, it lets torch connect them but counts one, and each would train alone.
    """
    import torch

    return launched_processes() > 1 and not torch.accelerator.is_available()


def check_processes(found: int) -> None:
    """Raises a [`UserError`] unless a run has as many processes as its launcher says: they would train alone."""
    launched = launched_processes()
    if found != launched:
        name = next(name for name in VARIABLES if os.environ.get(name) == str(launched))
        raise UserError(
            f"{name}={launched}, but this process found {found} of them{_why_alone()}: start with `accelerate launch"
            f" --num_processes {launched} SCRIPT` (on CPUs with --use_cpu), or unset {name} to run alone"
        )


def _why_alone() -> str:
    import torch

    device = torch.accelerator.current_accelerator()
    if "LOCAL_RANK" in os.environ and device is not None:
        return f" and trains alone on {device.type!r}"
    return "" if "LOCAL_RANK" in os.environ else " (LOCAL_RANK is not set)"
