"""How the losses and the other logged numbers of one or several runs went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..losses.terms import TERMS
from ..utils.figures import COLORS, drawable, new_figure, plain_axes, save_figure


Runs = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Panel:
    """A small plot. Its lines differ in style, the runs in color."""

    title: str
    lines: Mapping[str, str]  # key in the log, which may be a pattern, by the name of the line
    # "share" and "correlation" are drawn from 0 or -1 to 1, "distance" from 0, so that not much is made of small
    # changes; "log" is logarithmic where the values are far apart.
    axis: str = "free"
    reference: float | None = None  # what guessing gives, or the usual level of significance


def _each(prefixes: Mapping[str, str], key: str, uniform: str | None = None) -> dict[str, str]:
    """Gives a line to each prefix of a key, and of what there would be if attention were uniform."""
    lines = {name: prefix + key for name, prefix in prefixes.items()}
    if uniform is not None:
        lines |= {f"{name.removesuffix(' tokens')} if uniform": prefix + uniform for name, prefix in prefixes.items()}
    return lines


_PARTS = ("student", "projectors", "discriminator")
# The panels of the loss terms come before these.
_OF_TRAINING = (
    Panel("discriminator's loss", {"": "discriminator_loss"}),
    Panel(
        "discriminator's accuracy",
        {"real (keys)": "discriminator_accuracy_real", "fake (queries)": "discriminator_accuracy_fake"},
        *("share", 0.5),
    ),
    # With several evaluation sets the key has the name of the set.
    Panel("evaluation: bits per byte", {"": "eval_*bits_per_byte"}),
    Panel("gradient norms", dict(zip(_PARTS, ("grad_norm", "projector_grad_norm", "discriminator_grad_norm"))), "log"),
    Panel(
        "learning rates",
        dict(zip(_PARTS, ("learning_rate", "projector_learning_rate", "discriminator_learning_rate"))),
        "log",
    ),
)
_BOTH = {"student's tokens": "", "teacher's tokens": "s2t_"}
_PROBES = {"the run's": "", "chunk mean (clp)": "probe_clp_", "chunk attention (cla)": "probe_cla_"}
_AUC = {"new linear probe": "linear_probe_auc", "run's discriminator": "discriminator_auc"}
# What uniform attention would have, by the key of what it is compared with (see [`~hf_dskd.analysis.probe.analyse`]).
_UNIFORM = {"chunk_mass": "chunk_mass_uniform", "argmax_in_chunk": "chunk_mass_uniform"}
_UNIFORM |= {"attention_distance_bytes": "attention_distance_bytes_uniform"}
_OF_ANALYSES = (
    *(
        Panel(title, _each(prefixes, key, _UNIFORM.get(key)), axis)
        for prefixes, key, title, axis in (
            (_BOTH, "chunk_mass", "attention in the right chunk (chunk_mass)", "share"),
            (_BOTH, "argmax_in_chunk", "strongest weight in the chunk (argmax_in_chunk)", "share"),
            (_BOTH, "monotonicity", "order kept (monotonicity)", "correlation"),
            (_BOTH, "entropy", "entropy of the attention, nats", "distance"),
            (_BOTH, "entropy_normalised", "entropy, share of the largest", "share"),
            (_BOTH, "attention_distance_bytes", "attention's distance from its token, bytes", "distance"),
            (_BOTH, "prior_kl", "divergence from the chunk prior (prior_kl), nats", "distance"),
            (_BOTH, "aligned_rate", "tokens with a partner", "share"),
            (_PROBES, "t2s_accuracy", "projected teacher is right (t2s_accuracy)", "share"),
            (_PROBES, "t2s_ce_loss", "projected teacher's cross entropy (t2s_ce_loss)", "free"),
            (_PROBES, "s2t_accuracy", "projected student is right (s2t_accuracy)", "share"),
            (_PROBES, "s2t_agreement", "projected student agrees with teacher", "share"),
        )
    ),
    Panel("queries and keys: squared MMD", {"": "mmd"}, "distance"),
    Panel("queries and keys: p-value of the MMD", {"": "mmd_p_value"}, "share", 0.05),
    Panel("queries and keys: sliced Wasserstein", {"": "sliced_wasserstein"}, "distance"),
    Panel("queries and keys: gap of the means", {"": "mean_gap"}, "distance"),
    Panel("queries and keys: gap of the variances", {"": "variance_gap"}, "distance"),
    Panel("queries and keys: cosine of the means", {"": "mean_cosine"}, "correlation"),
    Panel("queries told from keys (AUC)", _AUC, "share", 0.5),
    Panel("gradient norms of the terms", {"": "gradient_norm_*"}, "log"),
)
_STYLES: tuple[tuple[Any, str], ...] = (("-", "o"), ((0, (4, 1.5)), "s"), ((0, (1, 1.2)), "^"), ("-.", "D"))


def training_panels() -> list[Panel]:
    """Lists every curve of a training, the loss terms' first."""
    terms = [
        Panel(term.panel, {"": term.log}, "share" if term.log.endswith("_rate") else "free")
        for term in TERMS.values()
        if term.panel
    ]
    return [*terms, *_OF_TRAINING]


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """
    Finds steps and values of `key`, by step. Logged twice at one step (after a resume), the later value stays.

    Entries without the key, such as the summary at the end of training, and values that aren't finite are left out.
    """
    values = {}
    for entry in history:
        value = entry.get(key)
        if "step" in entry and isinstance(value, Real) and math.isfinite(value):
            values[int(entry["step"])] = float(value)
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def has_curves(history: Sequence[Mapping[str, Any]]) -> bool:
    """Tells whether anything was logged that has a panel."""
    return any(_lines({"": history}, panel) for panel in training_panels())


def plot_curves(runs: Runs, path: str | Path) -> None:
    """
    Writes a PNG with one small panel per logged quantity, over optimizer steps; panels without data are left out.

    `runs` are `trainer.state.log_history` by the name of the run. The folder of the file is made if need be.

    Raises:
        UserError: If nothing that has a panel was logged.
    """
    if not any(_lines(runs, panel) for panel in training_panels()):
        raise UserError(
            f"the {len(runs)} runs given have logged nothing to draw: pass trainer.state.log_history after training,"
            " with logging_steps no larger than the number of steps"
        )
    _draw(runs, training_panels(), list(runs), path)


def plot_analysis(history: Sequence[Mapping[str, Any]] | Runs, path: str | Path) -> None:
    """
    Writes a PNG with one small panel per number of the alignment analysis, over optimizer steps.

    Numbers that have no panel of their own kind get one under their name, after the others; panels without data are
    left out. `history` has one entry per analysis, `{"step": 0, "chunk_mass": 0.31, …}`, or is several by the name of
    the run. The folder of the file is made if need be.

    Raises:
        UserError: If no entry has a number and a step.
    """
    runs = history if isinstance(history, Mapping) else {"": history}
    drawn = {key for panel in _OF_ANALYSES for key in _expanded(runs, panel.lines).values()}
    others = sorted({key for entries in runs.values() for entry in entries for key in entry} - drawn - {"step"})
    panels = [*_OF_ANALYSES, *(Panel(key, {"": key}) for key in others)]
    if not any(_lines(runs, panel) for panel in panels):
        raise UserError("the analyses given have no numbers to draw: pass at least one entry with its step")
    _draw(runs, panels, list(runs) if isinstance(history, Mapping) else [], path)


def _draw(runs: Runs, panels: Sequence[Panel], names: list[str], path: str | Path) -> None:
    """Writes the picture of the panels with data; `names` are those of the runs, for the legend."""
    shown = [(panel, lines) for panel in panels if (lines := _lines(runs, panel))]
    columns = min(len(shown), 3)
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(4.0 * columns, 2.5 * rows + 0.4)
    steps = [step for _, lines in shown for line in lines for step in line.steps]
    margin = 0.03 * (max(steps) - min(steps)) or 0.5
    for index, (panel, lines) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        # The same steps everywhere, so that panels can be compared by eye.
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
        _draw_panel(axes, panel, lines)
        if index >= len(shown) - columns:
            axes.set_xlabel("optimizer step", fontsize=8)
    if names:
        _name_runs(figure, names)
    save_figure(figure, path)


def _name_runs(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_color(index), linewidth=2.5) for index in range(len(names))]
    where: dict[str, Any] = {"loc": "outside upper left", "ncols": min(len(names), 4)}
    legend = figure.legend(handles, ["run"] * len(names), **where, frameon=False, fontsize=10)
    for text, name in zip(legend.get_texts(), names):
        # Not given to legend(), which takes a name that begins with "_" for one to leave out.
        text.set_text(drawable(str(name)))
        text.set_parse_math(False)


@dataclass(frozen=True)
class _Line:
    """One curve: a quantity of a run."""

    run: int
    style: int
    name: str
    steps: list[int]
    values: list[float]


def _lines(runs: Runs, panel: Panel) -> list[_Line]:
    """The curves of a panel, those that were logged."""
    return [
        _Line(run, style, name, *points)
        for run, history in enumerate(runs.values())
        for style, (name, key) in enumerate(_expanded(runs, panel.lines).items())
        if (points := series(history, key))[0]
    ]


def _expanded(runs: Runs, keys: Mapping[str, str]) -> dict[str, str]:
    """The keys with a pattern replaced by what matches it in the runs, named by what stands for the asterisk."""
    expanded = {}
    for name, pattern in keys.items():
        if "*" not in pattern:
            expanded[name] = pattern
            continue
        before, after = pattern.split("*")
        logged = {key for history in runs.values() for entry in history for key in entry}
        for key in sorted(key for key in logged if fnmatchcase(key, pattern)):
            expanded[key[len(before) : len(key) - len(after)].strip("_")] = key
    return expanded


def _draw_panel(axes: Any, panel: Panel, lines: list[_Line]) -> None:
    from matplotlib.ticker import MaxNLocator

    # A curve of few points is one of points; a single one would be invisible without.
    marked = max(len(line.steps) for line in lines) <= 25
    last_run = max(line.run for line in lines)
    for line in lines:
        # Later runs lie on top and are thinner: curves that coincide show both colors.
        width = 1.3 + 0.9 * min(last_run - line.run, 3)
        axes.plot(line.steps, line.values, color=_color(line.run), linewidth=width, **_style(line.style, marked))
    _scale(axes, panel, [value for line in lines for value in line.values])
    _name_lines(axes, {line.style: line.name for line in lines if line.name}, marked)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set_title(drawable(panel.title), fontsize=9, loc="left", parse_math=False)
    axes.yaxis.get_offset_text().set_fontsize(7)
    plain_axes(axes, grid="both")


def _scale(axes: Any, panel: Panel, values: list[float]) -> None:
    if panel.axis == "log" and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
    if panel.axis == "share":
        axes.set_ylim(-0.04, 1.04)
    elif panel.axis == "correlation":
        axes.set_ylim(-1.08, 1.08)
    elif panel.axis == "distance":
        axes.set_ylim(1.08 * min(0.0, *values), 1.08 * max(0.0, *values) or 1.0)
    if panel.reference is not None:
        axes.axhline(panel.reference, color="#bbbbbb", linewidth=0.8, zorder=0)


def _name_lines(axes: Any, names: Mapping[int, str], marked: bool) -> None:
    """A legend of the styles, for the lines that have a name."""
    from matplotlib.lines import Line2D

    if names:
        handles = [Line2D([], [], color="#444444", linewidth=1.3, **_style(style, marked)) for style in sorted(names)]
        labels = [drawable(names[style]) for style in sorted(names)]
        axes.legend(handles, labels, fontsize=7, handlelength=2.6, framealpha=0.6)


def _color(run: int) -> str:
    return COLORS[run % len(COLORS)]


def _style(style: int, marked: bool) -> dict[str, Any]:
    line, marker = _STYLES[style % len(_STYLES)]
    return {"linestyle": line, "marker": marker if marked else "", "markersize": 3.5}
