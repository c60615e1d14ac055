import json
import shutil
import signal
import statistics
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig
from warm import forked

from hf_dskd import cli
from hf_dskd.data.tokenization import tokenize_dataset
from hf_dskd.errors import UserError
from hf_dskd.evaluation import protocol
from hf_dskd.evaluation.likelihood import bits_per_byte
from hf_dskd.evaluation.protocol import EvaluationSettings, evaluate, read_lines
from hf_dskd.evaluation.scores import rouge_l
from hf_dskd.models.generation import end_token_ids, sample


ROWS = [
    {"instruction": "Name the animal on the mat.", "input": "The cat sat on the mat.", "output": "The cat sat."},
    {"instruction": "What do adders do?", "input": "", "output": ["They add numbers.", "Adders add."]},
    {"prompt": "東京は日本の首都です。👩‍👩‍👧 Say so:\n", "output": "ok, Tokyo"},
    {"instruction": "Write a long line about the moon, the cat, the mat and knowledge.", "output": "The moon looked."},
    {"instruction": "Numbers?", "output": ["3.14159", "2.71828", "1.41421"]},
]


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A folder with a tiny model that ends its answers with any of a twelfth of its tokens."""
    folder = tmp_path_factory.mktemp("student")
    model = tiny.qwen2(400)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    model.generation_config.eos_token_id = list(range(0, 400, 12))
    model.save_pretrained(folder)
    tiny.byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Two sets of questions: `inside.jsonl` and, shorter, `outside.jsonl`."""
    folder = tmp_path_factory.mktemp("questions")
    write_rows(folder / "inside.jsonl", ROWS + [{**row, "output": "cat"} for row in ROWS[:3]])
    write_rows(folder / "outside.jsonl", ROWS[::-1])
    return folder


RESULTS = (
    *("scores.json", "table.md", "answers/inside-greedy.jsonl", "answers/inside-seed10.jsonl"),
    "references/a.jsonl",
)


@pytest.fixture(scope="module")
def settings_in(student, questions):
    def settings(folder, **changes):
        given = {
            "model": str(student),
            "output_dir": folder,
            "sets": {"inside": str(questions / "inside.jsonl"), "a": str(questions / "outside.jsonl")},
            "in_distribution": ("inside",),
            "seeds": (10, 20),
            "max_prompt_length": 60,
            "max_length": 72,
            "batch_size": 3,
        }
        return EvaluationSettings(**{**given, **changes})

    return settings


@pytest.fixture
def make(settings_in, tmp_path):
    return lambda folder="out", **changes: settings_in(tmp_path / folder, **changes)


@pytest.fixture(scope="module")
def whole(settings_in, tmp_path_factory):
    """The folder of an evaluation that went through."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(settings_in(folder))
    return folder


def contents(folder):
    return [(folder / name).read_bytes() for name in RESULTS]


def answers(folder, name="inside-greedy"):
    return list(read_lines(folder / "answers" / f"{name}.jsonl").values())


def test_the_whole_protocol(whole, student):
    folder = whole
    scores = json.loads((folder / "scores.json").read_text())
    lines = answers(folder)
    assert [line["example"] for line in lines] == list(range(8))
    assert {line["finished"] for line in lines + answers(folder, "inside-seed20")} == {True, False}
    assert all(line["tokens"] <= 12 for line in lines)
    assert all(line["tokens"] == 12 for line in lines if not line["finished"])
    # Prompts of more than 60 tokens lose their ends.
    assert "### Response" not in lines[0]["prompt"] and lines[0]["prompt"].startswith("Below is an instruction")
    assert lines[2]["prompt"] == ROWS[2]["prompt"] and lines[1]["references"] == ROWS[1]["output"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), tiny.byte_level_tokenizer()
    prompt = tokenizer(ROWS[2]["prompt"])["input_ids"]
    written = sample(
        model,
        [prompt],
        pad_token_id=0,
        eos_token_ids=end_token_ids(tokenizer, model.generation_config),
        max_new_tokens=12,
        generation_config=GenerationConfig(do_sample=False, no_repeat_ngram_size=6),
    )
    assert lines[2]["tokens"] == len(written[0])

    inside, outside = scores["sets"]["inside"], scores["sets"]["a"]
    assert (inside["examples"], outside["examples"]) == (8, 5)
    long = [row for row in ROWS if "prompt" not in row]
    assert outside["prompts_cut"] == len(long) and inside["greedy"]["answers"] == 8
    assert inside["greedy"]["unfinished"] == sum(not line["finished"] for line in lines)
    values = [rouge_l(line["response"], line["references"]) for line in lines]
    assert inside["greedy"]["rouge_l"] == pytest.approx(100 * statistics.fmean(values), abs=1e-6)
    assert inside["sampled"]["answers"] == 16 and len(inside["sampled"]["rouge_l_seeds"]) == 2
    averages = scores["averages"]
    assert averages["in_distribution"]["sets"] == ["inside"] and averages["out_of_distribution"]["sets"] == ["a"]
    both = [inside["bits_per_byte"], outside["bits_per_byte"]]
    assert averages["all"]["bits_per_byte"] == pytest.approx(statistics.fmean(both), abs=1e-6)

    table = (folder / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and len(rows) == 2 + 2 + 3
    assert f"{inside['bits_per_byte']:.4f}" in rows[2] and "out of distribution" in rows[5]
    about = json.loads((folder / "evaluation.json").read_text())
    assert set(about["seconds"]) == {
        *(f"answers/{name}-{kind}.jsonl" for name in ("inside", "a") for kind in ("greedy", "seed10", "seed20")),
        *(f"references/{name}.jsonl" for name in ("inside", "a")),
    }
    assert "rouge-score" in about["versions"] and about["hardware"]["processes"] == 1


def test_references_are_scored_as_in_training(make, whole, tmp_path):
    """Whole prompts and references, whatever the lengths for answers are; of several references each counts."""
    data = [{"prompt": ROWS[2]["prompt"], "completion": ROWS[2]["output"]}]
    pairs = write_rows(tmp_path / "pairs.jsonl", [ROWS[2]])
    tokenizer, settings = tiny.byte_level_tokenizer(), make("pairs", seeds=(), sets={"b": str(pairs)})
    rows, _ = tokenize_dataset(Dataset.from_list(data), tokenizer, max_length=1024, prompt_style="plain")
    expected = bits_per_byte(AutoModelForCausalLM.from_pretrained(settings.model), rows)
    alone = evaluate(settings)
    assert json.loads((settings.output_dir / "scores.json").read_text()) == alone
    assert alone["sets"]["b"]["bits_per_byte"] == pytest.approx(expected, abs=1e-4)
    assert alone["averages"].keys() == {"out_of_distribution", "all"}
    assert read_lines(whole / "references" / "a.jsonl")[0]["bytes"] == 3 * 7
    found = json.loads((whole / "scores.json").read_text())["sets"]["a"]
    assert found["token_accuracy"] is not None and found["references_cut"] == found["references_skipped"] == 0


@pytest.mark.parametrize("batch_size", [1, 16])
def test_any_batch_size_gives_the_same(make, whole, batch_size):
    settings = make(batch_size=batch_size)
    evaluate(settings)
    # Sums of float32 may differ in the last digit that the files of references keep.
    assert contents(settings.output_dir)[:4] == contents(whole)[:4]
    assert answers(settings.output_dir, "a-seed10") == answers(whole, "a-seed10")


def test_seeds_and_settings_of_the_sampling_matter(make, whole):
    texts = [[line["response"] for line in answers(whole, f"inside-seed{seed}")] for seed in (10, 20)]
    assert texts[0] != texts[1] and len(texts[0]) == 8
    greedy = make("greedy", limit=3, seeds=(), no_repeat_ngram_size=0)
    evaluate(greedy)
    assert not (greedy.output_dir / "answers" / "inside-seed10.jsonl").exists()
    for changes in ({"temperature": 1e-4}, {"top_p": 1e-6}):
        settings = make("-".join(changes), limit=3, seeds=(10,), no_repeat_ngram_size=0, **changes)
        evaluate(settings)
        assert answers(settings.output_dir, "inside-seed10") == answers(greedy.output_dir)


def test_no_repeats(make, monkeypatch):
    real, written = protocol.sample, []

    def keeps(model, prompts, **options):
        responses = real(model, prompts, **options)
        written.extend(zip(prompts, responses))
        return responses

    monkeypatch.setattr(protocol, "sample", keeps)
    evaluate(make("anything", no_repeat_ngram_size=0, seeds=()))
    assert any(set(prompt) & set(response) for prompt, response in written)
    written.clear()
    evaluate(make(no_repeat_ngram_size=1, seeds=(10,)))
    assert len(written) == 2 * 13
    for prompt, response in written:
        assert not set(prompt) & set(response) and len(set(response)) == len(response)


def test_stopped_anywhere_it_goes_on_to_the_same_result(make, whole, monkeypatch):
    settings = make()
    real, calls = protocol.sample, []

    def fails(model, prompts, **options):
        calls.append(len(prompts))
        # Once in the middle of each file or so.
        if len(calls) in (2, 6, 7, 12):
            raise RuntimeError("stopped")
        return real(model, prompts, **options)

    monkeypatch.setattr(protocol, "sample", fails)
    for stop in range(4):
        with pytest.raises(RuntimeError, match="stopped"):
            evaluate(settings)
        assert not (settings.output_dir / "scores.json").exists()
        if stop == 1:
            # A line of which half was written, and one that is there of a batch that isn't.
            part = max((settings.output_dir / "answers").iterdir(), key=lambda path: path.stat().st_mtime)
            lines = part.read_bytes().splitlines(keepends=True)
            part.write_bytes(b"".join(lines[:1]) + (lines[1][:20] if len(lines) > 1 else b'{"exam'))
    evaluate(settings)
    assert contents(settings.output_dir) == contents(whole)
    done = len(calls)
    evaluate(settings)
    # Nothing is left to write, not even a model to load.
    assert len(calls) == done and contents(settings.output_dir) == contents(whole)


def arguments(settings):
    given = {
        "model": settings.model,
        "output_dir": settings.output_dir,
        "sets": ",".join(f"{name}={path}" for name, path in settings.sets.items()),
        "in_distribution": "inside",
        "seeds": ",".join(map(str, settings.seeds)),
        "max_prompt_length": settings.max_prompt_length,
        "max_length": settings.max_length,
        "batch_size": settings.batch_size,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


SCRIPT = """
import os, signal, sys
from hf_dskd import cli
from hf_dskd.evaluation import protocol
real, calls = protocol.sample, []
def killed(*args, **options):
    calls.append(1)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
protocol.sample = killed
code = cli.run(["evaluate", *sys.argv[2:]])
from hf_dskd.launch import leave_together
leave_together()
sys.exit(code)
"""
ON_CPU = {"ACCELERATE_USE_CPU": "true"}


def test_killed_it_goes_on(make, whole, capsys):
    settings = make()
    # In the second of three batches with the first seed.
    done = forked(SCRIPT, 5, *arguments(settings), environment=ON_CPU)
    assert done.returncode == -signal.SIGKILL
    assert len((settings.output_dir / "answers" / "inside-seed10.jsonl").read_bytes().splitlines()) == 3
    assert cli.run(["evaluate", *arguments(settings)]) == 0
    assert contents(settings.output_dir) == contents(whole)
    printed = capsys.readouterr()
    assert "a-seed20 (8/8): 100%" in printed.err and "inside references (1/8): 100%" in printed.err
    assert (settings.output_dir / "table.md").read_text() in printed.out
    assert "seconds" in printed.out and str(settings.output_dir / "scores.json") in printed.out


def test_two_processes(make, whole):
    settings = make(batch_size=2)
    # What one process left is gone on with by two.
    (settings.output_dir / "answers").mkdir(parents=True)
    begun = (whole / "answers" / "inside-greedy.jsonl").read_bytes().splitlines(keepends=True)
    (settings.output_dir / "answers" / "inside-greedy.jsonl").write_bytes(b"".join(begun[:3]) + begun[3][:9])
    shutil.copy(whole / "evaluation.json", settings.output_dir)
    done = forked(SCRIPT, 0, *arguments(settings), ranks=2, environment=ON_CPU)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(settings.output_dir)[:4] == contents(whole)[:4]
    assert not list(settings.output_dir.glob("*/*.part*"))
    assert done.stdout.count("ROUGE-L, greedy") == 1 and "2 process" in done.stdout


def test_other_settings_are_refused(make, questions, student, tmp_path):
    evaluate(make(limit=2, seeds=()))
    # Another batch size, and a model that has moved, change nothing.
    moved = tmp_path / "moved"
    shutil.copytree(student, moved)
    evaluate(make(limit=2, seeds=(), batch_size=1, model=str(moved)))
    model = AutoModelForCausalLM.from_pretrained(student)
    model.model.norm.weight.data += 1e-3
    model.save_pretrained(moved)
    changed = write_rows(tmp_path / "changed.jsonl", ROWS)
    sets = {"inside": str(changed), "a": str(questions / "outside.jsonl")}
    for changes, message in (
        ({"limit": 3}, "limit was 2 and is 3 now"),
        ({"seeds": (10,)}, r"seeds was \[\] and is \[10\] now"),
        ({"model": str(moved)}, "model: model.safetensors was"),
        ({"sets": sets}, "set inside was"),
        ({"sets": {"a": sets["a"]}}, "set inside was .* and is 'not there' now"),
        ({"top_p": 0.5, "temperature": 2.0, "dtype": "bfloat16", "max_length": 80}, r"\(and 1 more\).*--output_dir"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(make(**{"limit": 2, "seeds": (), **changes}))


def test_a_damaged_line_is_named(make):
    settings = make(limit=2, seeds=())
    evaluate(settings)
    path = settings.output_dir / "answers" / "a-greedy.jsonl"
    path.write_text("{damaged\n" + path.read_text())
    with pytest.raises(UserError, match=r"a-greedy.jsonl, line 1 is damaged: delete the line"):
        evaluate(settings)


def test_adapters(make, student, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(student)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(target_modules=["v_proj"], init_lora_weights=False, r=4))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    tiny.byte_level_tokenizer().save_pretrained(merged)

    def bits(folder="adapter", **changes):
        found = evaluate(make(folder, **{"model": str(tmp_path / "adapter"), "seeds": (), **changes}))
        return found["sets"]["inside"]["bits_per_byte"], answers(tmp_path / folder)

    expected = bits("merged", model=str(merged))
    assert bits() == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert abs(bits("plain", model=str(student))[0] - expected[0]) > 0.01

    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"the base model .*gone.*name the adapter's with --base_model"):
        bits("gone")
    assert bits("named", base_model=str(student))[1] == expected[1]
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="doesn't say what it adapts"):
        bits("none")
    with pytest.raises(UserError, match="no folder of an adapter"):
        evaluate(make("full", base_model=str(student)))


def test_four_bits_and_other_dtypes(make):
    bits = []
    for name, changes in (("full", {}), ("half", {"dtype": "bfloat16"}), ("four", {"load_in_4bit": True})):
        scores = evaluate(make(name, seeds=(), limit=2, **changes))
        bits.append(scores["sets"]["inside"]["bits_per_byte"])
    assert 0 < abs(bits[1] - bits[0]) < abs(bits[2] - bits[0]) < 0.5


def test_models_that_cannot_be_had(make, student, tmp_path):
    with pytest.raises(UserError, match=r"the tokenizer of .*nowhere|the model .*nowhere"):
        evaluate(make(model=str(tmp_path / "nowhere")))
    shutil.copytree(student, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*", "vocab*"))
    with pytest.raises(UserError, match=r"the tokenizer of .*bare"):
        evaluate(make(model=str(tmp_path / "bare")))
    with pytest.raises(UserError, match="has no chat template"):
        evaluate(make("chat", prompt_style="chat"))
