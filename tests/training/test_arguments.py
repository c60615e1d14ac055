"""Kinds of arguments that are taken as they are, and become what a trainer works with."""

import logging
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import runs
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model

from hf_dskd import tokenize_dataset
from hf_dskd.data.collator import DualCollator
from hf_dskd.data.kinds import as_dataset, as_datasets, as_tokenizer
from hf_dskd.errors import UserError
from hf_dskd.training.arguments import check_optimization, check_optimized, check_trackers
from hf_dskd.training.compatibility import as_model


ROWS = [dict(row) for row in tiny.dataset(4)]
STUDENT, TEACHER = runs._STUDENT_TOKENIZER, runs._TEACHER_TOKENIZER


class OfTorch(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]


@pytest.mark.parametrize("kind", [list, tuple, lambda rows: OfTorch(), pd.DataFrame, Dataset.from_list])
def test_rows_in_whatever_they_come(kind):
    data = as_dataset(kind(ROWS), "train_dataset")
    assert isinstance(data, Dataset) and data.to_list() == ROWS


def test_rows_of_a_frame_that_was_filtered():
    """Its index has gaps, and is no column."""
    frame = pd.DataFrame(ROWS)
    data = as_dataset(frame[frame.index > 1], "train_dataset")
    assert data.column_names == ["prompt", "completion"] and data.to_list() == ROWS[2:]


def test_columns_that_the_first_row_has_not():
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d", "system": "e"}]
    assert as_dataset(rows, "train_dataset")["system"] == [None, "e"]
    conversations = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "b", "name": "c"}]},
    ]
    assert as_dataset(conversations, "x")[1]["messages"][0]["name"] == "c"


def test_streams_and_several_sets_stay_what_they_are():
    stream = tiny.dataset(2).to_iterable_dataset()
    assert as_dataset(stream, "train_dataset") is stream and as_dataset(None, "train_dataset") is None
    several = as_datasets({"a": ROWS, "b": stream, "c": tiny.dataset(2)}, "eval_dataset")
    assert [type(data) for data in several.values()] == [Dataset, IterableDataset, Dataset]


def test_a_run_on_rows_is_that_on_the_dataset(tmp_path):
    weights = []
    for data in (tiny.dataset(4), ROWS, OfTorch()):
        run = runs.trainer(tmp_path, train_dataset=data, eval_dataset=data, max_steps=1)
        run.train()
        weights.append(runs.weights(run))
        assert run.evaluate(data)["eval_bits_per_byte"] == run.evaluate()["eval_bits_per_byte"]
    for others in weights[1:]:
        assert all(torch.equal(value, others[name]) for name, value in weights[0].items())


def test_a_path_is_a_name(tmp_path):
    assert as_model(Path("a/b"), "model") == "a/b" and as_model(None, "model") is None
    model = tiny.gpt2()
    assert as_model(model, "model") is model
    model.save_pretrained(tmp_path / "student")
    STUDENT.save_pretrained(tmp_path / "student")
    run = runs.trainer(tmp_path / "run", student=tmp_path / "student", processing_class=None, max_steps=1)
    run.train()
    assert run.model.name_or_path == str(tmp_path / "student")


def test_weights_that_accelerate_keeps_elsewhere_are_no_missing_ones():
    model = tiny.gpt2()
    model.hf_device_map = {"": "disk"}
    assert as_model(model.to("meta"), "teacher_model") is model


def test_a_processor_has_a_tokenizer():
    class Processor:
        tokenizer = STUDENT

    assert as_tokenizer(Processor(), "processing_class") is STUDENT
    assert as_tokenizer(STUDENT, "processing_class") is STUDENT and as_tokenizer(None, "processing_class") is None


def test_an_optimizer_of_the_students_own():
    model = tiny.gpt2()
    check_optimized(torch.optim.SGD(model.parameters(), 1.0), model)
    check_optimized(torch.optim.SGD(model.transformer.h[1].parameters(), 1.0), model)
    check_optimized(None, model)
    parameters = list(model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"]))
    with pytest.raises(UserError, match=r"none of the optimizer's parameters is trained"):
        check_optimized(torch.optim.SGD(parameters, 1.0), adapted)
    check_optimized(torch.optim.SGD(adapted.parameters(), 1.0), adapted)
    with pytest.raises(UserError, match=r"1 of the optimizer's \d+ parameters are none of the student's"):
        check_optimized(torch.optim.SGD([*adapted.parameters(), torch.zeros(1)], 1.0), adapted)


@pytest.mark.parametrize(
    "optim, given, unread",
    [
        ("ademamix", "beta3=0.999,alpha=5", None),
        ("ademamix", "beta1=0.8, beta3=0.9999, t_alpha=100", None),
        ("ademamix", "beta3=0.999,beta4=5", "beta4"),
        ("sgd", "momentum=0.9,nesterov=true", None),
        ("sgd", "momentum=0.9,beta3=0.9", "beta3"),
        ("adamw_torch", "beta1=0.8", "beta1"),
    ],
)
def test_parts_of_optim_args_that_the_optimizer_reads(optim, given, unread, tmp_path):
    if optim == "ademamix":
        pytest.importorskip("bitsandbytes")
    args = runs.config(tmp_path, optim=optim, optim_args=given)
    if unread is None:
        check_optimization(args, None)
        assert args.optim_args == given
        return
    with pytest.raises(UserError, match=f"{unread!r} has no effect on it, leave it out"):
        check_optimization(args, None)


def test_a_collator_of_ones_own(tmp_path):
    class Longer(DualCollator):
        pass

    collator = Longer(0, 2, pad_to_multiple_of=32)
    run = runs.trainer(tmp_path, data_collator=collator, max_steps=1)
    run.train()
    assert run.state.global_step == 1


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    check_trackers(["tensorboard"])
    with pytest.raises(UserError, match="report_to='wandb' needs wandb: pip install wandb, or choose another"):
        check_trackers(["tensorboard", "wandb"])


def test_tokenizing_takes_the_same_kinds():
    whole = tokenize_dataset(tiny.dataset(4), STUDENT, TEACHER, max_length=256)[0].to_list()
    for data in (ROWS, OfTorch(), pd.DataFrame(ROWS)):
        assert tokenize_dataset(data, STUDENT, TEACHER, max_length=256)[0].to_list() == whole
    for options, expected in (
        ({"dataset": "rows.jsonl"}, "dataset='rows.jsonl' is a name: pass datasets.load_dataset"),
        ({"student_tokenizer": "gpt2"}, "student_tokenizer='gpt2' is a name: pass AutoTokenizer"),
        ({"train_on": "first"}, "train_on='first' is unknown: one of all, last"),
        ({"on_bad_row": "stopp"}, "on_bad_row='stopp' is unknown: did you mean 'stop'"),
        ({"prompt_style": "chatty"}, "prompt_style='chatty' is unknown: did you mean 'chat'"),
    ):
        given = {"dataset": tiny.dataset(2), "student_tokenizer": STUDENT, "max_length": 256}
        with pytest.raises(UserError, match=f"^{expected}"):
            tokenize_dataset(**{**given, **options})


# ---- Tokenizers of other models


def test_a_loaded_models_other_tokenizer_is_said(tmp_path, caplog):
    """Its embedding may have been exchanged with it; that of a name can't have been."""
    model = tiny.gpt2(len(TEACHER))
    model.save_pretrained(tmp_path / "student")
    STUDENT.save_pretrained(tmp_path / "student")
    loaded = type(model).from_pretrained(tmp_path / "student")
    with caplog.at_level(logging.WARNING):
        runs.trainer(tmp_path, student=loaded, processing_class=TEACHER)
    assert [1 for record in caplog.records if "gives only 0 of 400 tokens the id" in record.getMessage()] == [1]
    with pytest.raises(UserError, match="processing_class gives only 0 of 400 tokens the id"):
        runs.trainer(tmp_path, student=str(tmp_path / "student"), processing_class=TEACHER)


def test_a_tokenizer_with_more_tokens_is_still_ones_own(tmp_path, caplog):
    tokenizer = tiny.byte_level_tokenizer()
    tiny.gpt2(len(tokenizer) + 8).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with caplog.at_level(logging.WARNING):
        runs.trainer(tmp_path, student=str(tmp_path / "student"), processing_class=tokenizer)
    assert not [record for record in caplog.records if "the id that the tokenizer" in record.getMessage()]


def test_exchanged_tokenizers_of_one_vocabulary_are_nothing_to_refuse(tmp_path):
    run = runs.trainer(
        tmp_path,
        method="kd",
        student=tiny.gpt2(len(STUDENT)),
        teacher=tiny.gpt2(len(STUDENT), width=96),
        processing_class=STUDENT,
        teacher_processing_class=tiny.byte_level_tokenizer(),
    )
    assert run.train_dataset is not None


# ---- Rows that were tokenized elsewhere


@pytest.fixture(scope="module")
def tokens():
    return tokenize_dataset(tiny.dataset(6), STUDENT, TEACHER, max_length=256)[0]


@pytest.mark.parametrize(
    "same",
    [
        lambda d: d.shuffle(seed=1),
        lambda d: d.with_format("torch"),
        lambda d: d.to_list(),
        # As another program may have made them: one answer a row, up to its end.
        lambda d: d.remove_columns(["spans", "teacher_spans", "chunk_ids", "teacher_chunk_ids"]),
    ],
)
def test_good_tokens_are_taken(tokens, same, tmp_path):
    run = runs.trainer(tmp_path, train_dataset=same(tokens), eval_dataset=same(tokens), max_steps=1)
    run.train()
    assert run.evaluate()["eval_bits_per_byte"] > 0


@pytest.mark.parametrize("bad", [False, True])
def test_a_stream_of_tokens_is_checked_as_it_is_read(tokens, bad, tmp_path):
    if bad:
        spoilt = lambda row, i: {"input_ids": [9999] * len(row["input_ids"])} if i == 4 else {}  # noqa: E731
        tokens = tokens.map(spoilt, with_indices=True)
    stream = tokens.to_iterable_dataset()
    run = runs.trainer(tmp_path, train_dataset=stream, max_steps=1, per_device_train_batch_size=6)
    said = "the train data is tokenized, and its row 4 has the token 9999"
    with pytest.raises(UserError, match=said) if bad else nullcontext():
        run.train()
    assert run.state.global_step == (0 if bad else 1)


def test_a_row_far_down_is_named(tokens, tmp_path):
    """Beyond the rows that are looked at together."""
    many = Dataset.from_list(tokens.to_list() * 200).map(
        lambda row, i: {"teacher_prompt_length": 0 if i == 1150 else row["teacher_prompt_length"]}, with_indices=True
    )
    with pytest.raises(UserError, match=r"its row 1150 has teacher_prompt_length=0, and teacher_spans begin at"):
        runs.trainer(tmp_path, train_dataset=many)


def test_a_teachers_tokenizer_that_loses_characters_is_no_other_pair(tmp_path):
    """What it has of a response is in the response."""
    rows = [{"prompt": "a", "completion": f"東京は日本の首都です。 ok {i}"} for i in range(4)]
    tokens = tokenize_dataset(Dataset.from_list(rows), STUDENT, TEACHER, max_length=256)[0]
    assert runs.trainer(tmp_path, train_dataset=tokens).train_dataset.num_rows == 4


def test_evaluation_of_other_tokens_later(tokens, tmp_path):
    run = runs.trainer(tmp_path, max_steps=1)
    with pytest.raises(UserError, match="the eval data is tokenized, without the columns byte_ends"):
        run.evaluate(tokens.remove_columns(["byte_ends"]))
    with pytest.raises(UserError, match="eval_dataset is an int"):
        run.evaluate(5)
    with pytest.raises(UserError, match="test_dataset='test' is a name"):
        run.predict("test")
