"""Tokens are in no file of a run or of a push, wherever they were given."""

import json
import os
import pickle
import shlex
import sys

import pytest
import runs
import tiny
import yaml

from hf_dskd import DSKDConfig, UserError, cli, run
from hf_dskd.experiments import grid as compare
from hf_dskd.hub.folder import write_model_folder
from hf_dskd.redaction import is_secret, redact, redact_words, secret_names, without_secrets, without_values
from hf_dskd.utils import environment


FORM = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123"


# ---- Words


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", "SECRET"],
        ["--hub_token=SECRET"],
        ["--hub-token", "SECRET"],
        ["--hub-token=SECRET"],
        ["--hub_token", '"hf SECRET"'],
        ["--hub_token", "-SECRET"],
        ["-hub_token=SECRET"],
        ["--push_to_hub_token", "SECRET"],
        ["--HUB_TOKEN", "SECRET"],
        ["--model_init_kwargs", '{"token": "SECRET"}'],
        ["--teacher_model_init_kwargs={'token': 'hf SECRET'}"],
        ["--model_init_kwargs", '{"a": {"use_auth_token":"SECRET\\" SECRET"}}'],
        ["--model_init_kwargs", "{token: SECRET, revision: main}"],
        ["--config", "HF_TOKEN=SECRET"],
        ["--run_name", FORM],
        ["--run_name", f"a-{FORM}-b"],
        ["--dataset_name", "https://me:SECRET@example.org/data.jsonl"],
        ["--header", "Authorization: Bearer SECRET0123"],
        ["--wandb_api_key", "SECRET"],
    ],
    ids=shlex.join,
)
def test_no_command_shows_a_token(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["/somewhere/hf-dskd", "train", *words, "--seed", "3"])
    shown = environment.command_line()
    assert "SECRET" not in shown and FORM not in shown
    assert shown.startswith(f"hf-dskd train {shlex.quote(words[0])[:6]}") and shown.endswith(" --seed 3")


@pytest.mark.parametrize(
    "words",
    [
        ["--chat_template_kwargs", '{"eos_token": "</s>", "tokens": 3}'],
        ["--max_length", "256", "--output_dir", "runs/hf_models_token/1"],
        ["--logging_dir", "a@b://c"],
        ["--dataset_name", "https://example.org/a@b.jsonl"],
        ["--run_name", "token", "--packing_token_count", "3"],
        ["--hub_token", "--seed", "3"],
    ],
    ids=shlex.join,
)
def test_other_words_stay(words):
    assert redact_words(words) == words


def test_tokens_of_the_environment_go_by_value(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain/Secret+1")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SOME_TOKENS", "many words")
    monkeypatch.setenv("MY_PASSWORD", "short")
    text = "a plain/Secret+1, b 0123456789abcdef, many words, short"
    assert without_values(text) == "a ..., b ..., many words, short"
    # Words that are passwords too stay.
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    monkeypatch.setenv("SITE_PASSWORD", "documentation")
    monkeypatch.setenv("DB_PASSWORD", "hunter22")
    text = "postgres-docs, documentation_en, documentations, xhunter22x"
    assert without_values(text) == "postgres-docs, ..._en, documentations, x...x"


@pytest.mark.parametrize(
    "value",
    ["['SECRET']", '["SECRET", "SECRET"]', "('SECRET',)", "['a]SECRET']", "{'a': 'SECRET'}", "[SECRET]"],
)
@pytest.mark.parametrize("form", ["hub_token={} b=1", "{{'token': {}, 'b': 1}}", "--hub_token {} b=1"])
def test_several_secrets_in_brackets(form, value):
    shown = redact(form.format(value))
    assert "SECRET" not in shown and "token" in shown and "b" in shown and "1" in shown


def test_secrets_in_brackets_with_escaped_quotes():
    assert redact(json.dumps(json.dumps({"token": ["SECRET"], "b": 1}))) == json.dumps('{"token": ..., "b": 1}')


def test_names_of_secrets():
    assert all(map(is_secret, "token hub_token HF_TOKEN use_auth_token api_key AWS_SECRET_ACCESS_KEY".split()))
    assert not any(map(is_secret, "eos_token pad_token tokens token_accuracy tokenizer max_new_tokens".split()))


def test_settings_lose_secrets_at_any_depth():
    given = {"a": [{"token": "x", "b": 1}, FORM], "hub_token": "y", "c": {"d": {"api_key": "z", "e": None}}}
    assert without_secrets(given) == {"a": [{"b": 1}, "..."], "c": {"d": {"e": None}}}
    assert secret_names(given) == ["hub_token", "c.d.api_key"]
    assert secret_names({"hub_token": None}) == []


def test_messages_of_errors():
    for text in (f"model={FORM!r} isn't there", "model_init_kwargs={'token': 'SECRET'} isn't a mapping"):
        error = UserError(text)
        assert FORM not in str(error) and "SECRET" not in str(error) and "isn't" in str(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    kept = "'a/b' can't be pushed to without a token: run `hf auth login` or set HF_TOKEN"
    assert str(UserError(kept)) == kept == redact(kept)


def test_a_configuration_doesnt_print_its_tokens(tmp_path):
    kwargs = {"token": "SECRET", "revision": "main"}
    config = runs.config(tmp_path, hub_token="SECRET", model_init_kwargs=kwargs, teacher_model_init_kwargs=kwargs)
    for text in (str(config), repr(config), f"{config}", config.to_json_string(), str(config.to_sanitized_dict())):
        assert "SECRET" not in text and "main" in text and "hub_token='SECRET'" not in text
    saved = config.without_tokens()
    assert b"SECRET" not in pickle.dumps(saved) and saved.model_init_kwargs == {"revision": "main"}
    # What is used stays.
    assert config.hub_token == "SECRET" and config.model_init_kwargs == kwargs
    assert isinstance(saved, DSKDConfig)


# ---- Files


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    runs.save_pair(folder)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.dataset(12)))
    return folder


def leaks(folder, secrets):
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                content = file.read()
            found += [(os.path.relpath(path, folder), secret) for secret in secrets if secret.encode() in content]
    return found


@pytest.mark.parametrize("adapter", [False, True])
def test_no_file_of_a_run_or_a_push_has_a_token(pair, tmp_path, monkeypatch, capfd, adapter):
    # One for each place; those that go by name have no form, and of the others none has a name.
    places = ("option", "student", "teacher", "file", "environment", "name", "tracker", "nested")
    secrets = {place: f"Secret{place.capitalize()}{'x' * 12}" for place in places}
    secrets["name"] = FORM
    monkeypatch.setenv("HF_TOKEN", secrets["environment"])
    monkeypatch.setenv("WANDB_API_KEY", secrets["tracker"])
    out = tmp_path / "out"
    config = {
        "dataset_name": str(pair / "data.jsonl"),
        "teacher_model_name_or_path": str(pair / "teacher"),
        "model_init_kwargs": {"token": secrets["student"], "revision": "main"},
        "hub_token": secrets["file"],
        "method": "dskd_cma",
        "max_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "analysis_steps": 2,
        "eval_generation_samples": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "held_out_size": 2,
        "per_device_train_batch_size": 2,
        "max_length": 128,
        "use_cpu": True,
        "bf16": False,
        "chat_template_kwargs": {"api_key": secrets["nested"]},
        # The name of a secret in the environment's value, and a token as a name.
        "run_name": f"run of {secrets['environment']} {secrets['tracker']} {secrets['name']}",
        "report_to": "tensorboard",
        "use_peft": adapter,
    }
    if adapter:  # which changes what is saved of the student, and no analysis or evaluation of it
        for name in ("analysis_steps", "eval_strategy", "eval_steps", "eval_generation_samples", "held_out_size"):
            del config[name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = [
        *("--config", str(tmp_path / "config.yaml"), "--output_dir", str(out), "--hub-token", secrets["option"]),
        *("--teacher_model_init_kwargs", json.dumps({"token": secrets["teacher"]})),
        *("--model_name_or_path", str(pair / "student")),
    ]
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(out / "tracker"))
    monkeypatch.setattr(sys, "argv", ["hf-dskd", "train", *arguments])
    cli.main(["train", *arguments])
    cli.main(["report", str(out)])
    write_model_folder(out, tmp_path / "pushed", "me/student", auxiliary=True, online=False)
    files = [path.name for path in out.rglob("*")]
    for name in ("result.json", "settings.yaml", "report.html", "training_args.bin", "trainer_state.json"):
        assert name in files
    assert any("tfevents" in name for name in files)
    assert leaks(out, secrets.values()) == []
    assert leaks(tmp_path / "pushed", secrets.values()) == []
    printed = "".join(capfd.readouterr())
    assert not [secret for secret in secrets.values() if secret in printed]
    # The rest is there, and the file makes the same run.
    settings = yaml.safe_load((out / "settings.yaml").read_text())
    assert settings["model_init_kwargs"]["revision"] == "main" and "hub_token" not in settings
    result = json.loads((out / "result.json").read_text())
    assert "--hub-token ..." in result["command"] and result["changed_settings"]["max_steps"] == [-1, 2]
    # What Python writes by itself: the settings that the trainer used are as they were given.
    assert run.parse(None, None, arguments).config.hub_token == secrets["option"]


@pytest.mark.parametrize(
    "base, arguments, name",
    [
        ({"hub_token": "SECRET"}, [], "hub_token"),
        ({"model_init_kwargs": {"token": "SECRET"}}, [], "model_init_kwargs.token"),
        ({"env": {"HF_TOKEN": "SECRET"}}, [], "env.HF_TOKEN"),
        ({}, ["--hub-token", "SECRET"], "hub_token"),
        ({}, ["--teacher_model_init_kwargs", '{"token": "SECRET"}'], "teacher_model_init_kwargs.token"),
    ],
)
def test_a_comparison_whose_cells_would_have_a_token_is_refused(tmp_path, base, arguments, name):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"dataset_name": "x", **base}))
    given = ["--config", str(tmp_path / "base.yaml"), "--methods", "sft", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=f"^{name} would be written .*set HF_TOKEN") as error:
        compare.parse([*given, *arguments])
    assert "SECRET" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_error_of_a_cell_has_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain/Secret+1")
    log = f"Traceback\nValueError: no access with plain/Secret+1, {FORM}, token='abc'\n"
    assert compare.last_error(log) == "ValueError: no access with ..., ..., token=..."


def test_an_error_that_nobody_caught_has_no_token(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "plain/Secret+1")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def fail():
        raise KeyError(f"plain/Secret+1 {FORM}")

    with pytest.raises(KeyError) as error:
        run.command(fail)
    sys.excepthook(KeyError, error.value, error.tb)
    assert capsys.readouterr().err.splitlines()[-1] == "KeyError: '... ...'"
