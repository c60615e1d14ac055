"""The report says what is in a run's folder, and is one file that needs nothing else."""

import re

import runs
import tiny
from run_folders import ANALYSES, FULL, RESULT, Checker, cells, folder, full_folder, written

from hf_dskd.report.one import write_report


def test_everything_that_a_run_left_is_shown(tmp_path):
    markdown, page = written(full_folder(tmp_path / "run"))
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


def test_the_page_is_one_file(tmp_path):
    page = write_report(full_folder(tmp_path / "run"))
    checked = Checker(page.read_text())
    assert checked.open == []
    # curves, shares of the gradients, analyses, and three kinds of pictures at the first and the last step
    assert len(checked.loads) == 8 and all(load.startswith("data:image/png;base64,") for load in checked.loads)
    assert "http" not in page.read_text() and "@import" not in page.read_text() and "url(" not in page.read_text()
    anchors = {link for link in checked.links if link.startswith("#")}
    assert anchors == {f"#{name}" for name in checked.ids} and len(anchors) == 10
    for link in {*checked.links} - anchors:
        assert (page.parent / link).exists()
    for link in re.findall(r"\]\(([^)]*)\)", page.with_name("report.md").read_text()):
        assert (page.parent / link).exists()


def test_the_same_folder_gives_the_same_report(tmp_path):
    run = full_folder(tmp_path / "run")
    first = {path.name: path.read_bytes() for path in write_report(run).parent.iterdir()}
    second = {path.name: path.read_bytes() for path in write_report(run).parent.iterdir()}
    assert first == second and len(first) == 5


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
    assert "checkpoint-50, the best" in kept


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


def test_output_dir(tmp_path):
    run = full_folder(tmp_path / "run")
    page = write_report(run, tmp_path / "else" / "where")
    assert page == tmp_path / "else" / "where" / "report.html" and not (run / "report").exists()
    assert (page.parent / "../../run/analysis/projection.png").exists()
    assert "(../../run/analysis/projection.png)" in page.with_name("report.md").read_text()


def test_a_real_run(tmp_path):
    run = runs.trainer(
        tmp_path / "run", eval_dataset=tiny.dataset(4), eval_strategy="steps", eval_steps=2, max_steps=4
    )
    output = run.train()
    run.save_state()
    metrics = run.evaluate()
    history = {e["step"]: {k: v for k, v in e.items() if k[:5] == "eval_"} for e in run.state.log_history}
    run.run_record(metrics, history, output.metrics["train_runtime"]).write(tmp_path / "run" / "result.json")
    markdown, page = written(tmp_path / "run")
    assert markdown.startswith("# dskd_cma_ga") and "4 optimizer steps" in markdown
    assert cells(markdown, "bits per byte")[1] == f"**{metrics['eval_bits_per_byte']:.4f}**"
    assert cells(markdown, "discriminator_hidden_size") == ["discriminator_hidden_size", "32", "768"]
    assert len(Checker(page).loads) == 1
