"""`hf-dskd`: what it answers at once, and how errors look."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import fields

import pytest
from warm import ROOT, run_command

from hf_dskd import cli
from hf_dskd.cli.methods import PARTS, markdown_methods, methods_table, part_table
from hf_dskd.launch import command
from hf_dskd.methods import METHODS
from hf_dskd.run.arguments import GROUPS
from hf_dskd.run.settings import RunArguments
from hf_dskd.settings import DistillationSettings


HELP = {
    "": ["compare", "--version", "methods and variants of settings"],
    "train": ["--kd_temperature (2.0)", "Divergence and temperature:", "--resume_from_checkpoint last"],
    "cache-teacher": ["--teacher_cache", "accelerate launch"],
    "compare": ["--variants", "with commas between"],
    "evaluate": ["--greedy_only", "of dolly, self_inst"],
    "analyse": ["RUN", "--examples N"],
    "report": ["hf-dskd report DIR", "several runs"],
    "push": ["hf-dskd push RUN REPO", "HF_TOKEN"],
    "methods": ["aligned"],
    "doctor": ["--json"],
    "completion": ["~/.config/fish/completions", "hf-dskd completion zsh >"],
}


def test_help_answers_without_heavy_imports():
    code = """
import contextlib, io, json, sys
from hf_dskd import cli
heavy, found = ("torch", "transformers", "trl", "datasets", "numpy", "peft", "yaml", "shtab", "huggingface_hub"), []
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.run([*command.split(), "--help"]) == 0
    found.append([printed.getvalue(), [name for name in heavy if name in sys.modules]])
print(json.dumps(found))
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *HELP], capture_output=True, text=True, timeout=60)
    for expected, (printed, loaded) in zip(HELP.values(), json.loads(done.stdout), strict=True):
        assert loaded == [] and all(text in printed for text in expected), printed
    # Loosely, since machines are busy: an import of torch alone takes longer.
    assert time.perf_counter() - start < 3


def test_what_answers_without_a_word_more(capsys):
    for words, expected in (
        ([], "hf-dskd COMMAND"),
        (["analyse"], "hf-dskd analyse RUN"),
        (["completion"], "bash|zsh"),
    ):
        assert cli.run(words) == 0 and expected in capsys.readouterr().out
    assert cli.run(["methods"]) == 0 and "dskd_cma_ga" in capsys.readouterr().out


def test_every_setting_has_a_group_of_its_kind():
    """A setting that is added belongs to the group before it."""
    settings = [setting.name for kind in (RunArguments, DistillationSettings) for setting in fields(kind)]
    assert [name for name in settings if name in GROUPS] == list(GROUPS)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_reader_that_has_had_enough_ends_it_quietly():
    command = f"{shlex.quote(sys.executable)} -m hf_dskd.cli train --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith("usage: hf-dskd train")
    assert done.stdout.splitlines()[1] in ("0", "141")


def test_other_broken_pipes_are_errors():
    def fail():
        raise BrokenPipeError("a worker is gone")

    with pytest.raises(BrokenPipeError, match="a worker"):
        command(fail)


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
    done = run_command("hf-dskd", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0] and done.stdout == ""


@pytest.mark.parametrize("width", [50, 80, 200])
def test_methods_table_has_every_method_within_the_width(width):
    text = methods_table(width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines if line and not line.startswith(" ")] == ["method", *METHODS]
    words = " ".join(text.split())
    assert all(method.summary in words for method in METHODS.values())


@pytest.mark.parametrize("setting", PARTS)
def test_tables_of_parts_have_every_row_within_the_width(setting):
    lines = part_table(setting, 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [setting, *PARTS[setting]]
    words = " ".join(" ".join(lines).split())
    assert all(row.formula in words and row.source in words for row in PARTS[setting].values())


def test_the_readme_has_the_table_of_methods():
    """After a change of a row: print(hf_dskd.cli.methods.markdown_methods())."""
    assert f"\n\n{markdown_methods()}\n\n" in (ROOT / "README.md").read_text(encoding="utf-8")
