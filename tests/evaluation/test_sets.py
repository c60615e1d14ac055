import json
from pathlib import Path

import pytest
import tiny

from hf_dskd.data.formats import INSTRUCTION_INPUT_TEMPLATE, INSTRUCTION_TEMPLATE
from hf_dskd.errors import UserError
from hf_dskd.evaluation import sets
from hf_dskd.evaluation.sets import load_set, parse_sets, question_tokens, read_question


SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
PLAIN = {"instruction": "Add.", "output": "3"}


def write(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def test_names_of_sets():
    assert parse_sets("dolly, x.1=a/b.jsonl,s_ni") == {"dolly": None, "x.1": "a/b.jsonl", "s_ni": None}
    for text, message in (
        ("doly", "'doly'.*one of dolly.*doly=FILE.jsonl"),
        ("dolly,dolly=a", "'dolly' twice"),
        ("../x=a", "can't name a file"),
        ("x=", "without a file"),
        (" , ", "empty"),
    ):
        with pytest.raises(UserError, match=message):
            parse_sets(text)


def test_prompts_of_each_kind_of_row():
    with_input = read_question({"instruction": "Add.", "input": "1 2", "prompt": "other", "output": ["3", "three"]})
    assert with_input.references == ["3", "three"]
    assert with_input.example.prompt == INSTRUCTION_INPUT_TEMPLATE.format(instruction="Add.", input="1 2")
    assert with_input.example.messages == [{"role": "user", "content": "Add.\n\n1 2"}]
    for empty in ("", None):
        assert read_question({**PLAIN, "input": empty}).example.prompt == INSTRUCTION_TEMPLATE.format(
            instruction="Add."
        )
    as_it_is = read_question({"prompt": "### Response:\n", "output": "3"})
    assert as_it_is.example.prompt == "### Response:\n" and as_it_is.references == ["3"]


def test_prompt_styles():
    tokenizer = tiny.byte_level_tokenizer()
    question = read_question({"instruction": "Add.", "input": "1 2", "output": "3"})

    def text(style):
        return tokenizer.decode(question_tokens(tokenizer, question, style))

    assert text("alpaca") == question.example.prompt
    assert text("plain") == "Add.\n\n1 2"
    with pytest.raises(UserError, match="has no chat template: evaluate with --prompt_style alpaca"):
        text("chat")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    assert text("chat") == "[user]Add.\n\n1 2[assistant]"
    assert tokenizer.decode(question_tokens(tokenizer, question, "chat", {"then": "<think>"})) == text("chat")
    tokenizer.chat_template += "{{ then }}"
    assert tokenizer.decode(question_tokens(tokenizer, question, "chat", {"then": "<think>"})) == (
        "[user]Add.\n\n1 2[assistant]<think>"
    )
    assert text("alpaca") == question.example.prompt
    own = read_question({"prompt": "As it is.", "output": "3"})
    for style, expected in (("alpaca", "As it is."), ("plain", "As it is."), ("chat", "[user]As it is.[assistant]")):
        assert tokenizer.decode(question_tokens(tokenizer, own, style)) == expected


@pytest.mark.parametrize(
    "row, message",
    [
        ("{not json", "no JSON"),
        ("[1]", "no JSON object"),
        ({"instruction": "Add."}, "'output' must be a string or a list"),
        ({"instruction": "Add.", "output": [1]}, "'output' must be a string or a list"),
        ({"instruction": "Add.", "output": []}, "empty reference"),
        ({"instruction": "Add.", "output": ["3", " "]}, "empty reference"),
        ({"instruction": "Add.", "output": ""}, "empty reference"),
        ({"output": "3"}, "neither 'instruction' nor 'prompt'"),
        ({"prompt": "\n", "output": "3"}, "'prompt' is empty"),
        ({"instruction": 5, "output": "3"}, "'instruction' is empty or no string"),
        ({"instruction": "Add.", "input": 5, "output": "3"}, "'input' holds 5"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(row, message, tmp_path):
    path = write(tmp_path / "rows.jsonl", PLAIN, "", row)
    with pytest.raises(UserError, match=rf"rows.jsonl, line 3: .*{message}"):
        load_set("x", path)


def test_load_a_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", PLAIN, "", {**PLAIN, "output": "4"}, "{not json")
    found = load_set("x", path, limit=2)
    assert [question.references for question in found.questions] == [["3"], ["4"]]
    assert (found.name, found.source) == ("x", path)
    (tmp_path / "latin.jsonl").write_bytes('{"instruction": "ä", "output": "b"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.jsonl, line 1: no JSON .*UTF-8"):
        load_set("x", str(tmp_path / "latin.jsonl"))
    with pytest.raises(UserError, match=r"nowhere\.jsonl isn't a file"):
        load_set("x", str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match="has no examples"):
        load_set("x", write(tmp_path / "empty.jsonl", ""))


def test_sets_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        return write(tmp_path / "hub.jsonl", *[PLAIN] * 4)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setitem(sets.HUB_SETS, "un_ni", sets.HUB_SETS["un_ni"]._replace(limit=3))
    assert len(load_set("s_ni").questions) == 4 and load_set("s_ni").source == "MiniLLM/sinst/11_/valid.jsonl"
    assert [len(load_set("un_ni", limit=limit).questions) for limit in (None, 9, 2)] == [3, 3, 2]
    assert asked[0] == ("MiniLLM/sinst", "11_/valid.jsonl", "dataset")

    def fails(*args, **kwargs):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    with pytest.raises(UserError, match=r"vicuna can't be had .*no network\).*--sets vicuna=FILE.jsonl"):
        load_set("vicuna")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the papers' data in ../shared/data")
def test_the_papers_files_have_the_prompts_that_the_template_gives():
    counts = {"dolly": 500, "self-inst": 242, "vicuna": 80, "sinst/11_": 1694}
    for name, count in counts.items():
        path = SHARED / name / "test.jsonl"
        given = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
        found = [question.example.prompt for question in load_set("x", str(path)).questions]
        assert len(found) == count and found == given
