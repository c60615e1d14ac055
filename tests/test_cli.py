"""`hf-dskd`: what it answers at once, and how errors look."""

import subprocess
import sys
import time

import pytest

from hf_dskd import cli
from hf_dskd.methods import METHODS


def hf_dskd(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "hf_dskd.cli", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "hf-dskd compare"),
        (["--help"], "hf-dskd compare"),
        (["train", "--help"], "--kd_temperature"),
        (["cache-teacher", "--help"], "--teacher_cache"),
        (["compare", "--help"], "--variants"),
        (["methods", "--help"], "aligned"),
        (["methods"], "dskd_cma_ga"),
    ],
)
def test_help_and_methods_answer_without_heavy_imports(arguments, expected):
    start = time.perf_counter()
    code = (
        "import sys\nfrom hf_dskd import cli\ntry:\n    cli.main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    assert not end.code\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert expected in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    # Loosely, since machines are busy: an import of torch alone takes longer.
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["trian"], "did you mean 'train'"),
        (["methods", "sft"], "'sft'"),
        (["compare", "--methods", "sft"], "--output_dir is not set"),
        (["train", "--config", "nothere.yaml"], "nothere.yaml"),
        (["train", "--config"], "''"),
        (["train", "--output_dir", "out", "--kd_temprature", "1"], "--kd_temprature"),
        (["train", "--output_dir", "out", "--max_steps", "many"], "'many'"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, expected):
    done = hf_dskd(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0] and done.stdout == ""


@pytest.mark.parametrize("width", [50, 80, 200])
def test_methods_table_has_every_method_within_the_width(width):
    text = cli.methods_table(width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines if line and not line.startswith(" ")] == ["method", *METHODS]
    words = " ".join(text.split())
    assert all(method.summary in words for method in METHODS.values())
