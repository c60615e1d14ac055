"""The trainer and `hf-dskd train` with `push_to_hub`, against the stand-in of the hub."""

import json
import re
import textwrap
from pathlib import Path

import pytest
import runs
import tiny

from hf_dskd import UserError
from hf_dskd.run.smoke import smoke_flags


@pytest.fixture
def python(served, hub):
    """Runs code, or a command without any, with a hub that is the stand-in."""
    tests = Path(runs.__file__).parent

    def run(folder, code, *words, token=None):
        options = {"environment": {"HF_TOKEN": token} if token else {}, "paths": (str(tests),)}
        done = served[1](list(words) or ["-c"], folder, code and textwrap.dedent(code), **options)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    return run


def test_a_trainer_pushes_once_with_a_card_of_its_run(hub, python, tmp_path):
    """Also after a first run in the same folder, which is overwritten and whose result must not be told again."""
    lines = python(
        tmp_path,
        f"""
        import runs, tiny
        for steps in (1, 2):
            trainer = runs.trainer(
                {str(tmp_path / "out")!r}, push_to_hub=True, hub_model_id="tiny-student", max_steps=steps,
                eval_dataset=tiny.dataset(4), push_auxiliary_to_hub=steps == 2, hub_token="hf_write",
            )
            trainer.args.overwrite_output_dir = True  # a setting of transformers 4
            trainer.train()
            trainer.evaluate()
            if steps == 1:
                trainer.create_model_card("de", "mit", dataset_name="ann/first")
        # As run_clm.py of transformers does it.
        told = {{"finetuned_from": "x", "tasks": "text-generation", "language": "en", "tags": "mine"}}
        told |= {{"dataset_tags": "ann/data", "dataset_args": "plain", "dataset": "ann/data plain"}}
        print(trainer.push_to_hub(dataset_name="ann/data", **told).commit_url)
        print(trainer.push_to_hub("in the background", blocking=False).result().commit_url)
        """,
    )
    assert lines[-2].startswith(f"{hub.url}/ann/tiny-student/commit/")
    [pushed] = hub.commits  # the second push had nothing new
    files = {"README.md", "model.safetensors", "images/curves.png", "auxiliary/projectors.safetensors"}
    assert pushed.repo_id == "ann/tiny-student" and files <= set(pushed.added)
    assert not any(name.startswith(("checkpoint", "training_args", "result")) for name in pushed.added)
    card = pushed.added["README.md"].decode()
    assert "ann/data" in card and "ann/first" not in card and "| optimizer steps | 2 |" in card
    assert "hf_write" not in card and str(tmp_path) not in card
    assert "| teacher | a model whose origin was not recorded" in card
    assert "\nlanguage: en\n" in card and "\n- mine\n" in card and "\ndatasets:\n- ann/data\n" in card
    # What create_model_card left beside the run of one step.
    first = (tmp_path / "out" / "README.md").read_text()
    assert all(text in first for text in ("\nlanguage: de\n", "\nlicense: mit\n", "ann/first"))
    assert (tmp_path / "out" / "images" / "curves.png").is_file()
    assert "hf_write" not in (tmp_path / "out" / "result.json").read_text()


def test_the_command_pushes_last_and_keeps_the_token_to_itself(hub, python, tmp_path):
    options = f"""train --smoke --model_name_or_path gpt2 --teacher_model_name_or_path Qwen/Qwen1.5-1.8B --max_steps 1
        --output_dir {tmp_path / "out"} --push_to_hub --hub_model_id by-command --hub_token hf_write"""
    lines = python(tmp_path, None, "hf-dskd", *options.split())
    assert lines[-1].startswith(f"{hub.url}/ann/by-command/commit/")
    [commit] = hub.commits
    assert commit.repo_id == "ann/by-command"
    # Drawn after the evaluation, which is why the push is the last of all.
    assert "images/alignment.png" in commit.added
    for name in ("result.json", "settings.yaml"):
        assert "hf_write" not in (tmp_path / "out" / name).read_text(), name
    assert "--hub_token ..." in json.loads((tmp_path / "out" / "result.json").read_text())["command"]


@pytest.mark.parametrize("token, expected", [(None, "without a token"), ("hf_read", "role 'read'")])
def test_rights_are_checked_before_models_are_loaded(python, tmp_path, token, expected):
    lines = python(
        tmp_path,
        f"""
        import runs, tiny
        from hf_dskd import UserError, run
        from hf_dskd.training import pair, prepare
        from hf_dskd.teacher import load
        def never(*args, **kwargs):
            raise AssertionError("loaded")
        load.load_causal_lm = pair.load_causal_lm = prepare.tokenize_dataset = never
        from hf_dskd.run import teacher, training
        training.load_data = teacher.train_teacher = never
        options = "--push_to_hub --hub_model_id ann/other --sft_teacher --dataset_name x --output_dir out"
        options += " --model_name_or_path ann/student --teacher_model_name_or_path ann/teacher"
        try:
            run.train(run.parse(None, None, options.split()))
        except UserError as error:
            print(error)
        try:
            runs.trainer({str(tmp_path / "out")!r}, push_to_hub=True, hub_model_id="ann/other")
        except UserError as error:
            print(error)
        """,
        token=token,
    )
    for line in lines[-2:]:
        assert "'ann/other'" in line and expected in line


def test_a_smoke_run_is_not_pushed():
    assert "--push_to_hub=False" in smoke_flags({"push_to_hub": True}, set())


def test_half_a_run_is_not_pushed():
    for strategy in ("every_save", "checkpoint"):
        with pytest.raises(UserError, match=f"hub_strategy='{strategy}' would publish.*leave it at 'end'"):
            runs.config("out", push_to_hub=True, hub_strategy=strategy)


def test_a_trainer_ends_its_run_as_the_command_does(tmp_path, undrawn):
    trainer = runs.trainer(tmp_path, eval_dataset=tiny.dataset(4), max_steps=2)
    # Of an earlier run in the same folder.
    numbers = tmp_path / "analysis" / "numbers.jsonl"
    numbers.parent.mkdir()
    numbers.write_text('{"step": 9}\n')
    trainer._forget_earlier(resumed=True)
    assert numbers.read_text()
    left = [tmp_path / name for name in ("alignment.png", "chat_template.jinja")]
    for path in left:
        path.touch()
    trainer.train()
    assert not numbers.read_text() and not any(path.exists() for path in left)
    first = trainer.evaluate()["eval_bits_per_byte"]
    report = trainer.write_report("ann/data")
    assert report == tmp_path / "report" / "report.html" and report.read_text().count("data:image/png") == 1
    markdown = report.with_name("report.md").read_text()
    assert markdown.startswith("# dskd_cma_ga") and "2 optimizer steps" in markdown
    assert f"**{first:.4f}**" in markdown and re.search(r"\| discriminator_hidden_size +\| 32 +\| 768 ", markdown)
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "trainer_state.json").is_file()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["eval_bits_per_byte"] == first and result["train_runtime"] > 0
    assert result["data"]["source"] == "ann/data"
    # Again, after another evaluation: not what it wrote before.
    second = trainer.evaluate(tiny.dataset(2))["eval_bits_per_byte"]
    # As of a quantized model, whose parameters are packed.
    trainer.model.num_parameters, trainer.model.is_loaded_in_4bit = lambda: 7, True
    trainer.write_report()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["eval_bits_per_byte"] == second != first
    assert (result["models"]["student_parameters"], result["models"]["student_bits"]) == (7, 4)
    assert result["data"]["source"] == "ann/data"
    # What `hf-dskd train` wrote stays.
    (tmp_path / "result.json").write_text(json.dumps({**result, "seed": 7}))
    again = runs.trainer(tmp_path, eval_dataset=tiny.dataset(4))
    again.write_report()
    assert json.loads((tmp_path / "result.json").read_text())["seed"] == 7
