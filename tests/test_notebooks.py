"""Every notebook: run with tiny models in a kernel of its own, and looked at as it is committed."""

import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.provisioning import local_provisioner
from nbclient import NotebookClient
from warm import forked


ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/hf-dskd/hf_dskd/blob/main/notebooks"
PACKAGE = '"hf-dskd[demo] @ git+https://github.com/hf-dskd/hf_dskd"'
LARGEST = 400_000  # bytes
MOST_LINES = 25  # of a code cell
# Where machines keep files. After a letter, a dot or another slash it is part of an address or of a relative path.
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(home|root|tmp|usr|opt|mnt|srv|work\w*|var|private|Users)/\w|\b[A-Z]:\\\w")
NOISE = re.compile(r"\d+%\|| it/s|s/it|<progress|Warning: ")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures(notebook):
    return [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


def text_of(output):
    """What a reader sees of an output, pictures aside."""
    shown = [str(content) for kind, content in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join([output.get("text", ""), *shown])


def check_counts(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"quickstart", "your_pair"}


class KernelInFork:
    """What a manager of kernels sees as the process of one; it ends when it is asked to."""

    pid, stdin, stdout, stderr = -1, None, None, None

    def __init__(self, command, cwd, **_):
        code = (
            "import matplotlib\nfrom ipykernel.kernelapp import launch_new_instance\n"
            "matplotlib.use('module://matplotlib_inline.backend_inline')\nlaunch_new_instance()"
        )
        arguments = command[command.index("-f") :]
        options = {"cwd": cwd, "environment": {"HF_DSKD_MODELS": os.environ["HF_DSKD_MODELS"]}}
        self.done = ThreadPoolExecutor(1).submit(forked, code, *arguments, **options)

    def poll(self):
        return self.wait() if self.done.done() else None

    def wait(self):
        return self.done.result().returncode

    def send_signal(self, number):
        """An interrupt comes before the request to end, which is heeded."""


def test_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DSKD_MODELS", "tiny")
    monkeypatch.setattr(local_provisioner, "launch_kernel", KernelInFork)
    committed = list(map(text_of, outputs(notebook)))
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    # Raises at the first error.
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    check_counts(notebook)
    # It doesn't raise where a cell catches what it shows.
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert pictures(notebook)
    assert list(map(text_of, outputs(notebook))) != committed  # which real models gave


def test_outputs_are_of_one_run(notebook):
    check_counts(notebook)


def test_outputs_are_no_noise(notebook):
    for output in outputs(notebook):
        assert output.output_type != "error", output.get("evalue")
        assert output.get("name") != "stderr", output.text
        assert not NOISE.search(text_of(output)), text_of(output)


def test_has_pictures_and_is_small(path, notebook):
    assert pictures(notebook)
    assert path.stat().st_size < LARGEST


def test_names_no_folder_of_a_machine(notebook):
    for text in [*map(text_of, outputs(notebook)), *(cell.source for cell in notebook.cells)]:
        found = MACHINE_PATH.search(text)
        assert found is None, text[max(found.start() - 60, 0) : found.end() + 60]


@pytest.mark.parametrize("text", ["/home/ann/x", "in '/tmp/abc'", "(/root/x)", "path=/workspace/a/b", "C:\\Users"])
def test_knows_folders_of_a_machine(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://hf.co/home/x", "analysis/step-0/tmp/a", "bits/byte", "a / b", "Eq:\\nx"])
def test_leaves_other_slashes_alone(text):
    assert not MACHINE_PATH.search(text)


def test_begins_with_a_badge_and_a_sentence(path, notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert f"badge.svg)]({COLAB}/{path.name})" in first.source
    words = re.sub(r"\[!\[.*?\]\(.*?\)\]\(.*?\)|^#.*$", "", first.source, flags=re.M).split()
    assert 8 <= len(words) <= 60


@pytest.mark.parametrize("there", [True, False])
def test_installs_first_where_it_has_to(notebook, monkeypatch, there):
    first, *others = code_cells(notebook)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there and name == "hf_dskd" else None)
    installed = []
    shell = SimpleNamespace(run_line_magic=lambda *words: installed.append(" ".join(words)))
    exec(TransformerManager().transform_cell(first.source), {"get_ipython": lambda: shell})
    assert installed == ([] if there else [f"pip install -q {PACKAGE} torchvision"])
    assert not any(re.search(r"^\s*[%!]\s*(pip|uv|apt|conda)", cell.source, re.M) for cell in others)


def test_one_variable_says_where_models_come_from(notebook):
    cells = code_cells(notebook)
    assert 'MODELS = os.environ.get("HF_DSKD_MODELS", "hub")' in cells[1].source
    code = "\n".join(cell.source for cell in cells)
    assert len(re.findall(r"environ|getenv", code)) == 1
    for way in ("hub", "packaged", "tiny"):
        assert f'"{way}"' in code or (way == "tiny" and "tiny_model(" in code)


def test_cells_are_short(notebook):
    for cell in code_cells(notebook):
        lines = cell.source.splitlines()
        assert 0 < len(lines) <= MOST_LINES and max(map(len, lines)) <= 119, cell.source


def test_errors_stop_it(notebook):
    # A cell under %%capture fails without an error that stops those after it.
    assert not any("%%capture" in cell.source for cell in code_cells(notebook))


def test_is_a_valid_file(notebook):
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_names_files_that_are_there(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for name in re.findall(r"`(\w+\.ipynb)`", text):
        assert (ROOT / "notebooks" / name).is_file(), name
    for name in re.findall(r"\brecipes/[\w.]+\w", text):
        assert (ROOT / name).is_file(), name
