"""The benchmark of a whole step: what it trains on, what it prints, and what it refuses."""

import json
import math
from dataclasses import replace
from functools import partial

import benchmark_step as recipe
import pytest
import tiny

from hf_dskd import UserError
from hf_dskd.alignment.spans import check_tiling
from hf_dskd.data.vocabulary import same_vocabulary


SMALL = ("--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--batch-size", "2", "--max-length", "24")
SMALL += ("--response-tokens", "8", "--steps", "1", "--warmup-steps", "1")


def here(function, cell):
    """Instead of a process for each cell, which takes seconds to import everything."""
    return function(cell)


def benchmark(folder, *arguments):
    return recipe.benchmark(recipe.parse([*SMALL, *arguments]), folder, run=here)


@pytest.fixture
def own_maps(monkeypatch):
    """The benchmark sets this for the processes it starts."""
    monkeypatch.setenv("HF_DSKD_CACHE", "")


def test_the_command_prints_a_table_and_json_last(own_maps, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "parse", partial(recipe.parse, [*SMALL, "--methods", "sft", "--json"]))
    monkeypatch.setattr(recipe, "benchmark", partial(recipe.benchmark, run=here))
    recipe.main()
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    (row,) = result["rows"]
    assert (row["method"], row["teacher"]) == ("sft", "none")
    for name in ("seconds_per_step", "cpu_seconds_per_step", "response_tokens_per_second", "peak_mb"):
        assert 0 < row[name] < math.inf
    # Nothing to compare with.
    assert "speed_up" not in row
    settings = result["settings"]
    assert settings["shape"] == "tiny" and settings["lora_r"] == 8 and settings["dtype"] == "float32"
    assert sum(response for _, response in settings["tokens_per_step"]) == 16
    assert result["threads"] >= 1 and result["torch"] and result["transformers"] and result["date"]
    text = "\n".join(table)
    for shown in ("36 tokens, 16 of them responses", "random weights", "peak MB", "sft           none"):
        assert shown in text


def test_every_teacher_and_what_cant_run(tmp_path, own_maps):
    result = benchmark(tmp_path, "--methods", "sft,dskd_cma_ga,alm,kd,seq_kd", "--teacher", "live,cached")
    rows = {(row["method"], row["teacher"]): row for row in result["rows"]}
    for method in ("dskd_cma_ga", "alm"):
        assert rows[method, "live"]["speed_up"] == rows[method, "live"]["memory_ratio"] == 1
        assert rows[method, "cached"]["speed_up"] > 0 and rows[method, "cached"]["cpu_speed_up"] > 0
        ratio = rows[method, "live"]["seconds_per_step"] / rows[method, "cached"]["seconds_per_step"]
        assert rows[method, "cached"]["speed_up"] == ratio
    assert "vocabularies" in rows["kd", "live"]["skipped"] and "sft" in rows["seq_kd", "none"]["skipped"]
    # One cache for both methods: 2 steps of 2 examples with 16 response tokens together.
    (filled,) = result["cache"]
    assert filled["examples"] == 4 and filled["states"] == 32 and filled["seconds"] > 0 and filled["mb"] > 0
    text = recipe.table(result)
    assert "not run: once the teacher" in text and "cache filled once and apart: 4 examples, 32 states" in text
    recipe.plot(result, str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_a_4bit_teacher_runs_or_says_why_not(tmp_path, own_maps):
    result = benchmark(tmp_path, "--methods", "dskd_cma", "--teacher", "4bit")
    (row,) = result["rows"]
    assert "4bit" in row.get("skipped", "") or row["seconds_per_step"] > 0


def test_the_whole_student_trained_with_checkpointing(tmp_path, own_maps):
    given = ("--methods", "dskd_cma", "--teacher", "live", "--lora-r", "0", "--gradient-checkpointing")
    result = benchmark(tmp_path, *given)
    assert result["rows"][0]["seconds_per_step"] > 0
    assert "all of it trained" in recipe.table(result)


def test_a_sweep_goes_over_each_axis(tmp_path, own_maps):
    result = benchmark(tmp_path, "--methods", "dskd_cma", "--teacher", "live", "--sweep", "batch_size")
    assert [(row["axis"], row["value"]) for row in result["rows"]] == [
        ("batch_size", 1),
        ("batch_size", 2),
        ("batch_size", 4),
    ]
    assert all(row["speed_up"] == 1 and row["peak_mb"] > 0 for row in result["rows"])
    recipe.plot(result, str(tmp_path / "lines.png"))
    assert (tmp_path / "lines.png").stat().st_size > 5000
    assert "batch_size" in recipe.table(result)


def test_points_of_a_sweep():
    shape = recipe.SHAPES["tiny"]
    base = replace(cell(), response_tokens=10, max_length=24, batch_size=2)
    points = list(recipe.sweep_points(shape, base, recipe.AXES))
    assert [value for axis, value, _ in points if axis == "response_tokens"] == [5, 10, 12]
    assert [value for axis, value, _ in points if axis == "teacher_vocabulary"] == [600, 1200, 2400]
    # The middle is the same run for every axis.
    assert [changes for _, _, changes in points].count({}) == 4
    assert {"student_vocabulary": 2000} in [changes for _, _, changes in points]


def cell(**changes):
    base = recipe.Cell("dskd_cma", "live", "", "", "", 8, False, 3, 40, 10, 2, 1, "cpu", "float32")
    return replace(base, **changes)


def test_batches_have_the_lengths_that_were_asked_for():
    assert recipe.lengths(1, 40, 10) == [(40, 10)]
    sizes = recipe.lengths(4, 40, 10)
    assert [total for total, _ in sizes] == [40, 33, 27, 20]
    assert sum(response for _, response in sizes) == 40 and len({response for _, response in sizes}) == 4
    # Never without a prompt.
    assert all(response < total for total, response in recipe.lengths(5, 8, 4))


def test_data_are_like_tokenized_text():
    student, teacher = recipe.make_tokenizer(500, "student"), recipe.make_tokenizer(600, "teacher")
    assert len(student) == 500 and len(teacher) == 600 and not same_vocabulary(student, teacher)
    dataset = recipe.make_dataset(cell(), student, teacher)
    assert len(dataset) == 9 and dataset[0]["input_ids"] != dataset[3]["input_ids"]
    for row in dataset:
        total, response = recipe.lengths(3, 40, 10)[row["example_id"] % 3]
        for prefix, tokenizer in (("", student), ("teacher_", teacher)):
            ids = row[f"{prefix}input_ids"]
            assert len(ids) == total and row[f"{prefix}prompt_length"] == total - response
            assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
            assert len(row[f"{prefix}byte_ends"]) == len(row[f"{prefix}chunk_ids"]) == response
            check_tiling(row[f"{prefix}byte_ends"][:-1], row["response_bytes"], 0, "student")
        # Both sides are the same text.
        texts = [
            tokenizer.convert_ids_to_tokens(row[f"{prefix}input_ids"][:-1])
            for prefix, tokenizer in (("", student), ("teacher_", teacher))
        ]
        assert texts[0] == texts[1]


def test_data_for_real_tokenizers():
    dataset = recipe.make_dataset(cell(), tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer())
    for row in dataset:
        check_tiling(row["byte_ends"][:-1], row["response_bytes"], 0, "student")


def test_a_process_that_dies_is_a_row(tmp_path):
    bench = recipe.Bench(recipe.SHAPES["tiny"], tmp_path, real_weights=False, run=lambda function, cell: None)
    assert "ended the process" in bench.measure(cell())["skipped"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--shape", "tinny"], "did you mean 'tiny'"),
        (["--shape", "tiny", "--methods", "sft,dskd_cam"], "did you mean 'dskd_cma'"),
        (["--shape", "tiny", "--teacher", "lively"], "did you mean 'live'"),
        (["--shape", "tiny", "--sweep", "vocabulary"], "'vocabulary' is unknown"),
        (["--shape", "tiny", "--device", "tpu"], "'tpu'"),
        (["--shape", "tiny", "--dtype", "float61"], "did you mean 'float16'"),
        (["--shape", "tiny", "--steps", "0"], "'0' must be a whole number above 0"),
        (["--shape", "tiny", "--lora-r", "-1"], "'-1'"),
        (["--shape", "tiny", "--max-length", "80", "--response-tokens", "50"], "40 is the most"),
        (["--shape", "tiny", "--max-length", "4", "--response-tokens", "2"], "8 is the least"),
        (["--shape", "tiny", "--plot", "nowhere/at/all.png"], "'nowhere/at/all.png'"),
        (["--shape", "tiny", "--stesp", "3"], "--stesp"),
        ([], "--shape"),
    ],
)
def test_what_cant_work_is_refused_in_one_line(arguments, expected):
    with pytest.raises(UserError) as error:
        recipe.parse(arguments)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_models_that_dont_fit_are_refused(monkeypatch):
    import psutil

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2 * 10**9))
    recipe.check_memory(recipe.SHAPES["tiny"], 8, "cpu")
    with pytest.raises(UserError, match="4 GB and 2 GB of memory are free"):
        recipe.check_memory(recipe.SHAPES["gpt2-qwen1.5"], 0, "cuda")
