"""
A run's report, or one of several runs side by side, made of the files in their folders: neither a model nor its data
is needed.

    OUTPUT_DIR/report/
      report.md     for a repository: pictures are links to files
      report.html   one file with its pictures in it, to be sent around
      curves.png, gradient_shares.png, analysis.png
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import UserError
from ..methods import METHODS
from ..run import RESULT_NAME, write_text
from ..settings import DistillationSettings


HELP = """\
hf-dskd report DIR [DIR ...] [--output_dir FOLDER]

Writes report.md and report.html (one file with its pictures in it). The folders are those that `hf-dskd train` wrote,
or one that `hf-dskd compare` wrote, which stands for all of its runs.

  one run        its report again, in DIR/report
  several runs   results with their mean and standard deviation over seeds, the settings that differ, and the curves on
                 the same axes; in DIR/report of the one folder of a comparison, else --output_dir is needed

  --output_dir   where to write it

    hf-dskd report runs/smollm2_qwen_coder
    hf-dskd report runs/sft runs/dskd_cma_ga --output_dir runs/report"""

# End of a key among the metrics → title and which end is better.
MEASURES: dict[str, tuple[str, str | None]] = {
    "bits_per_byte": ("bits per byte", "lower"),
    "rouge_l": ("ROUGE-L of generated answers, percent", "higher"),
    "exact_match": ("exact match of generated answers, percent", "higher"),
    "unfinished": ("share of them that ran into the maximum length", "lower"),
    "token_accuracy": ("token accuracy", "higher"),
    "ce_loss": ("cross entropy", "lower"),
    "t2s_accuracy": ("projected teacher is right", "higher"),
    "s2t_agreement": ("projected student agrees with the teacher", "higher"),
    "loss": ("method's own loss", None),
}
KD_TERMS = ("t2s_kd", "s2t_kd", "kd", "alm")
TERMS = ("ce", "t2s_ce", *KD_TERMS, "kq")
# Losses of the log that shouldn't jump. Those of matching are of a game, and t2s_kd_loss grows with the share of
# tokens that the correctness mask lets through.
SPIKING = ("loss", "ce_loss", "t2s_ce_loss", "s2t_kd_loss", "kd_loss", "alm_loss")
# Number of an analysis → what it means.
MEANINGS = {
    "aligned_rate": "tokens that have a partner",
    "chunk_mass": "attention on the tokens of the same bytes; 1 is all of it",
    "chunk_mass_uniform": "what uniform attention would have there",
    "argmax_in_chunk": "share of tokens whose strongest partner is one of them",
    "monotonicity": "1: partners come in the order of the text; 0: in no order; −1: backwards",
    "entropy": "nats; 0: one partner each",
    "entropy_normalised": "1: uniform attention; 0: one partner each",
    "attention_distance_bytes": "bytes between a token and what it attends to; lower is nearer",
    "attention_distance_bytes_uniform": "what uniform attention would have",
    "prior_kl": "nats from the chunk prior to the attention; 0: they are equal",
    "t2s_accuracy": "tokens that the projected teacher predicts rightly",
    "s2t_accuracy": "tokens that the projected student predicts rightly",
    "s2t_agreement": "tokens for which projected student and teacher predict the same",
    "t2s_ce_loss": "cross entropy of the projected teacher, in nats",
    "mmd": "squared discrepancy of queries and keys; 0: the same distribution",
    "mmd_p_value": "small: queries and keys do differ",
    "sliced_wasserstein": "distance of queries and keys; 0: the same distribution",
    "mean_gap": "between the means of queries and keys, per dimension; 0: none",
    "variance_gap": "between their variances, per dimension; 0: none",
    "mean_cosine": "cosine of the two means; 1: the same direction",
    "linear_probe_auc": "a linear probe that tells queries from keys; 0.5: it can't, 1: always",
    "discriminator_auc": "the run's own discriminator doing so; 0.5: it can't, 1: always",
}
# Start of a number's name → what is different in it.
PROBES = {
    "probe_clp_": "with the mean of the chunk instead",
    "probe_cla_": "with attention inside the chunk instead",
    "s2t_": "from the teacher's tokens to the student's",
}
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
# Settings that say where a run writes or which of several equal ones it is, not what it does.
NOT_COMPARED = {
    *("seed", "data_seed", "output_dir", "logging_dir", "run_name", "project", "trackio_space_id"),
    *("hub_model_id", "resume_from_checkpoint", "report_to", "disable_tqdm", "teacher_cache"),
}

EXAMPLES_SHOWN = 5
CHARACTERS_SHOWN = 1500
WON, GUESSING = 0.99, 0.55
SMALL_GRADIENT, SMALL_MASK, MANY_CUT = 0.01, 0.1, 0.05
SPIKE, SPIKE_SPREADS, NEIGHBOURS = 3.0, 4.0, 5
WORSE, BEST_EARLIER = 0.005, 0.75
DIVERGED = 1.25
UNIFORM = 1.1


# ---- Blocks: what a report is made of, as Markdown and as HTML


@dataclass(frozen=True)
class Span:
    """A piece of a text that is `"code"`, `"strong"` or a `"link"` to the file `path`."""

    text: str
    kind: str
    path: Path | None = None


Text = str | Span | tuple[str | Span, ...]


@dataclass(frozen=True)
class Heading:
    level: int
    text: str

    def markdown(self, folder: Path) -> str:
        return f"{'#' * self.level} {markdown_text(self.text, folder)}"

    def html(self, folder: Path) -> str:
        anchor = f' id="{_anchor(self.text)}"' if self.level == 2 else ""
        return f"<h{self.level}{anchor}>{html_text(self.text, folder)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    text: Text

    def markdown(self, folder: Path) -> str:
        return markdown_text(self.text, folder)

    def html(self, folder: Path) -> str:
        return f"<p>{html_text(self.text, folder)}</p>"


@dataclass(frozen=True)
class Listing:
    """A list; `warning` makes it stand out."""

    items: Sequence[Text]
    warning: bool = False

    def markdown(self, folder: Path) -> str:
        lines = [f"- {markdown_text(item, folder)}" for item in self.items]
        return "\n".join(["> [!WARNING]", *(f"> {line}" for line in lines)] if self.warning else lines)

    def html(self, folder: Path) -> str:
        kind = ' class="warning"' if self.warning else ""
        return f"<ul{kind}>{''.join(f'<li>{html_text(item, folder)}</li>' for item in self.items)}</ul>"


@dataclass(frozen=True)
class Table:
    """Rows under `columns`; `align` has "l" or "r" for each of them, and its last letter for those that are left."""

    columns: Sequence[Text]
    rows: Sequence[Sequence[Text]]
    align: str = "lr"

    @property
    def _right(self) -> list[bool]:
        return [letter == "r" for letter in self.align.ljust(len(self.columns), self.align[-1])]

    def markdown(self, folder: Path) -> str:
        cells = [[markdown_text(cell, folder) for cell in row] for row in [self.columns, *self.rows]]
        widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(self.columns))]
        padded = [
            [text.rjust(width) if right else text.ljust(width) for text, width, right in zip(row, widths, self._right)]
            for row in cells
        ]
        padded.insert(1, ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, self._right)])
        return "\n".join(f"| {' | '.join(row)} |" for row in padded)

    def html(self, folder: Path) -> str:
        def line(tag: str, row: Sequence[Text]) -> str:
            starts = [f'<{tag} class="r">' if right else f"<{tag}>" for right in self._right]
            cells = [f"{start}{html_text(cell, folder)}</{tag}>" for start, cell in zip(starts, row)]
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        head = f"<thead>{line('th', self.columns)}</thead>" if any(self.columns) else ""
        return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side: file by caption."""

    files: Mapping[str, Path]

    def markdown(self, folder: Path) -> str:
        shown = [(_markdown_escaped(caption), _address(path, folder)) for caption, path in self.files.items()]
        if len(shown) == 1:
            return f"![{shown[0][0]}]({shown[0][1]})"
        cells = [[caption for caption, _ in shown], ["---"] * len(shown), [f"![{text}]({to})" for text, to in shown]]
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)

    def html(self, folder: Path) -> str:
        figures = []
        for caption, path in self.files.items():
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            text = html.escape(_visible(caption))
            image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
            figures.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
        return f'<div class="pictures">{"".join(figures)}</div>'


@dataclass(frozen=True)
class Code:
    """Text as it stands."""

    text: str

    def markdown(self, folder: Path) -> str:
        text = _visible(self.text)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        return f"{fence}text\n{text}\n{fence}"

    def html(self, folder: Path) -> str:
        return f'<pre dir="auto">{html.escape(_visible(self.text))}</pre>'


@dataclass(frozen=True)
class Verbatim:
    """Markdown that another command wrote."""

    text: str

    def markdown(self, folder: Path) -> str:
        return self.text.strip()

    def html(self, folder: Path) -> str:
        parts = [html.escape(_visible(part)) for part in self.text.strip().split("\n\n")]
        return "".join(f'<pre class="table">{part}</pre>' if part[0] == "|" else f"<p>{part}</p>" for part in parts)


Histories = Mapping[str, Sequence[Mapping[str, Any]]]
Block = Heading | Paragraph | Listing | Table | Pictures | Code | Verbatim


def markdown_text(text: Text, folder: Path) -> str:
    """One line of Markdown in which nothing but a span's kind is markup."""
    if isinstance(text, tuple):
        return "".join(markdown_text(part, folder) for part in text)
    if isinstance(text, str):
        return _markdown_escaped(text)
    if text.kind == "code":
        content = _visible(text.text).replace("|", "\\|")
        fence = "`" * (1 + max(map(len, re.findall("`+", content)), default=0))
        space = " " if "`" in content else ""
        return f"{fence}{space}{content}{space}{fence}"
    if text.path is not None:
        return f"[{_markdown_escaped(text.text)}]({_address(text.path, folder)})"
    return f"**{_markdown_escaped(text.text)}**"


def html_text(text: Text, folder: Path) -> str:
    """HTML in which nothing but a span's kind is markup."""
    if isinstance(text, tuple):
        return "".join(html_text(part, folder) for part in text)
    if isinstance(text, str):
        return html.escape(_visible(text))
    content = html.escape(_visible(text.text))
    if text.path is not None:
        return f'<a href="{html.escape(_address(text.path, folder))}">{content}</a>'
    tag = {"code": "code", "strong": "strong"}[text.kind]
    return f"<{tag}>{content}</{tag}>"


def _visible(text: str) -> str:
    """Without what can't stand in a file of text: control characters and halves of surrogate pairs are escaped."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], text)


def _markdown_escaped(text: str) -> str:
    text = re.sub(r"\s+", " ", _visible(text))
    text = re.sub(r"([\\`*\[\]<>|~$&])", r"\\\1", text)
    # Inside a word, as in kd_rate, it is no markup.
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    text = re.sub(r"^(?=#{1,6}(\s|$)|[+=-](\s|$)|[-=]{3,})", r"\\", text)
    return re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", text)


def _address(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


STYLE = """\
:root { color-scheme: light dark; --text: #1c1e21; --page: #fff; --soft: #f3f4f6; --line: #d8dbe0; --faint: #5c636e;
  --link: #1f5fa8; --alarm: #a8530b; --alarm-page: #fff5e6; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --page: #16181c; --soft: #22252b; --line: #3a3f48;
  --faint: #a0a7b3; --link: #8ab8f0; --alarm: #f0a860; --alarm-page: #33261a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 66rem; color: var(--text); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .3rem 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.3rem 0 .3rem; }
nav { font-size: .85rem; margin: .8rem 0; }
nav a { display: inline-block; margin-right: .9rem; }
a { color: var(--link); }
code, pre { font: .86em/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--soft);
  border-radius: 4px; }
code { padding: .1em .3em; }
pre { padding: .6rem .8rem; white-space: pre-wrap; overflow-x: auto; margin: .4rem 0; }
pre.table { white-space: pre; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
th:first-child, td:first-child { min-width: 6.5rem; }
.r { text-align: right; font-variant-numeric: tabular-nums; }
td.r { white-space: nowrap; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; margin: .6rem 0; }
figure { margin: 0; flex: 1 1 20rem; min-width: 0; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
figcaption { font-size: .8rem; color: var(--faint); }
ul { padding-left: 1.2rem; margin: .5rem 0; }
.warning { list-style: none; padding: .6rem .9rem; border-left: 4px solid var(--alarm); background: var(--alarm-page);
  border-radius: 4px; }
.warning li + li { margin-top: .5rem; }
.warning li::before { content: "⚠ "; color: var(--alarm); }
@media print { nav { display: none; } }"""


def markdown_page(blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as a Markdown file that lies in `folder`."""
    return "\n\n".join(block.markdown(folder) for block in blocks) + "\n"


def html_page(blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as an HTML file that lies in `folder`, with its pictures in it; the first block is the title."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(name)}">{html.escape(_visible(name))}</a>' for name in sections)
    body = [block.html(folder) for block in blocks]
    body.insert(1, f"<nav>{links}</nav>")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(_visible(title))}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


# ---- Files of a run


@dataclass(frozen=True, eq=False)
class RunFiles:
    """
    What a run's folder says.

    Attributes:
        result: `result.json`.
        history: `log_history` of `trainer_state.json`.
        analyses: Lines of `analysis/numbers.jsonl` by step.
        samples: Lines of `analysis/samples.jsonl`.
        label: The row of a comparison that the run belongs to.
    """

    folder: Path
    result: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    analyses: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    label: str | None = None

    @property
    def method(self) -> str:
        return str(self.result["method"])


def read_run(folder: str | Path) -> RunFiles:
    """
    What the folder of a run says.

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
    result = _json(folder / RESULT_NAME)
    if not isinstance(result, dict) or "method" not in result:
        raise UserError(f"{str(folder / RESULT_NAME)!r} names no method: it isn't what `hf-dskd train` writes")
    state, cell = _json(folder / "trainer_state.json"), _json(folder / "cell.json")
    by_step = {line["step"]: line for line in _lines(folder / "analysis" / "numbers.jsonl")}
    return RunFiles(
        folder,
        result,
        (state or {}).get("log_history", []),
        [by_step[step] for step in sorted(by_step)],
        _lines(folder / "analysis" / "samples.jsonl"),
        (cell or {}).get("label"),
    )


def _json(path: Path) -> Any:
    """Content of a JSON file, or `None` if there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(path)!r} isn't valid JSON ({error}): restore it or run the training again") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; none if there is no file."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n") if path.is_file() else [], start=1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{str(path)!r}, line {number}: not valid JSON ({error}); delete the line") from None
    return found


def runs_in(folders: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """The folders with those of comparisons replaced by their cells: what is finished, and cells that aren't."""
    finished, unfinished = [], []
    for folder in map(Path, folders):
        cells = sorted(path for path in folder.glob("cells/*") if path.is_dir())
        done = [path for path in cells if (path / RESULT_NAME).is_file()]
        if cells and not done:
            raise UserError(f"{str(folder)!r} has no finished run: go on with `hf-dskd compare`")
        finished += done if cells else [folder]
        unfinished += [path for path in cells if path not in done]
    return finished, unfinished


# ---- Warnings


def warnings_of(
    result: Mapping[str, Any], history: Sequence[Mapping[str, Any]], analyses: Sequence[Mapping[str, Any]]
) -> list[str]:
    """
    What the numbers of a run should make its reader doubt; each names the number, the step and what to do.

    Args:
        result (`Mapping[str, Any]`): `result.json`.
        history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        analyses (`Sequence[Mapping[str, Any]]`): Lines of `analysis/numbers.jsonl`, by step.
    """
    return [text for found in _checked(result, history, analyses).values() for text in found]


def _checked(
    result: Mapping[str, Any], history: Sequence[Mapping[str, Any]], analyses: Sequence[Mapping[str, Any]]
) -> dict[str, list[str]]:
    """Warnings by the check that they come from, with an empty list for one that found nothing."""
    settings = settings_of(result)
    checks: dict[str, list[str] | None] = {
        "loss spikes": _spikes(history),
        "divergence of the training": _divergence(history),
        "gain over the student before": _no_gain(result, history),
        "overfitting": _overfitting(result, history),
        "the discriminator": _discriminator(settings, history),
        "the gradient of matching": _matching_gradient(analyses),
        "the correctness mask": _mask(settings, history),
        "the attention": _attention(analyses),
        "examples cut or skipped": _cut(result),
    }
    return {name: found for name, found in checks.items() if found is not None}


def _series(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    from .curves import series

    return list(zip(*series(history, key)))


def _last_quarter(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Those logged in the last quarter of the steps."""
    return [point for point in points if point[0] > 0.75 * points[-1][0]]


def _spikes(history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """
    A logged loss more than 3 times the median of the 5 logs before it and of the 5 after it, and more than 4 mean
    absolute deviations above the median of them all, so that neither a fast start nor losses that always jump count.
    """
    found, known = [], False
    for key in SPIKING:
        points = _series(history, key)
        known |= len(points) > 3
        spikes = []
        for index in range(3, len(points)):
            value = points[index][1]
            before = [value for _, value in points[max(0, index - NEIGHBOURS) : index]]
            after = [value for _, value in points[index + 1 : index + 1 + NEIGHBOURS]]
            usual = statistics.median(before + after)
            deviation = statistics.fmean(abs(value - usual) for value in before + after)
            if usual <= 0 or value <= usual + SPIKE_SPREADS * deviation:
                continue
            if all(value > SPIKE * statistics.median(part) for part in (before, after) if part):
                spikes.append((value / usual, points[index][0], value, usual))
        if spikes:
            times, step, value, usual = max(spikes)
            others = sorted(step_ for _, step_, _, _ in spikes if step_ != step)
            more = f" (also at step {_some(others)})" if others else ""
            found.append(
                f"{key} jumps to {number(value)} at step {step:,}, {times:.1f} times the {number(usual)} around it"
                f"{more}: look at the examples of that step, lower the learning rate or max_grad_norm, or warm up"
                " for longer"
            )
    return found if known else None


def _divergence(history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    points = _series(history, "ce_loss")
    if len(points) < 8:
        return None
    size = len(points) // 4
    parts = [points[start : start + size] for start in range(0, size * 3, size)] + [points[3 * size :]]
    medians = [statistics.median(value for _, value in part) for part in parts]
    best = min(medians)
    if medians[-1] <= DIVERGED * best:
        return []
    when = parts[medians.index(best)]
    return [
        f"the training cross entropy ends at {number(medians[-1])} (median from step {parts[-1][0][0]:,}), after"
        f" {number(best)} around step {when[len(when) // 2][0]:,}: training diverged; lower the learning rate or"
        " kd_rate"
    ]


def _evaluation_keys(history: Sequence[Mapping[str, Any]], suffix: str) -> list[str]:
    return sorted({key for entry in history for key in entry if key.startswith("eval_") and key.endswith(suffix)})


def _before(result: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics before training, where they were taken."""
    entries = [entry for entry in history if entry.get("step") == 0]
    logged = {key: value for entry in entries for key, value in entry.items() if key.startswith("eval_")}
    return {**logged, **result.get("evaluations", {}).get("0", {})}


def _no_gain(result: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    before, after = _before(result, history), result.get("metrics", {})
    keys = [key for key in before if key.endswith("bits_per_byte") and key in after]
    if not keys:
        return None
    return [
        f"{_title(key)} is {after[key]:.4f} after {result.get('steps', 0):,} steps and was {before[key]:.4f} at step"
        " 0: training didn't help; look at the learning rate, the data and whether the prompt style fits the model"
        for key in keys
        if after[key] >= before[key]
    ]


def _overfitting(result: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    keys = _evaluation_keys(history, "bits_per_byte") or _evaluation_keys(history, "eval_loss")
    every = {key: points for key in keys if len(points := _series(history, key)) > 2}
    if not every:
        return None
    # The model that is kept is then one from before it got worse.
    if result.get("best_checkpoint"):
        return []
    found = []
    for key, points in every.items():
        best, step = min((value, step) for step, value in points)
        last_step, last = points[-1]
        if step <= BEST_EARLIER * last_step and last - best > WORSE * abs(best):
            found.append(
                f"{_title(key)} was best at step {step:,} ({best:.4f}) and ends at {last:.4f} at step {last_step:,}:"
                " the student overfits; stop earlier, or set load_best_model_at_end"
            )
    return found


def _discriminator(settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    names = ("discriminator_accuracy_real", "discriminator_accuracy_fake")
    real, fake = (dict(_series(history, name)) for name in names)
    steps = sorted(set(real) & set(fake))
    if not steps:
        return None
    late = [step for step, _ in _last_quarter([(step, 0.0) for step in steps])]
    if all(min(real[step], fake[step]) >= WON for step in late):
        since = next(
            step
            for index, step in enumerate(steps)
            if all(min(real[later], fake[later]) >= WON for later in steps[index:])
        )
        remedies = ["a lower discriminator_learning_rate", "scale_queries", "a higher discriminator_dropout"]
        if settings.get("adversarial_loss", "minimax") == "minimax":
            remedies.insert(0, "adversarial_loss=non_saturating")
        return [
            f"the discriminator tells {_percent(real[steps[-1]])} of the keys and {_percent(fake[steps[-1]])} of the"
            f" queries at step {steps[-1]:,}, and at least {_percent(WON)} of both since step {since:,}: it has won,"
            f" its gradient no longer moves the queries; try {', '.join(remedies)}"
        ]
    balanced = {step: (real[step] + fake[step]) / 2 for step in steps}
    if len(steps) > 2 and max(balanced.values()) <= GUESSING:
        step = max(balanced, key=lambda step: balanced[step])
        remedy = (
            "as_published=True never trains it"
            if settings.get("as_published")
            else "raise discriminator_learning_rate or discriminator_steps"
        )
        return [
            f"the discriminator never does better than guessing (mean accuracy on keys and queries at most"
            f" {_percent(balanced[step])}, at step {step:,}; {_percent(balanced[steps[-1]])} at step {steps[-1]:,}):"
            f" what it teaches the queries is noise; {remedy}"
        ]
    return []


def _matching_gradient(analyses: Sequence[Mapping[str, Any]]) -> list[str] | None:
    measured = {
        step: norms for step, norms in gradient_norms(analyses).items() if "kq" in norms and {*KD_TERMS} & norms.keys()
    }
    if not measured:
        return None
    step, every = list(measured.items())[-1]
    matching, norms = every["kq"], {term: every[term] for term in KD_TERMS if term in every}
    largest = max(norms, key=lambda term: norms[term])
    if matching >= SMALL_GRADIENT * norms[largest]:
        return []
    share = _percent(matching / norms[largest], 2)
    return [
        f"the gradient of key-query matching has {share} of the norm of that of {largest} at step {step:,}"
        f" ({number(matching)} against {number(norms[largest])}): matching hardly changes anything; raise kq_rate, or"
        " leave it out with matching=none"
    ]


def _mask(settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    points = _series(history, "correctness_mask_rate")
    if not points or settings.get("correctness_mask") is False:
        return None
    late = _last_quarter(points)
    rate = statistics.fmean(value for _, value in late)
    if rate >= SMALL_MASK:
        return []
    return [
        f"the correctness mask lets only {_percent(rate)} of the tokens through (mean of the logs"
        f" from step {late[0][0]:,} on): the student-space divergence hardly counts; train for longer, raise"
        " projector_learning_rate, or leave that space out with spaces=teacher"
    ]


def _attention(analyses: Sequence[Mapping[str, Any]]) -> list[str] | None:
    measured = [entry for entry in analyses if "chunk_mass" in entry and "chunk_mass_uniform" in entry]
    if not measured:
        return None
    step, mass, uniform = (measured[-1][name] for name in ("step", "chunk_mass", "chunk_mass_uniform"))
    if mass > UNIFORM * uniform:
        return []
    return [
        f"the attention puts {_percent(mass)} of its mass on the teacher tokens of the same text at step {step:,}, and"
        f" uniform attention would put {_percent(uniform)} there: it aligns nothing; train for longer, raise"
        " projector_learning_rate, or take alignment=chunk_attention"
    ]


def _cut(result: Mapping[str, Any]) -> list[str] | None:
    parts = {name: part for name in ("train", "eval") if (part := (result.get("data") or {}).get(name))}
    if not parts:
        return None
    found = []
    for name, part in parts.items():
        of = "training" if name == "train" else "evaluation"
        cut, kept, rows = part.get("cut", 0), part["kept"], part["rows"]
        if kept and cut > MANY_CUT * kept:
            found.append(
                f"{cut:,} of {kept:,} {of} responses ({_percent(cut / kept)}) were cut to the maximum length, before"
                " step 1: raise max_length, or leave long examples out"
            )
        if rows - kept > MANY_CUT * rows:
            found.append(
                f"{rows - kept:,} of {rows:,} {of} examples ({_percent((rows - kept) / rows)}) were skipped before"
                " step 1: look for empty responses, or raise max_length for long prompts"
            )
    return found


def _some(steps: Sequence[int]) -> str:
    return ", ".join(f"{step:,}" for step in steps[:3]) + (f" and {len(steps) - 3} more" if len(steps) > 3 else "")


# ---- Words and numbers


def number(value: Any) -> str:
    """A number or a setting for people."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if (value.is_integer() and abs(value) < 1e6) or abs(value) >= 1e4:
            return f"{value:,.0f}".replace("-", "−")
        return f"{value:.4g}".replace("-", "−")
    return str(value)


def _setting(value: Any) -> str:
    """A setting as it would be given on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _percent(value: float, decimals: int = 1) -> str:
    return f"{100 * value:.{decimals}f} %"


def _measured(value: float | None) -> str:
    return "–" if value is None else (f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}").replace("-", "−")


def _change(before: float, after: float) -> str:
    change = after - before
    return f"{'+' if change > 0 else ''}{number(change)}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def _short(model: str) -> str:
    """A model's name, without the folders where it lies on a disk."""
    return Path(model).name if Path(model).is_absolute() else model


def _models(run: RunFiles) -> str:
    models = run.result.get("models") or {}
    names = [_short(models[role]) for role in ("student", "teacher") if models.get(role)]
    return " ← ".join(names)


def _parse_measure(key: str) -> tuple[str, str] | None:
    """Name of the evaluation set (`""` for a single one) and of the measure, of a key among the metrics."""
    rest = f"_{key.removeprefix('eval_')}"
    for name in sorted({*MEASURES, *(f"{term}_loss" for term in TERMS)}, key=len, reverse=True):
        if key.startswith("eval_") and rest.endswith(f"_{name}"):
            return (rest.removesuffix(f"_{name}").strip("_"), name) if name in MEASURES else None
    return None


def _title(key: str) -> str:
    parsed = _parse_measure(key)
    if parsed is None:
        return key
    title = MEASURES[parsed[1]][0]
    return f"{title} ({parsed[0]})" if parsed[0] else title


def _better(key: str) -> str | None:
    """Which end of a measure is better."""
    parsed = _parse_measure(key)
    return MEASURES[parsed[1]][1] if parsed else None


def measures_of(*metrics: Mapping[str, Any]) -> list[str]:
    """Keys of the metrics that are a measure, in the order of `MEASURES`."""
    order = list(MEASURES)
    found = {key: parsed for part in metrics for key in part if (parsed := _parse_measure(key))}
    return sorted(found, key=lambda key: (order.index(found[key][1]), found[key][0]))


def settings_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are known of a run: those of distillation, and others that differ from their defaults."""
    changed = {name: value for name, (_, value) in (result.get("changed_settings") or {}).items()}
    return {**result.get("settings", {}), **changed}


def changed_settings(result: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Default and value of the settings that differ from their defaults."""
    if result.get("changed_settings") is not None:
        return {name: (default, value) for name, (default, value) in result["changed_settings"].items()}
    defaults = {setting.name: setting.default for setting in fields(DistillationSettings)}
    return {
        name: (defaults[name], value)
        for name, value in result.get("settings", {}).items()
        if name in defaults and value != defaults[name]
    }


# ---- The report of one run


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
    models = _models(run)
    blocks: list[Block] = [
        Heading(1, f"{run.method}: {models}" if models else run.method),
        *_summary(run),
        *_how(run),
        *_data(run),
        *_settings(run),
        Heading(2, "Curves"),
        *_curves({run.method: run.history}, target / "curves.png"),
        *_gradients(run, target),
        *_alignment(run, target),
        *_scores(run),
        *_examples(run),
        *_files(run),
    ]
    return _write(blocks, target)


def _write(blocks: Sequence[Block], folder: Path) -> Path:
    write_text(folder / "report.md", markdown_page(blocks, folder))
    write_text(folder / "report.html", html_page(blocks, folder))
    return folder / "report.html"


def _summary(run: RunFiles) -> list[Block]:
    result, models = run.result, run.result.get("models") or {}
    method = METHODS.get(run.method)
    parts = [f"{result.get('steps', 0):,} optimizer steps"]
    if result.get("train_runtime") is not None:
        parts.append(f"{_duration(result['train_runtime'])} of training since the start or the last resume")
    if models.get("student_parameters"):
        trained = models.get("trained_parameters") or 0
        of_it = f" ({_millions(trained)} trained{', as an adapter' if models.get('adapter') else ''})"
        parts.append(f"student of {_millions(models['student_parameters'])} parameters{of_it if trained else ''}")
    if models.get("teacher_parameters"):
        parts.append(f"teacher of {_millions(models['teacher_parameters'])}")
    blocks: list[Block] = [Paragraph("; ".join(parts) + (f". Method: {method.summary}." if method else "."))]
    metrics, before = result.get("metrics", {}), _before(run.result, run.history)
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
        better = _better(key)
        points = [point for point in _series(run.history, key) if point[0] > 0]
        if better is not None and len(points) > 1:
            value, step = (min if better == "lower" else max)((value, step) for step, value in points)
            best[key] = f"{_measured(value)} (step {step:,})"
    columns = ["held out", *(["before"] if before else []), "after", *(["change"] if before else [])]
    columns += ["best on the way"] if best else []
    rows: list[list[Text]] = []
    for index, key in enumerate(keys):
        after = _measured(metrics[key])
        row: list[Text] = [_title(key), Span(after, "strong") if index == 0 else after]
        if before:
            row.insert(1, _measured(before.get(key)))
            change = metrics[key] - before[key] if key in before else None
            row.append(f"{'+' if change is not None and change > 0 else ''}{_measured(change)}")
        rows.append([*row, *([best.get(key, "–")] if best else [])])
    return Table(columns, rows)


def _millions(count: float) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _warnings(run: RunFiles) -> list[Block]:
    checked = _checked(run.result, run.history, run.analyses)
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
    rows += [[role, models[role]] for role in ("student", "teacher") if models.get(role)]
    if hardware:
        machine = [*hardware.get("gpus", []), hardware.get("cpu"), f"{number(hardware.get('cores'))} cores"]
        machine += [f"{number(hardware['memory_gb'])} GB of memory"] if hardware.get("memory_gb") else []
        rows.append(["hardware", ", ".join(part for part in machine if part)])
        rows.append(["processes", number(hardware.get("processes"))])
    rows.append(["seeds", ", ".join(f"{name} {_setting(seed)}" for name, seed in seeds.items() if seed is not None)])
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
    return [*blocks, Table(["", *(titles.get(column, column) for column in columns)], rows)] if rows else blocks


def _settings(run: RunFiles) -> list[Block]:
    changed = changed_settings(run.result)
    rows = [[name, _setting(value), _setting(default)] for name, (default, value) in sorted(changed.items())]
    blocks: list[Block] = [Heading(2, "Settings that differ from the defaults")]
    return [*blocks, Table(["setting", "value", "default"], rows, align="l") if rows else Paragraph("None.")]


def _curves(histories: Histories, path: Path) -> list[Block]:
    from .curves import plot_curves

    try:
        plot_curves(histories, path)
    except UserError:  # nothing to draw
        return [Paragraph("Nothing was logged: lower logging_steps.")]
    return [Pictures({"Every loss term and what else was logged, over optimizer steps": path})]


def gradient_norms(analyses: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Norm of each loss term's gradient by step and term."""
    prefix = "gradient_norm_"
    return {
        entry["step"]: norms
        for entry in analyses
        if (norms := {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)})
    }


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
        cells = [f"{number(part[term])} ({_percent(part[term] / total)})" if term in part else "–" for term in terms]
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


def plot_gradient_shares(norms: Mapping[int, Mapping[str, float]], path: str | Path) -> None:
    """
    Writes a PNG: a stacked bar for each step at which the norms were measured.

    Args:
        norms (`Mapping[int, Mapping[str, float]]`): Norm of each term's gradient, by step and term.
        path (`str` or `Path`): File to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .curves import COLOURS

    terms = list(dict.fromkeys(term for part in norms.values() for term in part))
    totals = [sum(part.values()) or math.inf for part in norms.values()]
    width = min(max(3.6, 1.6 + 0.45 * len(norms)), 11.0)
    figure = Figure(figsize=(width + 1.2, 2.8), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bottom = [0.0] * len(norms)
    for index, term in enumerate(terms):
        shares = [part.get(term, 0.0) / total for part, total in zip(norms.values(), totals)]
        colour = COLOURS[index % len(COLOURS)]
        axes.bar(range(len(norms)), shares, bottom=bottom, width=0.8, color=colour, label=term)
        bottom = [low + share for low, share in zip(bottom, shares)]
    every = math.ceil(len(norms) / 12)
    axes.set_xticks(range(0, len(norms), every), [f"{step:,}" for step in list(norms)[::every]])
    axes.set_ylim(0, 1)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_ylabel("share of the gradients' norms", fontsize=8)
    axes.tick_params(labelsize=8)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, reverse=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an analysis that aren't gradients: known ones first."""
    own = {key: value for key, value in entry.items() if key != "step" and not key.startswith("gradient_norm_")}
    order = list(MEANINGS)
    return dict(sorted(own.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _meaning(name: str) -> str:
    """What a number of an analysis means, also one with the prefix of a direction or of a probe."""
    if name in MEANINGS:
        return MEANINGS[name]
    for prefix, words in PROBES.items():
        if name.startswith(prefix) and (meaning := _meaning(name.removeprefix(prefix))):
            return f"{meaning} ({words})"
    return ""


def _alignment(run: RunFiles, folder: Path) -> list[Block]:
    from .curves import plot_analysis

    method = METHODS.get(run.method)
    if method is not None and method.alignment is None:
        return []
    blocks: list[Block] = [Heading(2, "Alignment, before and after")]
    numbers = [(entry["step"], found) for entry in run.analyses if (found := _numbers(entry))]
    if not numbers:
        blocks.append(Paragraph(("No analysis: train with ", Span("--analysis_steps N", "code"), ".")))
    else:
        (first, before), (last, after) = numbers[0], numbers[-1]
        names = list(_numbers({**before, **after}))
        rows = []
        for name in names:
            cells = [number(after.get(name))]
            if first != last:
                both = name in before and name in after
                cells = [number(before.get(name)), *cells, _change(before[name], after[name]) if both else "–"]
            rows.append([name, *cells, _meaning(name)])
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


# ---- The report of several runs


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
            [[name, Span(str(run.folder), "link", run.folder), _models(run)] for name, run in names.items()],
            align="l",
        ),
    ]
    return _write(blocks, target)


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
            title += f" ({', '.join(f'{name}={_setting(own[name])}' for name in differing[:3])})"
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
    from ..compare import spread

    measured = measures_of(*(run.result.get("metrics", {}) for run in names.values()))
    # Methods have losses of their own, which can't be compared.
    keys = [key for key in measured if _better(key) is not None]
    if not keys:
        return [Paragraph("Nothing was evaluated in any of them.")]
    columns: list[list[Text]] = []
    for key in keys:
        better = _better(key)
        values = [[v for run in group.runs if (v := run.result["metrics"].get(key)) is not None] for group in groups]
        means = [round(statistics.fmean(found), 4) if found else math.nan for found in values]
        finite = [mean for mean in means if math.isfinite(mean)]
        best = (min if better == "lower" else max)(finite) if len(finite) > 1 else None
        cells: list[Text] = []
        for mean, found in zip(means, values):
            deviation = spread(found)
            text = _measured(mean if found else None) + ("" if deviation is None else f" ± {_measured(deviation)}")
            cells.append(Span(text, "strong") if found and mean == best else text)
        columns.append(cells)
    counts = [str(len(group.runs)) for group in groups]
    rows = [[group.name, *(column[i] for column in columns), counts[i]] for i, group in enumerate(groups)]
    titles = [_title(key) for key in keys]
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
        [name, *(_measured(run.result.get("metrics", {}).get(key)) for key in keys), number(run.result.get("steps"))]
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
    shown = {name: ["–" if part[name] is None else _setting(part[name]) for part in parts] for name in parts[0]}
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
        blocks += _curves(histories, folder / ("curves.png" if index == 1 else f"curves-{index}.png"))
    return blocks


def drawn_together(groups: Sequence[Group], histories: Histories) -> list[Histories]:
    """Histories of runs by the picture that they go into: where colours are too few for all, the means of groups."""
    from .curves import COLOURS

    most = len(COLOURS)
    if len(histories) > most and len(groups) < len(histories):
        # In the order of the groups, as `run_names` has them.
        runs = iter(histories.values())
        histories = {group.name: mean_history([next(runs) for _ in group.runs]) for group in groups}
    every = list(histories.items())
    return [dict(every[start : start + most]) for start in range(0, len(every), most)]


def mean_history(histories: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One log of the means over several, at the steps and for the names that each of them has."""
    from .curves import series

    names = dict.fromkeys(name for history in histories for entry in history for name in entry if name != "step")
    mean: list[dict[str, Any]] = []
    for name in names:
        points = [dict(zip(*series(history, name))) for history in histories]
        steps = sorted(set.intersection(*(set(part) for part in points)))
        mean += [{"step": step, name: statistics.fmean(part[step] for part in points)} for step in steps]
    return mean


def _alignment_after(groups: Sequence[Group], names: Mapping[str, RunFiles], folder: Path) -> list[Block]:
    from .curves import plot_analysis

    last = {name: run.analyses[-1] for name, run in names.items() if run.analyses}
    if not last:
        return []
    numbers = list(_numbers({key: None for entry in last.values() for key in entry}))
    rows = [[key, *(number(entry.get(key)) for entry in last.values()), _meaning(key)] for key in numbers]
    columns = [f"{name} (step {entry['step']:,})" for name, entry in last.items()]
    blocks: list[Block] = [Heading(2, "Alignment, after training")]
    blocks.append(Table(["number", *columns, "meaning"], rows, align="l" + "r" * len(columns) + "l"))
    every = {name: [{"step": e["step"], **_numbers(e)} for e in run.analyses] for name, run in names.items()}
    pictures = drawn_together(groups, every)
    for index, histories in enumerate(pictures, start=1):
        if any(histories.values()):
            path = folder / ("analysis.png" if index == 1 else f"analysis-{index}.png")
            plot_analysis({name: analyses for name, analyses in histories.items() if analyses}, path)
            blocks.append(Pictures({"Every number of the analyses, over optimizer steps": path}))
    return blocks


# ---- The command


def parse(arguments: Sequence[str]) -> tuple[list[Path], Path | None]:
    """Folders and `--output_dir` of a command line."""
    folders: list[Path] = []
    output_dir: Path | None = None
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--output_dir", "--output-dir"):
            value = value if equals else next(words, "")
            if not value:
                raise UserError("--output_dir has no value: name a folder for the report")
            output_dir = Path(value)
        elif word.startswith("-"):
            raise UserError(f"hf-dskd report has no {word}: it takes folders of runs and --output_dir")
        else:
            folders.append(Path(word))
    if not folders:
        raise UserError("there is nothing to report on: name the --output_dir of a run of `hf-dskd train`")
    twice = [folder for index, folder in enumerate(folders) if folder.resolve() in map(Path.resolve, folders[:index])]
    if twice:
        raise UserError(f"{str(twice[0])!r} is named twice: name it once")
    return folders, output_dir


def main(arguments: Sequence[str]) -> int:
    """`hf-dskd report`: prints the files that it wrote, and returns the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    folders, output_dir = parse(arguments)
    runs, unfinished = runs_in(folders)
    if len(runs) == 1 and not unfinished:
        path = write_report(runs[0], output_dir)
    else:
        if output_dir is None and len(folders) > 1:
            raise UserError("--output_dir is not set: name a folder for the report on several runs")
        path = compare_runs(folders, output_dir or folders[0] / "report")
    print(path.with_name("report.md"))
    print(path)
    return 0
