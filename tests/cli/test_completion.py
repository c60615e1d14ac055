"""`hf-dskd completion`, by the shells themselves."""

import shutil
import subprocess
import sys

import pytest

from hf_dskd import cli
from hf_dskd.cli import completion
from hf_dskd.errors import UserError
from hf_dskd.methods import DIVERGENCES, METHODS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for shell in completion.SHELLS:
        (folder / shell).write_text(completion.script(shell), encoding="utf-8")
    return folder


@pytest.fixture
def offers(scripts, tmp_path):
    """What bash offers for the last word of a command line."""
    (tmp_path / "run.yaml").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "runs").mkdir()

    def run(*words):
        code = (
            'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_hf_dskd; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        command = ["bash", "--norc", "-c", code, str(scripts / "bash"), "hf-dskd", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    return run


def test_bash_completes_commands_and_options_of_each(offers):
    assert offers("tr") == {"train"} and set(cli.COMMANDS) <= offers("")
    of_teacher = {"--teacher_model_name_or_path", "--teacher_model_init_kwargs", "--teacher_model_revision"}
    assert offers("train", "--teacher_m") == of_teacher
    every = offers("train", "--")
    assert {"--config", "--kd_rate", "--learning_rate", "--lora_r", "--dataset_name", "--rename_columns"} <= every
    assert not any("-" in name[2:] for name in every)  # one spelling of each
    assert {"--methods", "--variants", "--num_processes", "--kd_rate"} <= offers("compare", "--")
    assert "--methods" not in every
    evaluate = offers("evaluate", "--")
    assert {"--model", "--sets", "--top_p", "--greedy_only"} <= evaluate and "--kd_rate" not in evaluate
    assert {"--examples", "--config", "--output_dir"} <= offers("analyse", "--")


def test_bash_completes_values(offers):
    assert offers("train", "--method", "dskd_") == {name for name in METHODS if name.startswith("dskd_")}
    assert offers("cache-teacher", "--divergence", "") == set(DIVERGENCES)
    assert offers("train", "--teacher_dtype", "b") == {"bfloat16"}
    assert offers("train", "--use_peft", "") == {"true", "false"}
    assert "cosine" in offers("train", "--lr_scheduler_type", "co")


def test_bash_completes_files_and_folders(offers):
    assert offers("train", "--config", "ru") == {"run.yaml", "runs"}
    assert offers("train", "--config", "no") == set()
    assert offers("train", "--output_dir", "ru") == {"runs"}
    assert offers("analyse", "ru") == {"runs"}
    assert "notes.txt" in offers("train", "--dataset_name", "no")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_scripts_are_valid(scripts, shell):
    text = (scripts / shell).read_text(encoding="utf-8")
    assert all(name in text for name in (*cli.COMMANDS, "kd_temperature", "dskd_cma_ga"))
    # A line of the commands' own help is shown beside them, in the shells that show one.
    assert shell == "bash" or "One page about a run" in text
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here to read the script")
    subprocess.run([shell, "-n", str(scripts / shell)], check=True, timeout=60)


def test_errors_are_one_line():
    for words, expected in ((["bahs"], "did you mean 'bash'"), (["bash", "zsh"], "one shell")):
        with pytest.raises(UserError, match=expected):
            cli.run(["completion", *words])


def test_without_shtab_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(UserError, match=r"needs the package shtab: pip install 'hf-dskd\[completion\]'"):
        cli.run(["completion", "bash"])


def test_first_sentences():
    assert completion.first_sentence("The rate,\n  0.5 or so. It matters.") == "The rate, 0.5 or so"
