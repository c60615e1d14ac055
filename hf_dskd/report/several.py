"""The report of several runs side by side."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.curves import Runs, plot_analysis, series
from ..utils.figures import COLORS
from ..utils.markup import Markdown, link, pictures, render, table
from ..utils.tables import mean_column
from .document import write_pages
from .files import RunFiles, read_run, runs_in
from .plots import curves
from .warnings import warnings_of
from .words import better_end, meaning_of, measured, measures_of, number, numbers_of, setting, title_of


# Settings that say where a run writes or which of several equal ones it is, not what it does.
NOT_COMPARED = {
    *("seed", "data_seed", "output_dir", "logging_dir", "run_name", "project", "trackio_space_id"),
    *("hub_model_id", "resume_from_checkpoint", "report_to", "disable_tqdm", "teacher_cache"),
}


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seeds alone."""

    name: str
    runs: Sequence[RunFiles]


def compare_runs(folders: Sequence[str | Path], output_dir: str | Path) -> Path:
    """
    Writes one report of what `hf-dskd train` or `hf-dskd compare` wrote to several folders.

    Returns:
        `Path`: `report.html`, beside `report.md` and the picture that both show.

    Raises:
        UserError: If one of them is no folder of a finished run, or a file in it can't be read.
    """
    target = Path(output_dir)
    finished, unfinished = runs_in(folders)
    groups = grouped([read_run(folder) for folder in finished])
    names = run_names(groups)
    warned = {name: warnings_of(run) for name, run in names.items()}
    histories = drawn_together(groups, {name: run.history for name, run in names.items()})
    folder_rows = [
        [name, link(str(run.folder), run.folder, target), run.record.models.pair] for name, run in names.items()
    ]
    markdown = render(
        "report/several.md",
        groups=groups,
        names=names,
        **_results(groups, names),
        few_seeds=max(len(group.runs) for group in groups) < 3,
        unfinished=unfinished,
        warned=warned,
        quiet=[name for name, found in warned.items() if not found],
        differences=_differences(groups),
        means=any(name not in names for picture in histories for name in picture),
        curves=[curves(part, target / numbered("curves", index)) for index, part in enumerate(histories, start=1)],
        alignment=_alignment_after(names),
        alignment_pictures=_analysis_pictures(groups, names, target),
        runs=table(["run", "folder", "models"], folder_rows, align="l"),
    )
    return write_pages(markdown, target)


def numbered(name: str, index: int) -> str:
    """Names the picture that is the `index`-th of its kind."""
    return f"{name}.png" if index == 1 else f"{name}-{index}.png"


def comparable(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """
    Finds what makes each run what it is, but for its seeds: settings, models and data, under the same names for all.

    What one of them doesn't say is at its default, or `None` if it was written by a version that said less.
    """
    own = []
    for run in runs:
        data, models = run.record.data, run.record.models
        facts: dict[str, Any] = {"student": models.student, "teacher": models.teacher, "data": data.source}
        facts["training examples"] = data.rows("train")
        settings = {name: value for name, value in run.record.all_settings.items() if name not in NOT_COMPARED}
        own.append({**settings, "method": run.method, **facts})
    defaults = {name: default for run in runs for name, (default, _) in run.record.changes.items()}
    names = dict.fromkeys(name for part in own for name in part)
    return [
        {
            name: part.get(name, defaults.get(name) if run.record.changed_settings is not None else None)
            for name in names
        }
        for run, part in zip(runs, own)
    ]


def grouped(runs: Sequence[RunFiles]) -> list[Group]:
    """Groups runs by everything but their seeds, under the label of a comparison, or the method and what differs."""
    everything = comparable(runs)
    by_key: dict[str, list[int]] = {}
    for index, (run, part) in enumerate(zip(runs, everything)):
        by_key.setdefault(json.dumps([run.label, part], sort_keys=True, default=str), []).append(index)
    members = list(by_key.values())
    titles = [runs[indices[0]].label or runs[indices[0]].method for indices in members]
    found: list[Group] = []
    for title, indices in zip(titles, members):
        alike = [everything[other[0]] for name, other in zip(titles, members) if name == title]
        own = everything[indices[0]]
        differing = [name for name in own if any(other[name] != own[name] for other in alike)]
        if len(alike) > 1:
            title += f" ({', '.join(f'{name}={setting(own[name])}' for name in differing[:3])})"
        if title in [group.name for group in found]:
            title += f", {runs[indices[0]].folder}"
        found.append(Group(title, [runs[index] for index in indices]))
    return found


def run_names(groups: Sequence[Group]) -> dict[str, RunFiles]:
    """Names the runs by their group and, where it has several, their seed."""
    names: dict[str, RunFiles] = {}
    for group in groups:
        for run in group.runs:
            name = group.name if len(group.runs) == 1 else f"{group.name}, seed {run.record.seed}"
            # The same seed twice, or the same settings under another data seed.
            names[name if name not in names else f"{name}, {run.folder}"] = run
    return names


def _results(groups: Sequence[Group], names: Mapping[str, RunFiles]) -> dict[str, Markdown | None]:
    """The measures of each group, and of each run where a group has several."""
    every = measures_of(*(run.record.metrics for run in names.values()))
    # Methods have losses of their own, which can't be compared.
    keys = [key for key in every if better_end(key) is not None]
    if not keys:
        return {"results": None, "each_run": None}
    columns = [
        mean_column(
            [[v for run in group.runs if (v := run.record.metrics.get(key)) is not None] for group in groups],
            better_end(key),
            measured,
        )
        for key in keys
    ]
    rows = [[group.name, *means, str(len(group.runs))] for group, *means in zip(groups, *columns)]
    titles = [title_of(key) for key in keys]
    single = [
        [name, *(measured(run.record.metrics.get(key)) for key in keys), number(run.record.steps)]
        for name, run in names.items()
    ]
    return {
        "results": table(["", *titles, "seeds"], rows),
        "each_run": table(["run", *titles, "steps"], single) if len(names) > len(groups) else None,
    }


def _differences(groups: Sequence[Group]) -> Markdown | None:
    parts = comparable([group.runs[0] for group in groups])
    shown = {name: ["–" if part[name] is None else setting(part[name]) for part in parts] for name in parts[0]}
    rows = [[name, *values] for name, values in shown.items() if len(set(values)) > 1]
    return table(["setting", *(group.name for group in groups)], rows, align="l") if rows else None


def drawn_together(groups: Sequence[Group], histories: Runs) -> list[Runs]:
    """Shares histories of runs out to pictures; where colors are too few for all, they are the means of groups."""
    most = len(COLORS)
    if len(histories) > most and len(groups) < len(histories):
        # In the order of the groups, as `run_names` has them.
        runs = iter(histories.values())
        histories = {group.name: mean_history([next(runs) for _ in group.runs]) for group in groups}
    every = list(histories.items())
    return [dict(every[start : start + most]) for start in range(0, len(every), most)]


def mean_history(histories: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Makes one log of the means over several, at the steps and for the names that each of them has."""
    names = dict.fromkeys(name for history in histories for entry in history for name in entry if name != "step")
    mean: list[dict[str, Any]] = []
    for name in names:
        points = [dict(zip(*series(history, name))) for history in histories]
        steps = sorted(set.intersection(*(set(part) for part in points)))
        mean += [{"step": step, name: statistics.fmean(part[step] for part in points)} for step in steps]
    return mean


def _alignment_after(names: Mapping[str, RunFiles]) -> Markdown | None:
    last = {name: run.analyses[-1] for name, run in names.items() if run.analyses}
    if not last:
        return None
    numbers = list(numbers_of({key: None for entry in last.values() for key in entry}))
    rows = [[key, *(number(entry.get(key)) for entry in last.values()), meaning_of(key)] for key in numbers]
    columns = [f"{name} (step {entry['step']:,})" for name, entry in last.items()]
    return table(["number", *columns, "meaning"], rows, align="l" + "r" * len(columns) + "l")


def _analysis_pictures(groups: Sequence[Group], names: Mapping[str, RunFiles], target: Path) -> list[Markdown]:
    every = {name: [{"step": e["step"], **numbers_of(e)} for e in run.analyses] for name, run in names.items()}
    shown = []
    for index, histories in enumerate(drawn_together(groups, every), start=1):
        drawn = {name: analyses for name, analyses in histories.items() if analyses}
        if drawn:
            path = target / numbered("analysis", index)
            plot_analysis(drawn, path)
            shown.append(pictures({"Every number of the analyses, over optimizer steps": path}, target))
    return shown
