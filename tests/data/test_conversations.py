"""Rows as people have them, through the chat templates of both models: what is learnt, and what the models read."""

import json

import pytest
import tiny
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from hf_dskd.data.collator import DualCollator
from hf_dskd.data.formats import read_examples
from hf_dskd.data.prompts import answer_frame, prompt_tokens
from hf_dskd.data.tokenization import is_tokenized, tokenize_dataset
from hf_dskd.errors import UserError
from hf_dskd.offline.tiny_models import tiny_model


FAMILIES = ("qwen2", "gemma3", "llama2", "llama3", "mistral", "smollm2")
DAY = {"date_string": "1 May 2025"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture
def tokenizer(folder):
    """A fresh tokenizer of a family with its chat template: tests change some."""

    def load(family, chat_template=None):
        loaded = AutoTokenizer.from_pretrained(str(tiny_model(family, folder / family, "student")))
        if chat_template is not None:
            loaded.chat_template = chat_template
        return loaded

    return load


def tokenized(rows, student, teacher=None, **options):
    options = {"max_length": 512, "chat_template_kwargs": DAY, **options}
    data, report = tokenize_dataset(Dataset.from_list(rows), student, teacher, **options)
    return list(data), report


def answers(row, tokenizer, prefix=""):
    """The answers of a row as their tokens, each with its end."""
    spans = row[f"{prefix}spans"]
    ids = row[f"{prefix}input_ids"]
    return [tokenizer.convert_ids_to_tokens(ids[start:stop]) for start, stop in zip(spans[::2], spans[1::2])]


def chat(*contents):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]


def of_assistant(content, **extras):
    return {"messages": [*chat("hi"), {"role": "assistant", "content": content, **extras}]}


# ---- The end of an answer


@pytest.mark.parametrize(
    ("family", "eos", "end"),
    [
        ("gemma3", None, ["<end_of_turn>"]),
        ("qwen2", "<|endoftext|>", ["<|im_end|>"]),
        ("qwen2", None, ["<|im_end|>"]),
        ("llama3", "<|end_of_text|>", ["<|eot_id|>"]),
        ("llama2", None, ["</s>"]),
        ("mistral", None, ["</s>"]),
    ],
)
def test_an_answer_ends_as_the_template_ends_it(tokenizer, family, eos, end):
    own = tokenizer(family)
    if eos is not None:
        own.eos_token = eos
    (row,), _ = tokenized([{"messages": chat("hi", "yes", "sure?", "yes!")}], own)
    assert [tokens[-len(end) :] for tokens in answers(row, own)] == [end, end]
    assert own.convert_ids_to_tokens(answer_frame(own, "chat", DAY).end) == end
    # What stands between two answers is what the template writes there.
    rendered = own.apply_chat_template(chat("hi", "yes", "sure?", "yes!"), tokenize=False, **DAY)
    # The space that Llama 2's kind puts before each piece between control tokens is none of the template's.
    assert rendered.replace(" ", "").rstrip().startswith(own.decode(row["input_ids"]).replace(" ", ""))
    # In plain style there is no template.
    (row,), _ = tokenized([{"prompt": "hi", "completion": "yes"}], own, prompt_style="plain")
    assert row["input_ids"][-1] == own.eos_token_id


def template(after):
    """ChatML with something else after an answer."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if m.role == 'assistant' %}"
        f"{{{{ {after!r} }}}}"
        "{% else %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


@pytest.mark.parametrize(
    ("after", "end"),
    [
        # Several tokens, the white space before the control token among them, but not what is after it.
        (" <|im_end|>\n\n", ["Ġ", "<|im_end|>"]),
        ("<|im_end|><|endoftext|>\n", ["<|im_end|>", "<|endoftext|>"]),
        # Text that no generation stops at, so that EOS follows; and nothing at all.
        ("!!\n", ["!", "!", "<|im_end|>"]),
        ("\n\n", ["<|im_end|>"]),
        ("", ["<|im_end|>"]),
    ],
)
def test_other_closings(tokenizer, after, end):
    own = tokenizer("qwen2", template(after))
    (row,), _ = tokenized([{"prompt": "hi", "completion": "yes"}], own)
    (answer,) = answers(row, own)
    assert answer[-len(end) :] == end and own.convert_tokens_to_string(answer[: -len(end)]) == "yes"
    assert row["byte_ends"][-len(end) :] == [3] * len(end) and row["response_bytes"] == 3
    assert own.convert_ids_to_tokens(answer_frame(own).end) == end


def test_white_space_that_the_template_puts_before_an_answer(tokenizer):
    """Mistral's writes " answer" after its prompt: the model says it, and it is none of the answer's bytes."""
    own, other = tokenizer("mistral"), tokenizer("qwen2")
    (row,), _ = tokenized([{"prompt": "hi", "completion": "yes"}], own, other)
    ids = own.apply_chat_template(chat("hi", "yes"), tokenize=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    assert own.decode(row["input_ids"]) == own.decode(ids)
    assert answer_frame(own).lead == " " and answer_frame(other).lead == ""
    assert row["response_bytes"] == 3 and row["byte_ends"][-1] == row["teacher_byte_ends"][-1] == 3


def test_ends_of_the_pair_are_one_chunk(tokenizer):
    student, teacher = tokenizer("qwen2", template(" <|im_end|>\n")), tokenizer("gemma3")
    (row,), _ = tokenized([{"prompt": "hi", "completion": "yes"}], student, teacher)
    last = max(row["chunk_ids"])
    assert row["chunk_ids"][-3] < last and row["chunk_ids"][-2:] == [last, last]
    assert row["teacher_chunk_ids"][-2] < row["teacher_chunk_ids"][-1] == last


def test_the_end_of_a_template_that_needs_a_system_message(tokenizer):
    own = tokenizer(
        "qwen2",
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + template("<|im_end|>\n"),
    )
    own.eos_token = "<|endoftext|>"
    assert own.convert_ids_to_tokens(answer_frame(own).end) == ["<|im_end|>"]


# ---- An end that is there already


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>", "<|im_end|>\n", "<|im_end|></s>", "<|endoftext|>"])
def test_an_end_in_the_data_is_taken_off_and_counted(tokenizer, end):
    student, teacher = tokenizer("llama2"), tokenizer("qwen2")
    teacher.eos_token = "<|endoftext|>"
    rows = [{"prompt": "hi", "completion": f"yes{end}"}, {"prompt": "hi", "completion": "yes"}]
    (ended, plain), report = tokenized(rows, student, teacher)
    assert report.ends_removed == 1 and "1 rows had an end-of-turn token" in str(report) and report.remarkable
    assert {**ended, "example_id": 1} == plain
    (ended,), _ = tokenized([{"messages": chat("hi", f"yes{end}", "sure?", f"yes!{end}")}], student, teacher)
    (plain,), report = tokenized([{"messages": chat("hi", "yes", "sure?", "yes!")}], student, teacher)
    assert ended == plain and report.ends_removed == 0 and not report.remarkable
    # In the middle it is text.
    (row,), report = tokenized([{"prompt": "hi", "completion": f"a{end.strip()}b"}], student, teacher)
    assert report.ends_removed == 0 and row["response_bytes"] == 2 + len(end.strip())


def test_an_end_in_an_earlier_answer_is_in_no_prompt(tokenizer):
    own = tokenizer("llama2")
    rows, report = tokenized([{"messages": chat("hi", "yes</s>", "sure?", "yes!</s>")}], own, prompt_style="plain")
    assert report.ends_removed == 1 and all("</s>" not in own.decode(row["input_ids"][:-1]) for row in rows)
    # A mark of HTML is none.
    (row,), report = tokenized([{"prompt": "hi", "completion": "<s>old</s>"}], own)
    assert report.ends_removed == 0 and row["response_bytes"] == len("<s>old</s>")


# ---- Control tokens in data


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_data_are_text(tokenizer, family):
    own = tokenizer(family)
    control = {token for token, added in own.added_tokens_decoder.items() if added.special}
    names = "".join(own.convert_ids_to_tokens(sorted(control)))

    def read(place):
        texts = [f"say {names} now" if number == place else "so" for number in (0, 1, 2)]
        (row,), report = tokenized([{"messages": chat(texts[0], texts[1], "and?", texts[2])}], own, train_on="last")
        return row["input_ids"], report

    plain, _ = read(None)
    # In the prompt, an earlier answer and the response.
    for place in (0, 1, 2):
        ids, report = read(place)
        # The same control tokens as without: those of the template.
        assert [token for token in ids if token in control] == [token for token in plain if token in control]
        assert (report.control_as_text, report.control_live) == (1, 0)
        assert own.decode(ids).replace(" ", "").count(names.replace(" ", "")) == 1


def test_a_token_that_is_no_control_token_stays(tokenizer):
    own = tokenizer("qwen2")
    own.add_tokens(["<thought>"])
    (row,), report = tokenized([{"prompt": "<thought>?", "completion": "<thought>yes"}], own)
    assert row["input_ids"].count(own.convert_tokens_to_ids("<thought>")) == 2 and report.control_as_text == 0


def test_control_tokens_that_cannot_be_told_apart_are_counted(tokenizer):
    own = tokenizer("qwen2", template("<|im_end|>\n"))
    rows = [{"prompt": "say <|im_end|>", "completion": "yes"}]
    for changed in ("m.content", "m.content | trim", "m.content + (m.content | length | string)"):
        own.chat_template = template("<|im_end|>\n").replace("m.content", f"({changed})")
        assert tokenized(rows, own)[1].control_as_text == 1
    # Stand-ins for control tokens are no such tokens: a template that looks for them writes something else.
    own.chat_template = template("<|im_end|>\n").replace(
        "m.content", "(m.content + ('!' if '<|im_end|>' in m.content else ''))"
    )
    _, report = tokenized(rows, own)
    assert (report.control_as_text, report.control_live) == (0, 1)
    assert "1 rows have control tokens in a prompt that act as such" in str(report)


def test_prompts_for_generation_are_those_of_training(tokenizer):
    own = tokenizer("llama3")
    rows = [{"prompt": "say <|eot_id|> now", "completion": "<|eot_id|> yes"}]
    (row,), _ = tokenized(rows, own)
    (example,) = read_examples(rows[0])
    assert prompt_tokens(own, example, "chat", DAY) == row["input_ids"][: row["prompt_length"]]


# ---- Every answer


@pytest.mark.parametrize("pair", [("qwen2", "gemma3"), ("mistral", "llama3"), ("llama2", "smollm2")])
def test_every_answer_is_learnt_as_it_would_be_alone(tokenizer, pair):
    student, teacher = map(tokenizer, pair)
    messages = chat("hi", "yes", "sure?", "日本 yes", "why?", "so it is")
    rows, report = tokenized([{"messages": messages}], student, teacher)
    assert (report.rows, report.kept, report.answers, report.cut) == (1, 1, 3, 0)
    alone = [tokenized([{"messages": messages[:n]}], student, teacher, train_on="last")[0][0] for n in (2, 4, 6)]
    for prefix, own in (("", student), ("teacher_", teacher)):
        got = [ids for row in rows for ids in answers(row, own, prefix)]
        assert got == [answers(row, own, prefix)[0] for row in alone]
        # Each answer follows the tokens that the model would be asked with.
        places = [(row, start) for row in rows for start in row[f"{prefix}spans"][::2]]
        assert [row[f"{prefix}input_ids"][:start] for row, start in places] == [
            row[f"{prefix}input_ids"][: row[f"{prefix}prompt_length"]] for row in alone
        ]
    assert sum(row["response_bytes"] for row in rows) == sum(row["response_bytes"] for row in alone)
    if pair == ("qwen2", "gemma3"):
        # One row: bytes and chunks are counted through.
        (row,) = rows
        assert row["byte_ends"] == sorted(row["byte_ends"]) and row["byte_ends"][-1] == row["response_bytes"]
        counts = [max(part["chunk_ids"]) + 1 for part in alone]
        assert row["chunk_ids"] == [
            chunk + sum(counts[:i]) for i, part in enumerate(alone) for chunk in part["chunk_ids"]
        ]
    last, report = tokenized([{"messages": messages}], student, teacher, train_on="last")
    assert last == [alone[-1]] and report.answers == 1


def test_answers_that_no_row_can_hold_together_have_one_each(tokenizer):
    """Plain text ends an answer with EOS, which no later prompt has; so do templates that rewrite earlier turns."""
    own = tokenizer("qwen2")
    messages = chat("hi", "yes", "sure?", "yes!")
    rows, report = tokenized([{"messages": messages}, {"messages": messages[:2]}], own, prompt_style="plain")
    assert [row["example_id"] for row in rows] == [0, 0, 1] and (report.kept, report.answers) == (2, 3)
    assert own.decode(rows[1]["input_ids"]).startswith("### User:\nhi\n\n### Assistant:\nyes\n\n### User:")
    assert all(answers(row, own)[0][-1] == own.eos_token for row in rows)
    # A template that leaves earlier answers out.
    own.chat_template = template("<|im_end|>\n").replace("+ m.content", "+ (m.content if loop.last else '...')")
    rows, report = tokenized([{"messages": messages}], own)
    assert len(rows) == 2 and report.answers == 2
    assert "assistant\n...<|im_end|>" in own.decode(rows[1]["input_ids"])


def test_answers_that_do_not_fit(tokenizer):
    student, teacher = tokenizer("qwen2"), tokenizer("gemma3")
    messages = chat("hi", "yes", "sure?", "a long answer " * 20, "why?", "no")
    (row,), report = tokenized([{"messages": messages}], student, teacher, max_length=64)
    assert row["cut"] and (report.answers, report.cut, report.left_out) == (2, 1, 1)
    assert len(answers(row, student)) == 2 and student.eos_token not in answers(row, student)[1]
    assert "1 answers of these rows are empty or too far back" in str(report)
    with pytest.raises(UserError, match=r"row 0 .* leaves no room for a response within max_length=8"):
        tokenized([{"messages": messages}], student, teacher, max_length=8)
    empty, report = tokenized([{"messages": chat("hi", " ", "sure?", "yes")}], student, teacher)
    assert len(answers(empty[0], student)) == 1 and (report.answers, report.left_out) == (1, 1)


def test_an_answer_of_weight_nothing_is_not_learnt(tokenizer):
    own = tokenizer("qwen2")
    messages = chat("hi", "yes", "sure?", "no")
    messages[1]["weight"] = 0
    (row,), report = tokenized([{"messages": messages}], own)
    assert own.decode(row["input_ids"]).count("yes") == 1 and len(answers(row, own)) == 1 == report.answers
    messages[3]["weight"] = 0
    with pytest.raises(UserError, match="every answer of the conversation has weight 0"):
        tokenized([{"messages": messages}], own)
    messages[3]["weight"] = 0.5
    with pytest.raises(UserError, match=r"'weight' of message 3 in column 'messages' is 0.5"):
        tokenized([{"messages": messages}], own)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "mistral"])
def test_a_prompt_that_ends_in_an_answer_is_continued(tokenizer, family):
    own = tokenizer(family)
    prompt = [*chat("count"), {"role": "assistant", "content": "one, two"}]
    (row,), _ = tokenized([{"prompt": prompt, "completion": ", three"}], own)
    (whole,), _ = tokenized([{"messages": chat("count", "one, two, three")}], own)
    assert own.decode(row["input_ids"]) == own.decode(whole["input_ids"])
    text = own.convert_tokens_to_string(answers(row, own)[0][:-1])
    assert text.lstrip() == ", three" and len(answers(row, own)) == 1
    # A list of one message goes on too.
    assert tokenized([{"prompt": prompt, "completion": [chat("", ", three")[1]]}], own)[0] == [row]
    (row,), _ = tokenized([{"prompt": prompt, "completion": ", three"}], own, prompt_style="plain")
    assert "### Assistant:\none, two, three" in own.decode(row["input_ids"])


# ---- What a row says beside the text

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLS = [{"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]
WITH_TOOLS = (
    "{% if tools %}{{ 'TOOLS ' + tools | tojson + '\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}{{ '(' + m.reasoning_content + ')' }}{% endif %}"
    "{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ 'CALL ' + (m.tool_calls | map(attribute='function') | list | tojson) }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tools_and_calls_reach_the_templates(tokenizer):
    student, teacher = tokenizer("qwen2", WITH_TOOLS), tokenizer("smollm2", WITH_TOOLS)
    as_json = [{**CALLS[0], "function": {"name": "weather", "arguments": json.dumps({"city": "Paris"})}}]
    turns = [*chat("Paris?"), {"role": "assistant", "content": None, "tool_calls": CALLS}]
    turns += [{"role": "tool", "content": "18 C", "tool_call_id": "c1"}, {"role": "assistant", "content": "18 C."}]
    rows = [{"messages": turns, "tools": TOOLS}]
    (row,), report = tokenized(rows, student, teacher)
    text = student.decode(row["input_ids"])
    assert text.startswith("TOOLS [") and '{"city": "Paris"}' in text and report.answers == 2
    assert student.convert_tokens_to_string(answers(row, student)[0][:-1]).startswith('CALL [{"name": "weather"')
    assert (report.one_sided, report.foreign_calls) == (0, 0)
    # The same from JSON, as files and OpenAI's format have it.
    turns[1]["tool_calls"] = as_json
    assert tokenized([{"messages": turns, "tools": json.dumps(TOOLS)}], student, teacher)[0] == [row]
    # Another format of the teacher's: the student's own is the text.
    teacher.chat_template = WITH_TOOLS.replace("'CALL '", "'<call>'")
    (row, _), report = tokenized(rows, student, teacher)
    assert report.foreign_calls == 1 and "CALL [" in teacher.decode(
        row["teacher_input_ids"][row["teacher_spans"][0] :]
    )
    # A template that writes none of it.
    teacher.chat_template = tokenizer("smollm2").chat_template
    turns[1]["content"] = ""
    _, report = tokenized([{"messages": turns, "tools": TOOLS}], student, teacher)
    assert report.one_sided == 1 and "only one of the two chat templates writes" in str(report)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": chat("hi", "yes"), "tools": TOOLS}, "column 'tools'"),
        (of_assistant("", tool_calls=CALLS), "'tool_calls' of the"),
        ({"messages": [{"role": "user", "content": "hi", "name": "Ann"}, chat("", "yes")[1]]}, "'name' of message 0"),
        (of_assistant("yes", reasoning_content="hm"), "'reasoning_content' of the answer"),
        ({"prompt": "hi", "completion": "yes", "documents": [{"text": "x"}]}, "column 'documents'"),
    ],
)
@pytest.mark.parametrize("style", ["chat", "plain"])
def test_what_no_template_writes_is_refused(tokenizer, row, what, style):
    with pytest.raises(UserError) as error:
        tokenized([row], tokenizer("qwen2"), tokenizer("gemma3"), prompt_style=style)
    assert "row 0" in str(error.value) and f"{what}" in str(error.value) and "\n" not in str(error.value)
    assert ("prompt_style='chat'" in str(error.value)) == (style == "plain")
    # Empty, or filled in by a table, is nothing.
    bare = {key: None if key in ("tools", "documents") else value for key, value in row.items()}
    if bare != row:
        assert tokenized([bare], tokenizer("qwen2"), tokenizer("gemma3"))[1].kept == 1


def test_system_and_history_columns(tokenizer):
    own = tokenizer("qwen2")
    row = {"instruction": "And 2?", "input": "", "output": "Two.", "system": "Be brief.", "history": [["1?", "One."]]}
    (found,), report = tokenized([row], own)
    messages = [{"role": "system", "content": "Be brief."}, *chat("1?", "One.", "And 2?", "Two.")]
    assert found == tokenized([{"messages": messages}], own)[0][0] and report.answers == 2
    pair = {"prompt": "And 2?", "completion": "Two.", "system": "Be brief.", "history": [["1?", "One."]]}
    assert tokenized([pair], own)[0] == [found]
    rows, _ = tokenized([row], own, prompt_style="plain")
    text = own.decode(rows[-1]["input_ids"])
    assert text.startswith("Be brief.\n\nBelow is an instruction") and text.count("### Response:\n") == 2
    # Answers in a prompt are given, with a history before them too.
    given = {**pair, "prompt": chat("b?", "B.", "And 2?")}
    (found,), report = tokenized([given], own)
    assert report.answers == 2 and learnt(found, own) == ["One.<|im_end|>", "Two.<|im_end|>"]
    with pytest.raises(UserError, match="column 'system' and a system message"):
        tokenized([{"messages": messages, "system": "Be long."}], own)
    with pytest.raises(UserError, match=r"column 'history' holds 'ancient'; it must be a list of pairs"):
        tokenized([{"prompt": "a", "completion": "b", "history": "ancient"}], own)


def test_lists_of_text_parts_are_joined(tokenizer):
    own = tokenizer("qwen2")
    parts = [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]
    rows, _ = tokenized([{"messages": chat(parts, parts)}], own)
    assert rows == tokenized([{"messages": chat("hi there", "hi there")}], own)[0]
    with pytest.raises(UserError, match=r"'content' of message 0 in column 'messages'"):
        read_examples({"messages": chat([{"type": "image", "text": None}], "yes")})


ARGUMENTS_AS_TEXT = WITH_TOOLS.replace(
    "'CALL ' + (m.tool_calls | map(attribute='function') | list | tojson)",
    "'CALL ' + m.tool_calls[0].function.arguments",
)
NULL = json.dumps([{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}])


@pytest.mark.parametrize(
    ("family", "chat_template", "row", "text"),
    [
        ("qwen2", WITH_TOOLS, of_assistant("yes", reasoning_content="hm"), "assistant\n(hm)yes<|im_end|>"),
        ("qwen2", ARGUMENTS_AS_TEXT, of_assistant("", tool_calls=CALLS), 'CALL {"city": "Paris"}<|im_end|>'),
        # Nulls that JSON says stay.
        ("qwen2", WITH_TOOLS, {"messages": chat("hi", "yes"), "tools": NULL}, '"default": null'),
        ("llama3", None, {"messages": chat("hi", "yes"), "chat_template_kwargs": {"date_string": "2 June"}}, "2 June"),
    ],
)
def test_a_template_writes_what_the_row_says(tokenizer, family, chat_template, row, text):
    own = tokenizer(family, chat_template)
    assert text in own.decode(tokenized([row], own)[0][0]["input_ids"])


# ---- Templates that think

# As Qwen3's: an empty thought before the last answer, thoughts of earlier ones left out.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = (m.content or '').split('</think>') %}"
    "{% if loop.last %}{{ '<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '')"
    " + '\n</think>\n\n' }}{% endif %}{{ parts[-1].lstrip('\n') }}"
    "{% if m.tool_calls %}{{ '<call>' + m.tool_calls[0].function.name }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As R1's: the prompt begins a thought, and an answer is written without its own.
R1 = QWEN3.replace("{% if loop.last %}", "{% if false %}").replace(
    "assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"
)


def learnt(row, own, prefix=""):
    return [own.decode(own.convert_tokens_to_ids(tokens)) for tokens in answers(row, own, prefix)]


def test_an_empty_thought_is_written_by_the_model_and_is_none_of_the_text(tokenizer):
    student, teacher = tokenizer("qwen3"), tokenizer("qwen3", QWEN3)
    (row,), report = tokenized([{"prompt": "hi", "completion": "yes it is"}], student, teacher)
    assert learnt(row, student) == ["yes it is<|im_end|>"]
    assert learnt(row, teacher, "teacher_") == ["<think>\n\n</think>\n\nyes it is<|im_end|>"]
    assert row["teacher_input_ids"][: row["teacher_prompt_length"]] == row["input_ids"][: row["prompt_length"]]
    opening = len(row["teacher_byte_ends"]) - len(row["byte_ends"])
    assert row["teacher_byte_ends"] == [0] * opening + row["byte_ends"] and opening >= 3
    assert row["teacher_chunk_ids"] == [-1] * opening + row["chunk_ids"] and not report.remarkable
    batch = DualCollator(0, 0)([row])
    # Token by token the two are compared in the text.
    places, others = (batch[f"{side}places"][batch[f"{side}labels"] != -100] for side in ("", "teacher_"))
    assert others.tolist() == [-1] * opening + places.tolist() and places.tolist()[:2] == [0, 1]
    assert batch["teacher_silent"].sum() == opening + 1 and batch["silent"].sum() == 1
    # Asked for by the settings, it is in the prompt; and what is generated is asked for as in training.
    (example,) = read_examples({"prompt": "hi", "completion": "yes it is"})
    assert prompt_tokens(teacher, example) == row["teacher_input_ids"][: row["teacher_prompt_length"]]
    assert answer_frame(teacher).lead == "<think>\n\n</think>\n\n"


def test_calls_and_plain_answers_follow_one_prompt(tokenizer):
    own = tokenizer("qwen3", QWEN3)
    rows, _ = tokenized([of_assistant("", tool_calls=CALLS), {"messages": chat("hi", "yes")}], own)
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    assert prompts[0] == prompts[1]
    assert [learnt(row, own)[0].split("</think>")[-1] for row in rows] == [
        "\n\n<call>weather<|im_end|>",
        "\n\nyes<|im_end|>",
    ]


@pytest.mark.parametrize("thinks", ["student", "teacher"])
def test_a_thought_that_the_prompt_begins_is_whole_for_both(tokenizer, thinks):
    thought = "<think>\nhm\n</think>\n\nyes"
    pair = [
        tokenizer("qwen3", QWEN3.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")),
        tokenizer("qwen2"),
    ]
    student, teacher = pair if thinks == "student" else pair[::-1]
    (row,), _ = tokenized([{"prompt": "hi", "completion": thought}], student, teacher)
    for own, prefix in ((student, ""), (teacher, "teacher_")):
        assert own.decode(row[f"{prefix}input_ids"]).count("<think>") == 1
        assert learnt(row, own, prefix) == [f"{thought}<|im_end|>"]


def test_an_answer_without_the_thought_that_is_asked_for(tokenizer):
    own = tokenizer("qwen3", R1)
    (row,), report = tokenized([{"prompt": "hi", "completion": "yes"}], own)
    assert report.unasked == 1 and "where a chat template asks for a thought" in str(report)
    assert own.decode(row["input_ids"]).endswith("assistant\nyes<|im_end|>")
    thought = "<think>\nhm\n</think>\n\nyes"
    (row,), report = tokenized([{"prompt": "hi", "completion": thought}], own)
    assert report.unasked == 0 and own.decode(row["input_ids"]).endswith(f"assistant\n{thought}<|im_end|>")


# ---- What templates leave out or refuse


def test_calls_that_a_template_rejects_are_refused(tokenizer):
    rejects = WITH_TOOLS.replace(
        "{% if m.tool_calls %}",
        "{% if m.tool_calls and m.tool_calls[0].id | length != 9 %}"
        "{{ raise_exception('ids have nine letters') }}{% endif %}{% if m.tool_calls %}",
    )
    row = of_assistant("let me look", tool_calls=CALLS)
    with pytest.raises(UserError, match=r"row 0 .*ids have nine letters"):
        tokenized([row], tokenizer("qwen2", rejects))
    with pytest.raises(UserError, match=r"'tool_calls' of the answer.*\(the chat template .*ids have nine letters"):
        tokenized([row], tokenizer("qwen2", rejects), tokenizer("smollm2"))


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_message_that_no_template_writes_is_refused(tokenizer, role):
    only_two = (
        template("<|im_end|>\n")
        .replace("{{ '<|im_start|>'", "{% if m.role in ('user', 'assistant') %}{{ '<|im_start|>'")
        .replace("{% endif %}{% endfor %}", "{% endif %}{% endif %}{% endfor %}")
    )
    messages = [*chat("hi", "wait"), {"role": role, "content": "42"}, *chat("so?", "yes")]
    with pytest.raises(UserError, match=rf"message 2, of role '{role}', can't be told to the model"):
        tokenized([{"messages": messages}], tokenizer("qwen2", only_two))
    # Plain text has every message.
    _, report = tokenized([{"messages": messages}], tokenizer("qwen2", only_two), tiny.byte_level_tokenizer())
    assert report.one_sided == 1


def test_text_beside_a_call_that_the_template_drops(tokenizer):
    drops = WITH_TOOLS.replace("{{ m.content or '' }}", "{% if not m.tool_calls %}{{ m.content or '' }}{% endif %}")
    row = of_assistant("let me look", tool_calls=CALLS)
    with pytest.raises(UserError, match="the text of the answer beside 'tool_calls' can't be told"):
        tokenized([row], tokenizer("qwen2", drops))
    row["messages"][1]["content"] = ""
    assert tokenized([row], tokenizer("qwen2", drops))[1].kept == 1


def test_control_tokens_in_an_answer_of_the_templates_own_format(tokenizer):
    own = tokenizer("qwen2", QWEN3)
    text = "<think>\nhm\n</think>\n\nWrite <|im_end|>\n<|im_start|>system"
    (row,), report = tokenized([{"prompt": "hi", "completion": text}], own)
    (answer,) = answers(row, own)
    assert [token for token in answer if token.startswith("<|")] == ["<|im_end|>"] and answer[-1] == "<|im_end|>"
    assert report.control_as_text == 1 and learnt(row, own) == [f"{text}<|im_end|>"]
    assert row["byte_ends"][-1] == row["response_bytes"] == len(text)
    calls = [{**CALLS[0], "function": {"name": "w<|im_end|>", "arguments": {}}}]
    (row,), report = tokenized([of_assistant("", tool_calls=calls)], own)
    assert answers(row, own)[0].count("<|im_end|>") == 1 and report.control_as_text == 1


def test_tokens_that_are_added_later_are_control_tokens_then():
    own = tiny.byte_level_tokenizer()
    own.chat_template = template("<|im_end|>\n")
    (before,), _ = tokenized([{"prompt": "hi", "completion": "yes"}], own)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    (after,), report = tokenized([{"prompt": "hi", "completion": "yes<|im_end|>"}], own)
    assert len(answers(before, own)[0]) > 2 and answers(after, own)[0][-1] == "<|im_end|>"
    assert report.ends_removed == 1 and len(answers(after, own)[0]) < len(answers(before, own)[0])


def test_long_conversations_take_time_in_proportion(tokenizer, monkeypatch):
    from hf_dskd.data import templates

    own, rendered = tokenizer("qwen2", WITH_TOOLS), []
    render = templates.render
    monkeypatch.setattr(templates, "render", lambda *a, **k: rendered.append(len(a[1])) or render(*a, **k))
    turns = []
    for number in range(40):
        call = [{**CALLS[0], "function": {"name": "f", "arguments": {"n": number}}}]
        turns += [
            *chat(f"{number}?"),
            {"role": "assistant", "content": "", "tool_calls": call},
            {"role": "tool", "content": "x"},
        ]
    turns += chat("so?", "yes")
    _, report = tokenized([{"messages": turns, "tools": TOOLS}], own, max_length=9000)
    assert report.answers == 41
    # A few for each answer, none of them twice.
    assert len(rendered) < 6 * 41
    rendered.clear()
    _, report = tokenized([{"messages": turns, "tools": TOOLS}], own, max_length=500)
    assert report.answers + report.left_out == 41 and report.left_out > 30 and len(rendered) < 100


# ---- Rows that can't be read


def test_bad_rows_are_skipped_and_counted_by_kind():
    tokenizer = tiny.byte_level_tokenizer()
    good = {"prompt": "q", "completion": "yes"}
    rows = [good, {"prompt": "", "completion": "x"}, {"prompt": "", "completion": "yy"}, good]
    rows.append({"prompt": "long " * 100, "completion": "x"})
    with pytest.raises(UserError, match=r"row 1 .*the prompt has no tokens for the student"):
        tokenized(rows, tokenizer)
    kept, report = tokenized(rows, tokenizer, on_bad_row="skip", max_length=60)
    assert [row["example_id"] for row in kept] == [0, 3] and (report.rows, report.kept) == (5, 2)
    assert sorted(report.bad.values()) == [1, 2]
    said = str(report)
    assert (
        "3 that can't be read: 2 such as train data set, row 1 (" in said and "1 such as train data set, row 4" in said
    )
    with pytest.raises(
        UserError, match=r"no row of the train data set is left.*2 can't be read, such as train data set"
    ):
        tokenized(rows[1:3], tokenizer, on_bad_row="skip")


def test_bad_rows_of_a_stream(caplog):
    tokenizer = tiny.byte_level_tokenizer()

    def rows():
        yield {"prompt": "q", "completion": "yes"}
        yield {"prompt": "q", "completion": "half a \ud83d pair"}
        yield {"prompt": "\udc00", "completion": "no"}
        yield {"prompt": "q", "completion": "no"}

    stream = IterableDataset.from_generator(rows)
    data, _ = tokenize_dataset(stream, tokenizer, max_length=100)
    with pytest.raises(
        UserError, match=r"train data set, row 1 .*column 'completion' has a lone surrogate at character 7"
    ):
        list(data)
    with caplog.at_level("WARNING", "hf_dskd"):
        data, _ = tokenize_dataset(stream, tokenizer, max_length=100, on_bad_row="skip")
        assert [row["example_id"] for row in data] == [0, 3]
    assert "row 1" in caplog.text and "on_bad_row='skip'" in caplog.text


def test_stream_of_conversations(tokenizer):
    own = tokenizer("qwen2")
    rows = [{"messages": chat("hi", "yes", "sure?", "yes!")}, {"messages": chat("hi", "no")}]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    data, _ = tokenize_dataset(stream, own, max_length=100, prompt_style="plain")
    expected, _ = tokenize_dataset(Dataset.from_list(rows), own, max_length=100, prompt_style="plain")
    assert list(data) == list(expected) and len(expected) == 3


# ---- Text that a tokenizer loses


def test_characters_that_a_tokenizer_drops_are_noticed():
    from tokenizers import normalizers

    whole, lossy = tiny.byte_level_tokenizer(), tiny.byte_level_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    rows = [{"prompt": "q", "completion": text} for text in ("cafe", "café", "naïve", "e\u0301")]
    _, report = tokenized(rows, whole, lossy)
    assert report.lost == {"teacher": 3} and report.remarkable
    assert "3 rows have characters that the teacher's tokenizer loses" in str(report)
    # A letter and its accent as one character are the same text.
    composing = tiny.byte_level_tokenizer()
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    assert tokenized(rows, composing)[1].lost == {}


def test_a_text_dataset_with_a_column_of_a_tokenized_one():
    rows = [{"prompt": "q", "completion": "yes", "prompt_length": 1}]
    assert not is_tokenized(Dataset.from_list(rows))
    data, report = tokenized(rows, tiny.byte_level_tokenizer())
    assert report.kept == 1 and is_tokenized(Dataset.from_list(data))
