"""The record of a run: what it came to and what it was made of, as its `result.json` keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..redaction import without_secrets
from ..settings import DistillationSettings
from ..utils.environment import in_words
from ..utils.files import plain, read_json, write_text


# Settings that DSKDConfig makes itself, and one that must not be written down.
UNWRITTEN = ("remove_unused_columns", "logging_nan_inf_filter", "hub_token")

Part = TypeVar("Part")


@dataclass(frozen=True)
class Models:
    """Student and teacher."""

    # Name on the hub, or last part of the folder's.
    student: str | None = None
    teacher: str | None = None
    base_model: str | None = None  # the student's name on the hub before training; None for a folder
    student_type: str | None = None  # its architecture, as its config says
    student_bits: int | None = None  # 4 or 8, if it was quantized while it was trained
    student_parameters: int | None = None
    trained_parameters: int | None = None
    teacher_parameters: int | None = None
    adapter: bool | None = None  # None if the file is of a version that didn't say
    # Commits of what was loaded from the hub, and the model that a loaded adapter is for.
    student_commit: str | None = None
    student_adapts: str | None = None
    student_adapts_commit: str | None = None
    teacher_commit: str | None = None
    teacher_adapts: str | None = None
    teacher_adapts_commit: str | None = None

    def with_commit(self, role: str) -> str:
        """Names a model, with the commit of what was loaded where it came from the hub."""
        name, commit, adapts, adapts_commit = (
            getattr(self, f"{role}{part}") for part in ("", "_commit", "_adapts", "_adapts_commit")
        )
        loaded = f"{name} at {commit}" if commit else str(name)
        if adapts:
            loaded += f", an adapter of {adapts}" + (f" at {adapts_commit}" if adapts_commit else "")
        return loaded

    @property
    def pair(self) -> str:
        """Student ← teacher, without the folders where they lie on a disk."""
        names = [name for name in (self.student, self.teacher) if name]
        return " ← ".join(Path(name).name if Path(name).is_absolute() else name for name in names)


@dataclass(frozen=True)
class Hardware:
    """The machine of a run, its memory in GB (10^9 bytes), and how many processes the run had."""

    cpu: str | None = None
    cores: int | None = None
    memory_gb: float | None = None
    gpus: list[str] = field(default_factory=list)
    processes: int = 1

    @property
    def words(self) -> str:
        """One line of it."""
        return in_words(asdict(self))


@dataclass(frozen=True)
class Data:
    """The data of a run."""

    source: str | None = None  # name of the dataset
    fingerprint: str | None = None  # of the tokenized training examples
    # What became of the rows (see TokenizationReport), by "train", "eval" or "eval_NAME".
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    def rows(self, split: str) -> int | None:
        """Counts the examples of a split that were kept."""
        return self.splits.get(split, {}).get("kept")


@dataclass(frozen=True)
class Card:
    """What the user has for the model card."""

    language: str | list[str] | None = None
    license: str | None = None
    tags: list[str] = field(default_factory=list)
    model_name: str | None = None
    datasets: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunRecord:
    """What a run came to and what it was made of. What a file of an earlier version doesn't say is `None` or empty."""

    method: str
    seed: int | None = None
    data_seed: int | None = None
    run_id: str | None = None
    steps: int = 0
    skipped_steps: int = 0
    best_checkpoint: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the final model
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)  # on the way, by optimizer step
    train_runtime: float | None = None  # seconds since the start or the last resume; None if nothing was left to train
    command: str | None = None
    finished: str | None = None  # when, in UTC
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Hardware | None = None
    models: Models = field(default_factory=Models)
    data: Data = field(default_factory=Data)
    settings: dict[str, Any] = field(default_factory=dict)  # all of the distillation
    changed_settings: dict[str, list[Any]] | None = None  # default and value of all that isn't at its default
    fitted: dict[str, float] = field(default_factory=dict)  # constants that the method fitted before training
    card: Card = field(default_factory=Card)

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """
        Reads a `result.json`.

        Raises:
            UserError: If it isn't one.
        """
        content = read_json(path)
        if not isinstance(content, dict) or "method" not in content:
            raise UserError(f"{str(path)!r} names no method: it isn't what `hf-dskd train` writes")
        found = {**content, "method": str(content["method"])}
        data = dict(content.get("data") or {})
        found["data"] = Data(data.pop("source", None), data.pop("fingerprint", None), data)
        found["evaluations"] = {int(step): entry for step, entry in (content.get("evaluations") or {}).items()}
        for name, kind in (("models", Models), ("hardware", Hardware), ("card", Card)):
            found[name] = _known(kind, content[name]) if content.get(name) else None
        return _known(cls, found)

    def write(self, path: Path) -> None:
        """Writes the record as JSON."""
        content = asdict(self)
        content["data"] |= content["data"].pop("splits")
        card = {name: value for name, value in content.pop("card").items() if value}
        if not self.fitted:
            del content["fitted"]
        write_text(path, json.dumps({**content, **({"card": card} if card else {})}, indent=2, default=str) + "\n")

    @property
    def all_settings(self) -> dict[str, Any]:
        """The settings that are known: those of the distillation, and others that differ from their defaults."""
        return {**self.settings, **{name: value for name, (_, value) in (self.changed_settings or {}).items()}}

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """Default and value of the settings that differ from their defaults."""
        if self.changed_settings is not None:
            return {name: (default, value) for name, (default, value) in self.changed_settings.items()}
        defaults = {setting.name: setting.default for setting in fields(DistillationSettings)}
        return {
            name: (defaults[name], value)
            for name, value in self.settings.items()
            if name in defaults and value != defaults[name]
        }


def _known(kind: type[Part], values: Mapping[str, Any]) -> Part:
    """Makes a part of a record of what a file says, without what this version doesn't know."""
    names = [part.name for part in fields(kind)]  # type: ignore[arg-type]  # a dataclass
    return kind(**{name: values[name] for name in names if values.get(name) is not None})


def note_card(path: Path, card: Mapping[str, Any]) -> None:
    """Puts what the user has for the card into a `result.json`, of which all else stays."""
    write_text(path, json.dumps({**read_json(path), "card": card}, indent=2) + "\n")


def evaluations(history: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Finds the metrics by the optimizer step that they were taken at, in `trainer.state.log_history`."""
    return {
        entry["step"]: {name: value for name, value in entry.items() if name.startswith("eval_")}
        for entry in history
        if any(name.startswith("eval_") for name in entry)
    }


def differences(settings: Any) -> dict[str, list[Any]]:
    """
    Finds `[default, value]` of a dataclass's settings that aren't at their default, as plain as YAML and JSON need.

    Left out are those that [`DSKDConfig`] sets itself, and tokens.
    """
    found = {}
    for setting in fields(settings):
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        value = without_secrets(plain(getattr(settings, setting.name)))
        default = None if default is MISSING else plain(default)
        # Objects that a setting was parsed into.
        known = value is None or isinstance(value, (str, bool, int, float, list, dict))
        # Of None Trainer makes what suits the metric, and that isn't False.
        decided = setting.name == "greater_is_better" and value is not None
        # Of None a run makes what suits the machine.
        decided |= setting.name == "bf16" and value is False and not settings.fp16
        same = not decided and (value == default or all(_is_nothing(part) for part in (value, default)))
        if setting.init and known and not same and setting.name not in UNWRITTEN:
            found[setting.name] = [default, value]
    return found


def _is_nothing(value: Any) -> bool:
    """Some settings make one of these of another."""
    return value is None or value is False or value in ([], {}, "", "none", ["none"])
