"""The memory of a step: the formulas against what models keep, hold and take."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_dskd import UserError
from hf_dskd.losses.key_query import Discriminator
from hf_dskd.models import backbone
from hf_dskd.projectors import Projectors


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# Recipes are run as files; processes that they start look here too.
sys.path.insert(0, str(RECIPES))

import memory_table as recipe  # noqa: E402
from benchmark_step import SHAPES, count_parameters, model_config  # noqa: E402


def student_model(name, rank, dtype=torch.float32):
    model = AutoModelForCausalLM.from_config(model_config(name)).to(dtype)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


def kept_bytes(model, batch_size, length, dtype):
    """Of the tensors that a forward pass saves for its backward pass, parameters apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The tensor too, so that its place in memory is not used again.
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    ids = torch.randint(1, 100, (batch_size, length))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    "name, rank, half, dtype",
    [
        ("small student", 16, False, "float32"),
        ("small student", 16, False, "bfloat16"),
        ("small student", 16, True, "bfloat16"),
        ("small student", 0, False, "bfloat16"),
        ("small gpt2", 0, False, "float32"),
        ("small gpt2", 0, False, "bfloat16"),
    ],
)
def test_activations_are_what_a_forward_pass_keeps(name, rank, half, dtype):
    model = student_model(name, rank, torch.bfloat16 if half else torch.float32)
    shape = recipe.Shape(name, "small teacher", rank, half_student=half)
    cell = recipe.make_cell(shape, 2, 64, 1, "live", "cpu", dtype)
    computed = recipe.activations(recipe.Size.of(model_config(name)), cell)
    assert computed == pytest.approx(kept_bytes(model, 2, 64, dtype), rel=0.05)


def test_sizes_are_those_of_the_models():
    gpt2, qwen = recipe.sizes(SHAPES["gpt2-qwen1.5"])
    assert gpt2.parameters == 124_439_808 and gpt2.tied and gpt2.dropout and gpt2.inner == 3072
    assert qwen.parameters == 1_836_828_672 and not qwen.tied and qwen.attention == 2048
    llama, mistral = recipe.sizes(SHAPES["tinyllama-mistral"])
    assert llama.parameters == 1_100_048_384 and mistral.parameters == 7_241_732_096
    llama, qwen = recipe.sizes(SHAPES["llama3.2-qwen2.5"])
    assert llama.parameters == 1_235_814_400 and qwen.parameters == 7_615_616_512
    # All that isn't linear: two matrices of tokens, norms.
    assert mistral.parameters - mistral.linear_parameters == 2 * 32_000 * 4096 + (2 * 32 + 1) * 4096


def test_trained_parts_are_counted_as_they_are_built():
    def count(module: nn.Module, only=lambda name: True):
        return sum(parameter.numel() for name, parameter in module.named_parameters() if only(name))

    student, teacher = recipe.sizes(SHAPES["small"])
    model = student_model("small student", 16)
    assert student.adapter(16) == count(model, lambda name: "lora_" in name)
    assert student.parameters == count(model, lambda name: "lora_" not in name)
    assert student.parameters == count_parameters(model_config("small student"))
    assert recipe.projectors(student, teacher) == count(Projectors(student.width, teacher.width))
    assert recipe.discriminator(teacher) == count(Discriminator(2 * teacher.width))


def test_what_takes_more_and_what_takes_less():
    student, teacher = recipe.sizes(SHAPES["llama3.2-qwen2.5"])
    live = recipe.make_cell(SHAPES["llama3.2-qwen2.5"], 4, 512, 1, "live", "cuda", "bfloat16")

    def total(**changes):
        return recipe.step_memory(student, teacher, replace(live, **changes))["total"]

    assert total(teacher="cached") < total(teacher="4bit") < total()
    assert total(gradient_checkpointing=True) < total() < total(batch_size=8)
    assert total() < total(accumulation=8) and total(half_student=False) > total()
    assert total(dtype="float32", half_student=False) > total()
    # 7.6 billion parameters in two bytes; the cache keeps 152,064 x 3584 twice.
    assert recipe.teacher_weights(teacher, live) == 2 * 7_615_616_512
    assert recipe.teacher_weights(teacher, replace(live, teacher="cached")) == 2 * 2 * 152_064 * 3584
    four_bit = recipe.teacher_weights(teacher, replace(live, teacher="4bit"))
    assert four_bit == pytest.approx(2 * 2 * 152_064 * 3584 + 0.516 * teacher.linear_parameters, rel=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the most memory that a process had")
def test_a_run_takes_what_is_computed(tmp_path):
    (row,) = recipe.check((("small", 8, 384, "float32", "live"),), tmp_path)
    assert row["error"] == pytest.approx(0, abs=0.15), row


def test_the_table_says_what_fits():
    def found(gigabytes):
        return {"computed": {"total": gigabytes * 1e9}}

    row = {"title": "a ← b", "batch_size": 4, "max_length": 512, "gradient_checkpointing": True}
    rows = [{**row, "live": found(16.2), "cached": {**found(1.0), "measured": 12.2e9}}]
    head, rule, line = recipe.markdown(rows).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line == ("| a ← b, gradient checkpointing | 4 × 512 | 16.2 | 12.2 | cached | no | live and cached |")


def test_the_command_computes(tmp_path):
    done = subprocess.run(
        [sys.executable, str(RECIPES / "memory_table.py"), "--computed", "--json", "--recipes", "smollm2_qwen_coder"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *text, last = done.stdout.splitlines()
    result = json.loads(last)
    assert len(result["rows"]) == 2 and result["checks"] == [] and result["torch"] == torch.__version__
    for row in result["rows"]:
        live, cached = (row[kind]["computed"]["total"] for kind in ("live", "cached"))
        assert 0 < cached < live
        assert f"| {live / 1e9:.1f} | {cached / 1e9:.1f} |" in "\n".join(text)
    assert "computed, not measured" in "\n".join(text)


def test_an_unknown_recipe_is_refused_in_one_line():
    with pytest.raises(UserError) as error:
        recipe.parse(["--recipes", "gpt2_gwen"])
    assert "did you mean 'gpt2_qwen'" in str(error.value) and "\n" not in str(error.value)
