import subprocess
import sys

import pytest

from hf_dskd.data.formats import detect_format, read_example
from hf_dskd.errors import UserError


USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}


def test_instruction_without_input():
    example = read_example({"instruction": "Add 1 and 2.", "input": "", "output": "3"})
    assert example.messages == [{"role": "user", "content": "Add 1 and 2."}]
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    )
    assert example.response == "3"
    assert read_example({"instruction": "Add 1 and 2.", "output": "3"}) == example
    assert read_example({"instruction": "Add 1 and 2.", "input": None, "output": "3"}) == example


def test_instruction_with_input_and_braces():
    example = read_example({"instruction": "Fix {x}", "input": "{y}", "output": ["first", "second"]})
    assert example.messages == [{"role": "user", "content": "Fix {x}\n\n{y}"}]
    assert example.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nFix {x}\n\n### Input:\n{y}\n\n"
        "### Response:\n"
    )
    assert example.response == "first"


def test_messages():
    system = {"role": "system", "content": "Be brief."}
    example = read_example({"messages": [system, {**USER, "tool_calls": None}, ASSISTANT]})
    assert example.messages == [system, USER]
    assert example.prompt == "### System:\nBe brief.\n\n### User:\nWhy?\n\n### Assistant:\n"
    assert example.response == "Because."


@pytest.mark.parametrize("prompt", ["Why?", [USER]])
@pytest.mark.parametrize("completion", ["Because.", [ASSISTANT]])
def test_conversational_pair(prompt, completion):
    example = read_example({"prompt": prompt, "completion": completion})
    assert example.messages == [USER]
    assert example.response == "Because."
    assert example.prompt == ("Why?" if prompt == "Why?" else "### User:\nWhy?\n\n### Assistant:\n")


def test_completion_of_several_turns_is_the_last_answer():
    example = read_example({"prompt": "Hi", "completion": [{"role": "assistant", "content": "Yes?"}, USER, ASSISTANT]})
    assert [message["content"] for message in example.messages] == ["Hi", "Yes?", "Why?"]
    assert example.prompt.endswith("### Assistant:\nYes?\n\n### User:\nWhy?\n\n### Assistant:\n")
    assert example.response == "Because."


def test_named_columns_win():
    row = {"question": "Q", "answer": ["A", "B"], "prompt": "no", "completion": "no", "messages": [USER, ASSISTANT]}
    example = read_example(row, prompt_column="question", response_column="answer")
    assert (example.prompt, example.response) == ("Q", "A")
    assert read_example(row, prompt_column="question").response == "no"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": None},
        {"instruction": "Q", "output": []},
        {"instruction": "Q", "output": [None]},
        {"messages": [USER, {"role": "assistant", "content": None}]},
    ],
)
def test_none_is_an_empty_response(row):
    assert read_example(row).response == ""


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["messages", "prompt", "completion", "instruction", "output"], ("messages", "messages", "messages")),
        (["prompt", "completion", "instruction", "output"], ("pair", "prompt", "completion")),
        (["prompt", "instruction", "input", "output"], ("instruction", "instruction", "output")),
        (["prompt", "completion", "output"], ("pair", "prompt", "completion")),
    ],
)
def test_first_complete_format_is_taken(names, columns):
    assert detect_format(names) == columns


@pytest.mark.parametrize(
    ("names", "options", "parts"),
    [
        (["text"], {}, ["'messages'", "'text'", "prompt_column"]),
        ([], {}, ["no columns"]),
        (["prompt", "answer"], {}, ["'completion' is missing", "'prompt', 'answer'", "response_column"]),
        (["instruction", "input"], {}, ["'output' is missing"]),
        (["q", "a"], {"prompt_column": "question", "response_column": "a"}, ["'question'", "'q', 'a'"]),
        (["q", "a"], {"prompt_column": "q", "response_column": "b"}, ["'b' is missing", "set response_column"]),
    ],
)
def test_missing_column(names, options, parts):
    with pytest.raises(UserError) as error:
        detect_format(names, **options)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": None, "completion": "x"}, ["'prompt'", "None"]),
        ({"prompt": "x", "completion": 7}, ["'completion'", "7"]),
        ({"instruction": 3, "output": "x"}, ["'instruction'", "3"]),
        ({"instruction": "x", "input": 5, "output": "x"}, ["'input'", "5"]),
        ({"messages": [USER]}, ["'user'", "'assistant'"]),
        ({"messages": [ASSISTANT]}, ["no message before"]),
        ({"messages": []}, ["'messages'", "[]"]),
        ({"messages": [{"role": "user", "content": ["a\nb"]}, ASSISTANT]}, ["message 0", "'content'"]),
        ({"messages": [{"content": "x"}, ASSISTANT]}, ["message 0", "'role'", "None"]),
        ({"messages": [USER, None, ASSISTANT]}, ["message 1"]),
        ({"messages": ["hi", "x"]}, ["must be a list of messages"]),
        (
            {"prompt": "a", "completion": "b", "chat_template_kwargs": {"add_generation_prompt": True}},
            ["which training decides"],
        ),
    ],
)
def test_bad_value(row, parts):
    with pytest.raises(UserError) as error:
        read_example(row)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_import_is_light():
    code = (
        "import sys, hf_dskd.data.formats, hf_dskd.data.tokenization;"
        "sys.exit(str({'torch', 'transformers', 'datasets', 'tokenizers'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
