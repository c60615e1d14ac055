"""The report of several runs side by side."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.curves import COLOURS, plot_analysis, series
from ..utils.tables import spread
from .document import Block, Heading, Listing, Paragraph, Pictures, Span, Table, Text, write_pages
from .files import RunFiles, changed_settings, read_run, runs_in, settings_of
from .plots import Histories, curves
from .warnings import warnings_of
from .words import better_end, meaning_of, measured, measures_of, models_of, number, numbers_of, setting, title_of


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
    Writes one report of several finished runs side by side.

    Args:
        folders (`Sequence[str | Path]`): What `hf-dskd train` or `hf-dskd compare` wrote.
        output_dir (`str` or `Path`): Where to write it.

    Returns:
        `Path`: `report.html`, beside `report.md` and the picture that both show.

    Raises:
        UserError: If one of them is no folder of a finished run, or a file in it can't be read.
    """
    target = Path(output_dir)
    finished, unfinished = runs_in(folders)
    runs = [read_run(folder) for folder in finished]
    groups = grouped(runs)
    names = run_names(groups)
    methods = ", ".join(dict.fromkeys(group.name for group in groups))
    blocks: list[Block] = [
        Heading(1, f"{len(runs)} runs: {methods}"),
        *_results(groups, names),
        *(
            [Paragraph(f"Not finished and left out: {', '.join(path.name for path in unfinished)}.")]
            * bool(unfinished)
        ),
        *_warnings_by_run(names),
        *_differences(groups),
        *_all_curves(groups, names, target),
        *_alignment_after(groups, names, target),
        Heading(2, "Runs"),
        Table(
            ["run", "folder", "models"],
            [[name, Span(str(run.folder), "link", run.folder), models_of(run.result)] for name, run in names.items()],
            align="l",
        ),
    ]
    return write_pages(blocks, target)


def comparable(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """
    What makes each run what it is, but for its seeds: settings, models and data, under the same names for all.

    What one of them doesn't say is at its default, or `None` if it was written by a version that said less.
    """
    own = []
    for run in runs:
        data, models = run.result.get("data") or {}, run.result.get("models") or {}
        facts = {"student": models.get("student"), "teacher": models.get("teacher"), "data": data.get("source")}
        facts["training examples"] = (data.get("train") or {}).get("kept")
        settings = {name: value for name, value in settings_of(run.result).items() if name not in NOT_COMPARED}
        own.append({**settings, "method": run.method, **facts})
    defaults = {name: default for run in runs for name, (default, _) in changed_settings(run.result).items()}
    names = dict.fromkeys(name for part in own for name in part)
    return [
        {name: part.get(name, defaults.get(name) if "changed_settings" in run.result else None) for name in names}
        for run, part in zip(runs, own)
    ]


def grouped(runs: Sequence[RunFiles]) -> list[Group]:
    """The runs by everything but their seeds, under the label of a comparison, or the method and what differs."""
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
    """The runs by their group and, where it has several, their seed."""
    names: dict[str, RunFiles] = {}
    for group in groups:
        for run in group.runs:
            name = group.name if len(group.runs) == 1 else f"{group.name}, seed {run.result.get('seed')}"
            # The same seed twice, or the same settings under another data seed.
            names[name if name not in names else f"{name}, {run.folder}"] = run
    return names


def _results(groups: Sequence[Group], names: Mapping[str, RunFiles]) -> list[Block]:
    every = measures_of(*(run.result.get("metrics", {}) for run in names.values()))
    # Methods have losses of their own, which can't be compared.
    keys = [key for key in every if better_end(key) is not None]
    if not keys:
        return [Paragraph("Nothing was evaluated in any of them.")]
    columns: list[list[Text]] = []
    for key in keys:
        better = better_end(key)
        values = [[v for run in group.runs if (v := run.result["metrics"].get(key)) is not None] for group in groups]
        means = [round(statistics.fmean(found), 4) if found else math.nan for found in values]
        finite = [mean for mean in means if math.isfinite(mean)]
        best = (min if better == "lower" else max)(finite) if len(finite) > 1 else None
        cells: list[Text] = []
        for mean, found in zip(means, values):
            deviation = spread(found)
            text = measured(mean if found else None) + ("" if deviation is None else f" ± {measured(deviation)}")
            cells.append(Span(text, "strong") if found and mean == best else text)
        columns.append(cells)
    counts = [str(len(group.runs)) for group in groups]
    rows = [[group.name, *(column[i] for column in columns), counts[i]] for i, group in enumerate(groups)]
    titles = [title_of(key) for key in keys]
    blocks: list[Block] = [
        Paragraph(
            "Held-out examples, after training. Mean ± sample standard deviation over seeds; best mean in bold."
        ),
        Table(["", *titles, "seeds"], rows),
    ]
    if max(len(group.runs) for group in groups) < 3:
        blocks.append(Paragraph("With fewer than three seeds a row, small differences may be chance."))
    if len(names) == len(groups):
        return blocks
    single = [
        [name, *(measured(run.result.get("metrics", {}).get(key)) for key in keys), number(run.result.get("steps"))]
        for name, run in names.items()
    ]
    return [*blocks, Heading(2, "Each run"), Table(["run", *titles, "steps"], single)]


def _warnings_by_run(names: Mapping[str, RunFiles]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Warnings")]
    quiet = []
    for name, run in names.items():
        found = warnings_of(run.result, run.history, run.analyses)
        if found:
            blocks += [Heading(3, name), Listing(found, warning=True)]
        else:
            quiet.append(name)
    return [*blocks, Paragraph(f"Without a warning: {'; '.join(quiet)}.")] if quiet else blocks


def _differences(groups: Sequence[Group]) -> list[Block]:
    parts = comparable([group.runs[0] for group in groups])
    shown = {name: ["–" if part[name] is None else setting(part[name]) for part in parts] for name in parts[0]}
    rows = [[name, *values] for name, values in shown.items() if len(set(values)) > 1]
    heading = Heading(2, "Settings that differ")
    if not rows:
        return [heading, Paragraph("None but the seeds.")]
    return [heading, Table(["setting", *(group.name for group in groups)], rows, align="l")]


def _all_curves(groups: Sequence[Group], names: Mapping[str, RunFiles], folder: Path) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Curves")]
    pictures = drawn_together(groups, {name: run.history for name, run in names.items()})
    if any(name not in names for picture in pictures for name in picture):
        blocks.append(Paragraph("Means over seeds."))
    for index, histories in enumerate(pictures, start=1):
        blocks += curves(histories, folder / ("curves.png" if index == 1 else f"curves-{index}.png"))
    return blocks


def drawn_together(groups: Sequence[Group], histories: Histories) -> list[Histories]:
    """Histories of runs by the picture that they go into: where colours are too few for all, the means of groups."""
    most = len(COLOURS)
    if len(histories) > most and len(groups) < len(histories):
        # In the order of the groups, as `run_names` has them.
        runs = iter(histories.values())
        histories = {group.name: mean_history([next(runs) for _ in group.runs]) for group in groups}
    every = list(histories.items())
    return [dict(every[start : start + most]) for start in range(0, len(every), most)]


def mean_history(histories: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One log of the means over several, at the steps and for the names that each of them has."""
    names = dict.fromkeys(name for history in histories for entry in history for name in entry if name != "step")
    mean: list[dict[str, Any]] = []
    for name in names:
        points = [dict(zip(*series(history, name))) for history in histories]
        steps = sorted(set.intersection(*(set(part) for part in points)))
        mean += [{"step": step, name: statistics.fmean(part[step] for part in points)} for step in steps]
    return mean


def _alignment_after(groups: Sequence[Group], names: Mapping[str, RunFiles], folder: Path) -> list[Block]:
    last = {name: run.analyses[-1] for name, run in names.items() if run.analyses}
    if not last:
        return []
    numbers = list(numbers_of({key: None for entry in last.values() for key in entry}))
    rows = [[key, *(number(entry.get(key)) for entry in last.values()), meaning_of(key)] for key in numbers]
    columns = [f"{name} (step {entry['step']:,})" for name, entry in last.items()]
    blocks: list[Block] = [Heading(2, "Alignment, after training")]
    blocks.append(Table(["number", *columns, "meaning"], rows, align="l" + "r" * len(columns) + "l"))
    every = {name: [{"step": e["step"], **numbers_of(e)} for e in run.analyses] for name, run in names.items()}
    pictures = drawn_together(groups, every)
    for index, histories in enumerate(pictures, start=1):
        if any(histories.values()):
            path = folder / ("analysis.png" if index == 1 else f"analysis-{index}.png")
            plot_analysis({name: analyses for name, analyses in histories.items() if analyses}, path)
            blocks.append(Pictures({"Every number of the analyses, over optimizer steps": path}))
    return blocks
