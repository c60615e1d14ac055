import copy
import json

import datasets
import pytest
import tiny
import torch
from datasets import Dataset

from hf_dskd.data.formats import read_example
from hf_dskd.data.prompts import prompt_tokens
from hf_dskd.data.tokenization import tokenize_dataset
from hf_dskd.errors import UserError
from hf_dskd.models.generation import response_text, sample
from hf_dskd.teacher.responses import write_responses


TOKENIZER = tiny.sentencepiece_tokenizer()
STUDENT = tiny.byte_level_tokenizer()
MAX_LENGTH = 90
FACTS = {"teacher": "tiny/qwen2"}


def make_teacher():
    """Ends some of its responses."""
    model = tiny.qwen2(len(TOKENIZER))
    model.generation_config.eos_token_id = list(range(100, 120))
    return model.eval()


class Loader:
    """Counts how often the teacher is loaded, and after how many batches it is killed."""

    def __init__(self, batches=None):
        self.loaded, self.batches = 0, batches

    def __call__(self):
        self.loaded += 1
        model = make_teacher()
        generate = model.generate

        def counted(**kwargs):
            if self.batches == 0:
                raise KeyboardInterrupt
            self.batches = None if self.batches is None else self.batches - 1
            return generate(**kwargs)

        model.generate = counted
        return model


def write(folder, dataset=None, loader=None, **options):
    options = {"max_length": MAX_LENGTH, "prompt_style": "chat", "batch_size": 3, "facts": FACTS, **options}
    return write_responses(
        tiny.dataset(8) if dataset is None else dataset, loader or Loader(), TOKENIZER, folder, **options
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, write(folder)


def test_rows_are_the_teachers_greedy_responses(whole):
    written = whole[1]
    source, teacher = tiny.dataset(8), make_teacher()
    assert written.column_names == ["prompt", "completion", "example_id", "finished"]
    assert written["prompt"][:] == source["prompt"][:]
    assert written["example_id"][:] == list(range(8))
    assert set(written["finished"][:]) == {True, False}
    ends = [TOKENIZER.eos_token_id, *teacher.generation_config.eos_token_id]
    for row in written:
        ids = prompt_tokens(TOKENIZER, read_example(row))
        response = []
        while len(ids + response) < MAX_LENGTH and not set(response) & set(ends):
            with torch.no_grad():
                response.append(int(teacher(input_ids=torch.tensor([ids + response])).logits[0, -1].argmax()))
        assert row["finished"] == (response[-1] in ends)
        text = response_text(TOKENIZER, response[:-1] if row["finished"] else response)
        assert row["completion"] == (text if row["finished"] else text.rstrip("\ufffd"))


def test_chat_template_kwargs_are_in_the_teachers_prompts(tmp_path):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{{ messages[0].content }}{{ then }}"
    seen = []

    def teacher():
        model = make_teacher()
        generate = model.generate

        def watched(**kwargs):
            seen.extend(kwargs["input_ids"].tolist())
            return generate(**kwargs)

        model.generate = watched
        return model

    options = {"max_length": MAX_LENGTH, "prompt_style": "chat", "batch_size": 1, "facts": FACTS}
    for then in ("!", "?"):
        write_responses(
            *(tiny.dataset(2), teacher, tokenizer, tmp_path / str(ord(then))),
            **options,
            chat_template_kwargs={"then": then},
        )
    prompts = [row["prompt"] for row in tiny.dataset(2)]
    assert [tokenizer.decode(ids) for ids in seen] == [prompt + then for then in "!?" for prompt in prompts]


def test_file_is_plain_json_lines(whole, tmp_path):
    folder, written = whole
    lines = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert lines == written.to_list()
    loaded = datasets.load_dataset(
        "json", data_files=str(folder / "responses.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    assert loaded.to_list() == written.to_list()


def test_trains_like_any_data(whole):
    _, written = whole
    options = {"max_length": MAX_LENGTH, "skip_long_prompts": True}
    rows, _ = tokenize_dataset(written, STUDENT, TOKENIZER, finished_column="finished", **options)
    for row in rows:
        source = written[row["example_id"]]
        kept = source["completion"].encode()[: row["response_bytes"]]
        assert row["teacher_input_ids"][: row["teacher_prompt_length"]] == prompt_tokens(
            TOKENIZER, read_example(source)
        )
        assert (row["input_ids"][-1] == STUDENT.eos_token_id) == (not row["cut"])
        assert source["finished"] or row["cut"]
        assert response_text(STUDENT, row["input_ids"][row["prompt_length"] :]).encode() == kept
    # Without being told, an unfinished response that fits gets an end.
    short = Dataset.from_list([{"prompt": "Hi", "completion": "and so on and", "finished": False}])
    assert not tokenize_dataset(short, STUDENT, TOKENIZER, **options)[0][0]["cut"]
    row = tokenize_dataset(short, STUDENT, TOKENIZER, finished_column="finished", **options)[0][0]
    assert row["cut"] and row["response_bytes"] == len("and so on and")
    assert STUDENT.eos_token_id not in row["input_ids"] and TOKENIZER.eos_token_id not in row["teacher_input_ids"]
    assert len(row["chunk_ids"]) == len(row["byte_ends"])


def test_complete_folder_needs_no_teacher(whole):
    folder, written = whole
    loader = Loader(0)
    assert write(folder, loader=loader).to_list() == written.to_list()
    # Nor do other responses to the same prompts, which are the same data.
    rows = tiny.dataset(8).map(lambda row: {"completion": row["completion"] + "!"})
    assert write(folder, dataset=rows, loader=loader).to_list() == written.to_list()
    assert loader.loaded == 0


@pytest.mark.parametrize("batches", [0, 2])
def test_goes_on_after_a_kill(batches, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, loader=Loader(batches))
    path = tmp_path / "responses.jsonl"
    assert path.read_bytes().count(b"\n") == 3 * batches
    with path.open("ab") as file:
        file.write('{"prompt": "Question: zwölf'.encode()[:-2])
    loader = Loader(3 - batches)
    resumed = write(tmp_path, loader=loader)
    # No batch was written twice.
    assert loader.batches == 0
    assert resumed.to_list() == whole[1].to_list()
    assert path.read_bytes() == (whole[0] / "responses.jsonl").read_bytes()


def test_half_line_that_is_the_last_missing_one(whole, tmp_path):
    for name in ("responses.jsonl", "about.json"):
        (tmp_path / name).write_bytes((whole[0] / name).read_bytes())
    path = tmp_path / "responses.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert write(tmp_path).to_list() == whole[1].to_list()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"facts": {"teacher": "tiny/other"}}, "teacher='tiny/qwen2', which is now 'tiny/other'"),
        ({"facts": {**FACTS, "dtype": "bfloat16"}}, "dtype=None, which is now 'bfloat16'"),
        ({"max_length": 80}, "max_length=90, which is now 80"),
        ({"prompt_style": "plain"}, "prompt_style='chat', which is now 'plain'"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs={}, which is now {'a': 1}"),
        ({"dataset": tiny.dataset(7)}, "rows=8, which is now 7"),
        ({"dataset": tiny.dataset(8).select([1, 0, *range(2, 8)])}, "prompts='"),
    ],
)
def test_responses_of_other_facts_are_refused(change, named, whole):
    before = (whole[0] / "responses.jsonl").read_bytes()
    with pytest.raises(UserError, match="choose another folder or delete this one") as error:
        write(whole[0], **change)
    assert named in str(error.value) and str(whole[0]) in str(error.value)
    assert "\n" not in str(error.value)
    assert (whole[0] / "responses.jsonl").read_bytes() == before


def test_messages(tmp_path, whole):
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    longer = [*turns, {"role": "user", "content": "And?"}, {"role": "assistant", "content": None}]
    rows = Dataset.from_list([{"messages": longer, "id": 0}, {"messages": turns, "id": 1}])
    written = write(tmp_path, dataset=rows)
    assert written.column_names == ["messages", "example_id", "finished"]
    for source, row in zip(rows, written):
        assert row["messages"][:-1] == source["messages"][:-1]
        assert row["messages"][-1]["role"] == "assistant"
        assert row["messages"][-1]["content"] not in (None, "Two.")
    assert len(tokenize_dataset(written, STUDENT, TOKENIZER, max_length=MAX_LENGTH, train_on="last")[0]) == 2


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": ["3", "three"]}, {}),
        ({"instruction": "Greet.", "output": "Hi"}, {}),
        ({"q": "Why?", "a": "So.", "prompt": "x"}, {"prompt_column": "q", "response_column": "a"}),
        ({"prompt": [{"role": "user", "content": "A"}], "completion": [{"role": "assistant", "content": "B"}]}, {}),
        # A date, and no response.
        ({"prompt": "2024-01-01", "completion": None}, {}),
    ],
)
def test_every_format(row, options, tmp_path):
    rows = Dataset.from_list([row])
    written = write(tmp_path, dataset=rows, max_length=250, **options)[0]
    before, after = read_example(row, **options), read_example(written, **options)
    assert after[:2] == before[:2]
    assert set(written) == set(row) - ({"prompt"} if "q" in row else set()) | {"example_id", "finished"}
    prompt = prompt_tokens(TOKENIZER, before)
    ends = [TOKENIZER.eos_token_id, *make_teacher().generation_config.eos_token_id]
    alone = sample(make_teacher(), [prompt], pad_token_id=2, eos_token_ids=ends, max_new_tokens=250 - len(prompt))[0]
    text = (
        response_text(TOKENIZER, alone[:-1]) if alone[-1] in ends else response_text(TOKENIZER, alone).rstrip("\ufffd")
    )
    assert after.response == text != before.response


def test_prompt_without_room(tmp_path):
    rows = Dataset.from_list([{"prompt": "long " * 200, "completion": "x"}, {"prompt": "short", "completion": "x"}])
    written = write(tmp_path, dataset=rows)
    assert [bool(text) for text in written["completion"]] == [False, True] and written["finished"][0] is False


def test_row_that_cannot_be_read(tmp_path):
    rows = Dataset.from_list([{"prompt": "x", "completion": "y"}, {"prompt": None, "completion": "y"}])
    with pytest.raises(UserError, match="row 1: column 'prompt' holds None"):
        write(tmp_path / "new", dataset=rows)
    assert not (tmp_path / "new").exists()
