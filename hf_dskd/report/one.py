"""The report of one run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..analysis.curves import plot_analysis
from ..methods import METHODS
from ..training.run_folder import RESULT_NAME
from ..utils.markup import Markdown, code, link, pictures, render, strong, table
from .document import write_pages
from .files import RunFiles, read_run
from .plots import curves, plot_gradient_shares
from .warnings import checks_of
from .words import (
    better_end,
    difference,
    duration,
    meaning_of,
    measured,
    measures_of,
    millions,
    number,
    numbers_of,
    percent,
    setting,
    title_of,
)


FILES = {
    RESULT_NAME: "metrics, settings and versions",
    "trainer_state.json": "everything that was logged",
    "log.txt": "what the run printed",
    "config.yaml": "its configuration",
    "analysis/numbers.jsonl": "the numbers of every analysis",
    "analysis/samples.jsonl": "answers of the student",
    "evaluation/scores.json": "scores of `hf-dskd evaluate`",
    "evaluation/table.md": "their table",
}
EXAMPLES_SHOWN = 5
CHARACTERS_SHOWN = 1500
# What becomes of the rows of a data set → what it is called.
ROWS = {
    "rows": "examples",
    "kept": "kept",
    "cut": "of these with the response cut",
    "empty_responses": "skipped: empty response",
    "long_prompts": "skipped: long prompt",
}


def write_report(folder: str | Path, output_dir: str | Path | None = None) -> Path:
    """
    Writes the report of what `hf-dskd train` wrote to `folder`, by default to `folder`/report.

    Returns:
        `Path`: `report.html`, beside `report.md` and the pictures that both show.

    Raises:
        UserError: If it is no folder of a finished run, or a file in it can't be read.
    """
    run = read_run(folder)
    target = Path(output_dir) if output_dir is not None else run.folder / "report"
    checked = checks_of(run)
    scores = run.folder / "evaluation" / "table.md"
    shown = run.samples[:EXAMPLES_SHOWN]
    markdown = render(
        "report/one.md",
        run=run,
        summary=_summary(run),
        measures=_measures(run),
        notes=_notes(run),
        warnings=[text for texts in checked.values() for text in texts],
        quiet=[name for name, texts in checked.items() if not texts],
        machine=_machine(run),
        data=_data(run),
        settings=_settings(run),
        curves=curves({run.method: run.history}, target / "curves.png"),
        **_gradients(run, target),
        **_alignment(run, target),
        scores=Markdown(scores.read_text(encoding="utf-8").strip()) if scores.is_file() else None,
        evaluate=code(f"hf-dskd evaluate --model {run.folder} --output_dir {run.folder / 'evaluation'}"),
        samples=[{name: _sample(sample[name]) for name in ("prompt", "reference", "response")} for sample in shown],
        sample_steps=", ".join(f"{step:,}" for step in dict.fromkeys(sample["step"] for sample in shown)),
        characters=f"{CHARACTERS_SHOWN:,}",
        files=_files(run, target),
    )
    return write_pages(markdown, target, [run.folder])


def _summary(run: RunFiles) -> str:
    record, models = run.record, run.record.models
    method = METHODS.get(run.method)
    parts = [f"{record.steps:,} optimizer steps"]
    if record.train_runtime is not None:
        parts.append(f"{duration(record.train_runtime)} of training since the start or the last resume")
    if models.student_parameters:
        adapter = ", as an adapter" if models.adapter else ""
        of_it = f" ({millions(models.trained_parameters)} trained{adapter})" if models.trained_parameters else ""
        parts.append(f"student of {millions(models.student_parameters)} parameters{of_it}")
    if models.teacher_parameters:
        parts.append(f"teacher of {millions(models.teacher_parameters)}")
    return "; ".join(parts) + (f". Method: {method.summary}." if method else ".")


def _measures(run: RunFiles) -> Markdown | None:
    """Every measure before and after training, and its best on the way, as far as they are known."""
    metrics, before = run.record.metrics, run.metrics_before
    keys = measures_of(metrics)
    if not keys:
        return None
    best = {}
    for key in keys:
        better = better_end(key)
        points = [point for point in run.points(key) if point[0] > 0]
        if better is not None and len(points) > 1:
            value, step = (min if better == "lower" else max)((value, step) for step, value in points)
            best[key] = f"{measured(value)} (step {step:,})"
    changes = {key: metrics[key] - before[key] for key in keys if key in before}
    columns = {
        "held out": list(map(title_of, keys)),
        "before": [measured(before.get(key)) for key in keys] if before else [],
        "after": [strong(measured(metrics[keys[0]])), *(measured(metrics[key]) for key in keys[1:])],
        "change": ["+" * (changes.get(key, 0) > 0) + measured(changes.get(key)) for key in keys] if before else [],
        "best on the way": [best.get(key, "–") for key in keys] if best else [],
    }
    shown = {name: column for name, column in columns.items() if column}
    return table(list(shown), list(zip(*shown.values())))


def _notes(run: RunFiles) -> str:
    best, rows = run.record.best_checkpoint, run.record.data.rows("eval")
    last = best is not None and best.endswith(f"checkpoint-{run.record.steps}")
    notes = (
        [f"The model evaluated and kept is {best}, the best of the run, {'and' if last else 'not'} the last."]
        if best
        else []
    )
    if not run.metrics_before:
        notes.append("It wasn't evaluated before training (eval_on_start does that).")
    on = f"{rows:,} held-out examples" if rows else "held-out examples"
    notes.append(f"Measured on {on}, one training seed: small differences to another run may be chance.")
    return " ".join(notes)


def _machine(run: RunFiles) -> Markdown:
    record, hardware, models = run.record, run.record.hardware, run.record.models
    seeds = {"seed": record.seed, "data_seed": record.data_seed}
    rows = [["method", run.method]]
    rows += [[role, models.with_commit(role)] for role in ("student", "teacher") if getattr(models, role)]
    if hardware is not None:
        parts = [*hardware.gpus, hardware.cpu, f"{number(hardware.cores)} cores"]
        parts += [f"{number(hardware.memory_gb)} GB of memory"] if hardware.memory_gb else []
        rows.append(["hardware", ", ".join(part for part in parts if part)])
        rows.append(["processes", number(hardware.processes)])
    rows.append(["seeds", ", ".join(f"{name} {seed}" for name, seed in seeds.items() if seed is not None)])
    rows.append(["versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())])
    rows.append(["finished", record.finished or ""])
    return table(["", ""], [row for row in rows if row[1]], align="l")


def _data(run: RunFiles) -> Markdown | None:
    """What became of the rows; `None` where nothing at all is known of the data."""
    data = run.record.data
    parts = {
        name: data.splits[key] for name, key in (("training", "train"), ("held out", "eval")) if key in data.splits
    }
    if not parts:
        return Markdown("") if data.source or data.fingerprint else None
    names = [*ROWS, *dict.fromkeys(name for part in parts.values() for name in part if name not in ROWS)]
    columns = [name for name in names if any(name in part for part in parts.values())]
    rows = [[name, *(number(part.get(column)) for column in columns)] for name, part in parts.items()]
    return table(["", *(ROWS.get(column, column) for column in columns)], rows)


def _settings(run: RunFiles) -> Markdown | None:
    rows = [[name, setting(value), setting(default)] for name, (default, value) in sorted(run.record.changes.items())]
    return table(["setting", "value", "default"], rows, align="l") if rows else None


def _gradients(run: RunFiles, folder: Path) -> dict[str, Markdown | None]:
    method, norms = METHODS.get(run.method), run.gradient_norms
    if method is not None and not method.needs_teacher:
        return {"gradients": None}
    if not norms:
        return {"gradients": Markdown("")}
    terms = list(dict.fromkeys(term for part in norms.values() for term in part))
    path = folder / "gradient_shares.png"
    plot_gradient_shares(norms, path)
    rows = []
    for step, part in norms.items():
        total = sum(part.values()) or math.nan
        cells = [f"{number(part[term])} ({percent(part[term] / total)})" if term in part else "–" for term in terms]
        rows.append([f"{step:,}", *cells])
    picture = pictures({"Share of each term in the sum of the gradients' norms": path}, folder)
    return {"gradients": table(["step", *terms], rows), "gradients_picture": picture}


def _alignment(run: RunFiles, folder: Path) -> dict[str, Any]:
    method = METHODS.get(run.method)
    if method is not None and method.alignment is None:
        return {"alignment": None}
    numbers = [(entry["step"], found) for entry in run.analyses if (found := numbers_of(entry))]
    shown = []
    if len(numbers) > 1:
        path = folder / "analysis.png"
        plot_analysis([{"step": step, **found} for step, found in numbers], path)
        shown.append(pictures({"Every number of the analyses, over optimizer steps": path}, folder))
    steps = _step_folders(run)
    pages = [path / "alignment.html" for path in steps.values() if (path / "alignment.html").is_file()]
    return {
        "alignment": _alignment_table(*numbers[0], *numbers[-1]) if numbers else Markdown(""),
        "no_analysis": Markdown("No analysis: train with `--analysis_steps N`."),
        "alignment_pictures": [*shown, *_analysis_pictures(run, steps, folder)],
        "pages": [link(path.parent.name, path, folder) for path in pages],
    }


def _alignment_table(first: int, before: Mapping[str, Any], last: int, after: Mapping[str, Any]) -> Markdown:
    rows = []
    for name in numbers_of({**before, **after}):
        cells = [number(after.get(name))]
        if first != last:
            both = name in before and name in after
            cells = [number(before.get(name)), *cells, difference(before[name], after[name]) if both else "–"]
        rows.append([name, *cells, meaning_of(name)])
    steps = [f"step {last:,}"] if first == last else [f"step {first:,}", f"step {last:,}", "change"]
    return table(["number", *steps, "meaning"], rows, align="l" + "r" * len(steps) + "l")


def _step_folders(run: RunFiles) -> dict[int, Path]:
    """The folders of the analyses with pictures, by step."""
    folders = {int(path.name.removeprefix("step-")): path for path in run.folder.glob("analysis/step-*")}
    return dict(sorted(folders.items()))


def _analysis_pictures(run: RunFiles, folders: Mapping[int, Path], target: Path) -> list[Markdown]:
    """The pictures of the first and the last analysis; without one, that of a held-out example."""
    shown = []
    together = run.folder / "analysis" / "projection.png"
    if together.is_file():
        shown.append({"queries and keys on their two principal axes": together})
    for pattern, title in (
        ("contact_sheet.png", "attention on the probe examples"),
        ("alignment-*.png", "attention on one of them"),
    ):
        found = {step: min(files) for step, path in folders.items() if (files := list(path.glob(pattern)))}
        if found:
            ends = dict.fromkeys((min(found), max(found)))
            shown.append({f"{title}, step {step:,}": found[step] for step in ends})
    if not shown and (run.folder / "alignment.png").is_file():
        shown.append({"attention on a held-out example, after training": run.folder / "alignment.png"})
    return [pictures(files, target) for files in shown]


def _sample(text: str | list[str]) -> str:
    """A prompt or an answer, or several, as far as they are shown."""
    text = text if isinstance(text, str) else "\n\n".join(text)
    return text.rstrip("\n")[:CHARACTERS_SHOWN] + (" …" if len(text) > CHARACTERS_SHOWN else "")


def _files(run: RunFiles, target: Path) -> Markdown:
    rows = [
        [link(name, run.folder / name, target), what] for name, what in FILES.items() if (run.folder / name).is_file()
    ]
    rows += [
        [link(f"analysis/{path.name}", path, target), "pictures of that analysis"]
        for path in _step_folders(run).values()
    ]
    return table(["file", "what it has"], rows, align="l")
