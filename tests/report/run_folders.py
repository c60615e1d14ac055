"""Folders as runs leave them, and what is looked up in their reports."""

import html.parser
import json

from hf_dskd.report.one import write_report


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
    "seed": 7,
    "data_seed": 3,
}
ANALYSES = [
    {"step": 0, "chunk_mass": 0.25, "chunk_mass_uniform": 0.2, "mmd": 0.5, "gradient_norm_ce": 3.0}
    | {"gradient_norm_t2s_kd": 0.75, "gradient_norm_kq": 0.25},
    {"step": 100, "chunk_mass": 0.5, "chunk_mass_uniform": 0.2, "mmd": 0.125, "gradient_norm_ce": 1.0}
    | {"gradient_norm_t2s_kd": 0.5, "gradient_norm_kq": 0.5},
]
PNG = b"\x89PNG not really"
NASTY = '<script>alert("1")</script> & `code` **bold** _it_ [a](b) | $x$ ~~no~~ \\ \x00\ud800 # x'


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


def written(path, *arguments):
    """Markdown and HTML of the report on a folder."""
    page = write_report(path, *arguments)
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
