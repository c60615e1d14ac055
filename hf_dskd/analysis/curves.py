"""How the losses and the other logged numbers of one or several runs went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..losses.terms import TERMS
from ..utils.figures import drawable


# title → {name of the line: key in the log, which may be a pattern}. Lines of a panel differ in style, runs in colour.
# Those of the loss terms come before these (see [`panels`]).
_OTHER_PANELS: dict[str, dict[str, str]] = {
    "discriminator's loss": {"": "discriminator_loss"},
    "discriminator's accuracy": {
        "real (keys)": "discriminator_accuracy_real",
        "fake (queries)": "discriminator_accuracy_fake",
    },
    # With several evaluation sets the key has the name of the set.
    "evaluation: bits per byte": {"": "eval_*bits_per_byte"},
    "gradient norms": {
        "student": "grad_norm",
        "projectors": "projector_grad_norm",
        "discriminator": "discriminator_grad_norm",
    },
    "learning rates": {
        "student": "learning_rate",
        "projectors": "projector_learning_rate",
        "discriminator": "discriminator_learning_rate",
    },
}
_BOTH = {"student's tokens": "", "teacher's tokens": "s2t_"}
_UNIFORM = {"student's if uniform": "", "teacher's if uniform": "s2t_"}
_PROBES = {"the run's": "", "chunk mean (clp)": "probe_clp_", "chunk attention (cla)": "probe_cla_"}


def _of_each(prefixes: dict[str, str], key: str) -> dict[str, str]:
    return {name: prefix + key for name, prefix in prefixes.items()}


# The same for the alignment analysis (see [`~hf_dskd.analysis.probe.analyse`]).
ANALYSIS_PANELS: dict[str, dict[str, str]] = {
    "attention in the right chunk (chunk_mass)": (
        _of_each(_BOTH, "chunk_mass") | _of_each(_UNIFORM, "chunk_mass_uniform")
    ),
    "strongest weight in the chunk (argmax_in_chunk)": (
        _of_each(_BOTH, "argmax_in_chunk") | _of_each(_UNIFORM, "chunk_mass_uniform")
    ),
    "order kept (monotonicity)": _of_each(_BOTH, "monotonicity"),
    "entropy of the attention, nats": _of_each(_BOTH, "entropy"),
    "entropy, share of the largest": _of_each(_BOTH, "entropy_normalised"),
    "attention's distance from its token, bytes": (
        _of_each(_BOTH, "attention_distance_bytes") | _of_each(_UNIFORM, "attention_distance_bytes_uniform")
    ),
    "divergence from the chunk prior (prior_kl), nats": _of_each(_BOTH, "prior_kl"),
    "tokens with a partner": _of_each(_BOTH, "aligned_rate"),
    "projected teacher is right (t2s_accuracy)": _of_each(_PROBES, "t2s_accuracy"),
    "projected teacher's cross entropy (t2s_ce_loss)": _of_each(_PROBES, "t2s_ce_loss"),
    "projected student is right (s2t_accuracy)": _of_each(_PROBES, "s2t_accuracy"),
    "projected student agrees with teacher": _of_each(_PROBES, "s2t_agreement"),
    "queries and keys: squared MMD": {"": "mmd"},
    "queries and keys: p-value of the MMD": {"": "mmd_p_value"},
    "queries and keys: sliced Wasserstein": {"": "sliced_wasserstein"},
    "queries and keys: gap of the means": {"": "mean_gap"},
    "queries and keys: gap of the variances": {"": "variance_gap"},
    "queries and keys: cosine of the means": {"": "mean_cosine"},
    "queries told from keys (AUC)": {
        "new linear probe": "linear_probe_auc",
        "run's discriminator": "discriminator_auc",
    },
    "gradient norms of the terms": {"": "gradient_norm_*"},
}
LOGARITHMIC = ("gradient norms", "learning rates", "gradient norms of the terms")
SHARES = (
    "discriminator's accuracy",
    "projected teacher is right (mask rate)",
    "student tokens with a partner",
    "attention in the right chunk (chunk_mass)",
    "strongest weight in the chunk (argmax_in_chunk)",
    "entropy, share of the largest",
    "tokens with a partner",
    "projected teacher is right (t2s_accuracy)",
    "projected student is right (s2t_accuracy)",
    "projected student agrees with teacher",
    "queries and keys: p-value of the MMD",
    "queries told from keys (AUC)",
)
# An axis that begins at 0, or goes from -1 to 1, doesn't make much of small changes.
FROM_ZERO = (
    "entropy of the attention, nats",
    "attention's distance from its token, bytes",
    "divergence from the chunk prior (prior_kl), nats",
    "queries and keys: squared MMD",
    "queries and keys: sliced Wasserstein",
    "queries and keys: gap of the means",
    "queries and keys: gap of the variances",
)
CORRELATIONS = ("order kept (monotonicity)", "queries and keys: cosine of the means")
# What guessing gives, and the usual level of significance.
REFERENCES = {
    "discriminator's accuracy": 0.5,
    "queries told from keys (AUC)": 0.5,
    "queries and keys: p-value of the MMD": 0.05,
}

COLOURS = ("#1f5fa8", "#e4572e", "#3a9d5d", "#8e5bb5", "#d6a11b", "#4ab3c4", "#b3446c", "#7a7a7a")
_STYLES: tuple[tuple[Any, str], ...] = (("-", "o"), ((0, (4, 1.5)), "s"), ((0, (1, 1.2)), "^"), ("-.", "D"))
_DPI = 110


def panels() -> dict[str, dict[str, str]]:
    """Every curve of a training, the loss terms' first: title → {name of the line: key in the log}."""
    terms = {term.panel: {"": term.log} for term in TERMS.values() if term.panel}
    return terms | _OTHER_PANELS


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """
    Steps and values of `key`, by step. Logged twice at one step (after a resume), the later value stays.

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
    return any(_panel_lines({"": history}, keys) for keys in panels().values())


def plot_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """
    Writes a PNG with one small panel per logged quantity, over optimizer steps; panels without data are left out.

    Args:
        runs (`Mapping[str, Sequence[Mapping[str, Any]]]`): `trainer.state.log_history` by the name of the run.
        path (`str` or `Path`): File to write; its folder is made if need be.

    Raises:
        UserError: If nothing that has a panel was logged.
    """
    drawn = {title: lines for title, keys in panels().items() if (lines := _panel_lines(runs, keys))}
    if not drawn:
        raise UserError(
            f"the {len(runs)} runs given have logged nothing to draw: pass trainer.state.log_history after training,"
            " with logging_steps no larger than the number of steps"
        )
    _draw(drawn, list(runs), path)


def plot_analysis(
    history: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path
) -> None:
    """
    Writes a PNG with one small panel per number of the alignment analysis, over optimizer steps.

    Numbers that have no panel of their own kind get one under their name, after the others; panels without data are
    left out.

    Args:
        history (`Sequence[Mapping[str, Any]]` or `Mapping[str, Sequence[Mapping[str, Any]]]`):
            One entry per analysis, `{"step": 0, "chunk_mass": 0.31, …}`; or such a history by the name of the run.
        path (`str` or `Path`): File to write; its folder is made if need be.

    Raises:
        UserError: If no entry has a number and a step.
    """
    runs = history if isinstance(history, Mapping) else {"": history}
    lines_of = {title: _panel_lines(runs, keys) for title, keys in ANALYSIS_PANELS.items()}
    drawn = {key for keys in ANALYSIS_PANELS.values() for key in _expanded(runs, keys).values()}
    others = sorted({key for entries in runs.values() for entry in entries for key in entry} - drawn - {"step"})
    lines_of |= {key: _panel_lines(runs, {"": key}) for key in others}
    panels = {title: lines for title, lines in lines_of.items() if lines}
    if not panels:
        raise UserError("the analyses given have no numbers to draw: pass at least one entry with its step")
    _draw(panels, list(runs) if isinstance(history, Mapping) else [], path)


def _draw(panels: dict[str, list[_Line]], names: list[str], path: str | Path) -> None:
    """Writes the picture; `names` are those of the runs, for the legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.0 * columns, 2.5 * rows + 0.4), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    steps = [step for lines in panels.values() for line in lines for step in line.steps]
    margin = 0.03 * (max(steps) - min(steps)) or 0.5
    for index, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        # The same steps everywhere, so that panels can be compared by eye.
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
        _draw_panel(axes, title, lines)
        if index >= len(panels) - columns:
            axes.set_xlabel("optimizer step", fontsize=8)

    if names:
        handles = [Line2D([], [], color=_colour(index), linewidth=2.5) for index in range(len(names))]
        legend = figure.legend(
            handles,
            ["run"] * len(names),
            loc="outside upper left",
            ncols=min(len(names), 4),
            frameon=False,
            fontsize=10,
        )
        for text, name in zip(legend.get_texts(), names):
            # Not given to legend(), which takes a name that begins with "_" for one to leave out.
            text.set_text(drawable(str(name)))
            text.set_parse_math(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


class _Line:
    """One curve: a quantity of a run."""

    def __init__(self, run: int, style: int, name: str, steps: list[int], values: list[float]):
        self.run, self.style, self.name, self.steps, self.values = run, style, name, steps, values


def _panel_lines(runs: Mapping[str, Sequence[Mapping[str, Any]]], keys: dict[str, str]) -> list[_Line]:
    lines = []
    for run, history in enumerate(runs.values()):
        for style, (name, key) in enumerate(_expanded(runs, keys).items()):
            steps, values = series(history, key)
            if steps:
                lines.append(_Line(run, style, name, steps, values))
    return lines


def _expanded(runs: Mapping[str, Sequence[Mapping[str, Any]]], keys: dict[str, str]) -> dict[str, str]:
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


def _draw_panel(axes: Any, title: str, lines: list[_Line]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    # A curve of few points is one of points; a single one would be invisible without.
    marked = max(len(line.steps) for line in lines) <= 25
    last_run = max(line.run for line in lines)
    for line in lines:
        # Later runs lie on top and are thinner: curves that coincide show both colours.
        width = 1.3 + 0.9 * min(last_run - line.run, 3)
        axes.plot(line.steps, line.values, color=_colour(line.run), linewidth=width, **_style(line.style, marked))
    values = [value for line in lines for value in line.values]
    if title in LOGARITHMIC and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
    if title in SHARES:
        axes.set_ylim(-0.04, 1.04)
    elif title in CORRELATIONS:
        axes.set_ylim(-1.08, 1.08)
    elif title in FROM_ZERO:
        axes.set_ylim(1.08 * min(0.0, *values), 1.08 * max(0.0, *values) or 1.0)
    if title in REFERENCES:
        axes.axhline(REFERENCES[title], color="#bbbbbb", linewidth=0.8, zorder=0)
    named = {line.style: line.name for line in lines if line.name}
    if named:
        order = sorted(named)
        handles = [Line2D([], [], color="#444444", linewidth=1.3, **_style(style, marked)) for style in order]
        labels = [drawable(named[style]) for style in order]
        axes.legend(handles, labels, fontsize=7, handlelength=2.6, framealpha=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set_title(drawable(title), fontsize=9, loc="left", parse_math=False)
    axes.tick_params(labelsize=8)
    axes.yaxis.get_offset_text().set_fontsize(7)
    axes.grid(True, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _colour(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def _style(style: int, marked: bool) -> dict[str, Any]:
    line, marker = _STYLES[style % len(_STYLES)]
    return {"linestyle": line, "marker": marker if marked else "", "markersize": 3.5}
