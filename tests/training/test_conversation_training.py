"""Training on conversations: every method learns each answer of a row as it would alone."""

import pytest
import runs
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_dskd.analysis.record import read_numbers
from hf_dskd.evaluation.likelihood import bits_per_byte
from hf_dskd.evaluation.protocol import EvaluationSettings, load_model
from hf_dskd.losses.objective import Step
from hf_dskd.models.generation import end_token_ids


# What a control token is for each: the closing of an answer is one of them, and in the teacher's case not its EOS.
CHAT = (
    "{{% for m in messages %}}{{{{ m.role + ':\n' + m.content + '{end}' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ 'assistant:\n' }}}}{{% endif %}}"
)


def tokenizers(method="sft"):
    same = method in ("kd", "dskd")
    student, teacher = (
        tiny.byte_level_tokenizer(),
        tiny.byte_level_tokenizer() if same else tiny.sentencepiece_tokenizer(),
    )
    student.chat_template = CHAT.format(end="<|endoftext|>")
    teacher.chat_template = CHAT.format(end="<|endoftext|>" if same else "<s>")
    return student, teacher


def conversations(count=6):
    texts = ["The cat sat.", "add(a, b)", "東京 ok", "Numbers: 3.14159", "on the mat", "Zwölf Boxkämpfer"]

    def turn(i):
        return [{"role": "user", "content": f"and {i}?"}, {"role": "assistant", "content": texts[i % 6]}]

    return [{"messages": [message for k in range(1 + n % 3) for message in turn(n + k)]} for n in range(count)]


def one_by_one(rows):
    """Every answer as the last of a conversation of its own."""
    return [{"messages": row["messages"][: n + 2]} for row in rows for n in range(0, len(row["messages"]), 2)]


def trainer(folder, method, rows, **settings):
    student, teacher = tokenizers(method.get("method"))
    return runs.trainer(
        folder,
        processing_class=student,
        teacher_processing_class=teacher,
        train_dataset=Dataset.from_list(rows),
        **{**method, **settings},
    )


def terms(run):
    """Sums of every term over all rows, in one batch."""
    rows = [run.train_dataset[i] for i in range(len(run.train_dataset))]
    batch = run.data_collator(rows)
    run.model.eval()
    with torch.no_grad():
        views = run.distiller.views(run.model, batch)
        found = run.distiller.terms(views, Step())
    sums = {name: value.sum() for name, value in found.sums.items()}
    sums["student_tokens"] = found.student_tokens.sum()
    return sums


# All whose losses of an answer depend on that answer alone: attention over the whole row sees the other answers too.
APART = ["sft", "kd", "dskd", "dskd_clp", "dskd_cla", "dskd_eta", "uld", "min_edit", "alm", "merged_chunks"]
APART += ["bpm", "bpm_longest"]


@pytest.mark.parametrize("case", APART)
def test_answers_of_a_row_are_learnt_as_alone(tmp_path, case):
    rows, options = conversations(), {"train_on": "all"}
    together = trainer(tmp_path / "a", runs.CASES[case], rows, **options)
    apart = trainer(tmp_path / "b", runs.CASES[case], one_by_one(rows), train_on="last")
    assert len(together.train_dataset) == len(rows) == 6 and len(apart.train_dataset) == 12
    assert together.tokenization_reports["train"].answers == 12
    if together.projectors is not None:
        apart.projectors.load_state_dict(together.projectors.state_dict())
    found, expected = terms(together), terms(apart)
    assert found.keys() == expected.keys() and len(found) > 2
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=2e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_attention_goes_over_all_answers_of_a_row(tmp_path):
    run = trainer(tmp_path, {"method": "dskd_cma_ga"}, conversations()[1:3], max_steps=1, analysis_steps=0)
    run.train()
    assert len(runs.history(run, "loss")) == 1 and len(read_numbers(run.analysis_folder)) == 2


def test_a_cache_has_the_states_of_all_answers(tmp_path):
    given = {"method": "dskd_clp"}, conversations()
    live = trainer(tmp_path / "live", *given, max_steps=2)
    cached = trainer(tmp_path / "cached", *given, max_steps=2, teacher_cache=str(tmp_path / "cache"))
    live.train()
    cached.train()
    # The cache keeps states in bfloat16.
    losses = [[loss for (loss,) in runs.history(run, "loss")] for run in (cached, live)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    counts = [sum(span[1::2]) - sum(span[::2]) for span in live.train_dataset["teacher_spans"]]
    assert sum(shard_count for shard in cached._preparation.cache.shards for shard_count in shard.counts) == sum(
        counts
    )


def test_metrics_count_the_text_of_all_answers(tmp_path):
    rows = conversations()
    run = trainer(tmp_path / "a", {"method": "alm"}, rows)
    apart = trainer(tmp_path / "b", {"method": "alm"}, one_by_one(rows), train_on="last")
    names = ("eval_loss", "eval_ce_loss", "eval_alm_loss", "eval_bits_per_byte")
    found, expected = (r.evaluate(r.train_dataset) for r in (run, apart))
    assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-4)
    assert bits_per_byte(run.model, run.train_dataset) == pytest.approx(expected["eval_bits_per_byte"], rel=1e-4)
    sides = [bits_per_byte(run.teacher.model, r.train_dataset, side="teacher") for r in (run, apart)]
    assert sides[0] == pytest.approx(sides[1], rel=1e-4)


def test_a_student_answers_the_last_prompt_of_a_conversation(tmp_path):
    run = trainer(tmp_path, {"method": "alm"}, conversations(3), on_policy_fraction=1.0, max_steps=1, max_length=200)
    batch = run.data_collator([run.train_dataset[i] for i in range(3)])
    written = run._answered_by_student(batch, 0)
    for index in range(3):
        row = run.train_dataset[index]
        labels = written["labels"][index]
        first = int((labels != -100).int().argmax())
        # Up to there the batch is as it was, and only the last answer is learnt.
        assert first == row["spans"][-2] and written["input_ids"][index, :first].tolist() == row["input_ids"][:first]
        assert (written["places"][index].max() < 2**20).item()
    run.train()
    assert len(runs.history(run, "loss")) == 1


def test_evaluation_answers_the_last_prompt(tmp_path):
    rows = conversations(3)
    run = trainer(tmp_path, {"method": "sft"}, rows, eval_generation_samples=3)
    run.evaluate(run.train_dataset)
    assert [sample["reference"] for sample in run.samples] == [row["messages"][-1]["content"] for row in rows]
    assert all(sample["prompt"].endswith("assistant:\n") for sample in run.samples)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_saved_student_stops_where_its_template_stops(tmp_path, adapter):
    """Its template ends an answer with another token than EOS, which neither tokenizer nor model says."""
    _, tokenizer = tokenizers()
    student = tiny.llama(len(tokenizer))
    student.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert student.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    run = runs.trainer(
        tmp_path / "run",
        method="sft",
        student=str(tmp_path / "base"),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(conversations()),
        max_steps=1,
        **({"peft_config": LoraConfig(r=4, target_modules=["q_proj"])} if adapter else {}),
    )
    end = tokenizer.convert_tokens_to_ids("<s>")
    assert [run.train_dataset[0]["input_ids"][-1], run.processing_class.eos_token_id] == [end, 2]
    run.train()
    run.write_report()
    saved = GenerationConfig.from_pretrained(tmp_path / "run")
    assert saved.eos_token_id == [2, end]
    settings = EvaluationSettings(str(tmp_path / "run"), tmp_path / "scores", {})
    loaded = load_model(settings, torch.device("cpu"))
    assert end in end_token_ids(AutoTokenizer.from_pretrained(tmp_path / "run"), loaded.generation_config)
    if not adapter:
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").generation_config.eos_token_id == [2, end]
