"""
Which tokens a dual-space method puts beside which: cross-model attention, or another alignment.

A position of the attention is one that *predicts* a token: row i of the student is the position whose target is token
i of the response, and its query is made of the embeddings of that target and of the token before it. Rows and columns
are labelled with the target, so that equal text lies on the diagonal. n_s and n_t are the response tokens of student
and teacher, end-of-sequence token included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..alignment.spans import answer_spans, chunk_ids, silent_mask
from ..alignment.weights import chunk_mask
from ..errors import UserError
from ..utils.figures import COLORS, FONT, drawable, new_figure, save_figure


if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from ..training.distiller import Distiller

MOST_TOKENS = 60
MOST_ON_SHEET = 24
NOTE = "Rows and columns bear the token that the position predicts: equal text lies on the diagonal."
_WHITESPACE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "\\r"})
_DPI = 110
# Sizes in points and inches.
_FONT_SIZE = 8.0
_CHARACTER = 0.6 * _FONT_SIZE / 72
_LONGEST_LABEL = 18
_WIDEST = 15.0
_SHEET_COLUMNS = 6
_SHEET_DPI = 140  # 120 tokens of a panel get two pixels each
_MOST_TOKENS_ON_SHEET = 120
_LONGEST_CAPTION = 36


@dataclass(frozen=True, eq=False)
class AlignmentExample:
    """
    The two attentions of one response, on the CPU in float32.

    Attributes:
        student_tokens (`tuple[str, ...]` of length n_s), teacher_tokens (`tuple[str, ...]` of length n_t):
            Text of the target of each position, with whitespace made visible (`·`, `↵`, `⇥`).
        student_byte_ends, teacher_byte_ends (`tuple[int, ...]`):
            Byte of the response at which the token ends; it begins where the one before it ends.
        has_eos (`bool`): Whether the last token on both sides is the end-of-sequence token (else the text was cut).
        t2s (`torch.Tensor` of shape `[n_s, n_t]`): Of student positions over teacher positions; rows sum to 1.
        s2t (`torch.Tensor` of shape `[n_t, n_s]`): Of teacher positions over student positions; rows sum to 1.
        caption (`str`, *optional*): Stands above the picture.
        student_chunks, teacher_chunks (`tuple[int, ...]`, *optional*):
            Chunk of each token (see [`~hf_dskd.alignment.spans.chunk_ids`]).
        student_closes, teacher_closes (`tuple[int, ...]`, *optional*):
            The answer that each token closes, -1 for a token of its text or before it.
    """

    student_tokens: tuple[str, ...]
    teacher_tokens: tuple[str, ...]
    student_byte_ends: tuple[int, ...]
    teacher_byte_ends: tuple[int, ...]
    has_eos: bool
    t2s: Tensor
    s2t: Tensor
    caption: str = ""
    student_chunks: tuple[int, ...] | None = None
    teacher_chunks: tuple[int, ...] | None = None
    student_closes: tuple[int, ...] | None = None
    teacher_closes: tuple[int, ...] | None = None


def cross_attention(distiller: Distiller, row: Mapping[str, Any], caption: str = "") -> AlignmentExample:
    """
    Computes the alignment of one tokenized row, in the present state and precision of a run.

    Queries and keys are made of embeddings only, so neither model is run. With `as_published` the attention depends
    on the other examples of the batch; here the row is alone.

    Args:
        distiller ([`~hf_dskd.training.distiller.Distiller`]): With a teacher, such as `trainer.distiller`.
        row (`Mapping[str, Any]`): As of [`~hf_dskd.data.tokenization.tokenize_dataset`], such as
            `trainer.eval_dataset[0]`.

    Raises:
        UserError: If the method has no alignment, or the row isn't tokenized for both models.
    """
    method = distiller.config.method_row
    if not method.has_alignment:
        raise UserError(
            f"method={distiller.config.method!r} has no alignment to show: use one in hidden spaces, such as dskd_cma,"
            " or alm"
        )
    needed = ("input_ids", "prompt_length", "byte_ends")
    columns = [*needed, *(f"teacher_{name}" for name in needed), "response_bytes", "cut"]
    missing = [name for name in columns if name not in row]
    if missing:
        raise UserError(f"the row has no column {missing[0]!r}: pass a tokenized one, such as trainer.eval_dataset[0]")

    with torch.no_grad(), distiller.autocast():
        student, teacher = distiller.embedded(distiller.batch([row]))
        aligned = distiller.align(student, teacher)
    # As published every position of the padded sequence has a row.
    rows, others = student.mask[0], teacher.mask[0]

    tokenizers = distiller.pair.tokenizers
    data = _response_bytes(row, *tokenizers)
    sides: dict[str, Any] = {}
    for side, prefix, tokenizer in zip(("student", "teacher"), ("", "teacher_"), tokenizers):
        chunks = row.get(f"{prefix}chunk_ids")
        sides[f"{side}_tokens"] = tuple(_token_texts(row, prefix, tokenizer, data))
        sides[f"{side}_byte_ends"] = tuple(map(int, row[f"{prefix}byte_ends"]))
        sides[f"{side}_chunks"] = None if chunks is None else tuple(map(int, chunks))
        sides[f"{side}_closes"] = _closes(row, prefix)
    t2s = aligned.t2s[0][rows][:, others].float().cpu()
    s2t = aligned.s2t[0][others][:, rows].float().cpu()
    return AlignmentExample(has_eos=not row["cut"], t2s=t2s, s2t=s2t, caption=caption, **sides)


def same_text(example: AlignmentExample) -> Tensor:
    """
    Which tokens share text: at least one byte of the response, or both close the same answer.

    Returns:
        `torch.Tensor` of shape `[n_s, n_t]`, bool. All false for the rare token without text that is no EOS.
    """
    student_ends = torch.tensor(example.student_byte_ends)
    teacher_ends = torch.tensor(example.teacher_byte_ends)
    student_starts, teacher_starts = student_ends.roll(1), teacher_ends.roll(1)
    student_starts[0] = teacher_starts[0] = 0
    first = torch.maximum(student_starts[:, None], teacher_starts[None])
    last = torch.minimum(student_ends[:, None], teacher_ends[None])
    shared = first < last
    if example.student_closes is not None and example.teacher_closes is not None:
        shared |= chunk_mask(torch.tensor([example.student_closes]), torch.tensor([example.teacher_closes]))[0]
    elif example.has_eos:
        shared[-1, -1] = True
    return shared


def chunks_of(example: AlignmentExample) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunk of each token of the student and of the teacher, worked out from the byte ends if not given."""
    if example.student_chunks is not None and example.teacher_chunks is not None:
        return example.student_chunks, example.teacher_chunks
    ends = list(example.student_byte_ends), list(example.teacher_byte_ends)
    student, teacher = chunk_ids(*ends, example.has_eos, example.has_eos)
    return tuple(student), tuple(teacher)


def same_chunk(example: AlignmentExample) -> Tensor:
    """Which tokens belong to the same chunk, bool `[n_s, n_t]`."""
    student, teacher = (torch.tensor([chunks]) for chunks in chunks_of(example))
    return chunk_mask(student, teacher)[0]


def shares(example: AlignmentExample) -> dict[str, float]:
    """
    Shares of each student token's attention (`t2s`), averaged over tokens.

    Returns:
        `dict[str, float]`: `on_text`, on the teacher tokens of the same text, which is 1 for a perfect alignment
        (student tokens without text, for which there is no right answer, don't count); `in_chunk`, on those of its
        chunk; `uniform_on_text` and `uniform_in_chunk`, the same if it attended to all teacher tokens alike.
    """
    shared, chunk = same_text(example), same_chunk(example)
    with_text = shared.any(1)
    return {
        "on_text": float((example.t2s * shared).sum(1)[with_text].mean()),
        "uniform_on_text": float(shared.float().mean(1)[with_text].mean()),
        "in_chunk": float((example.t2s * chunk).sum(1).mean()),
        "uniform_in_chunk": float(chunk.float().mean()),
    }


def check_given(examples: Sequence[AlignmentExample], function: str) -> None:
    """Raises a [`UserError`] if there is nothing to draw."""
    if not examples:
        raise UserError(f"{function} got no examples: pass at least one from cross_attention")


def plot_attention(examples: Sequence[AlignmentExample], path: str | Path, title: str | None = None) -> None:
    """
    Writes a PNG of `t2s`: student tokens from top to bottom, teacher tokens from left to right.

    Each example is a panel, such as the same row before and after training; all share one scale. Cells of tokens with
    the same text are outlined in orange, those of the same chunk in grey (a chunk of more than one token on both sides
    has cells that share no text), and thin lines go through where a chunk ends. At most the first 60 tokens of a side
    are shown; the shares in the caption are those of the whole response. The folder of the file is made if need be.

    Raises:
        UserError: If `examples` is empty.
    """
    from matplotlib.colors import Normalize

    check_given(examples, "plot_attention")
    panels = [_Panel.of(example) for example in examples]
    longest = max(max(panel.weights.shape) for panel in panels)
    # Few tokens fill a picture of ordinary size, many keep legible labels.
    cell = min(max(4.5 / longest, 0.18), 0.45)
    text_width = 1.2 * _CHARACTER * max(len(line) for panel in panels for line in panel.heading)
    left = 0.4 + _CHARACTER * max(len(label) for panel in panels for label in panel.student_labels)
    below = 0.45 + _CHARACTER * max(len(label) for panel in panels for label in panel.teacher_labels)
    above = 0.2 + 0.18 * max(len(panel.heading) for panel in panels)
    slot_width = left + max(cell * max(panel.weights.shape[1] for panel in panels), text_width)
    columns = min(len(panels), max(int(_WIDEST // slot_width), 1))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    row_heights = [above + cell * max(panel.weights.shape[0] for panel in row) + below for row in rows]

    figure = new_figure(slot_width * columns + 0.9, sum(row_heights), _DPI, layout=None)
    scale = Normalize(0, max(float(panel.weights.max()) for panel in panels))
    for index, panel in enumerate(panels):
        x, y = slot_width * (index % columns) + left, sum(row_heights[: index // columns]) + above
        height, width = (cell * count for count in panel.weights.shape)
        _draw_panel(_axes(figure, x, y, width, height), panel, scale)
    # Beside the row's last panel, so that it stands for all of them.
    x = slot_width * (columns - 1) + left + cell * panels[columns - 1].weights.shape[1] + 0.15
    _draw_bar(figure, scale, x, above, cell * len(panels[0].weights))
    _save(figure, path, title)


def contact_sheet(examples: Sequence[AlignmentExample], path: str | Path, title: str | None = None) -> None:
    """
    Writes a PNG of many examples' `t2s`, small and without the tokens' text; all share one scale.

    Cells of tokens with the same text are outlined. At most 24 examples and the first 120 tokens of a side are shown;
    the shares in the captions are those of the whole response. Arguments and errors are those of [`plot_attention`].
    """
    from matplotlib.colors import Normalize

    check_given(examples, "contact_sheet")
    shown = examples[:MOST_ON_SHEET]
    columns = min(len(shown), _SHEET_COLUMNS)
    rows = math.ceil(len(shown) / columns)
    side, between, above = 2.1, 0.25, 0.55
    figure = new_figure((side + between) * columns + 0.8, (side + above + between) * rows, _SHEET_DPI, layout=None)
    panels = [example.t2s[:_MOST_TOKENS_ON_SHEET, :_MOST_TOKENS_ON_SHEET].numpy() for example in shown]
    scale = Normalize(0, max(float(weights.max()) for weights in panels))
    for index, (example, weights) in enumerate(zip(shown, panels)):
        cell = side / max(weights.shape)
        x, y = 0.1 + (side + between) * (index % columns), (side + above + between) * (index // columns) + above
        height, width = (cell * count for count in weights.shape)
        _draw_small(_axes(figure, x, y, width, height), example, weights, scale, cell)
    _draw_bar(figure, scale, 0.1 + (side + between) * columns, above, side)
    if len(examples) > len(shown):
        title = f"{title or 'examples'} (the first {len(shown)} of {len(examples)})"
    _save(figure, path, title)


class _Panel(NamedTuple):
    """An example as it is drawn, the part of it that is shown."""

    example: AlignmentExample
    weights: np.ndarray
    student_labels: list[str]
    teacher_labels: list[str]
    heading: list[str]

    @classmethod
    def of(cls, example: AlignmentExample) -> _Panel:
        found, counts = shares(example), example.t2s.shape
        heading = [drawable(example.caption)] if example.caption else []
        for what, name in (("on the same text (orange)", "on_text"), ("in the same chunk (grey)", "in_chunk")):
            heading.append(f"{what}: {found[name]:.1%}, if uniform {found[f'uniform_{name}']:.1%}")
        if max(counts) > MOST_TOKENS:
            shown = [f"{min(count, MOST_TOKENS)} of {count}" for count in counts]
            heading.append(f"the first {shown[0]} student and {shown[1]} teacher tokens")
        students, teachers = (
            [_shortened(drawable(token), _LONGEST_LABEL) for token in tokens[:MOST_TOKENS]]
            for tokens in (example.student_tokens, example.teacher_tokens)
        )
        return cls(example, example.t2s[:MOST_TOKENS, :MOST_TOKENS].numpy(), students, teachers, heading)


def _axes(figure: Any, x: float, y: float, width: float, height: float) -> Any:
    """Adds axes; all is in inches, from the figure's left and upper edge."""
    whole_width, whole_height = figure.get_size_inches()
    place = (x / whole_width, 1 - (y + height) / whole_height, width / whole_width, height / whole_height)
    return figure.add_axes(place)


def _draw_bar(figure: Any, scale: Any, x: float, y: float, height: float) -> None:
    """The legend of the colours; in inches from the figure's left and upper edge."""
    from matplotlib.cm import ScalarMappable

    bar = _axes(figure, x, y, 0.14, min(height, 4.0))
    figure.colorbar(ScalarMappable(scale, "Blues"), cax=bar)
    bar.tick_params(labelsize=_FONT_SIZE)
    bar.set_ylabel("attention (rows sum to 1)", fontsize=_FONT_SIZE)


def _save(figure: Any, path: str | Path, title: str | None) -> None:
    width, height = figure.get_size_inches()
    # Above the panels, which begin at the figure's upper edge.
    figure.text(0.1 / width, 1 + 0.1 / height, NOTE, fontsize=_FONT_SIZE, color="#555555")
    if title:
        figure.text(0.1 / width, 1 + 0.32 / height, drawable(title), fontsize=12, fontweight="bold", parse_math=False)
    # Cropped to what is drawn: how wide text gets is known only then.
    save_figure(figure, path, bbox_inches="tight", pad_inches=0.12)


def _draw_small(axes: Any, example: AlignmentExample, weights: np.ndarray, scale: Any, cell: float) -> None:
    """A panel of the contact sheet; `cell` is the side of a cell in inches."""
    from matplotlib.collections import LineCollection

    rows, columns = weights.shape
    axes.imshow(
        weights, norm=scale, cmap="Blues", interpolation="nearest", aspect="auto", extent=(0, columns, rows, 0)
    )
    shared = same_text(example)[:rows, :columns].numpy()
    axes.add_collection(LineCollection(_outline(shared), colors=COLORS[1], linewidths=min(72 * cell / 8, 0.9)))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#999999")
    counts = example.t2s.shape
    heading = [_shortened(drawable(example.caption), _LONGEST_CAPTION)] if example.caption else []
    cut = f", the first {_MOST_TOKENS_ON_SHEET} shown" if max(counts) > _MOST_TOKENS_ON_SHEET else ""
    heading.append(f"{counts[0]} × {counts[1]} tokens{cut}")
    found = shares(example)
    heading.append(f"same text {found['on_text']:.1%}, chunk {found['in_chunk']:.1%}")
    axes.set_title("\n".join(heading), fontsize=7, loc="left", pad=3, parse_math=False)


def _draw_panel(axes: Any, panel: _Panel, scale: Any) -> None:
    from matplotlib.collections import LineCollection

    axes.pcolormesh(panel.weights, norm=scale, cmap="Blues", edgecolors="#ececec", linewidth=0.4)
    rows, columns = panel.weights.shape
    row_ends, column_ends = map(_chunk_ends, chunks_of(panel.example))
    in_chunk, shared = (
        _outline(pairs(panel.example)[:MOST_TOKENS, :MOST_TOKENS].numpy()) for pairs in (same_chunk, same_text)
    )
    chunk_lines = [((0, y), (columns, y)) for y in row_ends] + [((x, 0), (x, rows)) for x in column_ends]
    for lines, color, width in ((chunk_lines, "#c2c2c2", 0.4), (in_chunk, "#7d7d7d", 0.9), (shared, COLORS[1], 0.9)):
        axes.add_collection(LineCollection(lines, colors=color, linewidths=width))
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in range(rows)], [""] * rows)
    axes.set_xticks([column + 0.5 for column in range(columns)], [""] * columns)
    axes.tick_params(length=2)
    # Not as tick labels: those are centred on their ink, which makes "_" and "." look like "-" and "·".
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "baseline", "rotation_mode": "anchor"}
    style |= {"fontsize": _FONT_SIZE, "family": FONT, "parse_math": False, "annotation_clip": False}
    gap, half = 5, 0.33 * _FONT_SIZE
    for row, label in enumerate(panel.student_labels):
        axes.annotate(label, (0, row + 0.5), (-gap, -half), xycoords=axes.get_yaxis_transform(), **style)
    for column, label in enumerate(panel.teacher_labels):
        axes.annotate(
            label, (column + 0.5, 0), (half, -gap), xycoords=axes.get_xaxis_transform(), rotation=90, **style
        )
    named = ((axes.set_ylabel, "student", panel.student_labels), (axes.set_xlabel, "teacher", panel.teacher_labels))
    for set_name, name, labels in named:
        set_name(name, fontsize=_FONT_SIZE + 1, labelpad=72 * _CHARACTER * max(map(len, labels)) + gap)
    for spine in axes.spines.values():
        spine.set_color("#999999")
    axes.set_title("\n".join(panel.heading), fontsize=_FONT_SIZE + 1, loc="left", pad=9, parse_math=False)


def _chunk_ends(chunks: Sequence[int]) -> list[int]:
    """How many tokens lie before each end of a chunk that isn't the last one shown."""
    return [index + 1 for index, pair in enumerate(pairwise(chunks[:MOST_TOKENS])) if pair[0] != pair[1]]


def _outline(cells: np.ndarray) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Line segments `((x, y), (x, y))` around the true cells of `[rows, columns]`, none between two of them."""
    import numpy as np

    across = np.pad(cells, ((0, 0), (1, 1)))
    down = np.pad(cells, ((1, 1), (0, 0)))
    upright = [((x, y), (x, y + 1)) for y, x in np.argwhere(across[:, 1:] != across[:, :-1]).tolist()]
    level = [((x, y), (x + 1, y)) for y, x in np.argwhere(down[1:] != down[:-1]).tolist()]
    return upright + level


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _closes(row: Mapping[str, Any], prefix: str) -> tuple[int, ...]:
    """The answer that each response token closes, -1 for a token of its text or before it."""
    lengths = [stop - start for start, stop in answer_spans(row, prefix)]
    silent, closes = silent_mask(row[f"{prefix}byte_ends"], lengths), list[int]()
    for number, length in enumerate(lengths):
        part = silent[len(closes) : len(closes) + length]
        text = part.index(False)
        closes += [number if quiet and place > text else -1 for place, quiet in enumerate(part)]
    return tuple(closes)


def _response_bytes(row: Mapping[str, Any], *tokenizers: PreTrainedTokenizerBase) -> bytes | None:
    """The response's UTF-8 bytes, decoded by the first tokenizer that gives back as many as the row states."""
    for prefix, tokenizer in zip(("", "teacher_"), tokenizers):
        silent = silent_mask(row[f"{prefix}byte_ends"], [stop - start for start, stop in answer_spans(row, prefix)])
        ids = [token for token, quiet in zip(_response_ids(row, prefix), silent) if not quiet]
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        # Tokenizers of the Llama 2 kind drop a space at the beginning.
        for data in (text.encode(), b" " + text.encode()):
            if len(data) == row["response_bytes"]:
                return data
    return None


def _token_texts(
    row: Mapping[str, Any], prefix: str, tokenizer: PreTrainedTokenizerBase, data: bytes | None
) -> list[str]:
    """Each response token's text with visible whitespace; bytes that are only part of a character as `\\xe6`."""
    texts = []
    start = 0
    for token, end in zip(_response_ids(row, prefix), row[f"{prefix}byte_ends"]):
        if end == start:
            text = str(tokenizer.convert_ids_to_tokens(token))
        elif data is not None:
            text = data[start:end].decode("utf-8", "backslashreplace")
        else:
            text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        texts.append(text.translate(_WHITESPACE))
        start = end
    return texts


def _response_ids(row: Mapping[str, Any], prefix: str) -> list[int]:
    return [int(token) for start, stop in answer_spans(row, prefix) for token in row[f"{prefix}input_ids"][start:stop]]
