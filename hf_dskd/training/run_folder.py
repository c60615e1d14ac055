"""
What a run's folder holds: whose it is, its checkpoints, and what each of them has beside the student.

    output_dir/
      .run.json    the id of the run begun or resumed last, and who did: host, process, time
      .run.lock    held while that process trains; the system lets go of it when the process dies
      result.json  what the run came to, of one that is complete
      checkpoint-N/
        (what transformers.Trainer writes: the student or its adapter, tokenizer, optimizer, scheduler, random state)
        auxiliary.json                 what the other files are, and of which method, pair, run and settings
        projectors.safetensors         query, s2t, t2s
        discriminator.safetensors      only with adversarial matching; transport_critics.safetensors with transport
        discriminator_optimizer.pt     its optimizer and schedule
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..methods import MATCHINGS
from ..utils.files import write_text


if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

RESULT_NAME = "result.json"
SETTINGS_NAME = "settings.yaml"
RUN_NAME = ".run.json"
LOCK_NAME = ".run.lock"
# For what a killed process leaves running, such as the workers of its data loader, to notice and end.
PATIENCE = 30.0
# In the place of the id of a run, where a checkpoint doesn't say it.
DAMAGED = "damaged"
AUXILIARY_NAME = "auxiliary.json"
DISCRIMINATOR_OPTIMIZER_NAME = "discriminator_optimizer.pt"
STAGING_NAME = ".incomplete"

PROJECTORS = "query (student embeddings to keys), s2t (student to teacher space), t2s (teacher to student space)"


# ---- What lies beside the student


def roles() -> dict[str, str]:
    """Says of every module that a run may have beside the student what it does."""
    return {"projectors": PROJECTORS, **{row.critic: row.role for row in MATCHINGS.values() if row.critic}}


def save_auxiliary(folder: str | Path, modules: dict[str, nn.Module], facts: dict[str, Any]) -> None:
    """Writes `modules` as safetensors and `facts` with a description of each file as `auxiliary.json`."""
    from safetensors.torch import save_file

    folder = Path(folder)
    files = {}
    for name, module in modules.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        files[name] = {
            "file": f"{name}.safetensors",
            "role": roles()[name],
            "shapes": {key: list(value.shape) for key, value in tensors.items()},
        }
    (folder / AUXILIARY_NAME).write_text(json.dumps({**facts, "modules": files}, indent=2) + "\n")


def load_auxiliary(folder: str | Path, modules: dict[str, nn.Module]) -> None:
    """Reads what [`save_auxiliary`] wrote into `modules`."""
    from safetensors.torch import load_file

    for name, module in modules.items():
        module.load_state_dict(load_file(Path(folder) / f"{name}.safetensors"))


def run_id(folder: str | Path) -> str | None:
    """Reads which run a checkpoint is of; `None` for an earlier version's. Damaged ones raise a [`UserError`]."""
    path = Path(folder) / AUXILIARY_NAME
    return None if not path.is_file() else read_auxiliary(folder).get("run_id")


def read_auxiliary(folder: str | Path) -> dict[str, Any]:
    """Reads what `auxiliary.json` in `folder` says."""
    path = Path(folder) / AUXILIARY_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or not isinstance(saved["modules"], dict):
            raise TypeError("it isn't what hf_dskd writes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} can't be read ({type(error).__name__}: {error}): use another checkpoint"
        ) from None
    return saved


def check_facts(folder: str | Path, facts: dict[str, Any], name: str) -> None:
    """Raises a [`UserError`] unless what is saved in `folder` (called `name` in messages) is of a run with `facts`."""
    saved = read_auxiliary(folder)
    for key, value in facts.items():
        if saved.get(key) != value:
            raise UserError(
                f"{name}{str(folder)!r} is of another run: its {key} is {saved.get(key)!r}, this run's is {value!r};"
                " use the settings it was made with, or start in a new output_dir"
            )


def check_analysed(folder: str | Path) -> None:
    """Raises a [`UserError`] unless `folder` is of a run whose alignment can be analysed."""
    path = Path(folder) / AUXILIARY_NAME
    if not path.is_file():
        raise UserError(
            f"{str(folder)!r} has no {AUXILIARY_NAME}: name the output folder of a run of hf_dskd, or a checkpoint-N"
            " in it"
        )
    saved = read_auxiliary(folder)
    if not saved["modules"] and saved["alignment"] not in ("chunks",):
        raise UserError(
            f"{str(folder)!r} was trained with method={saved['method']!r}, which has no projectors and no alignment to"
            " analyse: choose a run with one in hidden spaces, such as dskd_cma, or with alm"
        )


def checkpoints(run_folder: str | Path) -> list[Path]:
    """Lists the checkpoints in a folder, by step."""
    found = [path for path in Path(run_folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step)


def step(checkpoint: Path) -> int:
    """Reads the optimizer step in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1])


def publish(staged: Path, final: Path) -> None:
    """
    Moves a complete checkpoint to its place in one rename; one of the same name that was there goes only then.

    It is on the disk before it has its name: after a power failure a name would else stand for empty files.
    """
    for path in (*staged.rglob("*"), staged):
        _sync(path)
    if os.path.lexists(final):
        old = final.with_name(f".old-{final.name}")
        if os.path.lexists(old):
            remove(old)
        os.replace(final, old)
        os.replace(staged, final)
        _sync(final.parent)
        remove(old)
    else:
        os.replace(staged, final)
        _sync(final.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    # Windows syncs nothing that is open for reading alone.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Of a folder some file systems can't, such as those of FUSE.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint; of a symbolic link only the link, for what it leads to is elsewhere."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint)


def rotate(run_folder: str | Path, limit: int | None, best: str | None, run: str | None) -> None:
    """Deletes the oldest checkpoints of a `run` over `limit`; the best one and the newest always stay."""
    if limit is None or limit <= 0:
        return
    found = [path for path in checkpoints(run_folder) if _run_of(path) == run]
    keep = {found[-1].name} if found else set()
    if best is not None:
        keep.add(Path(best).name)
    surplus = len(found) - max(limit, len(keep))
    for path in [path for path in found if path.name not in keep][: max(surplus, 0)]:
        remove(path)


# ---- Whose a folder is


def check_output_dir(folder: str) -> None:
    """Checks that an output folder takes files."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output_dir={folder!r} is not writable ({error.strerror}): choose another folder") from None


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


def remove_run(folder: Path) -> None:
    """Deletes what makes a folder that of a run."""
    for path in checkpoints(folder):
        remove(path)
    for name in (RESULT_NAME, RUN_NAME):
        (folder / name).unlink(missing_ok=True)


def noted(folder: str | Path) -> dict[str, Any]:
    """Reads what is written of the last run in a folder; nothing before the first, or where it can't be read."""
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

    A [`UserError`] where another process does, with its name, or where no file can be written.
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
    """Tells whether the process was one of this machine and is none any more."""
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
    Finds the newest checkpoint of the last run in a folder; a [`UserError`] without one, or where it can't be told
    whose.
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
