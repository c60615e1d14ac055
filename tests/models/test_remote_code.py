"""Models that come with their code: wherever one is built it is with that code, for each model by its own option."""

import json
import sys

import pytest
import runs
import tiny
from peft import LoraConfig

from hf_dskd import UserError, doctor, run
from hf_dskd.experiments.autoconfig import derive
from hf_dskd.experiments.memory import Size
from hf_dskd.models.pretrained import empty_model, read_config
from hf_dskd.teacher.load import teacher_quantization


CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TRUST = {"trust_remote_code": True}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Copies of the code go here."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def own(tmp_path):
    def make(name, tokenizer, width=64):
        folder = tmp_path / name
        tiny.llama(len(tokenizer), width=width).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "configuration_own.py").write_text(CONFIGURATION)
        (folder / "modeling_own.py").write_text(MODELING)
        config = json.loads((folder / "config.json").read_text())
        kinds = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
        config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": kinds}
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


@pytest.fixture
def pair(own):
    return own("student", runs._STUDENT_TOKENIZER), own("teacher", runs._TEACHER_TOKENIZER, width=128)


def trainer(tmp_path, pair, **settings):
    options = {"method": "dskd_cma", "model_init_kwargs": TRUST, "teacher_model_init_kwargs": TRUST, **settings}
    return runs.trainer(tmp_path / "run", student=pair[0], teacher=pair[1], **options)


@pytest.mark.parametrize("settings", [{}, {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}])
def test_both_are_trained_with_their_code(settings, pair, tmp_path):
    made = trainer(tmp_path, pair, max_steps=1, **settings)
    made.train()
    student = made.model.get_base_model() if settings else made.model
    assert [type(model).__name__ for model in (student, made.teacher.model)] == ["OwnForCausalLM"] * 2


@pytest.mark.parametrize("side", ["", "teacher_"])
def test_the_option_of_one_is_not_that_of_the_other(side, pair, tmp_path):
    role = "student" if side == "" else "teacher"
    with pytest.raises(UserError, match=rf"the {role} .* can't be loaded .*trust_remote_code"):
        trainer(tmp_path, pair, **{f"{side}model_init_kwargs": None})


def test_shapes_for_four_bits(pair, own, tmp_path):
    settings = {"teacher_model_init_kwargs": TRUST, "load_teacher_in_4bit": True}
    config = runs.config(tmp_path, **settings)
    found = read_config(pair[1], TRUST, "the teacher")
    assert teacher_quantization(config, None, found, pair[1]).load_in_4bit
    odd = own("odd", runs._TEACHER_TOKENIZER, width=96)
    with pytest.raises(UserError, match=r"can't run in 4 bits on a CPU: .* 96"):
        teacher_quantization(config, None, read_config(odd, TRUST, "the teacher"), odd)


def test_an_adapter_on_a_loaded_model(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(pair[0], **TRUST)
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    runs.trainer(tmp_path, student=student, peft_config=adapter, method="sft")
    assert type(empty_model(student.config, loaded=student)).__name__ == "OwnForCausalLM"


def test_memory_doctor_and_the_derived_settings(pair, tmp_path):
    student, teacher = pair
    plain = tiny.llama(len(runs._STUDENT_TOKENIZER))
    assert Size.of(read_config(student, TRUST, "the student"), TRUST).parameters == plain.num_parameters()
    given = {"model_init_kwargs": TRUST, "teacher_model_init_kwargs": TRUST}
    derived = derive(student, teacher, memory=None, device="cpu", given=given)
    assert derived.settings["model_name_or_path"] == student
    flags = [f"--model_name_or_path={student}", f"--teacher_model_name_or_path={teacher}", "--use_cpu=true"]
    flags += [f"--{side}model_init_kwargs={json.dumps(TRUST)}" for side in ("", "teacher_")]
    parsed = run.parse(None, None, [*flags, f"--output_dir={tmp_path / 'run'}", "--max_length=128"])
    for role in ("student", "teacher"):
        assert [status for status, _ in doctor.models(parsed, role)] == [doctor.OK]
    assert list(doctor.step_memory(parsed)) and list(doctor.tokenizers(parsed))
