"""
What a run saves beside the student, and how a checkpoint gets to its place.

    checkpoint-N/
      (what transformers.Trainer writes: the student or its adapter, tokenizer, optimizer, scheduler, random state)
      auxiliary.json                 what the other files are, and of which method and pair
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


def check_checkpoint(folder: str | Path, facts: dict[str, Any]) -> None:
    """
    Raises a [`UserError`] unless `folder` is a whole checkpoint of a run with the same `facts`.

    `facts` are what must agree for a run to go on: method, pair, sizes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"resume_from_checkpoint={str(folder)!r} isn't a folder: name a checkpoint-N folder of a run")
    # A run's own folder can have the first two.
    for name in ("trainer_state.json", AUXILIARY_NAME, "optimizer.pt"):
        if not (folder / name).is_file():
            inside = checkpoints(folder)
            hint = f": did you mean {str(inside[-1])!r}?" if inside else ": name a checkpoint-N folder of a run"
            raise UserError(f"resume_from_checkpoint={str(folder)!r} is not a checkpoint, it has no {name}{hint}")
    check_facts(folder, facts, "resume_from_checkpoint=")


def check_facts(folder: str | Path, facts: dict[str, Any], name: str) -> None:
    """Raises a [`UserError`] unless what is saved in `folder` (called `name` in messages) is of a run with `facts`."""
    saved = json.loads((Path(folder) / AUXILIARY_NAME).read_text())
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
    saved = json.loads(path.read_text())
    if not saved["modules"] and saved["alignment"] not in ("chunks",):
        raise UserError(
            f"{str(folder)!r} was trained with method={saved['method']!r}, which has no projectors and no alignment to"
            " analyse: choose a run with one in hidden spaces, such as dskd_cma, or with alm"
        )


def checkpoints(run_folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    found = [path for path in Path(run_folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def publish(staged: Path, final: Path) -> None:
    """Moves a complete checkpoint to its place in one rename; one of the same name that was there goes only then."""
    if final.exists():
        old = final.with_name(f".old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(staged, final)
        shutil.rmtree(old)
    else:
        os.replace(staged, final)


def rotate(run_folder: str | Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints over `limit`; the best one and the newest always stay."""
    if limit is None or limit <= 0:
        return
    found = checkpoints(run_folder)
    keep = {found[-1].name} if found else set()
    if best is not None:
        keep.add(Path(best).name)
    surplus = len(found) - max(limit, len(keep))
    for path in [path for path in found if path.name not in keep][: max(surplus, 0)]:
        shutil.rmtree(path)
