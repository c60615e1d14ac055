"""A `result.json` is written and read as one typed record, and those of earlier versions are read."""

import json

import pytest
from run_folders import RESULT, folder

from hf_dskd.report.one import write_report
from hf_dskd.report.record import Card, Data, Hardware, Models, RunRecord, note_card
from hf_dskd.settings import DistillationSettings


pytestmark = pytest.mark.usefixtures("undrawn")


# As the first version wrote it, and as the second did: without an id of the run, commits and a fingerprint.
FIRST = """{"method": "dskd_cma", "seed": 1, "data_seed": null, "steps": 60, "best_checkpoint": null,
 "metrics": {"eval_bits_per_byte": 0.71, "epoch": 1.0}, "evaluations": {"20": {"eval_bits_per_byte": 0.8}},
 "train_runtime": 12.5, "versions": {"torch": "2.13.0"},
 "settings": {"method": "dskd_cma", "kd_rate": 0.25, "of_then": 1}}"""
SECOND = """{"method": "dskd_cma_ga", "seed": 0, "data_seed": 0, "steps": 2, "best_checkpoint": "checkpoint-1",
 "metrics": {"eval_loss": 5.1}, "evaluations": {}, "train_runtime": null, "command": "hf-dskd train",
 "finished": "2026-11-23T10:00:00+00:00", "versions": {"hf_dskd": "0.1.0", "torch": "2.13.0"},
 "hardware": {"cpu": "C", "cores": 2, "memory_gb": 25.3, "gpus": [], "processes": 1},
 "models": {"student": "student", "teacher": "teacher", "student_parameters": 10, "trained_parameters": 4,
 "teacher_parameters": 30, "adapter": true, "base_model": "a/b", "student_type": "gpt2", "student_bits": null},
 "data": {"source": "rows.jsonl", "train": {"rows": 8, "kept": 7}, "eval_code": {"rows": 2, "kept": 2}},
 "settings": {"method": "dskd_cma_ga"}, "changed_settings": {"learning_rate": [5e-05, 0.001]},
 "card": {"language": "en", "tags": ["mine"]}}"""


def read(path, text):
    path.write_text(text)
    return RunRecord.read(path)


def test_files_of_earlier_versions(tmp_path):
    first = read(tmp_path / "first.json", FIRST)
    assert first.steps == 60 and first.evaluations == {20: {"eval_bits_per_byte": 0.8}} and first.run_id is None
    assert first.models == Models() and first.data == Data() and first.hardware is None and first.card == Card()
    assert first.changes["kd_rate"] == (DistillationSettings().kd_rate, 0.25) and "of_then" not in first.changes
    assert first.all_settings["of_then"] == 1
    second = read(tmp_path / "second.json", SECOND)
    assert second.models.adapter and second.models.student_commit is None and second.models.pair == "student ← teacher"
    assert second.hardware == Hardware("C", 2, 25.3, [], 1)
    assert (
        second.data.rows("train") == 7
        and second.data.rows("eval") is None
        and set(second.data.splits) == {"train", "eval_code"}
    )
    assert second.changes == {"learning_rate": (5e-05, 0.001)} == second.changes and second.card.tags == ["mine"]


@pytest.mark.parametrize("text", [FIRST, SECOND])
def test_what_is_written_is_read_again(text, tmp_path):
    record = read(tmp_path / "result.json", text)
    record.write(tmp_path / "again.json")
    assert RunRecord.read(tmp_path / "again.json") == record
    then, now = json.loads(text), json.loads((tmp_path / "again.json").read_text())
    parts = ("models", "data")
    assert {name: now[name] for name in then if name not in parts} == {n: then[n] for n in then if n not in parts}
    assert all(then.get(part, {}).items() <= now[part].items() for part in parts)
    write_report(folder(tmp_path / "run", then))


def test_a_card_is_added_and_all_else_stays(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**RESULT, "of_a_later_version": 1}))
    note_card(path, {"language": "de"})
    assert json.loads(path.read_text()) == {**RESULT, "of_a_later_version": 1, "card": {"language": "de"}}
    assert RunRecord.read(path).card == Card("de")


def test_models_with_their_commits():
    models = Models("a", "b/c", student_commit="1" * 40, teacher_adapts="d", teacher_adapts_commit="2" * 40)
    assert models.with_commit("student") == f"a at {'1' * 40}"
    assert models.with_commit("teacher") == f"b/c, an adapter of d at {'2' * 40}"
