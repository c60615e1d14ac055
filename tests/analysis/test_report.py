"""The report says what is in a run's folder, warns where it should, and is one file that needs nothing else."""

import base64
import html
import html.parser
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny

from hf_dskd import UserError
from hf_dskd.analysis import report
from hf_dskd.run import write_result


STEPS = range(10, 101, 10)
LEARNING = {step: 2.0 - step / 200 for step in STEPS}
RESULT = {
    "method": "dskd_cma_ga",
    "seed": 0,
    "data_seed": 0,
    "steps": 100,
    "best_checkpoint": None,
    "metrics": {"eval_bits_per_byte": 0.75, "eval_token_accuracy": 0.6, "eval_loss": 4.25, "eval_t2s_ce_loss": 3.0},
    "evaluations": {},
    "train_runtime": 4000.0,
    "versions": {"torch": "2.13.0", "hf_dskd": "0.1.0"},
    "settings": {"method": "dskd_cma_ga", "kd_rate": 0.5, "adversarial_loss": "minimax"},
}
FULL = {
    **RESULT,
    "command": "hf-dskd train --config a.yaml",
    "finished": "2026-11-22T23:11:02Z",
    "hardware": {"cpu": "Some CPU", "cores": 2, "memory_gb": 24.5, "gpus": ["Some GPU"], "processes": 3},
    "models": {
        "student": "/disk/cache/student",
        "teacher": "owner/teacher",
        "student_parameters": 134_515_008,
        "trained_parameters": 4_884_480,
        "teacher_parameters": 1_540_000_000,
        "adapter": True,
    },
    "data": {
        "source": "some functions",
        "train": {"rows": 1240, "kept": 1238, "cut": 3, "empty_responses": 2, "long_prompts": 0},
        "eval": {"rows": 40, "kept": 40, "cut": 0, "empty_responses": 0, "long_prompts": 0},
    },
    "changed_settings": {"learning_rate": [5e-5, 2e-4], "prompt_style": ["chat", "plain"]},
    "seeds": {"seed": 7, "data_seed": 3},
    "warnings": ["attention is <slow> here"],
}
ANALYSES = [
    {"step": 0, "chunk_mass": 0.25, "chunk_mass_uniform": 0.2, "mmd": 0.5, "gradient_norm_ce": 3.0}
    | {"gradient_norm_t2s_kd": 0.75, "gradient_norm_kq": 0.25},
    {"step": 100, "chunk_mass": 0.5, "chunk_mass_uniform": 0.2, "mmd": 0.125, "gradient_norm_ce": 1.0}
    | {"gradient_norm_t2s_kd": 0.5, "gradient_norm_kq": 0.5},
]
PNG = b"\x89PNG not really"


def logs(**values):
    """A log with these values, each a number or one for each of the steps."""
    return [
        {"step": step, **{name: value[i] if isinstance(value, list) else value for name, value in values.items()}}
        for i, step in enumerate(STEPS)
    ]


def folder(path, result=RESULT, history=None, analyses=(), samples=()):
    """A run's folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "result.json").write_text(json.dumps(result))
    history = logs(loss=list(LEARNING.values()), ce_loss=list(LEARNING.values())) if history is None else history
    (path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    for name, lines in (("numbers", analyses), ("samples", samples)):
        if lines:
            (path / "analysis").mkdir(exist_ok=True)
            (path / "analysis" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def full_folder(path):
    samples = [{"step": 100, "prompt": "Add.", "reference": ["one", "two"], "response": "```\n</pre><script>"}]
    folder(path, FULL, analyses=ANALYSES, samples=samples)
    for step in (0, 50, 100):
        pictures = path / "analysis" / f"step-{step}"
        pictures.mkdir()
        for name in ("contact_sheet.png", "alignment-0.png", "alignment-1.png"):
            (pictures / name).write_bytes(PNG + f"{step} {name}".encode())
        (pictures / "alignment.html").write_text("<p>")
    (path / "analysis" / "projection.png").write_bytes(PNG + b"projection.png")
    (path / "evaluation").mkdir()
    (path / "evaluation" / "table.md").write_text("| set | ROUGE-L |\n|---|---|\n| dolly | 23.1 |\n")
    return path


def written(path, *arguments):
    """Markdown and HTML of the report on a folder."""
    page = report.write_report(path, *arguments)
    return page.with_name("report.md").read_text(), page.read_text()


def cells(markdown, start):
    """Cells of the table's row that starts so."""
    [line] = [line for line in markdown.splitlines() if line.startswith(f"| {start} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


class Checker(html.parser.HTMLParser):
    """Tags that aren't closed, and everything that a page would load."""

    def __init__(self, page):
        super().__init__()
        self.open, self.loads, self.links, self.ids, self.text = [], [], [], set(), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loads += [found[name] for name in ("src", "srcset", "data", "action") if name in found]
        self.links += [found["href"]] if "href" in found else []
        self.ids |= {found["id"]} if "id" in found else set()
        assert tag not in ("script", "link", "iframe", "object") and not [name for name in found if name[:2] == "on"]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if self.open[-1:] == ["style"] else data


# ---- One run


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
    assert "| dolly | 23.1 |" in markdown and "attention is \\<slow\\> here" in markdown
    # Terms that have no place in the summary are not taken for one that has.
    assert "3.0000" not in markdown


def test_the_page_is_one_file(tmp_path):
    page = report.write_report(full_folder(tmp_path / "run"))
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
    first = {path.name: path.read_bytes() for path in report.write_report(run).parent.iterdir()}
    second = {path.name: path.read_bytes() for path in report.write_report(run).parent.iterdir()}
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


def test_what_numbers_mean():
    chunk = report.MEANINGS["t2s_accuracy"]
    assert report._meaning("t2s_accuracy") == chunk and report._meaning("s2t_accuracy") != chunk
    assert report._meaning("probe_clp_t2s_accuracy") == f"{chunk} ({report.PROBES['probe_clp_']})"
    assert report._meaning("s2t_entropy") == f"{report.MEANINGS['entropy']} ({report.PROBES['s2t_']})"
    assert report._meaning("unheard_of") == report._meaning("probe_clp_unheard_of") == ""


def test_gradient_shares_are_stacked(tmp_path, figures):
    norms = report.gradient_norms([*ANALYSES, {"step": 120, "mmd": 0.5}])
    assert norms == {
        0: {"ce": 3.0, "t2s_kd": 0.75, "kq": 0.25},
        100: {"ce": 1.0, "t2s_kd": 0.5, "kq": 0.5},
    }
    report.plot_gradient_shares({**norms, 120: {"ce": 0.0, "kq": 0.0}}, tmp_path / "new" / "shares.png")
    [axes] = figures[0].axes
    heights = [[(bar.get_y(), bar.get_height()) for bar in container] for container in axes.containers]
    assert heights == [
        [(0, 0.75), (0, 0.5), (0, 0)],
        [(0.75, 0.1875), (0.5, 0.25), (0, 0)],
        [(0.9375, 0.0625), (0.75, 0.25), (0, 0)],
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "100", "120"]


def test_output_dir(tmp_path):
    run = full_folder(tmp_path / "run")
    page = report.write_report(run, tmp_path / "else" / "where")
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
    write_result(tmp_path / "run" / "result.json", run, metrics, history, output.metrics["train_runtime"])
    markdown, page = written(tmp_path / "run")
    assert markdown.startswith("# dskd_cma_ga") and "4 optimizer steps" in markdown
    assert cells(markdown, "bits per byte")[1] == f"**{metrics['eval_bits_per_byte']:.4f}**"
    assert cells(markdown, "discriminator_hidden_size") == ["discriminator_hidden_size", "32", "768"]
    assert len(Checker(page).loads) == 1


# ---- What is shown is text


NASTY = '<script>alert("1")</script> & `code` **bold** _it_ [a](b) | $x$ ~~no~~ \\ \x00\ud800 # x'


@pytest.mark.parametrize(
    "text", [NASTY, "# no heading", "- no list", "1. no list", "---", "> no quote", "* x", "a_b_c"]
)
def test_text_is_no_markup(text, tmp_path):
    span = report.Span(text, "strong")
    visible = text.replace("\x00", "\\x00").replace("\ud800", "\\ud800")
    for block in (report.Heading(3, text), report.Paragraph(text), report.Paragraph(span), report.Code(text)):
        assert Checker(block.html(tmp_path)).text == visible
    assert Checker(report.Listing([text, (text, span)]).html(tmp_path)).text == visible * 3
    assert Checker(report.Table([text], [[text], [span]]).html(tmp_path)).text == visible * 3

    # Every character that could be markup has a backslash, but for underscores inside a word.
    markdown = report.markdown_text(text, tmp_path)
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*\[\]<>|~$&]", re.sub(r"\\[^\w\s]", "", markdown))
    assert re.sub(r"\\([^a-z0-9\s])", r"\1", markdown) == visible
    assert not re.match(r"#|- |---|>|\d+\. ", markdown)
    assert ("\\_" in markdown) == ("_it_" in text)
    table = report.Table(["a", "b"], [[text, text]]).markdown(tmp_path)
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()] == [3, 3, 3]


def test_code_keeps_its_text(tmp_path):
    text = "a\n````\n  </pre>```"
    assert report.Code(text).markdown(tmp_path) == f"`````text\n{text}\n`````"
    assert report.Code("a").markdown(tmp_path) == "```text\na\n```"
    spans = {"a`b": "`` a`b ``", "a|b": "`a\\|b`", "<a>": "`<a>`"}
    for content, expected in spans.items():
        assert report.markdown_text(report.Span(content, "code"), tmp_path) == expected
        assert report.html_text(report.Span(content, "code"), tmp_path) == f"<code>{html.escape(content)}</code>"
    assert report.markdown_text(("see ", report.Span("x", "code"), ", too"), tmp_path) == "see `x`, too"


def test_files_with_odd_names(tmp_path):
    path = tmp_path / 'a "b" (c)#&.png'
    path.write_bytes(PNG)
    link = report.Span("file", "link", path)
    assert report.markdown_text(link, tmp_path) == "[file](a%20%22b%22%20%28c%29%23%26.png)"
    assert Checker(report.html_text(link, tmp_path)).links == ["a%20%22b%22%20%28c%29%23%26.png"]
    pictures = report.Pictures({"<one>|": path, "two": path})
    assert Checker(pictures.html(tmp_path)).loads == ["data:image/png;base64," + base64.b64encode(PNG).decode()] * 2
    assert pictures.markdown(tmp_path).splitlines()[0] == "| \\<one\\>\\| | two |"


def test_a_folder_full_of_markup(tmp_path):
    samples = [{"step": 100, "prompt": NASTY, "reference": NASTY, "response": NASTY * 100}]
    nasty = {**FULL, "command": NASTY, "warnings": [NASTY], "changed_settings": {NASTY: [NASTY, {NASTY: NASTY}]}}
    nasty["models"] = {"student": NASTY, "teacher": NASTY}
    markdown, page = written(folder(tmp_path / "run", nasty, samples=samples))
    assert Checker(page).open == [] and "<script" not in page
    assert not re.search(r"(?<!\\)<script", re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL))
    assert page.count("…</pre>") == 1


# ---- Warnings


def warned(history=(), analyses=(), **result):
    return report.warnings_of({**RESULT, **result}, history, analyses)


def test_a_good_run_has_no_warning(tmp_path):
    history = logs(
        loss=list(LEARNING.values()),
        ce_loss=list(LEARNING.values()),
        discriminator_accuracy_real=0.8,
        discriminator_accuracy_fake=0.7,
        correctness_mask_rate=0.3,
        eval_bits_per_byte=list(LEARNING.values()),
    )
    assert warned(history, ANALYSES, evaluations={"0": {"eval_bits_per_byte": 0.8}}, data=FULL["data"]) == []
    result = {**RESULT, "evaluations": {"0": {"eval_bits_per_byte": 0.8}}, "data": FULL["data"]}
    markdown, _ = written(folder(tmp_path / "run", result, history, ANALYSES))
    [line] = [line for line in markdown.splitlines() if line.startswith("Checked and found in order")]
    assert line.count(",") == 8 and "[!WARNING]" not in markdown
    assert warned() == []


def test_a_discriminator_that_has_won():
    def found(real, fake, **settings):
        history = logs(discriminator_accuracy_real=real, discriminator_accuracy_fake=fake)
        return warned(history, settings={**RESULT["settings"], **settings})

    [text] = found([0.5] * 3 + [1.0] * 7, [0.5] * 4 + [0.995] * 6)
    assert "100.0 % of the keys and 99.5 % of the queries at step 100" in text and "since step 50" in text
    assert "non_saturating" in text and "discriminator_learning_rate" in text
    [text] = found(1.0, 1.0, adversarial_loss="non_saturating")
    assert "since step 10" in text and "non_saturating" not in text
    assert found([1.0] * 9 + [0.98], 1.0) == [] == found(1.0, 0.9) == found(0.9, 1.0)
    # Between the first and the last it may have been otherwise.
    assert "since step 60" in found([1.0] * 4 + [0.9] + [1.0] * 5, 1.0)[0]


def test_a_discriminator_that_guesses():
    def found(real, fake, **settings):
        history = logs(discriminator_accuracy_real=real, discriminator_accuracy_fake=fake)
        return warned(history, settings={**RESULT["settings"], **settings})

    [text] = found([1.0] + [0.5] * 9, [0.08] + [0.5] * 9)
    assert "at most 54.0 %, at step 10" in text and "50.0 % at step 100" in text
    assert "discriminator_learning_rate" in text
    [text] = found(1.0, 0.0, as_published=True)
    assert "as_published=True never trains it" in text
    assert found([0.7] + [0.5] * 9, 0.5) == []
    assert warned(logs(discriminator_accuracy_real=0.5, discriminator_accuracy_fake=0.5)[:2]) == []


def test_a_gradient_of_matching_that_vanishes():
    def found(matching, **norms):
        last = {"step": 1200, "gradient_norm_kq": matching, **{f"gradient_norm_{k}": v for k, v in norms.items()}}
        return warned(analyses=[ANALYSES[0], last])

    [text] = found(0.0099, t2s_kd=0.5, s2t_kd=1.0, ce=9.0)
    assert "0.99 % of the norm of that of s2t_kd at step 1,200 (0.0099 against 1)" in text and "kq_rate" in text
    assert found(0.0, t2s_kd=0.5) and found(0.01, t2s_kd=1.0, ce=100.0) == [] == found(0.0, ce=1.0)


def test_a_correctness_mask_that_lets_little_through():
    [text] = warned(logs(correctness_mask_rate=[0.9] * 7 + [0.05, 0.07, 0.15]))
    assert "9.0 %" in text and "from step 80 on" in text and "spaces=teacher" in text
    assert warned(logs(correctness_mask_rate=[0.0] * 7 + [0.1, 0.1, 0.15])) == []
    unused = {**RESULT["settings"], "correctness_mask": False}
    assert warned(logs(correctness_mask_rate=0.0), settings=unused) == []


def test_loss_spikes():
    noise = [0.1 * (-1) ** i for i in range(10)]
    steady = [2.0 + value for value in noise]
    [text] = warned(logs(s2t_kd_loss=[*steady[:6], 9.0, *steady[7:]]))
    assert "s2t_kd_loss jumps to 9 at step 70" in text and "4.7 times the 1.9 around it" in text
    assert "also" not in text and "learning rate" in text
    [text] = warned(logs(loss=[*steady[:3], 16.0, *steady[4:9], 20.0]))
    assert "jumps to 20 at step 100" in text and "(also at step 40)" in text
    assert warned(logs(loss=[*steady[:6], 5.5, *steady[7:]])) == []
    # What goes down fast, or up for good, or always jumps, or is the loss of a game, is no spike.
    assert warned(logs(loss=[30.0, 9.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])) == []
    assert warned(logs(t2s_ce_loss=[1.0] * 5 + [5.0] * 5)) == []
    assert warned(logs(loss=[0.1, 4.0] * 5)) == []
    assert warned(logs(loss=[0.1, 0.1, 0.1, 4.0] * 2 + [0.1, 0.1])) != []
    assert warned(logs(kq_loss=[1.0] * 9 + [9.0], t2s_kd_loss=[1.0] * 9 + [9.0])) == []
    assert warned(logs(loss=-1.0)) == []


def test_training_that_diverges():
    rising = [2.0, 1.5, 1.0, 1.0, 1.1, 1.2, 1.2, 1.3, 1.3, 1.3]
    [text] = warned(logs(ce_loss=rising))
    assert "ends at 1.3 (median from step 70)" in text and "after 1 around step 40" in text
    assert warned(logs(ce_loss=[min(value, 1.2) for value in rising])) == []
    assert warned(logs(ce_loss=rising)[:7]) == []


def test_evaluation_that_gets_worse():
    def found(values, key="eval_bits_per_byte", **result):
        return warned([{"step": step, key: value} for step, value in values.items()], **result)

    values = {100: 0.9, 300: 0.7, 1000: 0.75}
    [text] = found(values)
    assert "bits per byte was best at step 300 (0.7000) and ends at 0.7500 at step 1,000" in text
    assert "load_best_model_at_end" in text
    assert "bits per byte (code)" in found(values, "eval_code_bits_per_byte")[0]
    assert "method's own loss" in found(values, "eval_loss")[0]
    # The model that is kept is the best; late; by very little; falling; too few to say.
    assert found(values, best_checkpoint="checkpoint-300") == []
    assert found({100: 0.9, 800: 0.7, 1000: 0.75}) == [] == found({100: 0.9, 300: 0.7, 1000: 0.703})
    assert found({100: 0.9, 300: 0.7, 1000: 0.6}) == [] == found({300: 0.7, 1000: 0.75})


def test_training_that_does_not_help():
    [text] = warned(evaluations={"0": {"eval_bits_per_byte": 0.75}})
    assert "is 0.7500 after 100 steps and was 0.7500 at step 0" in text
    assert warned([{"step": 0, "eval_bits_per_byte": 0.5}]) != []
    assert warned(evaluations={"0": {"eval_bits_per_byte": 0.7501}}) == []
    assert warned(evaluations={"10": {"eval_bits_per_byte": 0.5}}) == []


def test_attention_that_aligns_nothing():
    def found(mass):
        return warned(analyses=[ANALYSES[1], {"step": 1000, "chunk_mass": mass, "chunk_mass_uniform": 0.2}])

    [text] = found(0.21)
    assert "21.0 %" in text and "step 1,000" in text and "20.0 %" in text and "chunk_attention" in text
    assert found(0.23) == [] == warned(analyses=[{"step": 0, "chunk_mass": 0.0}])


def test_examples_that_were_cut_or_skipped():
    part = {"rows": 1200, "kept": 1100, "cut": 56, "empty_responses": 100, "long_prompts": 0}
    first, second = warned(data={"train": part, "eval": None})
    assert "56 of 1,100 training responses (5.1 %)" in first and "max_length" in first
    assert "100 of 1,200 training examples (8.3 %) were skipped" in second
    [text] = warned(data={"train": None, "eval": {"rows": 20, "kept": 20, "cut": 2}})
    assert "2 of 20 evaluation responses" in text
    assert warned(data={"train": {**part, "kept": 1140, "cut": 57}}) == []
    assert len(warned(data={"train": {"rows": 3, "kept": 0, "cut": 0}})) == 1


# ---- Several runs


def comparison(path, values, label=None, **settings):
    """Runs that differ in their seeds, with these bits per byte."""
    folders = []
    for seed, value in enumerate(values):
        result = {**RESULT, "seed": seed, "metrics": {"eval_bits_per_byte": value, "eval_loss": 9.0}}
        result["settings"] = {**RESULT["settings"], **settings}
        result["method"] = settings.get("method", RESULT["method"])
        result["changed_settings"] = {"seed": [42, seed], "output_dir": [None, f"{path}{seed}"]}
        folders.append(folder(path.with_name(f"{path.name}-seed{seed}"), result))
        if label:
            (folders[-1] / "cell.json").write_text(json.dumps({"label": label, "seed": seed}))
    return folders


def compared(folders, output):
    page = report.compare_runs(folders, output)
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
    groups = report.grouped([report.read_run(path) for path in folders])
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
    assert report.mean_history([one, two]) == [
        {"step": 1, "a": 2.0},
        {"step": 2, "a": 3.0},
        {"step": 2, "eval_c": 1.5},
    ]


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


# ---- The command


def test_a_comparison_stands_for_its_cells(tmp_path, capsys):
    base = tmp_path / "grid" / "cells"
    comparison(base / "alm", [0.5, 0.75], label="alm-t1", method="alm")
    comparison(base / "sft", [0.75], label="sft", method="sft")
    (base / "uld-seed0").mkdir()
    assert report.main([str(tmp_path / "grid")]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / "grid" / "report" / name) for name in ("report.md", "report.html")]
    markdown = Path(printed[0]).read_text()
    assert markdown.startswith("# 3 runs: alm-t1, sft\n") and "left out: uld-seed0." in markdown


def test_one_run_and_output_dir(tmp_path, capsys):
    run = folder(tmp_path / "run")
    assert report.main([str(run)]) == 0 and (run / "report" / "report.md").is_file()
    for given in (["--output_dir", str(tmp_path / "a")], [f"--output-dir={tmp_path / 'b'}"]):
        assert report.main([*given, str(run)]) == 0
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()
    other = folder(tmp_path / "other")
    assert report.main([str(run), str(other), "--output_dir", str(tmp_path / "c")]) == 0
    assert "2 runs" in (tmp_path / "c" / "report.md").read_text()
    assert (
        "\n".join(capsys.readouterr().out.split()[-2:])
        == f"{tmp_path / 'c' / 'report.md'}\n{tmp_path / 'c' / 'report.html'}"
    )


def broken(path, name, content):
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(content)


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda run: (run / "result.json").unlink(), ["has no result.json", "hf-dskd train"]),
        (lambda run: ((run / "result.json").unlink(), (run / "checkpoint-3").mkdir()), ["resume_from_checkpoint"]),
        (lambda run: broken(run, "result.json", "{"), ["result.json'", "isn't valid JSON"]),
        (lambda run: broken(run, "result.json", "[1]"), ["result.json'", "names no method"]),
        (lambda run: broken(run, "trainer_state.json", "nothing"), ["trainer_state.json'", "isn't valid JSON"]),
        (lambda run: broken(run, "analysis/numbers.jsonl", '{"step": 0}\n{"st'), ["numbers.jsonl', line 2"]),
        (lambda run: broken(run, "analysis/samples.jsonl", "x\n"), ["samples.jsonl', line 1"]),
    ],
)
def test_a_bad_folder(spoil, expected, tmp_path):
    run = folder(tmp_path / "run")
    spoil(run)
    with pytest.raises(UserError) as error:
        report.main([str(run)])
    assert all(text in str(error.value) for text in [str(run), *expected]) and "\n" not in str(error.value)
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "nothing to report on"),
        (["nothere"], "'nothere' isn't a folder"),
        (["run", "--output_dir"], "--output_dir has no value"),
        (["run", "--seeds", "1"], "--seeds"),
        (["run", "other/../run"], "'other/../run' is named twice"),
        (["run", "other"], "--output_dir is not set"),
        (["grid"], "no finished run"),
    ],
)
def test_wrong_arguments(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "run"), folder(tmp_path / "other")
    (tmp_path / "grid" / "cells" / "sft-seed0").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        report.main(arguments)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_help_is_light():
    code = "import sys; from hf_dskd.analysis import report; report.main(['--help']); "
    code += "assert not {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hf-dskd report DIR" in done.stdout


def test_numbers_for_people():
    shown = {None: "–", 12345: "12,345", 1.0: "1", 0.123456: "0.1235", -0.5: "−0.5", 1e-5: "1e−05"}
    assert {value: report.number(value) for value in shown} == shown
    assert [report.number(value) for value in (True, 12345.6, math.nan, math.inf)] == ["yes", "12,346", "nan", "inf"]
    assert report._duration(59.6) == "1:00 min" and report._duration(3661) == "1:01:01 h"
