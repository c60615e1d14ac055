"""What lies in a folder that a user names, and isn't ours, stays as it is."""

import json

import pytest
import runs
import tiny
from trl import ScriptArguments

from hf_dskd import UserError, run
from hf_dskd.analysis.record import draw_projections
from hf_dskd.evaluation.protocol import EvaluationSettings, evaluate, parts
from hf_dskd.experiments import grid as compare
from hf_dskd.offline import packaged
from hf_dskd.run import smoke as run_smoke
from hf_dskd.run import teacher as run_teacher
from hf_dskd.teacher.responses import write_responses
from hf_dskd.training.run_folder import check_fresh
from hf_dskd.utils.files import write_text


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unused():
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    "files",
    [
        {"answers/dolly-greedy.jsonl": "mine, without an end"},
        {"references/dolly.jsonl": "{}\n"},
        {"scores.json": "[1]"},
        {"table.md": "mine"},
        {"evaluation.json": "not JSON"},
        {"evaluation.json": '{"some": "thing else"}', "answers/dolly-greedy.jsonl": "mine"},
        {"evaluation.json": "[]"},
    ],
    ids=str,
)
def test_an_evaluation_writes_over_its_own_files_only(tmp_path, files, monkeypatch):
    for name, text in files.items():
        write_text(tmp_path / name, text)
    before = content(tmp_path)
    monkeypatch.setattr("hf_dskd.evaluation.protocol.facts", lambda *_: {})
    with pytest.raises(UserError, match=r"choose another (--output_dir|folder)") as error:
        evaluate(EvaluationSettings("model", tmp_path, {}))
    assert "\n" not in str(error.value) and content(tmp_path) == before


def test_parts_of_an_answer_file_are_those_of_processes(tmp_path):
    for name in ("a.jsonl", "a.part0.jsonl", "a.part12.jsonl", "a.part.jsonl", "a.partner.jsonl", "b.part0.jsonl"):
        (tmp_path / name).touch()
    assert [path.name for path in parts(tmp_path / "a.jsonl")] == ["a.jsonl", "a.part0.jsonl", "a.part12.jsonl"]


@pytest.mark.parametrize(
    "files",
    [
        {"responses.jsonl": "mine, without an end"},
        {"responses.jsonl": "{}\n", "about.json": "not JSON"},
        {"about.json": "[1]"},
        {"about.json": '{"rows": 1}', "responses.jsonl": "mine"},
    ],
    ids=str,
)
def test_responses_of_nobody_knows_whom_are_left(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(UserError, match="choose another folder or delete this one"):
        write_responses(
            *(tiny.dataset(2), unused, runs._TEACHER_TOKENIZER, tmp_path),
            max_length=64,
            prompt_style="plain",
            facts={},
        )
    assert content(tmp_path) == before


def test_a_smoke_run_forgets_smoke_runs_only(tmp_path, monkeypatch):
    """A user's own run may be in a folder of such a name."""
    monkeypatch.setattr(run_smoke, "smoke_models", lambda student, teacher, folder: [student, teacher])
    folder = tmp_path / "is_no_smoke"
    arguments = ["--smoke", "--output_dir", str(folder), "--model_name_or_path", "student"]
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    given = run.parse(None, None, arguments)
    assert (folder / "checkpoint-2").is_dir() and (folder / "result.json").is_file()
    with pytest.raises(UserError, match="holds another run"):
        check_fresh(given.config.output_dir)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "checkpoint-4").symlink_to(elsewhere)
    (folder / "checkpoint-notes").mkdir()
    (folder / "tiny_models").mkdir()
    check_fresh(run.parse(None, None, arguments).config.output_dir)
    left = {path.name for path in folder.iterdir()} - {".run.lock"}
    assert left == {"checkpoint-notes", "tiny_models"} and elsewhere.is_dir()


def test_a_folder_in_the_place_of_the_trained_teacher_is_refused_before_it_is_trained(tmp_path):
    def given(**options):
        script = ScriptArguments(dataset_name="rows")
        return run.Run(script, runs.config(tmp_path), None, run.RunArguments(sft_teacher=True, **options))

    def train(teacher="org/teacher", **options):
        return run_teacher.train_teacher(given(**options), teacher, tiny.dataset(2))

    folder = tmp_path / "teacher"
    write_text(folder / "config.json", "{}")
    with pytest.raises(UserError, match=r"teacher', which is there and holds no teacher of a run"):
        train()
    assert content(tmp_path) == {"teacher/config.json": b"{}"}
    facts = run_teacher.teacher_facts(given(), "org/teacher", tiny.dataset(2))
    write_text(folder / "sft_teacher.json", json.dumps(facts))
    assert train() == str(folder)
    with pytest.raises(UserError, match=r"trained with teacher='org/teacher', which is now 'org/other'"):
        train("org/other")
    with pytest.raises(UserError, match=r"trained with sft_teacher_epochs=3.0, which is now 1.0: move it"):
        train(sft_teacher_epochs=1.0)


def test_a_folder_with_a_packaged_models_name_is_left(tmp_path):
    name = next(iter(packaged.PACKAGED_MODELS))
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"isn't a converted .*move it, or set"):
        packaged.packaged_model(name, tmp_path)
    assert content(tmp_path) == {f"{name}/model.safetensors": b"mine"}


def test_links_beside_a_file_are_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".result.json").symlink_to(tmp_path / "victim")
    write_text(tmp_path / "result.json", json.dumps({}))
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / "result.json").read_text() == "{}"


def test_folders_of_other_names_are_no_analyses(tmp_path):
    write_text(tmp_path / "step-by-step" / "vectors.safetensors", "mine")
    draw_projections(tmp_path)
    assert content(tmp_path) == {"step-by-step/vectors.safetensors": b"mine"}


@pytest.mark.parametrize("name", ["results.jsonl", "table.md", "table.png"])
def test_a_comparison_writes_over_its_own_table_only(tmp_path, name):
    (tmp_path / "base.yaml").write_text("dataset_name: x\n")
    write_text(tmp_path / "out" / name, "mine")
    arguments = ["--config", str(tmp_path / "base.yaml"), "--methods", "sft", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=f"has {name}, of no comparison: choose another folder"):
        compare.run_grid(compare.parse(arguments))
    assert content(tmp_path / "out") == {name: b"mine"}
    (tmp_path / "out" / "cells").mkdir()
    compare.check_folder(tmp_path / "out")
