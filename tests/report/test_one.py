"""The report says what is in a run's folder, and is one file that needs nothing else."""

import re

import pytest
from run_folders import ANALYSES, FULL, RESULT, Checker, cells, folder, full_folder, written

from hf_dskd.report.one import write_report


pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A folder with everything that runs leave, and its report in Markdown and HTML; it has a second one elsewhere."""
    run = full_folder(tmp_path_factory.mktemp("full") / "run")
    found = run, *written(run)
    write_report(run, run.parent / "else" / "where")
    return found


def test_everything_that_a_run_left_is_shown(full):
    _, markdown, page = full
    assert markdown.startswith("# dskd_cma_ga: student ← owner/teacher\n")
    assert re.findall("^## (.*)", markdown, re.MULTILINE) == [
        *("Warnings", "How it was run", "Data", "Settings that differ from the defaults", "Curves"),
        *("What each term contributes", "Alignment, before and after", "Scores", "Examples", "Files"),
    ]
    for text in (
        *("100 optimizer steps", "1:06:40 h", "134.5 M parameters (4.9 M trained, as an adapter)", "1.54 B"),
        *("hf-dskd train --config a.yaml", "2026-11-22T23:11:02Z", "torch 2.13.0, hf_dskd 0.1.0"),
        *("Some GPU, Some CPU, 2 cores, 24.5 GB of memory", "seed 7, data_seed 3", "/disk/cache/student"),
        *("some functions", "40 held-out examples", "Add.", "step-50", "analysis/numbers.jsonl"),
    ):
        assert text in markdown and text in Checker(page).text
    assert cells(markdown, "bits per byte")[1:] == ["**0.7500**"]
    assert cells(markdown, "processes") == ["processes", "3"]
    assert cells(markdown, "training") == ["training", "1,240", "1,238", "3", "2", "0"]
    assert cells(markdown, "learning_rate") == ["learning_rate", "0.0002", "5e-05"]
    assert cells(markdown, "chunk_mass")[:4] == ["chunk_mass", "0.25", "0.5", "+0.25"]
    assert cells(markdown, "mmd")[:4] == ["mmd", "0.5", "0.125", "−0.375"]
    assert cells(markdown, "0") == ["0", "3 (75.0 %)", "0.75 (18.8 %)", "0.25 (6.2 %)"]
    assert "| dolly | 23.1 |" in markdown
    # Terms that have no place in the summary are not taken for one that has.
    assert "3.0000" not in markdown


def test_the_page_is_one_file(full):
    run, markdown, page = full
    checked = Checker(page)
    assert checked.open == []
    # curves, shares of the gradients, analyses, and three kinds of pictures at the first and the last step
    assert len(checked.loads) == 8 and all(load.startswith("data:image/png;base64,") for load in checked.loads)
    assert not any(text in page for text in ("http", "@import", "url("))
    anchors = {link for link in checked.links if link.startswith("#")}
    assert anchors == {f"#{name}" for name in checked.ids} and len(anchors) == 10
    for link in [*{*checked.links} - anchors, *re.findall(r"\]\(([^)]*)\)", markdown)]:
        assert (run / "report" / link).exists()


def test_a_report_elsewhere_is_the_same_but_for_its_links(full):
    run, markdown, _ = full
    where = run.parent / "else" / "where"
    there = (where / "report.md").read_text()
    assert (where / "report.html").is_file() and (where / "../../run/analysis/projection.png").exists()
    assert "(../../run/analysis/projection.png)" in there
    links = re.compile(r" *\]\([^)]*\)| +|-{3,}:?")  # and what is as wide as they are
    assert links.sub("", there) == links.sub("", markdown)
    pictures = {path.name: path.read_bytes() for path in (run / "report").glob("*.png")}
    assert pictures == {path.name: path.read_bytes() for path in where.glob("*.png")} and len(pictures) == 3


def test_an_older_folder_is_enough(tmp_path):
    older = {name: value for name, value in RESULT.items() if name not in ("evaluations", "train_runtime")}
    settings = {"method": "dskd_cma_ga", "kd_rate": 0.25, "gone": 1}
    markdown, page = written(folder(tmp_path / "run", {**older, "settings": settings}))
    assert markdown.startswith("# dskd_cma_ga\n") and Checker(page).open == []
    assert cells(markdown, "kd_rate") == ["kd_rate", "0.25", "0.5"] and "gone" not in markdown
    assert "seed 0, data_seed 0" in markdown and "hf-dskd evaluate" in markdown and "--analysis_steps" in markdown
    for absent in ("None", "## Data", "## Examples", "processes", "[!WARNING]"):
        assert absent not in markdown


def test_training_on_the_text_alone_has_no_alignment(tmp_path):
    models = {"student": "a", "teacher": None, "student_parameters": 10, "trained_parameters": 10, "adapter": False}
    models["teacher_parameters"] = None
    markdown, _ = written(folder(tmp_path / "run", {**FULL, "method": "sft", "models": models}))
    assert markdown.startswith("# sft: a\n") and "teacher of" not in markdown and "| teacher" not in markdown
    assert "Alignment" not in markdown and "contributes" not in markdown and "analysis_steps" not in markdown


def test_a_run_without_logs_and_evaluation(tmp_path):
    path = folder(tmp_path / "run", {**RESULT, "metrics": {}, "steps": 0}, history=[])
    (path / "trainer_state.json").unlink()
    markdown, page = written(path)
    assert "Nothing was evaluated" in markdown and "Nothing was logged" in markdown and "Too little" in markdown
    assert Checker(page).loads == []


def test_before_and_the_best_on_the_way(tmp_path):
    history = [{"step": step, "eval_bits_per_byte": value} for step, value in {50: 0.7, 100: 0.75}.items()]
    result = {**RESULT, "evaluations": {"0": {"eval_bits_per_byte": 0.875}, "50": {}, "100": {}}}
    markdown, _ = written(folder(tmp_path / "run", result, history))
    found = cells(markdown, "bits per byte")
    assert found == ["bits per byte", "0.8750", "**0.7500**", "−0.1250", "0.7000 (step 50)"]
    assert cells(markdown, "token accuracy") == ["token accuracy", "–", "0.6000", "–", "–"]
    # Logged, but not known to result.json.
    started = [{"step": 0, "eval_bits_per_byte": 1.0}, *history]
    assert cells(written(folder(tmp_path / "run", history=started))[0], "bits per byte")[1] == "1.0000"
    kept = written(folder(tmp_path / "run", {**RESULT, "best_checkpoint": "checkpoint-50"}))[0]
    assert "checkpoint-50, the best of the run, not the last." in kept
    last = written(folder(tmp_path / "last", {**RESULT, "best_checkpoint": f"checkpoint-{RESULT['steps']}"}))[0]
    assert f"checkpoint-{RESULT['steps']}, the best of the run, and the last." in last


def test_evaluation_sets_have_their_names(tmp_path):
    metrics = {"eval_code_bits_per_byte": 0.5, "eval_code_ce_loss": 1.5, "eval_code_t2s_ce_loss": 2.5}
    metrics |= {"eval_my_text_bits_per_byte": 0.25, "eval_runtime": 3.5, "eval_rouge_l": 23.456}
    markdown, _ = written(folder(tmp_path / "run", {**RESULT, "metrics": metrics}))
    assert cells(markdown, "bits per byte (code)")[1] == "**0.5000**"
    assert cells(markdown, "bits per byte (my_text)")[1] == "0.2500"
    assert cells(markdown, "cross entropy (code)")[1] == "1.5000"
    assert cells(markdown, "ROUGE-L of generated answers, percent")[1] == "23.46"
    assert "2.5" not in markdown and "3.5" not in markdown


def test_a_resumed_analysis_counts_once(tmp_path):
    twice = [*ANALYSES, {**ANALYSES[1], "mmd": 0.25}]
    assert cells(written(folder(tmp_path / "run", analyses=twice))[0], "mmd")[1:4] == ["0.5", "0.25", "−0.25"]
    # A single analysis has no change.
    alone = written(folder(tmp_path / "run", analyses=ANALYSES[1:]))[0]
    assert cells(alone, "mmd")[1] == "0.125" and "change" not in alone
