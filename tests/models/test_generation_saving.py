"""A student that couldn't be saved after training is found before it."""

import json

import pytest
import runs
import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_dskd import UserError
from hf_dskd.models.generation import check_saved_generation


def student(folder, **settings):
    tiny.gpt2(len(runs._STUDENT_TOKENIZER)).save_pretrained(folder)
    runs._STUDENT_TOKENIZER.save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return str(folder)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": 0.6, "top_p": 0.9}, "temperature=0.6 and top_p=0.9, .* set do_sample to true, or leave"),
        ({"top_k": 5}, "top_k=5, .*in its generation_config.json"),
        ({"early_stopping": True}, "early_stopping=True"),
        ({"num_return_sequences": 3}, "num_return_sequences"),
    ],
)
def test_by_name_before_it_is_loaded(settings, words, tmp_path, monkeypatch):
    name = student(tmp_path / "student", **settings)
    monkeypatch.setattr("hf_dskd.training.pair.load_causal_lm", lambda *args, **options: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=words):
        runs.trainer(tmp_path / "run", student=name, method="sft")


def test_a_loaded_one(tmp_path):
    model = tiny.gpt2(len(runs._STUDENT_TOKENIZER))
    model.generation_config.temperature = 0.3
    for loaded in (model, get_peft_model(model, LoraConfig(target_modules=["c_attn"]))):
        with pytest.raises(UserError, match=r"generation config of the student .* has temperature=0\.3"):
            runs.trainer(tmp_path / "run", student=loaded, method="sft")
    # It can still be evaluated, which saves nothing.
    runs.trainer(tmp_path / "run", student=model, method="sft", train_dataset=None, eval_dataset=tiny.dataset(4))


def test_one_that_samples_is_trained_and_saved(tmp_path):
    name = student(tmp_path / "student", temperature=0.6, top_p=0.9, do_sample=True)
    run = runs.trainer(tmp_path / "run", student=name, method="sft", max_steps=1)
    run.train()
    run.write_report()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run").generation_config
    assert (saved.temperature, saved.top_p, saved.do_sample) == (0.6, 0.9, True)


def test_models_without_a_generation_config():
    check_saved_generation(None, "x")
    check_saved_generation(GenerationConfig(), "x")
