"""What the folders of runs say."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..analysis.curves import series
from ..errors import UserError
from ..training.run_folder import RESULT_NAME
from ..utils.files import read_json
from .record import RunRecord


# The folders in a run's own that a report, a card or a push reads or writes.
FOLDERS = ("additional_chat_templates", "analysis", "evaluation", "images", "report")


@dataclass(frozen=True, eq=False)
class RunFiles:
    """What a run's folder says."""

    folder: Path
    record: RunRecord  # result.json
    history: list[dict[str, Any]] = field(default_factory=list)  # log_history of trainer_state.json
    analyses: list[dict[str, Any]] = field(default_factory=list)  # lines of analysis/numbers.jsonl by step
    samples: list[dict[str, Any]] = field(default_factory=list)  # lines of analysis/samples.jsonl
    label: str | None = None  # the row of a comparison that the run belongs to

    @property
    def method(self) -> str:
        return self.record.method

    @property
    def metrics_before(self) -> dict[str, float]:
        """Metrics before training, where they were taken."""
        entries = [entry for entry in self.history if entry.get("step") == 0]
        logged = {key: value for entry in entries for key, value in entry.items() if key.startswith("eval_")}
        return {**logged, **self.record.evaluations.get(0, {})}

    @property
    def gradient_norms(self) -> dict[int, dict[str, float]]:
        """Norm of each loss term's gradient by step and term."""
        prefix = "gradient_norm_"
        return {
            entry["step"]: norms
            for entry in self.analyses
            if (norms := {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)})
        }

    def points(self, key: str) -> list[tuple[int, float]]:
        """Finds step and value of everything that was logged as `key`, by step."""
        return list(zip(*series(self.history, key)))


def read_run(folder: str | Path) -> RunFiles:
    """
    Reads the folder of a run.

    Raises:
        UserError: If it is no folder of a finished run, or a file in it can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} isn't a folder: name the --output_dir of a run of `hf-dskd train`")
    if not (folder / RESULT_NAME).is_file():
        unfinished = any(folder.glob("checkpoint-*"))
        remedy = (
            "its run isn't finished, go on with --resume_from_checkpoint last"
            if unfinished
            else "name the --output_dir of a run of `hf-dskd train` or `hf-dskd compare`"
        )
        raise UserError(f"{str(folder)!r} has no {RESULT_NAME}: {remedy}")
    check_links(folder)
    by_step = {line["step"]: line for line in _lines(folder / "analysis" / "numbers.jsonl")}
    return RunFiles(
        folder,
        RunRecord.read(folder / RESULT_NAME),
        read_json(folder / "trainer_state.json", {}).get("log_history", []),
        [by_step[step] for step in sorted(by_step)],
        _lines(folder / "analysis" / "samples.jsonl"),
        read_json(folder / "cell.json", {}).get("label"),
    )


def check_links(folder: Path) -> None:
    """Raises a [`UserError`] for a link out of a run's folder: a report or a push would show what isn't the run's."""
    home = folder.resolve()
    for place, folders, files in os.walk(home):
        if Path(place) == home:
            folders[:] = [name for name in folders if name in FOLDERS]
        for path in (Path(place) / name for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise UserError(
                    f"{str(path)!r} is a link out of the run's folder, which isn't followed: put the file itself"
                    " there, or delete the link"
                )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a JSONL file; none if there is no file."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n") if path.is_file() else [], start=1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{str(path)!r}, line {number}: not valid JSON ({error}); delete the line") from None
    return found


def runs_in(folders: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """Replaces the folders of comparisons by their cells, and finds what is finished, and cells that aren't."""
    finished, unfinished = [], []
    for folder in map(Path, folders):
        cells = sorted(path for path in folder.glob("cells/*") if path.is_dir())
        done = [path for path in cells if (path / RESULT_NAME).is_file()]
        if cells and not done:
            raise UserError(f"{str(folder)!r} has no finished run: go on with `hf-dskd compare`")
        finished += done if cells else [folder]
        unfinished += [path for path in cells if path not in done]
    return finished, unfinished
