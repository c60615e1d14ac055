"""The report of one run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..analysis.curves import plot_analysis
from ..methods import METHODS
from ..result import RESULT_NAME
from .document import Block, Code, Heading, Listing, Paragraph, Pictures, Span, Table, Text, Verbatim, write_pages
from .files import RunFiles, changed_settings, gradient_norms, metrics_before, points_of, read_run
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
    models_of,
    number,
    numbers_of,
    percent,
    setting,
    title_of,
    with_commit,
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


def write_report(folder: str | Path, output_dir: str | Path | None = None) -> Path:
    """
    Writes the report of a finished run.

    Args:
        folder (`str` or `Path`): What `hf-dskd train` wrote.
        output_dir (`str` or `Path`, *optional*): Where to write it; `folder`/report by default.

    Returns:
        `Path`: `report.html`, beside `report.md` and the pictures that both show.

    Raises:
        UserError: If it is no folder of a finished run, or a file in it can't be read.
    """
    run = read_run(folder)
    target = Path(output_dir) if output_dir is not None else run.folder / "report"
    models = models_of(run.result)
    blocks: list[Block] = [
        Heading(1, f"{run.method}: {models}" if models else run.method),
        *_summary(run),
        *_how(run),
        *_data(run),
        *_settings(run),
        Heading(2, "Curves"),
        *curves({run.method: run.history}, target / "curves.png"),
        *_gradients(run, target),
        *_alignment(run, target),
        *_scores(run),
        *_examples(run),
        *_files(run),
    ]
    return write_pages(blocks, target)


def _summary(run: RunFiles) -> list[Block]:
    result, models = run.result, run.result.get("models") or {}
    method = METHODS.get(run.method)
    parts = [f"{result.get('steps', 0):,} optimizer steps"]
    if result.get("train_runtime") is not None:
        parts.append(f"{duration(result['train_runtime'])} of training since the start or the last resume")
    if models.get("student_parameters"):
        trained = models.get("trained_parameters") or 0
        of_it = f" ({millions(trained)} trained{', as an adapter' if models.get('adapter') else ''})"
        parts.append(f"student of {millions(models['student_parameters'])} parameters{of_it if trained else ''}")
    if models.get("teacher_parameters"):
        parts.append(f"teacher of {millions(models['teacher_parameters'])}")
    blocks: list[Block] = [Paragraph("; ".join(parts) + (f". Method: {method.summary}." if method else "."))]
    metrics, before = result.get("metrics", {}), metrics_before(run.result, run.history)
    keys = measures_of(metrics)
    if keys:
        blocks.append(_measures_table(run, keys, before))
    else:
        blocks.append(
            Paragraph(("Nothing was evaluated: give held-out examples with ", Span("--held_out_size", "code"), "."))
        )
    notes = []
    if result.get("best_checkpoint"):
        notes.append(
            f"The model evaluated and kept is {result['best_checkpoint']}, the best of the run, not the last."
        )
    if keys and not before:
        notes.append("It wasn't evaluated before training (eval_on_start does that).")
    if keys:
        rows = ((result.get("data") or {}).get("eval") or {}).get("kept")
        on = f"{rows:,} held-out examples" if rows else "held-out examples"
        notes.append(f"Measured on {on}, one training seed: small differences to another run may be chance.")
        blocks.append(Paragraph(" ".join(notes)))
    return [*blocks, *_warnings(run)]


def _measures_table(run: RunFiles, keys: Sequence[str], before: Mapping[str, float]) -> Table:
    metrics = run.result["metrics"]
    best = {}
    for key in keys:
        better = better_end(key)
        points = [point for point in points_of(run.history, key) if point[0] > 0]
        if better is not None and len(points) > 1:
            value, step = (min if better == "lower" else max)((value, step) for step, value in points)
            best[key] = f"{measured(value)} (step {step:,})"
    columns = ["held out", *(["before"] if before else []), "after", *(["change"] if before else [])]
    columns += ["best on the way"] if best else []
    rows: list[list[Text]] = []
    for index, key in enumerate(keys):
        after = measured(metrics[key])
        row: list[Text] = [title_of(key), Span(after, "strong") if index == 0 else after]
        if before:
            row.insert(1, measured(before.get(key)))
            change = metrics[key] - before[key] if key in before else None
            row.append(f"{'+' if change is not None and change > 0 else ''}{measured(change)}")
        rows.append([*row, *([best.get(key, "–")] if best else [])])
    return Table(columns, rows)


def _warnings(run: RunFiles) -> list[Block]:
    checked = checks_of(run.result, run.history, run.analyses)
    found = [text for texts in checked.values() for text in texts]
    said = run.result.get("warnings") or []
    blocks: list[Block] = [Heading(2, "Warnings")]
    if found:
        blocks.append(Listing(found, warning=True))
    quiet = [name for name, texts in checked.items() if not texts]
    if quiet:
        blocks.append(Paragraph(f"Checked and found in order: {', '.join(quiet)}."))
    if not checked:
        blocks.append(Paragraph("Too little was logged to check anything: lower logging_steps."))
    if said:
        blocks += [Paragraph("Said by the run itself:"), Listing(said)]
    return blocks


def _how(run: RunFiles) -> list[Block]:
    result = run.result
    hardware, models = result.get("hardware") or {}, result.get("models") or {}
    seeds = result.get("seeds") or {name: result.get(name) for name in ("seed", "data_seed")}
    rows = [["method", run.method]]
    rows += [[role, with_commit(models, role)] for role in ("student", "teacher") if models.get(role)]
    if hardware:
        machine = [*hardware.get("gpus", []), hardware.get("cpu"), f"{number(hardware.get('cores'))} cores"]
        machine += [f"{number(hardware['memory_gb'])} GB of memory"] if hardware.get("memory_gb") else []
        rows.append(["hardware", ", ".join(part for part in machine if part)])
        rows.append(["processes", number(hardware.get("processes"))])
    rows.append(["seeds", ", ".join(f"{name} {setting(seed)}" for name, seed in seeds.items() if seed is not None)])
    rows.append(["versions", ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())])
    rows += [["finished", result["finished"]]] if result.get("finished") else []
    blocks: list[Block] = [Heading(2, "How it was run")]
    if result.get("command"):
        blocks.append(Code(result["command"]))
    return [*blocks, Table(["", ""], [row for row in rows if row[1]], align="l")]


def _data(run: RunFiles) -> list[Block]:
    data = run.result.get("data") or {}
    if not data:
        return []
    titles = {
        "rows": "examples",
        "kept": "kept",
        "cut": "of these with the response cut",
        "empty_responses": "skipped: empty response",
        "long_prompts": "skipped: long prompt",
    }
    parts = {name: data[key] for name, key in (("training", "train"), ("held out", "eval")) if data.get(key)}
    names = [*titles, *dict.fromkeys(name for part in parts.values() for name in part if name not in titles)]
    columns = [name for name in names if any(name in part for part in parts.values())]
    rows = [[name, *(number(part.get(column)) for column in columns)] for name, part in parts.items()]
    blocks: list[Block] = [Heading(2, "Data")]
    if data.get("source"):
        blocks.append(Paragraph(f"From {data['source']}."))
    if data.get("fingerprint"):
        blocks.append(Paragraph(f"Fingerprint of the tokenized training examples: {data['fingerprint']}."))
    return [*blocks, Table(["", *(titles.get(column, column) for column in columns)], rows)] if rows else blocks


def _settings(run: RunFiles) -> list[Block]:
    changed = changed_settings(run.result)
    rows = [[name, setting(value), setting(default)] for name, (default, value) in sorted(changed.items())]
    blocks: list[Block] = [Heading(2, "Settings that differ from the defaults")]
    return [*blocks, Table(["setting", "value", "default"], rows, align="l") if rows else Paragraph("None.")]


def _gradients(run: RunFiles, folder: Path) -> list[Block]:
    method = METHODS.get(run.method)
    if method is not None and not method.needs_teacher:
        return []
    norms = gradient_norms(run.analyses)
    heading = Heading(2, "What each term contributes")
    if not norms:
        return [heading, Paragraph(("Not measured: train with ", Span("--analysis_steps N", "code"), "."))]
    terms = list(dict.fromkeys(term for part in norms.values() for term in part))
    path = folder / "gradient_shares.png"
    plot_gradient_shares(norms, path)
    rows = []
    for step, part in norms.items():
        total = sum(part.values()) or math.nan
        cells = [f"{number(part[term])} ({percent(part[term] / total)})" if term in part else "–" for term in terms]
        rows.append([f"{step:,}", *cells])
    return [
        heading,
        Paragraph(
            "Norm of the gradient of each loss term, with its weight, in the student and the projectors, on probe"
            " examples; and its share of the sum of the norms."
        ),
        Pictures({"Share of each term in the sum of the gradients' norms": path}),
        Table(["step", *terms], rows),
    ]


def _alignment(run: RunFiles, folder: Path) -> list[Block]:
    method = METHODS.get(run.method)
    if method is not None and method.alignment is None:
        return []
    blocks: list[Block] = [Heading(2, "Alignment, before and after")]
    numbers = [(entry["step"], found) for entry in run.analyses if (found := numbers_of(entry))]
    if not numbers:
        blocks.append(Paragraph(("No analysis: train with ", Span("--analysis_steps N", "code"), ".")))
    else:
        (first, before), (last, after) = numbers[0], numbers[-1]
        names = list(numbers_of({**before, **after}))
        rows = []
        for name in names:
            cells = [number(after.get(name))]
            if first != last:
                both = name in before and name in after
                cells = [number(before.get(name)), *cells, difference(before[name], after[name]) if both else "–"]
            rows.append([name, *cells, meaning_of(name)])
        steps = [f"step {last:,}"] if first == last else [f"step {first:,}", f"step {last:,}", "change"]
        blocks.append(Table(["number", *steps, "meaning"], rows, align="l" + "r" * len(steps) + "l"))
    if len(numbers) > 1:
        path = folder / "analysis.png"
        plot_analysis([{"step": step, **found} for step, found in numbers], path)
        blocks.append(Pictures({"Every number of the analyses, over optimizer steps": path}))
    return [*blocks, *_analysis_pictures(run)]


def _analysis_pictures(run: RunFiles) -> list[Block]:
    folders = {int(path.name.removeprefix("step-")): path for path in run.folder.glob("analysis/step-*")}
    steps = sorted(folders)
    blocks: list[Block] = []
    together = run.folder / "analysis" / "projection.png"
    if together.is_file():
        blocks.append(Pictures({"queries and keys on their two principal axes": together}))
    for pattern, title in (
        ("contact_sheet.png", "attention on the probe examples"),
        ("alignment-*.png", "attention on one of them"),
    ):
        found = {step: min(files) for step in steps if (files := list(folders[step].glob(pattern)))}
        if found:
            shown = dict.fromkeys((min(found), max(found)))
            blocks.append(Pictures({f"{title}, step {step:,}": found[step] for step in shown}))
    if not blocks and (run.folder / "alignment.png").is_file():
        blocks.append(Pictures({"attention on a held-out example, after training": run.folder / "alignment.png"}))
    pages = [folders[step] / "alignment.html" for step in steps if (folders[step] / "alignment.html").is_file()]
    if pages:
        links = [part for path in pages for part in (", ", Span(path.parent.name, "link", path))][1:]
        blocks.append(Paragraph(("Token by token, in pages of their own: ", *links, ".")))
    return blocks


def _scores(run: RunFiles) -> list[Block]:
    table = run.folder / "evaluation" / "table.md"
    if table.is_file():
        return [Heading(2, "Scores"), Verbatim(table.read_text(encoding="utf-8"))]
    command = f"hf-dskd evaluate --model {run.folder} --output_dir {run.folder / 'evaluation'}"
    return [
        Heading(2, "Scores"),
        Paragraph(("The papers' sets were not evaluated: ", Span(command, "code"), ", then this report again.")),
    ]


def _examples(run: RunFiles) -> list[Block]:
    if not run.samples:
        return []
    shown = run.samples[:EXAMPLES_SHOWN]
    steps = ", ".join(f"{step:,}" for step in dict.fromkeys(sample["step"] for sample in shown))
    blocks: list[Block] = [
        Heading(2, "Examples"),
        Paragraph(
            f"Written by the student after step {steps}; the first {len(shown)} of {len(run.samples)},"
            f" up to {CHARACTERS_SHOWN:,} characters each."
        ),
    ]
    for index, sample in enumerate(shown, start=1):
        blocks.append(Heading(3, f"Example {index}"))
        for name in ("prompt", "reference", "response"):
            text = sample[name]
            text = text if isinstance(text, str) else "\n\n".join(text)
            more = " …" if len(text) > CHARACTERS_SHOWN else ""
            blocks += [Paragraph(Span(name, "strong")), Code(text.rstrip("\n")[:CHARACTERS_SHOWN] + more)]
    return blocks


def _files(run: RunFiles) -> list[Block]:
    rows: list[list[Text]] = [
        [Span(name, "link", run.folder / name), what] for name, what in FILES.items() if (run.folder / name).is_file()
    ]
    rows += [
        [Span(f"analysis/{path.name}", "link", path), "pictures of that analysis"]
        for path in sorted(run.folder.glob("analysis/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    ]
    return [Heading(2, "Files"), Table(["file", "what it has"], rows, align="l")]
