"""
The analyses of a run, on disk.

    OUTPUT_DIR/analysis/
      numbers.jsonl       one JSON object an analysis: {"step": N, "chunk_mass": …, "gradient_norm_ce": …}
      projection.png      queries and keys at the first and the last of them that has pictures
      step-N/             before and after training
        contact_sheet.png   the attention on all examples
        alignment-K.png     on one of them, with its tokens
        alignment.html      the same to point at, token by token
        vectors.safetensors queries and keys, in half precision
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..losses.objective import Step
from .heatmap import contact_sheet, plot_attention
from .pages import write_page
from .probe import Analysis, analyse
from .projection import plot_projection


if TYPE_CHECKING:
    from ..training.distiller import Distiller

NUMBERS_NAME = "numbers.jsonl"
VECTORS_NAME = "vectors.safetensors"
# Of the examples, so many in one batch for the gradients.
GRADIENT_EXAMPLES = 4


def probe_rows(dataset: Any, count: int) -> list[dict[str, Any]]:
    """`count` rows of a tokenized dataset at even distances; the first ones of a dataset without a length."""
    if not hasattr(dataset, "__len__"):
        return [dict(row) for row in dataset.take(count)]
    count = min(count, len(dataset))
    return [dict(dataset[index * len(dataset) // count]) for index in range(count)]


def record(
    distiller: Distiller,
    rows: Sequence[dict[str, Any]],
    folder: str | Path,
    pictures: bool,
    step: int = 0,
    progress: float = 0.0,
) -> dict[str, float]:
    """
    Analyses a run in its present state and writes the numbers to `folder`, with `pictures` also those.

    What the folder, `analysis` in that of the run, has of this step is replaced. `progress` is the step as a share of
    all, for scheduled temperatures. Other arguments and the numbers are those of [`~hf_dskd.analysis.probe.analyse`]
    and [`gradient_norms`].
    """
    folder = Path(folder)
    numbers: dict[str, float] = {}
    if distiller.config.method_row.has_alignment:
        analysis = analyse(distiller, rows, step=step)
        numbers |= analysis.numbers
        if pictures:
            draw(analysis, folder / f"step-{step}")
            draw_projections(folder)
    numbers |= gradient_norms(distiller, rows[:GRADIENT_EXAMPLES], progress)
    entries = [entry for entry in read_numbers(folder) if entry["step"] != step]
    _write_numbers(folder, [*entries, {"step": step, **numbers}])
    return numbers


def read_numbers(folder: str | Path) -> list[dict[str, Any]]:
    """The analyses so far, by step."""
    path = Path(folder) / NUMBERS_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return sorted((json.loads(line) for line in lines), key=lambda entry: int(entry["step"]))


def forget(folder: str | Path, after: int) -> None:
    """Drops the analyses after a step, which a run that starts or goes on there makes anew."""
    entries = read_numbers(folder)
    kept = [entry for entry in entries if entry["step"] <= after]
    if len(kept) < len(entries):
        _write_numbers(Path(folder), kept)


def _write_numbers(folder: Path, entries: list[dict[str, Any]]) -> None:
    from ..utils.files import write_text

    ordered = sorted(entries, key=lambda entry: int(entry["step"]))
    write_text(folder / NUMBERS_NAME, "".join(json.dumps(entry) + "\n" for entry in ordered))


def gradient_norms(distiller: Distiller, rows: Sequence[Mapping[str, Any]], progress: float = 0.0) -> dict[str, float]:
    """
    Measures how strongly each term of the loss, with its weight, pulls at what the student's optimizer trains.

    Computed on all `rows` as one batch, in evaluation mode; leaves the run as it is. `progress` is how much of the
    training is done, 0 to 1.

    Returns:
        `dict[str, float]`: `gradient_norm_{term}`, the L2 norm of the term's gradient in the student's trained weights
        and the projectors.
    """
    names, parameters, norms = list(distiller.weights()), distiller.trained(), {}
    with distiller.unchanged(), torch.enable_grad():
        views = distiller.views(distiller.student, distiller.batch(rows))
        if views.added is not None:
            names.append("aux")
        for name in names:
            with distiller.autocast():
                terms = distiller.terms(views, Step(progress, only=name))
            teacher_tokens = terms.student_tokens if terms.teacher_tokens is None else terms.teacher_tokens
            counts = (terms.student_tokens, teacher_tokens)
            loss = distiller.loss(terms, *(count.sum().clamp_min(1) for count in counts))
            found = [
                gradient.double().square().sum()
                for gradient in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                if gradient is not None
            ]
            norms[f"gradient_norm_{name}"] = float(torch.stack(found).sum().sqrt()) if found else 0.0
    return norms


def draw(analysis: Analysis, folder: str | Path) -> None:
    """The pictures of one analysis, and its queries and keys for [`draw_projections`]."""
    from safetensors.torch import save_file

    folder = Path(folder)
    title = f"step {analysis.step:,}"
    contact_sheet(analysis.examples, folder / "contact_sheet.png", title)
    for index, example in enumerate(analysis.examples):
        plot_attention([example], folder / f"alignment-{index}.png", title)
    write_page(analysis.examples, folder / "alignment.html", f"Alignment, {title}")
    if analysis.queries is not None and analysis.keys is not None:
        save_file({"queries": analysis.queries.half(), "keys": analysis.keys.half()}, folder / VECTORS_NAME)


def draw_projections(folder: str | Path) -> None:
    """Queries and keys of the first and the last analysis with pictures, on the same two principal axes."""
    from safetensors.torch import load_file

    from .distributions import pca

    folder = Path(folder)
    found = {
        int(path.parent.name.removeprefix("step-")): path
        for path in folder.glob(f"step-*/{VECTORS_NAME}")
        if path.parent.name.removeprefix("step-").isdecimal()
    }
    if not found:
        return
    steps = list(dict.fromkeys((min(found), max(found))))
    vectors = [load_file(found[step]) for step in steps]
    sides = [torch.cat([moment[name].float() for moment in vectors]) for name in ("queries", "keys")]
    *points, explained = pca(*sides)
    parts = [side.split([len(moment[name]) for moment in vectors]) for side, name in zip(points, ("queries", "keys"))]
    panels = {f"step {step:,}": (queries, keys) for step, queries, keys in zip(steps, *parts)}
    plot_projection(panels, folder / "projection.png", explained)
