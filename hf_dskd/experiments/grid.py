"""
Methods and variants of settings side by side: a grid of runs over seeds, one process each, and one table.

    OUTPUT_DIR/
      cells/LABEL-seedK/   one run: what `hf-dskd train` writes, and
        config.yaml          its configuration: `hf-dskd train --config` with it does the run again
        cell.json            its settings, where it stands, how long it took
        log.txt              what it printed
      results.jsonl        one JSON object a cell
      table.md, table.png  mean and standard deviation over seeds
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, check_name
from ..methods import METHODS
from ..redaction import redact, secret_names
from ..report.record import RunRecord
from ..training.run_folder import RESULT_NAME, checkpoints
from ..utils.figures import drawable, new_figure, plain_axes, save_figure
from ..utils.files import read_json, read_yaml, write_json, write_json_lines, write_text, write_yaml
from ..utils.tables import markdown_table, mean_column, spread


# Settings that the grid itself decides, and how.
DECIDED = {
    "method": "--methods or --variants",
    "seed": "--seeds",
    "output_dir": "--output_dir",
    "config": "--config",
    "resume_from_checkpoint": "the cells, which go on by themselves",
}
# key in the metrics → title and which end is better. Methods have losses of their own, so none of them is the best.
COLUMNS: dict[str, tuple[str, str | None]] = {
    "eval_bits_per_byte": ("bits per byte", "lower"),
    "eval_token_accuracy": ("token accuracy", "higher"),
    "eval_ce_loss": ("cross entropy", "lower"),
    "eval_loss": ("method's own loss", None),
}
MAIN = "eval_bits_per_byte"
SECONDS_TO_STOP = 40.0


# ---- The grid


@dataclass
class Grid:
    """Holds what the command line asks for."""

    rows: dict[str, dict[str, Any]]  # settings by label, `method` among them
    seeds: list[int]
    base: dict[str, Any]  # the configuration file
    output_dir: Path
    num_processes: int = 1
    arguments: dict[str, list[str]] = field(default_factory=dict)  # other settings of the command line, by name

    def cells(self) -> list[Cell]:
        """Lists the runs seed by seed, so that every label has a number early."""
        return [Cell(self, label, seed) for seed in self.seeds for label in self.rows]


@dataclass(frozen=True)
class Cell:
    """Stands for one run of a grid."""

    grid: Grid
    label: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.label}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.grid.output_dir / "cells" / self.name

    @property
    def method(self) -> str:
        return self.grid.rows[self.label]["method"]

    @property
    def arguments(self) -> dict[str, list[str]]:
        """Holds the settings of the command line that the row doesn't set itself."""
        return {name: values for name, values in self.grid.arguments.items() if name not in self.grid.rows[self.label]}

    @property
    def config(self) -> dict[str, Any]:
        """Holds the content of the cell's configuration file."""
        given = {name: value for name, value in self.grid.base.items() if name != "resume_from_checkpoint"}
        if given.get("data_seed") is None:
            # It would follow the seed, and with it the order of the data.
            given["data_seed"] = 0
        return {**given, **self.grid.rows[self.label], "seed": self.seed, "output_dir": str(self.folder)}

    @property
    def settings(self) -> dict[str, Any]:
        """Holds everything that makes the run what it is, wherever it was set. The folder may move."""
        # A switch has no value.
        given = {name: values[0] if len(values) == 1 else values or True for name, values in self.arguments.items()}
        merged = {**self.config, **given}
        return {name: _plain(value) for name, value in sorted(merged.items()) if name != "output_dir"}

    def command(self, resume: bool) -> list[str]:
        """Gives the command of the process that runs the cell."""
        count = self.grid.num_processes
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)] * (count > 1)
        given = [word for name, values in self.arguments.items() for word in (f"--{name}", *values)]
        command = [sys.executable, *launch, "-m", "hf_dskd.cli", "train", "--config", str(self.folder / "config.yaml")]
        return [*command, *given, *["--resume_from_checkpoint", "last"] * resume]


def parse(arguments: Sequence[str]) -> Grid:
    """
    Reads the grid that a command line asks for.

    Raises:
        UserError: For anything that is wrong, before a cell is run.
    """
    given = named_values(arguments)
    path, config, variants = (_one(given, name) for name in ("output_dir", "config", "variants"))
    processes = _one(given, "num_processes") or "1"
    methods, seeds = _list(given, "methods"), _list(given, "seeds") or ["0"]
    if path is None:
        raise UserError("--output_dir is not set: name a folder for the cells and the table")
    if config is None:
        raise UserError("--config is not set: name a YAML file as for `hf-dskd train`")
    if not methods and variants is None:
        raise UserError("there is nothing to compare: give --methods such as sft,dskd_cma, or --variants FILE.yaml")
    if not processes.isdecimal() or int(processes) < 1:
        raise UserError(f"--num_processes {processes!r} isn't a number of processes: give 1 or more")
    for seed in seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds has {seed!r}: give whole numbers with commas between, such as 0,1,2")
    seeds = [str(int(seed)) for seed in seeds]
    for option, named in (("--methods", methods), ("--seeds", seeds)):
        for name in named:
            if named.count(name) > 1:
                raise UserError(f"{option} has {name!r} twice: name it once")
    for name in given:
        if name in DECIDED:
            raise UserError(f"--{name} is different in every cell: it is decided by {DECIDED[name]}")
    rows = {method: {"method": method} for method in methods}
    if variants is not None:
        rows = add_variants(rows, read_yaml("--variants", variants), variants)
    for row in rows.values():
        check_name("method ", str(row["method"]), METHODS)
    grid = Grid(rows, list(map(int, seeds)), read_yaml("--config", config), Path(path), int(processes), given)
    check_cells(grid)
    return grid


def check_cells(grid: Grid) -> None:
    """Refuses settings that would write a secret, train a teacher or push in every cell."""
    for cell in grid.cells():
        for secret in secret_names(cell.settings):
            raise UserError(
                f"{secret} would be written into the files of every cell: leave it out, and set HF_TOKEN (or run"
                " `hf auth login`)"
            )
        if _is_on(cell.settings.get("sft_teacher")):
            raise UserError(
                "sft_teacher=True would train a teacher in every cell: train it once with `hf-dskd train"
                " --sft_teacher`, then compare with --teacher_model_name_or_path OUTPUT_DIR/teacher"
            )
        if _is_on(cell.settings.get("push_to_hub")):
            raise UserError(
                "push_to_hub=True would push every cell: add --push_to_hub false, and push the cell you choose with"
                f" `hf-dskd push {cell.folder} REPO`"
            )


def named_values(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Collects the words after each `--name`, or after the `=` in `--name=value`."""
    given: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in arguments:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name, values = name.replace("-", "_"), [value] if equals else []
            # `--no_x` is how a switch that is on is turned off; under its own name it can be compared.
            given[name.removeprefix("no_")] = ["false"] if name.startswith("no_") else values
        elif values is None:
            raise UserError(f"{word!r} belongs to no setting: write --name value")
        else:
            values.append(word)
    return given


def add_variants(rows: dict[str, dict[str, Any]], variants: Mapping[Any, Any], path: str) -> dict[str, dict[str, Any]]:
    """Adds the rows of a file of variants."""
    rows = dict(rows)
    for label, settings in variants.items():
        if not re.fullmatch(r"[\w.=+-]*\w[\w.=+-]*", str(label)):
            raise UserError(f"{path}: label {label!r} can't name a folder: use letters, digits and . _ = + -")
        if str(label) in rows:
            raise UserError(f"{path}: label {label!r} is also in --methods: give it another name")
        if not isinstance(settings, dict) or "method" not in settings:
            raise UserError(f"{path}: {label} must say its method, as in `{label}: {{method: sft, max_steps: 60}}`")
        for name in settings:
            if name in DECIDED and name != "method":
                raise UserError(f"{path}: {label} sets {name}, which is decided by {DECIDED[name]}")
        rows[str(label)] = settings
    return rows


def _one(given: dict[str, list[str]], name: str) -> str | None:
    values = given.pop(name, None)
    if values is not None and len(values) != 1:
        raise UserError(f"--{name} has {len(values)} values: give one")
    return values[0] if values else None


def _list(given: dict[str, list[str]], name: str) -> list[str]:
    return " ".join(given.pop(name, [])).replace(",", " ").split()


def _is_on(value: Any) -> bool:
    """Reads a switch as the parser of `hf-dskd train` does."""
    return str(value).lower() in ("true", "t", "yes", "y", "1")


def _plain(value: Any) -> Any:
    """Makes of a value what JSON keeps: YAML takes 1e-3 for a string and the command line everything."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return json.loads(json.dumps(value, default=str))


# ---- A cell's state on disk


def record(cell: Cell) -> dict[str, Any]:
    """Reads what `cell.json` says; empty if the cell was never started."""
    return read_json(cell.folder / "cell.json", {})


def status(cell: Cell) -> str:
    """Tells how a cell stands: `"ok"`, `"failed"`, `"interrupted"` or `"waiting"`."""
    said = record(cell).get("status")
    # A run may have come to its end after this program was killed; one that failed after its result has not.
    if said != "failed" and (cell.folder / RESULT_NAME).is_file():
        return "ok"
    return "waiting" if said is None else "failed" if said == "failed" else "interrupted"


def check_folder(folder: Path) -> None:
    """Refuses to write over files of somebody else: where there is no cell, the table is none of a comparison."""
    there = [name for name in ("results.jsonl", "table.md", "table.png") if (folder / name).exists()]
    if there and not (folder / "cells").is_dir():
        raise UserError(f"--output_dir {str(folder)!r} has {there[0]}, of no comparison: choose another folder")


def check_settings(cell: Cell) -> None:
    """
    Refuses a cell whose folder has a result or a checkpoint of other settings.

    Raises:
        UserError: It names what differs.
    """
    if not (cell.folder / RESULT_NAME).is_file() and not checkpoints(cell.folder):
        return
    then, now = record(cell).get("settings", {}), cell.settings
    was, is_now = ({name: repr(value) for name, value in part.items()} for part in (then, now))
    changed = [
        f"{name} was {was.get(name, 'unset')} and is {is_now.get(name, 'unset')} now"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"{cell.name} was run with other settings: {'; '.join(changed[:3])}{more}."
            f" Choose another --output_dir, or delete {cell.folder}"
        )


def result(cell: Cell) -> dict[str, Any]:
    """Makes the cell's line in `results.jsonl`."""
    noted = record(cell)
    line: dict[str, Any] = {
        **{"label": cell.label, "method": cell.method, "seed": cell.seed, "status": status(cell), "error": None},
        **{"metrics": {}, "evaluations": {}, "steps": None, "best_checkpoint": None, "seconds": noted.get("seconds")},
    }
    if line["status"] == "ok":
        run = RunRecord.read(cell.folder / RESULT_NAME)
        line |= {"metrics": run.metrics, "steps": run.steps, "best_checkpoint": run.best_checkpoint}
        line["evaluations"] = {str(step): metrics for step, metrics in run.evaluations.items()}
    elif line["status"] == "failed":
        line["error"] = noted["error"]
    return line


def last_error(log: str) -> str:
    """Finds the line of a log that says best why the process ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # What accelerate says of a failed process is no reason.
    told = [line for line in lines if not re.search(r"\b(ChildFailedError|CalledProcessError)\b", line)]
    for pattern in (r"error: (.+)", r"(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception|Interrupt)\b(?:: .*)?$)"):
        found = [match[1] for line in told if (match := re.match(pattern, line))]
        if found:
            return redact(found[-1])
    return redact(lines[-1]) if lines else "it printed nothing"


# ---- Running


def run_process(command: list[str], log: Path) -> int:
    """Runs a command to its end with its output added to `log`, and returns its exit code; stopped, it stops it."""
    with log.open("ab") as out:
        # A session of its own: a Ctrl-C reaches this program alone, which then stops the whole of it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait()
        except BaseException:
            _stop(process)
            raise


def _stop(process: subprocess.Popen) -> None:
    # accelerate's launcher ends the processes that it started when it is asked to stop.
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(SECONDS_TO_STOP)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def run_cell(cell: Cell) -> None:
    """Runs a cell, from its last checkpoint where it has one, and notes how it ended."""
    before = record(cell)
    resume = bool(checkpoints(cell.folder))
    command = cell.command(resume)
    note = {"label": cell.label, "seed": cell.seed, "settings": cell.settings, "command": command}
    earlier = (before.get("seconds") or 0.0) if resume else 0.0
    start = time.perf_counter()

    def save(**state: Any) -> None:
        seconds = round(earlier + time.perf_counter() - start, 1)
        write_json(cell.folder / "cell.json", {**note, "seconds": seconds, **state})

    # Before the status: a result that a failed attempt left is none.
    (cell.folder / RESULT_NAME).unlink(missing_ok=True)
    save(status="running")
    write_yaml(cell.folder / "config.yaml", cell.config, sort=False)
    log = cell.folder / "log.txt"
    offset = log.stat().st_size if log.is_file() else 0
    with log.open("a", encoding="utf-8") as out:
        out.write(f"$ {shlex.join(command)}\n")
    try:
        code = run_process(command, log)
    except KeyboardInterrupt:
        save(status="interrupted")
        raise
    if code == 0:
        save(status="ok")
        return
    with log.open("rb") as file:
        file.seek(offset)
        printed = file.read().decode(errors="replace").partition("\n")[2]
    killed = f"killed by {signal.Signals(-code).name}; " if code < 0 else ""
    save(status="failed", error=killed + last_error(printed))


def run_grid(grid: Grid) -> int:
    """
    Runs what isn't complete of a grid and writes the table after every cell.

    Returns:
        `int`: 0 if every cell is complete, else 1.

    Raises:
        UserError: If a cell was run with other settings, before anything is run.
    """
    cells = grid.cells()
    check_folder(grid.output_dir)
    for cell in cells:
        check_settings(cell)
    write_outputs(cells, grid.output_dir)
    try:
        for index, cell in enumerate(cells, start=1):
            where = f"[{index}/{len(cells)}] {cell.name}"
            if status(cell) == "ok":
                print(f"{where}: complete before", flush=True)
                continue
            from_checkpoint = " from its last checkpoint" if checkpoints(cell.folder) else ""
            print(f"{where}: running{from_checkpoint}; log in {cell.folder / 'log.txt'}", flush=True)
            run_cell(cell)
            write_outputs(cells, grid.output_dir)
            print(f"{where}: {_line(result(cell))}", flush=True)
    except KeyboardInterrupt:
        write_outputs(cells, grid.output_dir)
        done = sum(status(cell) == "ok" for cell in cells)
        print(f"stopped with {done} of {len(cells)} cells complete; the same command goes on", file=sys.stderr)
        sys.exit(130)
    return int(any(status(cell) != "ok" for cell in cells))


def _line(line: Mapping[str, Any]) -> str:
    elapsed = f"{int(line['seconds'] // 60)}:{int(line['seconds'] % 60):02d} min"
    if line["status"] != "ok":
        return f"failed after {elapsed}: {line['error']}"
    value = line["metrics"].get(MAIN)
    return f"ok in {elapsed}" + ("" if value is None else f", {value:.4f} bits per byte")


def write_outputs(cells: Sequence[Cell], folder: Path) -> None:
    """Writes `results.jsonl`, `table.md` and, where there is a number to draw, `table.png`."""
    results = [result(cell) for cell in cells]
    write_json_lines(folder / "results.jsonl", results)
    write_text(folder / "table.md", table(results))
    picture = folder / "table.png"
    if any(metric_values(results, label, MAIN) for label in labels(results)):
        plot_table(results, picture)
    else:
        picture.unlink(missing_ok=True)


# ---- The table


def labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lists the labels in the order of the results."""
    return list(dict.fromkeys(line["label"] for line in results))


def metric_values(
    results: Sequence[Mapping[str, Any]], label: str, metric: str, step: int | None = None
) -> list[float]:
    """Collects a metric over the seeds of a label: at the end, or at a step."""
    own = [line for line in results if line["label"] == label and line["status"] == "ok"]
    metrics = [line["metrics"] if step is None else line["evaluations"].get(str(step), {}) for line in own]
    return [part[metric] for part in metrics if part.get(metric) is not None]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """
    Writes lines of `results.jsonl` as Markdown: mean ± sample standard deviation over the seeds at the end of
    training, the best mean in bold, and bits per byte at each evaluation on the way.
    """
    rows = labels(results)
    shown = [
        metric for metric in COLUMNS if metric == MAIN or any(metric_values(results, label, metric) for label in rows)
    ]
    columns = {
        COLUMNS[metric][0]: mean_column([metric_values(results, label, metric) for label in rows], COLUMNS[metric][1])
        for metric in shown
    }
    columns["seeds"] = []
    for index, label in enumerate(rows):
        own = [line for line in results if line["label"] == label]
        done = sum(line["status"] == "ok" for line in own)
        columns["seeds"].append(str(done) if done == len(own) else f"{done} of {len(own)}")
        failed = [line for line in own if line["status"] == "failed"]
        if failed and not metric_values(results, label, MAIN):
            columns[COLUMNS[MAIN][0]][index] = f"failed: {_cell(failed[0]['error'])}"
    lines = ["Held-out examples, after training. Mean ± sample standard deviation over seeds; the best mean in bold."]
    if any(line["best_checkpoint"] for line in results):
        lines.append("The model evaluated is the best checkpoint of its run, which need not be the last.")
    lines += ["", *markdown_table(rows, columns)]

    # That after the last step is of the model in the table above, unless that is the best one.
    steps = {
        int(step)
        for line in results
        for step in line["evaluations"]
        if int(step) != line["steps"] or line["best_checkpoint"]
    }
    on_the_way = {
        f"{step:,} steps": mean_column([metric_values(results, label, MAIN, step) for label in rows], "lower")
        for step in sorted(steps)
    }
    if on_the_way:
        lines += ["", "Bits per byte on the way:", "", *markdown_table(rows, on_the_way)]
    failed = [line for line in results if line["status"] == "failed"]
    if failed:
        lines += ["", *(f"- {line['label']}, seed {line['seed']}: failed: {_cell(line['error'])}" for line in failed)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def plot_table(results: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """
    Draws lines of `results.jsonl`, one of them complete at least: for each label the mean bits per byte with an error
    bar of one sample standard deviation and the single seeds, the best on top. A dashed line goes through the mean of
    training on the text alone.
    """
    numbers = {label: metric_values(results, label, MAIN) for label in labels(results)}
    means = {label: statistics.fmean(found) for label, found in numbers.items() if found}
    order = sorted(means, key=lambda label: means[label])
    methods = {line["label"]: line["method"] for line in results}
    text_alone = [label for label in means if methods[label] == "sft"]
    figure = new_figure(7.0, 1.3 + 0.36 * len(order))
    axes = figure.add_subplot()
    if text_alone:
        reference = "sft" if "sft" in text_alone else text_alone[0]
        axes.axvline(means[reference], color="#e4572e", linewidth=1.1, linestyle=(0, (4, 2)), zorder=1)
        style: dict[str, Any] = {
            "color": "#e4572e",
            "fontsize": 8,
            "ha": "center",
            "va": "bottom",
            "parse_math": False,
        }
        axes.text(means[reference], 1.01, drawable(reference), transform=axes.get_xaxis_transform(), **style)
    marks: dict[str, Any] = {"fmt": "o", "color": "#1f5fa8", "markersize": 6.5, "elinewidth": 1.6, "capsize": 4}
    for row, label in enumerate(order):
        axes.plot(numbers[label], [row] * len(numbers[label]), "o", color="#9db9dd", markersize=4, zorder=2)
        axes.errorbar(means[label], row, xerr=spread(numbers[label]), zorder=3, **marks)
    axes.set_yticks(range(len(order)), [drawable(label) for label in order], fontsize=9, parse_math=False)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.ticklabel_format(axis="x", useOffset=False, style="plain")
    shown = "large: mean ± standard deviation over seeds; small: the seeds"
    axes.set_xlabel(f"bits per byte of held-out responses (lower is better)\n{shown}", fontsize=8)
    plain_axes(axes, grid="x")
    save_figure(figure, path)
