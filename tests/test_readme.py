"""
Every code block of both READMEs, run as it stands against a stand-in of the hub with tiny models under the real names.

Only lengths are changed: steps, examples, words to generate, cells of a grid. `make` is asked what it would do, and
`--smoke` is left to tests/test_recipes.py. But for the first launch and runs of several processes, Python is one that
has its imports behind it.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from hub_stand_in import HubStandIn
from test_recipes import RECIPES
from warm import WarmPython

from hf_dskd.evaluation.sets import HUB_SETS
from hf_dskd.offline.packaged import FORMAT_VERSION, MARKER, PACKAGED_MODELS
from hf_dskd.offline.tiny_models import tiny_model


ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "recipes/README.md")
MODELS = {
    "openai-community/gpt2": "student",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "student",
    "Qwen/Qwen1.5-1.8B": "teacher",
    "Qwen/Qwen2.5-1.5B-Instruct": "teacher",
}
# What makes a command short, by how it begins.
TRAINING = "--max_steps 2 --train_size 8 --held_out_size 4 --max_length 256 --total_batch_size 8"
SHORT = {
    r"accelerate launch .*recipes/": TRAINING,
    r"python recipes/your_pair.py": "--held_out_size 4",
    r"hf-dskd (train|cache-teacher) ": TRAINING,
    r"hf-dskd compare ": f"{TRAINING} --methods dskd_cma --seeds 0 --analysis_examples 2",
    r"hf-dskd evaluate ": "--max_length 264 --limit 1",
    r"hf-dskd analyse ": "--examples 2",
}
PYTHON = {
    r"max_steps=\d+": "max_steps=2",
    r"gradient_accumulation_steps=\d+": "gradient_accumulation_steps=1",
    r"bf16=True,": "bf16=True, use_cpu=True, max_steps=2,",  # without a GPU transformers wants to be told
    r"n_trials=\d+": "n_trials=2",
    r"train_test_split\(100,": "train_test_split(8,",
}


def blocks(readme):
    """Language, first line and content of every fenced block."""
    text = (ROOT / readme).read_text()
    assert len(re.findall("^```", text, re.M)) % 2 == 0
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [(match[1], text.count("\n", 0, match.start()) + 2, match[2]) for match in found]


def commands(content):
    lines = content.replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
    return [line for line in stripped if line]


BLOCKS = [(readme, line, language, content) for readme in READMES for language, line, content in blocks(readme)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    rows = [
        {"instruction": row["prompt"], "context": "", "response": row["completion"], "category": "open_qa"}
        for row in tiny.dataset(520)
    ]
    with HubStandIn() as hub:
        for name, role in MODELS.items():
            hub.add(name, tiny_model(name, folder / name, role))
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        hub.add("databricks/databricks-dolly-15k", {"databricks-dolly-15k.jsonl": data}, repo_type="dataset")
        questions = "".join(
            json.dumps({"instruction": row["instruction"], "input": "", "prompt": "", "output": row["response"]})
            + "\n"
            for row in rows[:2]
        )
        for place in HUB_SETS.values():
            hub.add(place.repository, {place.file: questions.encode()}, repo_type="dataset")
        yield hub


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """A cache in which the packaged models are there, tiny."""
    cache = tmp_path_factory.mktemp("cache")
    for (name, model), role in zip(PACKAGED_MODELS.items(), ("student", "teacher")):
        tiny_model(name, cache / name, role)
        marker = {"name": name, "sha256": model.sha256, "format_version": FORMAT_VERSION}
        (cache / name / MARKER).write_text(json.dumps(marker))
    return cache


@pytest.fixture(scope="module")
def run(hub, packaged, tmp_path_factory):
    """Runs a command in a folder that has of the repository what the commands need."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("recipes", "hf_dskd", "Makefile", "constraints.txt", "pyproject.toml", "README.md", "LICENSE"):
        (folder / name).symlink_to(ROOT / name)
    environment = hub.environment(tmp_path_factory.mktemp("home"))
    environment |= {"HF_DSKD_CACHE": str(packaged), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

    with WarmPython(environment) as warm:

        def run(command, warmly=False):
            if not warmly:
                done = subprocess.run(
                    command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400
                )
            elif command[0] == sys.executable:
                done = warm(command[:1], folder, code=command[2])
            else:
                done = warm(command, folder)
            assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
            return done.stdout

        run.folder, run.done, run.fresh = folder, set(), {"accelerate launch"}
        yield run


def shortened(command):
    return " ".join([command, *(flags for start, flags in SHORT.items() if re.match(start, command))])


def run_command(run, command):
    if command in run.done:  # in both READMEs
        return
    run.done.add(command)
    words = shlex.split(command)
    if re.fullmatch(r"(accelerate launch|python) recipes/\w+\.py --smoke", command):
        assert Path(words[-2]).stem in RECIPES
        return
    if words[0] == "make":
        assert "bin/python" in run(["make", "--dry-run", f"VENV={run.folder / 'venv'}", *words[1:]])
        return
    if words[:2] == ["pip", "install"]:
        run([sys.executable, "-m", *words, "--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"])
        return
    kind = next((kind for kind in ("accelerate launch", "python", "hf-dskd") if command.startswith(f"{kind} ")), None)
    words, fresh = shlex.split(shortened(command)), kind in run.fresh
    run.fresh.discard(kind)
    if fresh or kind is None or "--num_processes" in command or re.search(r"[|>&;$]", command):
        run(["bash", "-c", shortened(command)])
    else:
        run(words if kind == "hf-dskd" else words[len(kind.split()) :], warmly=True)


def run_block(run, language, content):
    if language == "bash":
        for command in commands(content):
            run_command(run, command)
    else:
        for long, short in PYTHON.items():
            content = re.sub(long, short, content)
        run([sys.executable, "-c", content], warmly=True)


def test_blocks_run(run, hub):
    """In their order, for later ones look at what earlier ones trained."""
    for readme, line, language, content in BLOCKS:
        assert language in ("bash", "python"), f"{readme}:{line} is in no language that this test runs"
        try:
            run_block(run, language, content)
        except BaseException as error:
            error.add_note(f"{readme}:{line}")
            raise
    # The runs are whole, the pushes arrived.
    finished = {path.parent.name for path in (run.folder / "runs").glob("*/result.json")}
    assert {"gpt2_qwen", "alm", "cached", "two_processes", "sft_teacher"} <= finished
    assert {"model.safetensors", "result.json", "report"} <= {*os.listdir(run.folder / "gpt2-distilled")}
    assert "README.md" in hub.files("ann/gpt2-from-qwen")


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme):
    text = (ROOT / readme).read_text()
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", text)
    paths = [a or b for a, b in targets if not (a or b).startswith("http")]
    assert len(paths) > 0 or readme != "README.md"
    for path in paths:
        assert ((ROOT / readme).parent / path).exists(), path
    anchors = [anchor for _, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", text)]
    for place, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#([^)]+)\)", text):
        target = (ROOT / readme).parent / place if place else ROOT / readme
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
        assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, anchor
    assert anchors or readme != "README.md"
