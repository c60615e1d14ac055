"""Models whose own files are quantized are checked as those that are quantized when they are loaded."""

import json

import pytest
import runs
import tiny
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from hf_dskd import UserError
from hf_dskd.teacher.load import teacher_quantization


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
GPTQ = {"quant_method": "gptq", "bits": 4}
LORA = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}


@pytest.fixture
def folder(tmp_path):
    """A model that says of itself how it is quantized. Its weights aren't, and must not be looked at."""

    def make(quantization, tokenizer=runs._STUDENT_TOKENIZER, width=64):
        name = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        tiny.llama(len(tokenizer), width=width).save_pretrained(name)
        tokenizer.save_pretrained(name)
        config = json.loads((name / "config.json").read_text())
        (name / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        (name / "model.safetensors").unlink()
        return str(name)

    return make


def test_a_student_of_four_bits_on_a_cpu_or_of_eight_without_an_adapter(folder, tmp_path):
    for options in ({}, LORA):
        words = r"is in bitsandbytes, 4 bits .*can't be trained on a CPU.*name it in 16 bits"
        with pytest.raises(UserError, match=words):
            runs.trainer(tmp_path / "run", student=folder(NF4), method="sft", **options)
    with pytest.raises(UserError, match=r"is in bitsandbytes, 8 bits .* needs an adapter to train"):
        runs.trainer(tmp_path / "run", student=folder(INT8), method="sft")


@pytest.mark.parametrize("own, words", [(NF4, "bitsandbytes, 4 bits"), (INT8, "bitsandbytes, 8 bits"), (GPTQ, "gptq")])
def test_quantized_once_more(own, words, folder, tmp_path):
    student, teacher = folder(own), folder(own, runs._TEACHER_TOKENIZER)
    chosen = BitsAndBytesConfig(load_in_8bit=True)
    from hf_dskd import DSKDTrainer

    with pytest.raises(UserError, match=rf"^quantization_config: the files of .* are quantized already \({words}\)"):
        config = runs.config(tmp_path / "run", method="sft")
        DSKDTrainer(student, None, config, train_dataset=tiny.dataset(4), quantization_config=chosen, **LORA)
    with pytest.raises(UserError, match=rf"^load_teacher_in_4bit: the files of .* quantized already \({words}\)"):
        runs.trainer(tmp_path / "run", teacher=teacher, method="dskd_cma", load_teacher_in_4bit=True)
    settings = {"teacher_model_init_kwargs": {"quantization_config": NF4}}
    with pytest.raises(UserError, match=rf"^teacher_quantization_config: .* quantized already \({words}\)"):
        runs.trainer(tmp_path / "run", teacher=teacher, method="dskd_cma", **settings)


def test_two_ways_at_once(tmp_path):
    config = runs.config(
        tmp_path, load_teacher_in_4bit=True, teacher_model_init_kwargs={"quantization_config": NF4}, method="dskd_cma"
    )
    with pytest.raises(UserError, match="load_teacher_in_4bit=True and teacher_quantization_config: pass only one"):
        teacher_quantization(config, None, tiny.llama().config, "x")


def test_an_option_of_the_teacher_quantizes_it(tmp_path):
    config = runs.config(tmp_path, teacher_model_init_kwargs={"quantization_config": NF4}, method="dskd_cma")
    assert teacher_quantization(config, None, tiny.llama().config, "x") == NF4
    with pytest.raises(UserError, match=r"can't run in 4 bits on a CPU: .* leave teacher_quantization_config out"):
        teacher_quantization(config, None, tiny.llama(width=96).config, "x")


def test_a_teachers_own_shapes_on_a_cpu(folder, tmp_path):
    teacher = folder(NF4, runs._TEACHER_TOKENIZER, width=96)
    with pytest.raises(UserError, match=r"can't run in 4 bits on a CPU: .* name a model in 16 or 32 bits"):
        runs.trainer(tmp_path / "run", teacher=teacher, method="dskd_cma")
