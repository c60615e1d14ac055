"""How a command begins and ends: the processes that a launcher has started, and what is printed of an error."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from .errors import NonFiniteLossError, UserError
from .redaction import without_values


# What torchrun (and so `accelerate launch`) and three kinds of MPI set in each process.
VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Lays out help for a terminal, with names and meanings side by side."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=min(shutil.get_terminal_size().columns, 119))


class Parser(argparse.ArgumentParser):
    """Says of a mistake in one line what it is, without the usage; half of a name isn't taken for the whole."""

    def __init__(self, prog: str | None = None, **options: Any):
        super().__init__(prog, **{"formatter_class": Formatter, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the options")


def launched_processes() -> int:
    """Counts the processes, as the launcher of this one says; 1 without a launcher."""
    return max(int(os.environ.get(name) or 1) for name in VARIABLES)


def check_sharding(config: Any) -> None:
    """Refuses to spread a model over ranks. TrainingArguments would ask for deepspeed to be installed first."""
    for name, set_in_config in (("FSDP", bool(config.fsdp)), ("DEEPSPEED", bool(config.deepspeed))):
        if set_in_config or os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes"):
            raise UserError(
                f"{name} shards the language-model heads that both spaces share and is not supported: use plain"
                " data parallelism (accelerate launch --multi_gpu), with LoRA and load_teacher_in_4bit to save memory"
            )


def must_use_cpu() -> bool:
    """Tells whether Accelerate must hear that the processes of a launcher run on the CPU: it would count one, else."""
    import torch

    return launched_processes() > 1 and not torch.accelerator.is_available()


def check_processes(found: int) -> None:
    """Raises a [`UserError`] unless a run has as many processes as its launcher says: they would train alone."""
    launched = launched_processes()
    if found != launched:
        import torch

        name = next(name for name in VARIABLES if os.environ.get(name) == str(launched))
        device, why = torch.accelerator.current_accelerator(), " (LOCAL_RANK is not set)"
        if "LOCAL_RANK" in os.environ:
            why = "" if device is None else f" and trains alone on {device.type!r}"
        raise UserError(
            f"{name}={launched}, but this process found {found} of them{why}: start with `accelerate launch"
            f" --num_processes {launched} SCRIPT` (on CPUs with --use_cpu), or unset {name} to run alone"
        )


def command(main: Callable[[], Any]) -> None:
    """Runs a recipe's `main`: what the user has to mend is one line on stderr, not a traceback."""
    # Neither is for the user of a recipe: bitsandbytes looks for an optional CPU kernel at import, and transformers 5
    # warns of names that its own code and peft's still use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    sys.excepthook = print_without_tokens
    try:
        try:
            main()
            leave_together()
        except (UserError, NonFiniteLossError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped; go on from the last checkpoint with --resume_from_checkpoint last", file=sys.stderr)
            sys.exit(130)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _stop_printing()


def _stop_printing() -> None:
    """Ends quietly where whoever reads the output has had enough, as `head` has; other broken pipes are errors."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    raise


def print_without_tokens(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an error that nobody caught: its text may have a token, and the terminal may be a file."""
    sys.stderr.write(without_values("".join(traceback.format_exception(kind, error, trace))))


def leave_together() -> None:
    """Ends the processes of a run together: one that exits while another still talks to it may abort."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
