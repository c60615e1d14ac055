import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from hf_dskd import cli
from hf_dskd.cli.evaluate import settings_of
from hf_dskd.errors import UserError
from hf_dskd.evaluation.protocol import EvaluationSettings
from hf_dskd.evaluation.sets import HUB_SETS


NEEDED = ["--model", "m", "--output_dir", "o"]


def parse(words):
    return settings_of(vars(cli.tree()[1]["evaluate"].parse_args(words)))


def test_defaults_are_the_papers():
    settings = parse(NEEDED)
    assert settings == EvaluationSettings("m", Path("o"), dict.fromkeys(HUB_SETS))
    assert (settings.seeds, settings.top_p, settings.temperature) == ((10, 20, 30, 40, 50), 1.0, 1.0)
    assert (settings.max_prompt_length, settings.max_length) == (256, 512)


def test_every_option():
    words = (
        "--sets x=a.jsonl,vicuna --in_distribution x --limit 3 --prompt_style chat --seeds 1,2 --temperature 0.5"
        " --top_p 0.9 --no_repeat_ngram_size 0 --max_prompt_length 10 --max_length 20 --batch_size 4 --dtype bfloat16"
        """ --load_in_4bit --base_model b --chat_template_kwargs {"a":1}"""
    )
    settings = parse([*NEEDED, *words.split()])
    assert settings == EvaluationSettings(
        model="m",
        output_dir=Path("o"),
        sets={"x": "a.jsonl", "vicuna": None},
        base_model="b",
        load_in_4bit=True,
        dtype="bfloat16",
        prompt_style="chat",
        chat_template_kwargs={"a": 1},
        in_distribution=("x",),
        limit=3,
        seeds=(1, 2),
        temperature=0.5,
        top_p=0.9,
        no_repeat_ngram_size=0,
        max_prompt_length=10,
        max_length=20,
        batch_size=4,
    )
    assert parse([*NEEDED, "--greedy_only"]).seeds == ()


def test_a_run_is_evaluated_in_the_template_that_it_was_trained_in(tmp_path):
    def parsed(*words):
        settings = parse(["--model", str(tmp_path), "--output_dir", "o", *words])
        return settings.prompt_style, settings.chat_template_kwargs

    (tmp_path / "tokenizer_config.json").write_text("{}")
    trained = {"settings": {"prompt_style": "chat", "chat_template_kwargs": {"a": 1}}}
    (tmp_path / "result.json").write_text(json.dumps(trained))
    assert parsed() == ("alpaca", None)  # without a template it saw plain text
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert parsed() == ("chat", {"a": 1}) and parsed("--prompt_style", "plain") == ("plain", None)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert parsed() == ("chat", {"a": 1})
    (tmp_path / "result.json").write_text(json.dumps({"settings": {"prompt_style": "plain"}}))
    assert parsed() == ("alpaca", None)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--modle m --output_dir o", "--modle"),
        ("--output_dir o", "--model is not set"),
        ("--model m", "--output_dir is not set"),
        ("--limit x", "'x'.*--help"),
        ("--limit 0", "--limit 0 is less than 1"),
        ("--batch_size 0", "--batch_size 0"),
        ("--seeds 1,a", "'a'"),
        ("--seeds 1,1", "1 twice"),
        ("--seeds 99999999999999999999", "below"),
        ("--seeds 1 --greedy_only", "leave one of them out"),
        ("--sets doly", "'doly'"),
        ("--in_distribution doly", "'doly', which isn't one of --sets"),
        ("--prompt_style chat --chat_template_kwargs think=0", "'think=0' isn't a JSON object"),
        ('--chat_template_kwargs {"a":1}', "--chat_template_kwargs goes with --prompt_style chat, not 'alpaca'"),
        ("--prompt_style alpacca", "'alpacca' is unknown: one of alpaca, plain, chat"),
        ("--dtype int8", "'int8' is unknown"),
        ("--max_length 256", "--max_length 256 leaves no room"),
        ("--temperature 0", "not above 0: use --greedy_only"),
        ("--top_p 1.5", "--top_p 1.5"),
        ("--no_repeat_ngram_size=-1", "-1 is less than 0"),
    ],
)
def test_bad_options(words, message):
    given = words.split()
    with pytest.raises(UserError, match=message):
        parse(given if "--model" in words or "--output_dir" in words else [*NEEDED, *given])


def test_help_names_every_setting(capsys):
    assert cli.run(["evaluate", "--help"]) == 0
    printed = capsys.readouterr().out
    assert {setting.name for setting in fields(EvaluationSettings)} <= set(re.findall(r"--(\w+)", printed))
