"""
What a run saves beside the student, and how a checkpoint gets to its place.

    checkpoint-N/
      (what transformers.Trainer writes: the student or its adapter, tokenizer, optimizer, scheduler, random state)
      auxiliary.json                 what the other files are, and of which method, pair, run and settings
      projectors.safetensors         query, s2t, t2s
      discriminator.safetensors      only with adversarial matching; transport_critics.safetensors with transport
      discriminator_optimizer.pt     its optimizer and schedule
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError


if TYPE_CHECKING:
    from torch import nn

AUXILIARY_NAME = "auxiliary.json"
DISCRIMINATOR_OPTIMIZER_NAME = "discriminator_optimizer.pt"
STAGING_NAME = ".incomplete"

ROLES = {
    "projectors": "query (student embeddings to keys), s2t (student to teacher space), t2s (teacher to student space)",
    "discriminator": "tells queries from keys; its logit is that of 'query'",
    "transport_critics": "costs (critics) and plans (navigators) of the transport between queries and keys",
}


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
            "role": ROLES[name],
            "shapes": {key: list(value.shape) for key, value in tensors.items()},
        }
    (folder / AUXILIARY_NAME).write_text(json.dumps({**facts, "modules": files}, indent=2) + "\n")


def load_auxiliary(folder: str | Path, modules: dict[str, nn.Module]) -> None:
    """Reads what [`save_auxiliary`] wrote into `modules`."""
    from safetensors.torch import load_file

    for name, module in modules.items():
        module.load_state_dict(load_file(Path(folder) / f"{name}.safetensors"))


def run_id(folder: str | Path) -> str | None:
    """The run that a checkpoint is of; `None` for one of an earlier version. Damaged ones raise a [`UserError`]."""
    path = Path(folder) / AUXILIARY_NAME
    return None if not path.is_file() else read_auxiliary(folder).get("run_id")


def read_auxiliary(folder: str | Path) -> dict[str, Any]:
    """What `auxiliary.json` in `folder` says."""
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
    """The checkpoints in a folder, by step."""
    found = [path for path in Path(run_folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step)


def step(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
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
    found = [path for path in checkpoints(run_folder) if _is_of(path, run)]
    keep = {found[-1].name} if found else set()
    if best is not None:
        keep.add(Path(best).name)
    surplus = len(found) - max(limit, len(keep))
    for path in [path for path in found if path.name not in keep][: max(surplus, 0)]:
        remove(path)


def _is_of(checkpoint: Path, run: str | None) -> bool:
    try:
        return (checkpoint / AUXILIARY_NAME).is_file() and run_id(checkpoint) == run
    except UserError:
        return False
