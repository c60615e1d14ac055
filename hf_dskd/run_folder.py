"""
Whose an output folder is: the run that it holds, and the process that works in it.

    output_dir/
      .run.json    the id of the run begun or resumed last, and who did: host, process, time
      .run.lock    held while that process trains; the system lets go of it when the process dies
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .checkpoint import AUXILIARY_NAME, checkpoints, remove, run_id
from .checks import check_output_dir
from .errors import UserError
from .utils.files import write_text


logger = logging.getLogger(__name__)

RESULT_NAME = "result.json"
SETTINGS_NAME = "settings.yaml"
RUN_NAME = ".run.json"
LOCK_NAME = ".run.lock"
# For what a killed process leaves running, such as the workers of its data loader, to notice and end.
PATIENCE = 30.0
# In the place of the id of a run, where a checkpoint doesn't say it.
DAMAGED = "damaged"


def check_fresh(folder: str | Path) -> None:
    """Refuses to mix a new run with one that is in the output folder."""
    folder = Path(folder)
    there = [path.name for path in (*checkpoints(folder)[-1:], folder / RESULT_NAME) if path.exists()]
    if there:
        raise UserError(
            f"output_dir={str(folder)!r} holds another run ({', '.join(there)}): go on with it by"
            " resume_from_checkpoint=True (--resume_from_checkpoint last), name another output_dir, or delete that"
            " folder"
        )


def check_no_other(folder: Path, run: str | None) -> None:
    """Refuses to go on with a `run` from elsewhere in an output folder that holds another one."""
    there = {_run_of(path) for path in checkpoints(folder)}
    if (folder / RESULT_NAME).exists():
        there.add(noted(folder).get("run_id"))
    if there - {run}:
        check_fresh(folder)


def forget_run(folder: Path) -> None:
    """Deletes what makes a folder that of a run."""
    for path in checkpoints(folder):
        remove(path)
    for name in (RESULT_NAME, RUN_NAME):
        (folder / name).unlink(missing_ok=True)


def noted(folder: str | Path) -> dict[str, Any]:
    """What is written of the last run in a folder; nothing before the first, or where it can't be read."""
    try:
        found = json.loads((Path(folder) / RUN_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def note(folder: Path, **changes: Any) -> None:
    """Writes down what there is to know of the run in a folder."""
    write_text(folder / RUN_NAME, json.dumps({**noted(folder), **changes}, indent=2) + "\n")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """
    Keeps other processes from training into a folder; this one may hold it several times.

    Raises:
        UserError: Where another process does, with its name, or where no file can be written.
    """
    from filelock import FileLock

    check_output_dir(str(folder))
    if (folder / LOCK_NAME).is_symlink():
        # What it leads to would be emptied.
        raise UserError(f"{str(folder / LOCK_NAME)!r} is a symbolic link: delete it")
    lock = FileLock(folder / LOCK_NAME, is_singleton=True)
    locked = _acquire(lock, folder)
    note(folder, host=socket.gethostname(), pid=os.getpid(), since=datetime.now(UTC).isoformat(timespec="seconds"))
    try:
        yield
    finally:
        if locked:
            lock.release()


def _acquire(lock: Any, folder: Path) -> bool:
    from filelock import Timeout

    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not _is_dead(noted(folder)):
                raise
            logger.warning("%s: what a killed process has left running in it still ends", folder)
            lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise UserError(
            f"output_dir={str(folder)!r} is in use by {_holder(noted(folder))}: wait for its end, or name another"
            " output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning("%s can't be locked (%s): take care that no other run writes there", folder, error)
        return False
    return True


def _holder(who: dict[str, Any]) -> str:
    if not who.keys() >= {"pid", "host", "since"}:
        return "another process"
    return f"process {who['pid']} on {who['host']} since {who['since']}"


def _is_dead(who: dict[str, Any]) -> bool:
    """Whether the process was one of this machine and is none any more."""
    if who.get("host") != socket.gethostname() or not isinstance(who.get("pid"), int) or os.name != "posix":
        return False
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def last_checkpoint(folder: str | Path) -> Path:
    """
    The newest checkpoint of the last run in a folder.

    Raises:
        UserError: Without one, or where it can't be told which run's it would be.
    """
    folder = Path(folder)
    found = {path: _run_of(path) for path in checkpoints(folder)}
    if not found:
        raise UserError(f"resume_from_checkpoint=True: {str(folder)!r} has no checkpoint; start without it")
    newest = list(found)[-1]
    known = noted(folder)
    if "run_id" not in known:
        # Moved without hidden files, or of an earlier version.
        if len(set(found.values()) - {DAMAGED}) <= 1:
            return newest
        raise UserError(
            f"resume_from_checkpoint=True: {str(folder)!r} has checkpoints of several runs: name the one to go on"
            f" with, such as {str(newest)!r}"
        )
    # What is damaged is told where it is looked at.
    own = [path for path, run in found.items() if run in (known["run_id"], DAMAGED)]
    if not own:
        raise UserError(
            f"resume_from_checkpoint=True: {str(folder)!r} has no checkpoint of its last run, but one of an earlier"
            f" run: name it, {str(newest)!r}, to go on with that"
        )
    return own[-1]


def _run_of(checkpoint: Path) -> str | None:
    try:
        return run_id(checkpoint) if (checkpoint / AUXILIARY_NAME).is_file() else DAMAGED
    except UserError:
        return DAMAGED


def recover(folder: Path) -> None:
    """Puts a checkpoint back whose replacement was interrupted, between two renames (see `checkpoint.publish`)."""
    for old in folder.glob(".old-checkpoint-*"):
        final = folder / old.name.removeprefix(".old-")
        if os.path.lexists(final):
            remove(old)
        else:
            os.replace(old, final)
