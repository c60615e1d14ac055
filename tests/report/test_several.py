"""Several runs side by side: grouped over seeds, told apart by what differs."""

import json
import re
import statistics

import pytest
from run_folders import ANALYSES, RESULT, Checker, cells, comparison, folder, logs

from hf_dskd.report.files import read_run
from hf_dskd.report.several import compare_runs, grouped, mean_history


pytestmark = pytest.mark.usefixtures("undrawn")


def compared(folders, output):
    page = compare_runs(folders, output)
    assert Checker(page.read_text()).open == []
    return page.with_name("report.md").read_text(), page.read_text()


def test_seeds_are_grouped(tmp_path):
    a = comparison(tmp_path / "a", [0.75, 0.5, 1.0])
    b = comparison(tmp_path / "b", [0.5, 0.75], method="sft")
    markdown, page = compared([a[0], b[0], a[1], b[1], a[2]], tmp_path / "out")
    assert markdown.startswith("# 5 runs: dskd_cma_ga, sft\n")
    first = markdown.partition("## Each run")[0]
    assert cells(first, "dskd_cma_ga") == ["dskd_cma_ga", f"0.7500 ± {statistics.stdev([0.75, 0.5, 1.0]):.4f}", "3"]
    assert cells(first, "sft") == ["sft", f"**0.6250 ± {statistics.stdev([0.5, 0.75]):.4f}**", "2"]
    assert "9.0000" not in markdown
    assert cells(markdown.partition("## Each run")[2].partition("##")[0], "dskd_cma_ga, seed 2")[1] == "1.0000"
    assert cells(markdown.partition("## Settings that differ")[2], "method") == ["method", "dskd_cma_ga", "sft"]
    assert "output_dir" not in markdown and "| seed " not in markdown
    assert all(load.startswith("data:") for load in Checker(page).loads) and "http" not in page


def test_groups_of_one_method_say_what_differs(tmp_path):
    a = comparison(tmp_path / "a", [0.75], kd_rate=0.2)
    b = comparison(tmp_path / "b", [0.5], kd_rate=0.5)
    markdown, _ = compared([*a, *b], tmp_path / "out")
    assert "dskd_cma_ga (kd_rate=0.2), dskd_cma_ga (kd_rate=0.5)" in markdown.splitlines()[0]
    assert cells(markdown.partition("## Settings that differ")[2], "kd_rate") == ["kd_rate", "0.2", "0.5"]
    # A setting that only one of them names has its default in the other.
    result = json.loads((b[0] / "result.json").read_text())
    result["changed_settings"]["learning_rate"] = [5e-5, 2e-4]
    (b[0] / "result.json").write_text(json.dumps(result))
    rest = compared([*a, *b], tmp_path / "out")[0].partition("## Settings that differ")[2]
    assert cells(rest, "learning_rate") == ["learning_rate", "5e-05", "0.0002"]
    # What an older version wrote doesn't say.
    folder(a[0], RESULT)
    rest = compared([*a, *b], tmp_path / "out")[0].partition("## Settings that differ")[2]
    assert cells(rest, "learning_rate") == ["learning_rate", "–", "0.0002"]


def test_runs_that_are_the_same_are_told_apart(tmp_path):
    a, b = comparison(tmp_path / "a", [0.75]), comparison(tmp_path / "b", [0.75])
    markdown, _ = compared([*a, *b], tmp_path / "out")
    assert f"dskd_cma_ga, seed 0, {b[0]}" in markdown and "None but the seeds" in markdown


def test_groups_never_share_a_name(tmp_path):
    many = {"divergence": "js", "max_length": 9, "kd_temperature": 9.0}
    folders = [comparison(tmp_path / "a", [0.5])[0], comparison(tmp_path / "b", [0.5], **many)[0]]
    folders.append(comparison(tmp_path / "c", [0.5], **many, skew_lambda=0.3)[0])
    groups = grouped([read_run(path) for path in folders])
    assert len({group.name for group in groups}) == 3 and str(folders[2]) in groups[2].name


def test_models_and_data_tell_runs_apart(tmp_path):
    a, b = comparison(tmp_path / "a", [0.75]), comparison(tmp_path / "b", [0.5])
    for path, teacher in ((a[0], "one"), (b[0], "other")):
        result = json.loads((path / "result.json").read_text()) | {"models": {"student": "s", "teacher": teacher}}
        (path / "result.json").write_text(json.dumps(result))
    markdown, _ = compared([*a, *b], tmp_path / "out")
    assert markdown.startswith("# 2 runs: dskd_cma_ga (teacher=one), dskd_cma_ga (teacher=other)")


def test_curves_share_their_axes(tmp_path, figures):
    a = comparison(tmp_path / "a", [0.75, 0.5])
    b = comparison(tmp_path / "b", [0.5], method="sft")
    compared([*a, *b], tmp_path / "out")
    [figure] = figures
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["dskd_cma_ga, seed 0", "dskd_cma_ga, seed 1", "sft"]


def test_curves_of_many_runs_are_means(tmp_path, figures):
    a = comparison(tmp_path / "a", [0.75, 0.5, 0.25, 0.5, 0.5])
    b = comparison(tmp_path / "b", [0.5, 0.5, 0.5, 0.5], method="sft")
    markdown, _ = compared([*a, *b], tmp_path / "out")
    assert "Means over seeds." in markdown
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["dskd_cma_ga", "sft"]
    # Nine groups have no nine colours.
    single = [comparison(tmp_path / f"c{i}", [0.5], kd_rate=i / 10)[0] for i in range(9)]
    markdown, _ = compared(single, tmp_path / "many")
    assert "curves.png" in markdown and "curves-2.png" in markdown
    assert [len(figure.legends[0].get_texts()) for figure in figures[1:]] == [8, 1]


def test_mean_history():
    one = [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "b": 5.0}, {"step": 2, "eval_c": 1.0}]
    two = [{"step": 1, "a": 3.0}, {"step": 3, "a": 7.0}, {"step": 2, "a": 4.0, "eval_c": 2.0}]
    assert mean_history([one, two]) == [{"step": 1, "a": 2.0}, {"step": 2, "a": 3.0}, {"step": 2, "eval_c": 1.5}]


def test_warnings_and_analyses_of_several_runs(tmp_path):
    a, b = comparison(tmp_path / "a", [0.75]), comparison(tmp_path / "b", [0.5], method="dskd_cma")
    history = logs(correctness_mask_rate=0.0, ce_loss=1.0)
    folder(a[0], json.loads((a[0] / "result.json").read_text()), history, ANALYSES)
    markdown, _ = compared([*a, *b], tmp_path / "out")
    warnings = markdown.partition("## Warnings")[2].partition("\n## ")[0]
    assert re.findall("### (.*)", warnings) == ["dskd_cma_ga"] and "correctness mask" in warnings
    assert "Without a warning: dskd_cma." in warnings
    after = markdown.partition("## Alignment, after training")[2]
    assert "dskd_cma_ga (step 100)" in after and cells(after, "chunk_mass")[1] == "0.5"
