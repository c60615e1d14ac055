"""The attention that is shown is the one of training; labels and numbers say what they claim."""

import dataclasses
from itertools import pairwise

import pytest
import runs
import tiny
import torch
from datasets import Dataset
from drawing import plot, size
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex

from hf_dskd import UserError
from hf_dskd.alignment import weights
from hf_dskd.alignment.cross_model import cross_model_attention
from hf_dskd.analysis.heatmap import (
    MOST_ON_SHEET,
    NOTE,
    AlignmentExample,
    chunks_of,
    contact_sheet,
    cross_attention,
    drawable,
    plot_attention,
    same_chunk,
    same_text,
    shares,
)
from hf_dskd.losses.dual_space import queries_and_keys


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    run = runs.trainer(tmp_path_factory.mktemp("run"), rows=8)
    # Scores far from 0, so that a wrong row or scale shows.
    with torch.no_grad():
        run.projectors.query.weight.mul_(100)
    return run


def example(t2s, student_ends, teacher_ends, has_eos=True, **fields):
    t2s = torch.tensor(t2s) if isinstance(t2s, list) else t2s
    names = {
        "student_tokens": tuple(f"s{i}" for i in range(len(student_ends))),
        "teacher_tokens": tuple(f"t{i}" for i in range(len(teacher_ends))),
    }
    fields = {**names, "student_byte_ends": student_ends, "teacher_byte_ends": teacher_ends, **fields}
    return AlignmentExample(has_eos=has_eos, t2s=t2s, s2t=torch.softmax(t2s.T, -1), **fields)


def diagonal(count, **fields):
    ends = (*range(1, count), count - 1)
    return example(torch.eye(count), ends, ends, **fields)


# ---- The attention


@pytest.mark.parametrize(
    "settings",
    [{"scale_queries": True}, {"bf16": True}, {"method": "dskd_cla"}, {"as_published": True, "max_length": 200}],
    ids=str,
)
def test_is_the_attention_of_training(tmp_path, monkeypatch, settings):
    run = runs.trainer(tmp_path, rows=4, **settings)
    seen = []

    def recorded(*args):
        seen.append((args[2], args[3], cross_model_attention(*args)))
        return seen[-1][2]

    monkeypatch.setattr(weights, "cross_model_attention", recorded)
    for index in range(4):
        row = run.train_dataset[index]
        run.model.train()
        seen.clear()
        run.compute_loss(run.model, run._prepare_inputs(run.data_collator([row])))
        [(student_mask, teacher_mask, (t2s, s2t))] = seen
        shown = cross_attention(run.distiller, row)
        rows, columns = student_mask[0], teacher_mask[0]
        assert torch.equal(shown.t2s, t2s[0][rows][:, columns].detach().float())
        assert torch.equal(shown.s2t, s2t[0][columns][:, rows].detach().float())
        assert shown.t2s.shape == (len(row["byte_ends"]), len(row["teacher_byte_ends"]))
        assert run.model.training and not shown.t2s.requires_grad


def test_neighbours_in_the_batch_change_nothing(trainer):
    """With the models run, in a padded batch of several rows."""
    batch = runs.first_batch(trainer, 4)
    with torch.no_grad():
        views = trainer.distiller.views(trainer.model, batch)
        queries, keys = queries_and_keys(views.student, views.teacher, trainer.projectors)
        t2s, s2t = cross_model_attention(queries, keys, views.student.mask, views.teacher.mask)
    for index in range(4):
        shown = cross_attention(trainer.distiller, trainer.train_dataset[index])
        rows, columns = shown.t2s.shape
        torch.testing.assert_close(shown.t2s, t2s[index, :rows, :columns], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shown.s2t, s2t[index, :columns, :rows], atol=1e-5, rtol=1e-4)
        # Not uniform, or the comparison would say little.
        assert shown.t2s.max() > 3 / columns


# ---- Labels


def visible(text):
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


TEXTS = ["def add(a, b):\n\treturn a + b\n", " a space begins it", "  two", "\nThe cat sat", "plain $x$ text", "é東"]


def test_labels_spell_the_response(tmp_path):
    data = Dataset.from_list([{"prompt": "Q: ", "completion": text} for text in TEXTS])
    run = runs.trainer(tmp_path, train_dataset=data)
    for row, text in zip(run.train_dataset, TEXTS):
        shown = cross_attention(run.distiller, row)
        assert shown.has_eos
        for tokens, ends, end_of_sequence in (
            (shown.student_tokens, shown.student_byte_ends, "<|endoftext|>"),
            (shown.teacher_tokens, shown.teacher_byte_ends, "</s>"),
        ):
            # Parts of a character are bytes.
            pieces = [text.encode()[a:b].decode("utf-8", "backslashreplace") for a, b in pairwise((0, *ends[:-1]))]
            assert tokens == (*map(visible, pieces), end_of_sequence)
    assert shown.teacher_tokens == ("\\xc3", "\\xa9", "\\xe6", "\\x9d", "\\xb1", "</s>")


def test_space_that_decoding_drops(tmp_path):
    """Tokenizers of the Llama 2 kind decode " two" to "two"; here no other kind knows better."""
    data = Dataset.from_list([{"prompt": "Q: ", "completion": text} for text in TEXTS[:-1]])
    tokenizer = tiny.sentencepiece_tokenizer()
    student = tiny.llama(len(tokenizer))
    run = runs.trainer(tmp_path, student=student, processing_class=tokenizer, train_dataset=data)
    for row, text in zip(run.train_dataset, TEXTS):
        shown = cross_attention(run.distiller, row)
        assert "".join(shown.student_tokens) == "".join(shown.teacher_tokens) == visible(text) + "</s>"


def test_cut_response_has_no_eos(tmp_path):
    data = Dataset.from_list([{"prompt": "Q: ", "completion": "The cat sat on the mat and looked at the moon. " * 9}])
    run = runs.trainer(tmp_path, train_dataset=data, max_length=30)
    row = run.train_dataset[0]
    shown = cross_attention(run.distiller, row)
    assert row["cut"] and not shown.has_eos
    assert shown.student_tokens[-1] != "<|endoftext|>"
    assert "".join(shown.student_tokens) == "".join(shown.teacher_tokens)


def test_labels_without_the_text(trainer):
    """Where neither tokenizer gives the text back, each token is decoded alone."""
    row = {**trainer.train_dataset[1], "response_bytes": 10**6}
    shown = cross_attention(trainer.distiller, row)
    ids = row["input_ids"][row["prompt_length"] :]
    decode = trainer.processing_class.decode
    assert shown.student_tokens == tuple(visible(decode([token])) for token in ids)


# ---- Numbers


def test_same_text_by_hand():
    # student: "The" "·cat" EOS; teacher: "Th" "e·c" "at" EOS
    expected = [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert same_text(example(torch.zeros(3, 4), (3, 7, 7), (2, 5, 7, 7))).int().tolist() == expected
    cut = same_text(example(torch.zeros(2, 3), (3, 7), (2, 5, 7), has_eos=False))
    assert cut.int().tolist() == [row[:3] for row in expected[:2]]
    assert not same_text(example(torch.zeros(2, 2), (1, 1), (1, 1), has_eos=False))[1, 1]


def test_shares_by_hand():
    found = shares(diagonal(7))
    assert found["on_text"] == found["in_chunk"] == 1.0
    assert shares(dataclasses.replace(diagonal(4), t2s=torch.eye(4).roll(1, 1)))["on_text"] == 0.0
    mixed = example([[0.1, 0.2, 0.3, 0.4], [0.25, 0.5, 0.125, 0.125], [0.0, 0.0, 0.0, 1.0]], (3, 7, 7), (2, 5, 7, 7))
    assert shares(mixed)["on_text"] == pytest.approx((0.3 + 0.625 + 1.0) / 3)
    # Five of twelve cells share text.
    uniform = dataclasses.replace(mixed, t2s=torch.full((3, 4), 0.25))
    assert shares(uniform)["on_text"] == pytest.approx(5 / 12)
    assert shares(mixed)["uniform_on_text"] == pytest.approx(5 / 12)
    # The second student token covers no byte and is no EOS: it doesn't count.
    assert shares(example([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], (2, 2, 4), (2, 4), has_eos=False))["on_text"] == 1.0


def test_chunks_of_a_row(trainer):
    for index in range(8):
        row = trainer.train_dataset[index]
        shown = cross_attention(trainer.distiller, row)
        chunks = tuple(row["chunk_ids"]), tuple(row["teacher_chunk_ids"])
        assert chunks_of(shown) == (shown.student_chunks, shown.teacher_chunks) == chunks
        # The bytes alone say the same.
        assert chunks_of(dataclasses.replace(shown, student_chunks=None)) == chunks
        # A token of a chunk shares text with one of the same chunk only.
        assert not (same_text(shown) & ~same_chunk(shown)).any()


def test_attention_in_chunk_by_hand():
    # student: "The" "·c" "at" EOS; teacher: "Th" "e·c" "at" EOS. "The·c" is a chunk of two tokens on both sides.
    t2s = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.125, 0.125], [0.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.0, 0.0]]
    shown = example(t2s, (3, 5, 7, 7), (2, 5, 7, 7))
    assert chunks_of(shown) == ((0, 0, 1, 2), (0, 0, 1, 2))
    assert same_chunk(shown).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    found = shares(shown)
    assert found["in_chunk"] == pytest.approx((0.3 + 0.75 + 1.0 + 0.0) / 4)
    assert found["uniform_in_chunk"] == pytest.approx(6 / 16)
    # "·c" shares no text with "Th".
    assert found["on_text"] == pytest.approx((0.3 + 0.25 + 1.0 + 0.0) / 4)
    given = dataclasses.replace(shown, student_chunks=(0, 1, 2, 2), teacher_chunks=(0, 1, 1, 2))
    assert shares(given)["in_chunk"] == pytest.approx((0.1 + 0.375 + 0.0 + 0.0) / 4)


# ---- Pictures


def panels_of(figure):
    return [axes for axes in figure.axes if axes.get_xlabel() == "teacher"]


def test_picture_of_a_run(tmp_path, trainer, figures, caplog):
    shown = [cross_attention(trainer.distiller, trainer.train_dataset[index], f"row {index}") for index in (0, 2)]
    plot(plot_attention, shown, tmp_path / "two.png", title="Tiny models at $5 and $6")
    assert not caplog.records
    [figure] = figures
    assert [text.get_text() for text in figure.texts] == [NOTE, "Tiny models at $5 and $6"]
    panels = panels_of(figure)
    assert len(panels) == 2
    top = max(float(one.t2s.max()) for one in shown)
    for axes, one in zip(panels, shown):
        [mesh] = [part for part in axes.collections if isinstance(part, QuadMesh)]
        assert torch.equal(torch.tensor(mesh.get_array()).reshape(one.t2s.shape), one.t2s)
        assert (mesh.norm.vmin, mesh.norm.vmax) == (0, top)
        assert axes.get_ylabel() == "student" and axes.yaxis_inverted() and not axes.xaxis_inverted()
        labels = [text.get_text() for text in axes.texts]
        assert labels == [drawable(token) if len(drawable(token)) <= 18 else drawable(token)[:17] + "…"
                          for token in one.student_tokens + one.teacher_tokens]  # fmt: skip
        # The first student label is beside the first row, the first teacher label below the first column.
        assert axes.texts[0].xy == (0, 0.5) and axes.texts[len(one.student_tokens)].xy == (0.5, 0)
        heading = axes.get_title("left").split("\n")
        assert heading[0] == one.caption
        found = {name: f"{share:.1%}" for name, share in shares(one).items()}
        assert found["on_text"] in heading[1] and found["uniform_on_text"] in heading[1]
        assert found["in_chunk"] in heading[2] and found["uniform_in_chunk"] in heading[2]


def test_panels_are_placed_by_their_size(tmp_path, figures):
    short = example(torch.full((3, 60), 1 / 60), (1, 2, 3), tuple(range(1, 61)), has_eos=False)
    for shown, beside in (([diagonal(10), diagonal(10)], True), ([short, diagonal(60)], False)):
        plot(plot_attention, shown, tmp_path / "folder" / "two.png")
        assert all(250 <= pixels <= 3200 for pixels in size(tmp_path / "folder" / "two.png"))
        first, second = (axes.get_position() for axes in panels_of(figures[-1]))
        assert (first.y0 == pytest.approx(second.y0)) == beside
        assert (first.x0 == pytest.approx(second.x0)) == (not beside)
        assert second.x0 > first.x1 if beside else second.y1 < first.y0
    # A row is as high as its own panels, with labels and heading between the two: about an inch and a half.
    assert 0.5 < (first.y0 - second.y1) * figures[-1].get_size_inches()[1] < 2


def test_long_responses_are_truncated_and_it_is_said(tmp_path, figures):
    ends = tuple(range(1, 71))
    shown = example(torch.eye(70), ends, ends, has_eos=False)
    shown.t2s[60:] = shown.t2s[60:].roll(1, 1)
    plot(plot_attention, [shown, diagonal(60)], tmp_path / "long.png")
    long, short = panels_of(figures[0])
    assert "the first 60 of 70 student and 60 of 70 teacher tokens" in long.get_title("left")
    assert f"{60 / 70:.1%}" in long.get_title("left")  # of the whole response, not of the part shown
    assert len(long.texts) == 120 and "first" not in short.get_title("left")
    # The boundaries of chunks end with the picture.
    lines = segments(long)[LIGHT]
    assert len(lines) == 2 * 59 and max(x for line in lines for point in line for x in point) == 60


def segments(axes):
    """Lines by colour."""
    return {
        to_hex(part.get_color()[0]): sorted(tuple(map(tuple, segment)) for segment in part.get_segments())
        for part in axes.collections
        if isinstance(part, LineCollection)
    }


ORANGE, GREY, LIGHT = "#e4572e", "#7d7d7d", "#c2c2c2"


def test_outline_follows_the_text(tmp_path, figures):
    shown = example(torch.full((2, 3), 1 / 3), (3, 7), (2, 3, 7), has_eos=False)
    plot(plot_attention, [shown], tmp_path / "outline.png")
    lines = segments(figures[0].axes[0])
    # Around columns 0 and 1 of row 0, and column 2 of row 1; no line between the first two.
    outline = [((x, y), (x, y + 1)) for x, y in ((0, 0), (2, 0), (2, 1), (3, 1))]
    outline += [((x, y), (x + 1, y)) for x, y in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (2, 2))]
    assert lines[ORANGE] == lines[GREY] == sorted(outline)  # a chunk of one token has no more cells


def test_chunks_are_outlined_and_divided(tmp_path, figures):
    # Chunks of 2 × 2, 1 × 1 and (EOS) 1 × 1 tokens.
    plot(plot_attention, [example(torch.full((4, 4), 0.25), (3, 5, 7, 7), (2, 5, 7, 7))], tmp_path / "chunks.png")
    lines = segments(figures[0].axes[0])
    # Right through, after the second and the third token of both sides.
    assert lines[LIGHT] == sorted([((0, 2), (4, 2)), ((0, 3), (4, 3)), ((2, 0), (2, 4)), ((3, 0), (3, 4))])
    # The lower left cell of the first chunk shares no text: only the grey line goes around it.
    corner = {((0, 1), (0, 2)), ((0, 2), (1, 2))}
    inside = {((0, 1), (1, 1)), ((1, 1), (1, 2))}
    assert corner <= set(lines[GREY]) and not corner & set(lines[ORANGE])
    assert inside <= set(lines[ORANGE]) and not inside & set(lines[GREY])


# ---- The contact sheet


def sheet_panels(figure):
    return [axes for axes in figure.axes if axes.images]


def test_contact_sheet_of_a_run(tmp_path, trainer, figures, caplog):
    shown = [cross_attention(trainer.distiller, trainer.train_dataset[index], f"row {index}") for index in range(8)]
    plot(contact_sheet, shown, tmp_path / "folder" / "sheet.png", title="Eight $x$ rows")
    assert not caplog.records
    [figure] = figures
    assert [text.get_text() for text in figure.texts] == [NOTE, "Eight $x$ rows"]
    panels = sheet_panels(figure)
    assert len(panels) == 8
    top = max(float(one.t2s.max()) for one in shown)
    for axes, one in zip(panels, shown):
        [image] = axes.images
        assert torch.equal(torch.tensor(image.get_array()), one.t2s)
        assert (image.norm.vmin, image.norm.vmax) == (0, top)
        assert axes.get_xlim() == (0, one.t2s.shape[1]) and axes.get_ylim() == (one.t2s.shape[0], 0)
        assert not axes.texts and not len(axes.get_xticks())
        caption, counts, shown_shares = axes.get_title("left").split("\n")
        assert caption == one.caption and counts == "{} × {} tokens".format(*one.t2s.shape)
        found = shares(one)
        assert shown_shares == f"same text {found['on_text']:.1%}, chunk {found['in_chunk']:.1%}"
        [(colour, lines)] = segments(axes).items()
        assert colour == ORANGE and lines
    # Rows of six, that don't overlap.
    boxes = [axes.get_position() for axes in panels]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes[:6]))
    assert boxes[6].x0 == boxes[0].x0 and boxes[6].y1 < min(box.y0 for box in boxes[:6])
    width, height = size(tmp_path / "folder" / "sheet.png")
    assert 1800 < width < 2300 and 600 < height < 1000


def test_contact_sheet_says_what_it_leaves_out(tmp_path, figures):
    ends = tuple(range(1, 131))
    long = example(torch.eye(130), ends, ends[:-1] + (130,), has_eos=False, caption="a caption " * 9)
    plot(contact_sheet, [long] + [diagonal(5)] * MOST_ON_SHEET, tmp_path / "sheet.png")
    [many] = figures
    assert many.texts[1].get_text() == "examples (the first 24 of 25)" and len(sheet_panels(many)) == 24
    first, second = sheet_panels(many)[:2]
    assert first.images[0].get_array().shape == (120, 120)
    caption, counts, found = first.get_title("left").split("\n")
    assert caption == ("a caption " * 9)[:35] + "…"
    assert counts == "130 × 130 tokens, the first 120 shown" and "text 100.0%" in found
    assert second.get_title("left").split("\n") == ["5 × 5 tokens", "same text 100.0%, chunk 100.0%"]


def test_any_character_can_be_drawn(tmp_path, figures, caplog):
    tokens = ("$x$", "$\\frac{$", "東", "👩\u200d👧", "a\x00\u0301\x1b")
    shown = diagonal(5, student_tokens=tokens, teacher_tokens=tokens, caption="$\\frac{$ 東")
    plot(plot_attention, [shown], tmp_path / "all.png", title="東 $\\frac{$")
    labels = [text.get_text() for text in figures[0].axes[0].texts]
    # Drawn as mathematics, $\frac{$ would be an error. A label has at most 18 characters.
    expected = ["$x$", "$\\frac{$", "\\u6771", "\\U0001f469\\u200d\\…", "a\\x00\\u0301\\x1b"]
    assert labels == expected * 2
    assert not caplog.records
    assert drawable("Zwölf·↵⇥ naïve £ 'a' \"b\" \\n") == "Zwölf·↵⇥ naïve £ 'a' \"b\" \\n"


# ---- Errors


def test_errors(tmp_path, trainer):
    with pytest.raises(UserError, match="no examples"):
        plot_attention([], tmp_path / "none.png")
    with pytest.raises(UserError, match="no examples"):
        contact_sheet([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    alone = runs.trainer(tmp_path, method="sft", rows=4)
    with pytest.raises(UserError, match="method='sft' has no alignment to show"):
        cross_attention(alone.distiller, alone.train_dataset[0])
    with pytest.raises(UserError, match="no column 'input_ids': pass a tokenized one"):
        cross_attention(trainer.distiller, tiny.dataset(1)[0])
