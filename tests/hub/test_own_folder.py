"""A run's folder: its card, links in it, names and addresses on the hub."""

import json
import os
import shutil
import sys

import pytest
import runs
import tiny
from hub_runs import of_pair
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from hf_dskd import DSKDConfig, UserError, cli
from hf_dskd.hub.card import model_card, write_own_card
from hf_dskd.hub.folder import write_model_folder
from hf_dskd.report.one import write_report


pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made["adapter"], tmp_path / "run")


# ---- The card


def test_no_save_of_an_adapter_has_pefts_card(made):
    folder = made["adapter"]
    assert [path.name for path in folder.glob("checkpoint-*")] and not list(folder.rglob("README.md"))


def test_a_finished_run_has_its_card_and_loads(models, tmp_path):
    lora = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    student = AutoModelForCausalLM.from_pretrained(models[0])
    trainer = runs.trainer(
        tmp_path / "out",
        student=student,
        peft_config=lora,
        method="dskd_cma",
        max_steps=1,
        eval_dataset=tiny.dataset(2),
    )
    trainer.train()
    trainer.evaluate()
    trainer.write_report()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "hf_dskd" in ModelCard(card).data.tags and "dskd_cma" in card
    assert str(tmp_path) not in card and str(models[0].parent) not in card
    # Another save leaves it as it is, and the adapter still knows where its base lies.
    trainer.save_model()
    assert (tmp_path / "out" / "README.md").read_text() == card
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models[0])
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models[0]), tmp_path / "out")
    # Of the user's own object nothing is changed.
    trainer.model.save_pretrained(tmp_path / "by_peft")
    assert "peft" in (tmp_path / "by_peft" / "README.md").read_text()


def test_somebody_elses_readme_stays(run):
    metadata = [f"---\n{text}\n---\n" for text in ("my notes", "- a\n- b", "a: [", "tags: 5")]
    for text in ("# My project\n", *metadata):
        (run / "README.md").write_text(text)
        write_own_card(run, None)
        assert (run / "README.md").read_text() == text
    (run / "README.md").unlink()
    for name in ("ann/first", "ann/second"):
        write_own_card(run, name)
        assert name in (run / "README.md").read_text()


# ---- Links


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "alignment.png", "analysis/samples.jsonl", "evaluation", "generation_config.json", "new"],
)
def test_links_out_of_a_run_are_refused(run, tmp_path, name):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "scores.json").write_text("{}")
    target = secret if name == "evaluation" else secret / "scores.json"
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    # Either as seen from where it lies, or from everywhere.
    path.symlink_to(os.path.relpath(target, path.parent) if name == "evaluation" else target)
    for call in (
        lambda: write_model_folder(run, tmp_path / "pushed", "ann/x", online=False),
        lambda: write_report(run),
        lambda: model_card(run, online=False),
        lambda: write_own_card(run, None),
    ):
        with pytest.raises(UserError, match=r"is a link out of the run's folder, which isn't followed") as error:
            call()
        assert str(path) in str(error.value)
    assert not (tmp_path / "pushed").exists()


def test_links_within_a_run_and_what_isnt_read_are_fine(run, tmp_path, models):
    (run / "files").mkdir()
    (run / "adapter_model.safetensors").rename(run / "files" / "adapter")
    (run / "adapter_model.safetensors").symlink_to("files/adapter")
    shutil.move(run / "checkpoint-1", tmp_path / "elsewhere")
    (run / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    (run / ".venv" / "bin").mkdir(parents=True)
    (run / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (run / "data").symlink_to(tmp_path / "elsewhere")
    linked = tmp_path / "linked"
    linked.symlink_to(run)
    pushed = write_model_folder(linked, tmp_path / "pushed", "ann/x", online=False)
    assert not (pushed / "adapter_model.safetensors").is_symlink()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models[0]), pushed)
    assert not any((pushed / name).exists() for name in ("files", "data", ".venv"))
    assert write_report(linked).is_file()


# ---- Names and addresses


def test_names_of_repositories_are_checked_before_work(made, tmp_path):
    names = ["a b/c", "ann/two/three", "ann/", "/c", "ann/my--model", "ann/my..model", "ann/.git", "x.git", "é/c"]
    for name in [*names, "a" * 97, "ann/-x", "https://huggingface.co/ann/x", "ann\\x", "../x"]:
        with pytest.raises(UserError, match=r"^.*can't name a repository .*write hub_model_id as NAMESPACE/NAME$"):
            DSKDConfig(str(tmp_path), push_to_hub=True, hub_model_id=name, report_to="none")
        with pytest.raises(UserError, match=r"can't name a repository .*write REPO as NAMESPACE/NAME"):
            cli.run(["push", str(made["adapter"]), name, "--dry_run", str(tmp_path / "pushed")])
        assert not (tmp_path / "pushed").exists()
    # A folder whose name would be the repository's.
    with pytest.raises(UserError, match=r"'my run' can't name a repository"):
        DSKDConfig(str(tmp_path / "my run"), push_to_hub=True, report_to="none")
    for options in ({"push_to_hub": True, "hub_model_id": "ann/my-run"}, {}):
        DSKDConfig(str(tmp_path / "my run"), report_to="none", **options)


def test_links_of_a_card_lead_to_the_endpoint(run, monkeypatch):
    of_pair(run, "base/gpt2-tiny", "base/qwen-tiny", "base/rows")
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example.org")
    text = str(model_card(run, online=False))
    for link in ("/base/gpt2-tiny", "/base/qwen-tiny", "/datasets/base/rows"):
        assert f"(https://hub.example.org{link})" in text
    assert "huggingface.co" not in text
