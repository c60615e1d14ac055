"""The curves show what was logged, run by run."""

import math

import pytest
import runs
import tiny
from drawing import plot, size
from test_model_loss import mixtral

from hf_dskd import UserError
from hf_dskd.analysis.curves import plot_analysis, plot_curves, series, training_panels


def panels(figure):
    return {axes.get_title("left"): axes for axes in figure.axes}


def curves(axes, colour=None):
    """Points of the data's lines, without the line that marks guessing."""
    return [
        list(zip(line.get_xdata(), line.get_ydata()))
        for line in axes.lines
        if line.get_color() != "#bbbbbb" and colour in (None, line.get_color())
    ]


def legend(figure):
    [box] = figure.legends
    return {text.get_text(): line.get_color() for text, line in zip(box.get_texts(), box.get_lines())}


HISTORY = [
    {"loss": 3.0, "ce_loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "step": 10},
    {"loss": 2.5, "ce_loss": 1.5, "grad_norm": 0.5, "learning_rate": 5e-4, "step": 20},
    {"eval_loss": 2.0, "eval_bits_per_byte": 1.25, "eval_runtime": 1.0, "step": 20},
    {"train_runtime": 9.0, "train_loss": 2.75, "total_flos": 1e9, "epoch": 1.0, "step": 20},
]


def test_series():
    assert series(HISTORY, "ce_loss") == ([10, 20], [2.0, 1.5])
    assert series(HISTORY, "eval_bits_per_byte") == ([20], [1.25])
    assert series(HISTORY, "kq_loss") == ([], [])
    history = [{"a": 5.0, "step": 4}, {"a": 1, "step": 2}, {"a": 3.0, "step": 4}, {"a": "4", "step": 5}, {"a": 6.0}]
    assert series([*history, {"a": math.nan, "step": 6}, {"a": math.inf, "step": 7}], "a") == ([2, 4], [1.0, 3.0])


def test_only_what_was_logged_has_a_panel(tmp_path, figures):
    plot(plot_curves, {"one": HISTORY}, tmp_path / "folder" / "curves.png")
    [figure] = figures
    assert set(panels(figure)) == {
        "cross entropy (ce_loss)",
        "evaluation: bits per byte",
        "gradient norms",
        "learning rates",
    }
    assert curves(panels(figure)["cross entropy (ce_loss)"]) == [[(10, 2.0), (20, 1.5)]]
    assert curves(panels(figure)["gradient norms"]) == [[(10, 1.0), (20, 0.5)]]
    # A single point would be invisible as a line.
    [line] = panels(figure)["evaluation: bits per byte"].lines
    assert list(line.get_xdata()) == [20] and line.get_marker() == "o"
    assert {axes.get_xlim() for axes in figure.axes} == {(9.7, 20.3)}
    width, height = size(tmp_path / "folder" / "curves.png")
    assert 1000 < width < 1600 and 400 < height < 800


def test_one_step(tmp_path, figures):
    plot(plot_curves, {"one": HISTORY[:1]}, tmp_path / "curves.png")
    for axes in figures[0].axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low < tick < high] == [10] and low < 10 < high
        assert all(line.get_marker() == "o" for line in axes.lines)


OF_OTHER_METHODS = {
    "what the model adds: routers, adapter (aux_loss)": {"method": "sft", "student": mixtral()},
    "divergence of logits (kd_loss)": {"method": "uld"},
    "divergence of chunk likelihoods (alm_loss)": {"method": "alm"},
    "student tokens with a target of the teacher": {"method": "bpm"},
    "divergence of attention (attention_loss)": {"method": "uld", "attention_kd_rate": 1.0},
    "transport cost under the critics": {"method": "dskd_cma_ct"},
}


@pytest.mark.parametrize("title, settings", OF_OTHER_METHODS.items())
def test_panels_of_other_methods(title, settings, tmp_path, figures):
    run = runs.trainer(tmp_path, rows=4, max_steps=1, **settings)
    run.train()
    plot(plot_curves, {"run": run.state.log_history}, tmp_path / "curves.png")
    assert title in panels(figures[0])


def test_real_runs_share_colours(tmp_path, figures):
    settings = {"eval_dataset": tiny.dataset(3), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    histories = {}
    for name, method in (("_with $\\frac{$", "dskd_cma_ga"), ("東 without", "dskd_cma"), ("text alone", "sft")):
        run = runs.trainer(tmp_path / method, rows=8, method=method, **settings)
        run.train()
        histories[name] = run.state.log_history
    plot(plot_curves, histories, tmp_path / "curves.png")
    [figure] = figures
    shown = panels(figure)
    # Everything that has a panel is really logged, under this name.
    assert list(shown) == [panel.title for panel in training_panels() if panel.title not in OF_OTHER_METHODS]
    colours = legend(figure)
    assert list(colours) == ["_with $\\frac{$", "\\u6771 without", "text alone"]
    assert len(set(colours.values())) == 3
    first, second, third = colours.values()
    for name, colour in zip(histories, colours.values()):
        for title, key in (
            ("cross entropy (ce_loss)", "ce_loss"),
            ("evaluation: bits per byte", "eval_bits_per_byte"),
        ):
            logged = [(log["step"], log[key]) for log in histories[name] if key in log]
            assert len(logged) == (2 if key == "ce_loss" else 1)
            assert curves(shown[title], colour) == [logged]
    assert len(curves(shown["key-query matching (kq_loss)"])) == 1
    assert len(curves(shown["divergence, teacher space (s2t_kd_loss)"])) == 2
    counts = [len(curves(shown["gradient norms"], colour)) for colour in (first, second, third)]
    assert counts == [3, 2, 1]
    fake, real = (
        [(log["step"], log[f"discriminator_accuracy_{kind}"]) for log in histories["_with $\\frac{$"] if "loss" in log]
        for kind in ("fake", "real")
    )
    assert curves(shown["discriminator's accuracy"]) == [real, fake]
    styles = [line.get_linestyle() for line in shown["learning rates"].lines if line.get_color() == first]
    inner = shown["learning rates"].get_legend()
    assert [text.get_text() for text in inner.get_texts()] == ["student", "projectors", "discriminator"]
    assert styles == [line.get_linestyle() for line in inner.get_lines()]


def test_wide_ranges_are_logarithmic(tmp_path, figures):
    for norm, rate in ((100.0, 0.0), (2.0, 1e-3)):
        history = [{"grad_norm": 1.0, "projector_grad_norm": norm, "learning_rate": rate, "step": 1}]
        plot(plot_curves, {"a": history}, tmp_path / "curves.png")
    scales = [panels(figure)["gradient norms"].get_yscale() for figure in figures]
    assert scales == ["log", "linear"]
    assert panels(figures[0])["learning rates"].get_yscale() == "linear"  # 0 has no logarithm


def test_several_evaluation_sets(tmp_path, figures):
    history = [{f"eval_{name}_bits_per_byte": bits, "step": 5} for name, bits in (("easy", 1.0), ("hard", 2.0))]
    plot(plot_curves, {"one": [*history, {"eval_easy_loss": 1.0, "step": 5}]}, tmp_path / "curves.png")
    axes = panels(figures[0])["evaluation: bits per byte"]
    assert curves(axes) == [[(5, 1.0)], [(5, 2.0)]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["easy", "hard"]


@pytest.mark.parametrize("histories", [{}, {"one": []}, {"one": HISTORY[-1:]}])
def test_nothing_to_draw(tmp_path, histories):
    with pytest.raises(UserError, match="logged nothing to draw"):
        plot_curves(histories, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


# ---- The alignment analysis


def analyses(*keys, steps=(0, 10, 20)):
    return [{"step": step, **{key: step / 100 + place for place, key in enumerate(keys)}} for step in steps]


def test_analysis_of_one_run(tmp_path, figures):
    history = analyses("chunk_mass", "chunk_mass_uniform", "mmd", "gradient_norm_kq", "gradient_norm_ce")
    plot(plot_analysis, history, tmp_path / "folder" / "analysis.png")
    [figure] = figures
    assert not figure.legends
    shown = panels(figure)
    assert list(shown) == [
        "attention in the right chunk (chunk_mass)",
        "strongest weight in the chunk (argmax_in_chunk)",
        "queries and keys: squared MMD",
        "gradient norms of the terms",
    ]
    mass = shown["attention in the right chunk (chunk_mass)"]
    assert curves(mass) == [[(0, 0.0), (10, 0.1), (20, 0.2)], [(0, 1.0), (10, 1.1), (20, 1.2)]]
    assert [text.get_text() for text in mass.get_legend().get_texts()] == ["student's tokens", "student's if uniform"]
    assert mass.get_ylim() == (-0.04, 1.04)
    gradients = shown["gradient norms of the terms"]
    assert [text.get_text() for text in gradients.get_legend().get_texts()] == ["ce", "kq"]
    assert [points[0] for points in curves(gradients)] == [(0, 4.0), (0, 3.0)]
    assert (tmp_path / "folder" / "analysis.png").exists()


def test_numbers_without_a_panel_of_their_own(tmp_path, figures):
    history = [{"step": 5, "mmd": 1.0, "new_$number": 2.0, "another": 1, "name": "text", "undefined": math.nan}]
    plot(plot_analysis, history, tmp_path / "analysis.png")
    shown = panels(figures[0])
    assert list(shown) == ["queries and keys: squared MMD", "another", "new_$number"]
    assert curves(shown["new_$number"]) == [[(5, 2.0)]]


def test_analyses_of_several_runs(tmp_path, figures):
    histories = {"_first": analyses("chunk_mass", "linear_probe_auc"), "second": analyses("chunk_mass", "entropy")}
    plot(plot_analysis, histories, tmp_path / "analysis.png")
    [figure] = figures
    colours = legend(figure)
    assert list(colours) == ["_first", "second"]
    shown = panels(figure)
    mass = shown["attention in the right chunk (chunk_mass)"]
    for colour in colours.values():
        assert curves(mass, colour) == [[(0, 0.0), (10, 0.1), (20, 0.2)]]
    told = shown["queries told from keys (AUC)"]
    assert curves(told) == [[(0, 1.0), (10, 1.1), (20, 1.2)]]
    assert [line.get_ydata() for line in told.lines if line.get_color() == "#bbbbbb"] == [[0.5, 0.5]]


def test_axes_of_analyses_do_not_depend_on_small_changes(tmp_path, figures):
    history = [{"step": step, "mmd": mmd, "mean_cosine": 0.5, "mean_gap": 0.0} for step, mmd in ((0, 0.1), (1, -0.01))]
    plot(plot_analysis, history, tmp_path / "analysis.png")
    shown = panels(figures[0])
    assert shown["queries and keys: squared MMD"].get_ylim() == pytest.approx((-0.0108, 0.108))
    assert shown["queries and keys: gap of the means"].get_ylim() == (0, 1)
    assert shown["queries and keys: cosine of the means"].get_ylim() == (-1.08, 1.08)


@pytest.mark.parametrize("history", [[], {}, {"one": []}, [{"step": 3}], [{"mmd": 1.0}]])
def test_no_analyses(tmp_path, history):
    with pytest.raises(UserError, match="have no numbers to draw"):
        plot_analysis(history, tmp_path / "analysis.png")
    assert not (tmp_path / "analysis.png").exists()
