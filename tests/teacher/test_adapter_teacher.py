"""An adapter's folder as the teacher: live, in 4 bits, cached; what of an adapter no loss could see is refused."""

import json
import shutil

import pytest
import runs
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from hf_dskd import UserError
from hf_dskd.models.pretrained import source
from hf_dskd.teacher.identity import cache_facts, files_digest


TEACHER = len(runs._TEACHER_TOKENIZER)


@pytest.fixture
def folders(tmp_path):
    """A base model with its tokenizer, and an adapter that changes much of what it says."""
    tiny.qwen2(TEACHER).save_pretrained(tmp_path / "base")
    runs._TEACHER_TOKENIZER.save_pretrained(tmp_path / "base")

    def adapter(name="adapter", base=None, **settings):
        torch.manual_seed(3)
        options = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
        options |= {"task_type": "CAUSAL_LM"}
        base = tiny.qwen2(TEACHER) if base is None else base
        base.name_or_path = str(tmp_path / "base")
        model = get_peft_model(base, LoraConfig(**{**options, **settings}))
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return adapter


def loaded(folder):
    model = PeftModel.from_pretrained(tiny.qwen2(TEACHER), folder)
    return model.eval()


def trainer(tmp_path, teacher, **settings):
    return runs.trainer(tmp_path / "run", teacher=teacher, **{"method": "dskd_cma", **settings})


def first_losses(run):
    return run.compute_loss(run.model, runs.first_batch(run)).item()


def test_live_and_cached(folders, tmp_path):
    adapter, base = folders(), str(tmp_path / "base")
    run = trainer(tmp_path, adapter)
    assert not any(parameter.requires_grad for parameter in run.teacher.model.parameters())
    expected = first_losses(runs.trainer(tmp_path / "run", teacher=loaded(adapter), method="dskd_cma"))
    assert first_losses(run) == pytest.approx(expected, rel=1e-5)
    assert abs(first_losses(trainer(tmp_path, base)) - expected) > 1e-3
    run.train()
    assert run._origins["teacher"] == {"commit": None, "adapts": base, "adapts_commit": None}
    # States are rounded to bf16 in a cache.
    cached = trainer(tmp_path, adapter, teacher_cache=str(tmp_path / "cache"), rows=4)
    assert first_losses(cached) == pytest.approx(expected, rel=2e-2)
    with pytest.raises(UserError, match="was written with teacher="):
        trainer(tmp_path, base, teacher_cache=str(tmp_path / "cache"))


def test_the_digest_is_of_base_and_adapter(folders, tmp_path):
    adapter = folders()

    def digest(folder=adapter):
        return files_digest(folder, {}, download=False)

    first = digest()
    assert first is not None and first not in (digest(folders("other", r=2)), digest(str(tmp_path / "base")))
    # Neither what the parameters are multiplied by nor a base that was trained again may go unnoticed.
    config = tmp_path / "adapter" / "adapter_config.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "lora_alpha": 32}))
    assert digest() != first
    config.write_text(text)
    assert digest() == first
    tiny.qwen2(TEACHER, seed=9).save_pretrained(tmp_path / "base")
    assert digest() != first


def test_the_digest_of_a_loaded_adapter_has_its_scale(folders, tmp_path):
    config = runs.config(tmp_path / "run", method="dskd_cma")
    facts = [
        cache_facts(config, model, model.config, runs._TEACHER_TOKENIZER)["teacher"]
        for model in (loaded(folders()), loaded(folders(lora_alpha=32)), tiny.qwen2(TEACHER))
    ]
    assert len(set(facts)) == 3


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="slow NF4 elsewhere")
def test_in_four_bits(folders, tmp_path):
    adapter = folders()
    run = trainer(tmp_path, adapter, load_teacher_in_4bit=True)
    base = run.teacher.model.get_base_model()
    assert base.is_loaded_in_4bit and isinstance(run.teacher.model, PeftModel)
    assert first_losses(run) == pytest.approx(first_losses(trainer(tmp_path, adapter)), rel=0.2)


def test_its_own_tokenizer_goes_before_that_of_its_base(folders, tmp_path):
    from hf_dskd.models.pretrained import load_tokenizer

    adapter = folders()
    assert len(load_tokenizer(adapter, None, "the teacher's tokenizer", "x")) == TEACHER
    runs._STUDENT_TOKENIZER.save_pretrained(adapter)
    assert len(load_tokenizer(adapter, None, "the teacher's tokenizer", "x")) == len(runs._STUDENT_TOKENIZER)


def test_head_and_embedding_that_were_trained_with_it(folders, tmp_path):
    """LoRA on the head, a copy of the embedding, or some tokens of it: the teacher's matrices are those with it."""
    for settings in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": {"embed_tokens": [3, 5, 8]}},
    ):
        model = get_peft_model(
            tiny.qwen2(TEACHER),
            LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, **{"target_modules": ["q_proj"], **settings}),
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name or "trainable_tokens" in name:
                    parameter.add_(torch.randn_like(parameter))
        run = runs.trainer(tmp_path / "run", teacher=model, method="dskd_cma")
        ids = torch.arange(TEACHER).unsqueeze(0)
        with torch.no_grad():
            plain = model.eval().get_base_model()
            embedded = plain.get_input_embeddings()(ids)[0]
            hidden = plain.model(input_ids=ids[:, :9])[0]
            logits = plain(input_ids=ids[:, :9]).logits
        torch.testing.assert_close(run.teacher.embedding, embedded, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run.teacher.head(hidden), logits, rtol=1e-4, atol=1e-4)


def test_prompts_that_are_no_part_of_the_layers(tmp_path):
    model = get_peft_model(tiny.qwen2(TEACHER), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match=r"the teacher's adapter .* PROMPT_TUNING"):
        runs.trainer(tmp_path, teacher=model, method="dskd_cma")


# ---- Words


def test_an_adapter_as_a_student_or_without_its_base(folders, tmp_path):
    adapter = folders()
    with pytest.raises(UserError, match=r"the student .* is an adapter: .*is_trainable=True"):
        runs.trainer(tmp_path / "run", student=adapter)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=r"the teacher .*base.* can't be loaded"):
        trainer(tmp_path, adapter)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="doesn't say what it adapts"):
        trainer(tmp_path, adapter)


def test_where_the_base_is_comes_from_the_adapter(folders, tmp_path):
    adapter = folders()
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "revision": "v3"}))
    found = source(adapter, {"revision": "v1", "subfolder": "", "cache_dir": "c", "attn_implementation": "eager"})
    assert found.options == {"cache_dir": "c", "attn_implementation": "eager", "revision": "v3"}
    assert found.adapter == adapter and found.adapter_options["revision"] == "v1"


def test_a_model_with_an_adapter_beside_it_is_a_model(folders, tmp_path):
    adapter = folders()
    shutil.copytree(tmp_path / "base", adapter, dirs_exist_ok=True)
    assert source(adapter).adapter is None
    assert files_digest(adapter, {}, download=False) != files_digest(str(tmp_path / "base"), {}, download=False)
