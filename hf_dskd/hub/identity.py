"""What a finished run is, as others may see it: its models and data by the names that they have on the hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.files import format_of
from ..errors import UserError
from ..methods import METHODS
from ..offline.packaged import MARKER, PACKAGED_MODELS, PackagedModel, ready_folder
from ..offline.python_functions import PYTHON_FUNCTIONS
from ..report.files import read_run, runs_in
from ..report.words import millions
from ..training.run_folder import SETTINGS_NAME
from ..utils.files import read_json, read_yaml
from .names import page


TAG = "hf_dskd"


@dataclass(frozen=True)
class Model:
    """A student before training, or a teacher, as a card may name it."""

    hub_id: str | None  # None for a folder of this machine, which means nothing elsewhere
    name: str  # for people, in Markdown
    size: str | None = None  # its parameters, for people
    folder: Path | None = None  # where it lies on this machine, as far as that is known
    packaged: PackagedModel | None = None  # where it came from

    @property
    def words(self) -> str:
        return self.name if self.size is None else f"{self.name}, {self.size} parameters"


def identity(student: str | None, adapter: bool, method: str, model_type: str | None = None) -> dict[str, str | None]:
    """
    Says what tells a pushed student from other models in a repository, as its card has it: for
    [`~hf_dskd.hub.push.check_access`] before there is a run.

    `student` is the name or folder of the model that is trained, and `model_type` its architecture, by default that
    of the folder's config.
    """
    is_folder = student is not None and os.path.isdir(student)
    name = Path(str(student)).resolve().name if is_folder else student
    if model_type is None and is_folder:
        model_type = read_json(Path(str(student)) / "config.json", {}).get("model_type")
    return {
        "base_model": _hub_id(name, student),
        "library_name": "peft" if adapter else "transformers",
        "method": method,
        "model_type": model_type,
    }


class FinishedRun:
    """
    A finished run with its models and data as others may see them.

    Raises:
        UserError: If it is no folder of one finished run, or a file in it can't be read.
    """

    def __init__(self, folder: str | Path):
        if (Path(folder) / "cells").is_dir():
            cells = ", ".join(str(cell) for cell in runs_in([folder])[0])
            raise UserError(f"{str(folder)!r} holds the runs of a comparison: push one of them, {cells}")
        self.files = read_run(folder)
        self.folder, self.record = self.files.folder, self.files.record

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings that aren't at their default: everything a command line can say, or those of the trainer alone."""
        path = self.folder / SETTINGS_NAME
        if path.is_file():
            return read_yaml("the run's settings", path)
        return {name: value for name, (_, value) in self.record.changes.items()}

    @property
    def adapter(self) -> bool:
        """As the run says; files of a run before it may lie in its folder."""
        said = self.record.models.adapter
        return (self.folder / "adapter_config.json").is_file() if said is None else said

    @cached_property
    def student(self) -> Model:
        models, given = self.record.models, self.settings.get("model_name_or_path")
        parameters = models.student_parameters
        if given is None and models.base_model == models.student:
            given = models.base_model  # of a run that `hf-dskd` didn't start: a name without a slash is no folder's
        if not self.adapter:
            return _model(models.student, given, parameters, self.folder)
        # Where its base was when it was loaded: a packaged model's own folder.
        base = read_json(self.folder / "adapter_config.json", {}).get("base_model_name_or_path")
        given = base if given is None or Path(str(base)).is_dir() else given
        return _model(models.student, given, parameters and parameters - (models.trained_parameters or 0))

    @cached_property
    def teacher(self) -> Model | None:
        models, given = self.record.models, self.settings.get("teacher_model_name_or_path")
        name = models.teacher
        if METHODS[self.record.method].text == "teacher" or (name and self.settings.get("sft_teacher")):
            name = given if given is None or not Path(given).is_dir() else Path(given).resolve().name
        # One that was passed as a loaded model may have no name.
        if not name and not models.teacher_parameters:
            return None
        teacher = _model(name or None, given, models.teacher_parameters)
        if not self.settings.get("sft_teacher"):
            return teacher
        # What it was before: its tokenizer and licence are the same.
        return replace(teacher, name=f"{teacher.name}, first fine-tuned on the same data")

    @cached_property
    def dataset(self) -> str | None:
        """Name of the training data on the hub; `None` for what lies on this machine."""
        source = self.record.data.source
        return source if source is not None and self.is_on_hub(source) else None

    def is_on_hub(self, source: str) -> bool:
        """Tells whether that is the name of a dataset on the hub, as far as names and this machine's folders tell."""
        if source == PYTHON_FUNCTIONS or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
            return False
        # A path is relative to where the run was started: here, or in a folder that its own is in.
        places = (Path.cwd(), *self.folder.resolve().parents)
        return format_of(source) is None and not any((place / source).exists() for place in places)

    @property
    def identity(self) -> dict[str, str | None]:
        """[`identity`] of its student."""
        named = identity(None, self.adapter, self.record.method, self.record.models.student_type)
        return {**named, "base_model": self.student.hub_id}


def _packaged(name: str | None, given: str | None) -> PackagedModel | None:
    """The packaged model that a run calls `name`; another folder may have that name too."""
    if name not in PACKAGED_MODELS or not (given in (None, name) or (Path(given) / MARKER).is_file()):
        return None
    return PACKAGED_MODELS[name]


def _hub_id(name: str | None, given: str | None) -> str | None:
    """
    Name on the hub of the model that a run calls `name` and that was given to it as `given`.

    A run knows folders by their last part: what has a slash in it is no folder. `gpt2` is either.
    """
    packaged = _packaged(name, given)
    if packaged is not None:
        return packaged.hub_id
    if name is None or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    return name if "/" in name or (name == given and not Path(name).is_dir()) else None


def _model(name: str | None, given: str | None, parameters: int | None, like: Path | None = None) -> Model:
    """`like` is a folder whose config is the model's, where its own isn't known."""
    hub_id, packaged = _hub_id(name, given), _packaged(name, given)
    folder = Path(given) if given is not None and Path(given).is_dir() else None
    if packaged is not None:
        folder = ready_folder(packaged.name)
    size = millions(parameters) if parameters else None
    if hub_id is not None:
        return Model(hub_id, f"[`{hub_id}`]({page(hub_id)})", size, folder, packaged)
    known = folder or like
    config = read_json(known / "config.json", {}) if known is not None else {}
    kinds = ", ".join(f"`{kind}`" for kind in config.get("architectures") or [])
    # A model that was passed as an object may be on the hub all the same.
    where = "a local model" if given is not None else "a model whose origin was not recorded"
    return Model(None, f"{where} ({kinds})" if kinds else where, size, folder)
