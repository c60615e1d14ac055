"""The memory of a step: the formulas against what models keep and hold."""

from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from benchmark_step import model_config  # sizes of real models
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from hf_dskd import UserError
from hf_dskd.experiments.memory import (
    CUDA_CONTEXT,
    Size,
    Step,
    activations,
    auxiliary_parameters,
    estimate,
    fake_student,
    free_memory,
    room,
    step_memory,
    teacher_weights,
)
from hf_dskd.losses.conditional_transport import TransportCritics
from hf_dskd.losses.key_query import Discriminator
from hf_dskd.losses.projectors import Projectors
from hf_dskd.models.causal_lm import backbone


LLAMA, QWEN = "meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-7B"
SMALL = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
KINDS = {
    "llama": {"intermediate_size": 512},
    "mistral": {"intermediate_size": 512, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 512, "num_key_value_heads": 2, "head_dim": 32},
    "gemma3_text": {"intermediate_size": 512, "num_key_value_heads": 2, "head_dim": 32},
    "phi": {"intermediate_size": 512},
    "gpt_neox": {"intermediate_size": 512},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 128},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 4},
    "gpt2 without dropout": {
        **{"n_embd": 128, "n_layer": 4, "n_head": 4},
        **{"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    },
}
# What it does depends on the text in transformers 4.
EXPERTS = {"mixtral": {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}}


def small_config(kind: str) -> PretrainedConfig:
    sizes = {"vocab_size": 1000} if kind.startswith("gpt2") else SMALL
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return AutoConfig.for_model(kind.split()[0], **sizes, **{**KINDS, **EXPERTS}[kind], **ends)


def student_model(config, rank, dtype=torch.float32, targets="all-linear"):
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
    return model.train()


def kept_bytes(model, batch_size, length, dtype, device="cpu"):
    """Of the tensors that a forward pass saves for its backward pass, parameters apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The tensor too, so that its place in memory is not used again.
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    ids = torch.randint(1, 100, (batch_size, length), device=device)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype != "float32")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(size for size, _ in kept.values())


ON_GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank, student_dtype", [(None, "float32"), (16, "bfloat16")])
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_activations_are_what_a_forward_pass_keeps(kind, rank, student_dtype, device):
    config = small_config(kind)
    step = Step(2, 64, adapter_rank=rank, student_dtype=student_dtype, dtype="bfloat16", device=device)
    model = student_model(config, rank, getattr(torch, student_dtype)).to(device)
    # On a GPU but for the seeds of what is dropped.
    kept = pytest.approx(kept_bytes(model, 2, 64, "bfloat16", device), rel=0 if device == "cpu" else 1e-3)
    assert activations(Size.of(config), step) == kept


def test_a_gpu_drops_by_masks_and_computes_more_in_float32():
    gpt2, plain = (Size.of(small_config(kind)) for kind in ("gpt2", "gpt2 without dropout"))
    on_cpu, on_gpu = (
        {size: activations(size, Step(2, 64, dtype="bfloat16", device=device)) for size in (gpt2, plain)}
        for device in ("cpu", "cuda")
    )
    # Masks of a byte: one before the layers, two in each of the four.
    assert on_gpu[gpt2] - on_gpu[plain] == 9 * 2 * 64 * 128
    assert on_cpu[gpt2] - on_cpu[plain] > 2 * (on_gpu[gpt2] - on_gpu[plain]) and on_gpu[plain] > on_cpu[plain]
    # In float32 both keep the same.
    alone = [activations(plain, Step(2, 64, dtype="float32", device=device)) for device in ("cpu", "cuda")]
    assert alone[0] == alone[1]


def test_checkpointing_keeps_inputs_and_computes_a_layer_again():
    config = small_config("gpt2")
    size, step = Size.of(config), Step(2, 64, dtype="float32", device="cpu")
    kept = fake_student(size, step).forward(2, 64, torch.float32, on_gpu=False)
    model = student_model(config, None)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = max(layer.inside for layer in kept.layers)
    assert len(kept.layers) == 4 and kept.layers[0].input == 2 * 64 * 128 * 4
    assert activations(size, replace(step, gradient_checkpointing=True)) == kept_bytes(model, 2, 64, "float32") + again


@pytest.mark.parametrize(
    "kind, targets",
    [
        ("llama", ["q_proj", "v_proj"]),
        ("qwen3", ["o_proj", "up_proj"]),
        ("gpt2", r".*\.mlp\.(c_fc|c_proj)"),
        ("gpt2", ["attn.c_proj"]),
        ("opt", ["fc2"]),
    ],
)
def test_what_is_not_adapted_keeps_no_input(kind, targets):
    config = small_config(kind)
    size, model = Size.of(config), student_model(config, 16, targets=targets)
    step = Step(2, 64, adapter_rank=16, adapter_targets=targets, device="cpu")
    assert fake_student(size, step).adapter_parameters == model.num_parameters(only_trainable=True)
    assert activations(size, step) == kept_bytes(model, 2, 64, "bfloat16")
    assert activations(size, step) < activations(size, replace(step, adapter_targets=None))


def test_attention_counts_as_it_is():
    step = Step(2, 64, dtype="float32", device="cpu")
    kept = {}
    for attention in ("sdpa", "eager", "flash_attention_2"):
        config = small_config("llama")
        config._attn_implementation = attention
        kept[attention] = activations(Size.of(config), step)
        if attention == "eager":
            assert kept["eager"] == kept_bytes(student_model(config, None), 2, 64, "float32") > kept["sdpa"]
    # Which isn't there, and keeps what PyTorch's own does.
    assert kept["flash_attention_2"] == kept["sdpa"]


@pytest.mark.parametrize("rank, dtype", [(None, "float32"), (16, "bfloat16")])
def test_experts_count_as_they_are(rank, dtype):
    config = small_config("mixtral")
    step = Step(2, 64, adapter_rank=rank, student_dtype=dtype, dtype=dtype, device="cpu")
    if int(transformers.__version__.split(".")[0]) < 5:
        with pytest.raises(UserError, match="depends on the text"):
            activations(Size.of(config), step)
        return
    kept = kept_bytes(student_model(config, rank, getattr(torch, dtype)), 2, 64, dtype)
    assert activations(Size.of(config), step) == pytest.approx(kept, rel=1e-4)


def test_targets_that_name_nothing_are_refused():
    with pytest.raises(UserError, match="names no module of the student"):
        activations(Size.of(small_config("llama")), Step(1, 64, adapter_rank=8, adapter_targets=["c_attn"]))


def test_sizes_are_those_of_the_models():
    gpt2, qwen = (Size.of(model_config(name)) for name in ("openai-community/gpt2", "Qwen/Qwen1.5-1.8B"))
    assert gpt2.parameters == 124_439_808 and gpt2.tied and gpt2.inner == 3072
    assert qwen.parameters == 1_836_828_672 and not qwen.tied
    mistral = Size.of(model_config("mistralai/Mistral-7B-v0.1"))
    assert mistral.parameters == 7_241_732_096 and mistral.inner == 14_336
    llama, qwen = (Size.of(model_config(name)) for name in (LLAMA, QWEN))
    assert llama.parameters == 1_235_814_400 and llama.tied and qwen.parameters == 7_615_616_512
    # All that isn't linear: two matrices of tokens, norms.
    assert mistral.parameters - mistral.linear_parameters == 2 * 32_000 * 4096 + (2 * 32 + 1) * 4096
    assert Size.of(model_config(LLAMA)) is llama


def test_trained_parts_are_counted_as_they_are_built():
    def count(module: nn.Module):
        return sum(parameter.numel() for parameter in module.parameters())

    student, teacher = (Size.of(model_config(f"small {role}")) for role in ("student", "teacher"))
    sizes = student.width, teacher.width
    critics = count(Discriminator(2 * teacher.width)), count(TransportCritics(2 * teacher.width))
    assert auxiliary_parameters(student, teacher, "dskd_cma_ga") == (count(Projectors(*sizes)), critics[0])
    assert auxiliary_parameters(student, teacher, "dskd_cma_ct") == (count(Projectors(*sizes)), critics[1])
    assert auxiliary_parameters(student, teacher, "dskd_clp") == (count(Projectors(*sizes, has_query=False)), 0)
    assert auxiliary_parameters(student, teacher, "alm") == (0, 0)


@pytest.fixture(scope="module")
def sizes():
    return Size.of(model_config(LLAMA)), Size.of(model_config(QWEN))


# The row of README.md for Llama-3.2-1B, LoRA r 64, from Qwen2.5-7B in 4 bits.
ROW = Step(4, 512, adapter_rank=64, student_dtype="bfloat16", teacher="4bit", accumulation=8)


def test_the_figures_of_the_readme(sizes):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8").splitlines()
    place = next(number for number, line in enumerate(readme) if line.startswith("| Llama-3.2-1B, LoRA r 64"))
    for line, checkpointing in zip(readme[place : place + 2], (False, True)):
        step = replace(ROW, gradient_checkpointing=checkpointing)
        live, cached = (step_memory(*sizes, replace(step, teacher=kind)).total for kind in ("4bit", "cached"))
        assert f"| {live / 1e9:.1f} | {cached / 1e9:.1f} |" in line
        cards = [cell.strip() for cell in line.strip("|").split("|")[-3:]]
        for cell, gibibytes in zip(cards, (14.56, 11.75, 23.6)):
            fits = [
                kind for kind, size in (("live", live), ("cached", cached)) if room(size, "cuda") <= gibibytes * 2**30
            ]
            assert (" and ".join(fits) or "no") == cell


def test_an_estimate_reads_configurations(sizes):
    options = {"batch_size": 4, "max_length": 512, "adapter_rank": 64, "student_dtype": "bfloat16", "accumulation": 8}
    configs = model_config(LLAMA), model_config(QWEN)
    assert estimate(*configs, four_bit_teacher=True, **options) == step_memory(*sizes, ROW)
    cached = estimate(*configs, cached_teacher=True, gradient_checkpointing=True, **options)
    assert cached == step_memory(*sizes, replace(ROW, teacher="cached", gradient_checkpointing=True))
    others = {"dtype": "float32", "device": "cpu", "loss_memory_mb": 100, "response_tokens": 40, "method": "uld"}
    assert estimate(*configs, **options, **others) == step_memory(*sizes, replace(ROW, teacher="live", **others))
    alone = estimate(configs[0], None, **options, method="sft")
    assert alone.teacher_weights == alone.projectors_and_discriminator == alone.queries_and_keys == 0
    assert alone.total < cached.total
    with pytest.raises(UserError, match=r"loss_memory_mb=0\.5 can't hold one row"):
        estimate(*configs, **options, loss_memory_mb=0.5)


def test_what_takes_more_and_what_takes_less(sizes):
    live = replace(ROW, teacher="live", accumulation=1)

    def total(**changes):
        return step_memory(*sizes, replace(live, **changes)).total

    assert total(teacher="cached") < total(teacher="4bit") < total()
    assert total(gradient_checkpointing=True) < total() < total(batch_size=8)
    assert total() < total(accumulation=8) and total(student_dtype="float32") > total()
    assert total(dtype="float32", student_dtype="float32") > total()
    assert total(adapter_rank=None, student_dtype="float32") > total(adapter_rank=256) > total()
    assert total(adapter_targets="all-linear") == total() > total(adapter_targets=["q_proj", "v_proj"])
    assert total(method="sft") < total(method="dskd_clp") < total(method="dskd_cma") < total()
    assert total(response_tokens=400) > total() > total(loss_memory_mb=100)
    assert step_memory(*sizes, replace(live, method="dskd_clp")).queries_and_keys == 0
    # Autocast makes a copy of a float32 head for each use of it: one without a teacher.
    alone = [
        step_memory(*sizes, replace(live, method="sft", student_dtype=dtype)) for dtype in ("float32", "bfloat16")
    ]
    assert alone[0].loss - alone[1].loss == 2 * 128_256 * 2048
    # 7.6 billion parameters in two bytes; the cache keeps 152,064 x 3584 twice.
    teacher = sizes[1]
    assert teacher_weights(teacher, live) == 2 * 7_615_616_512
    assert teacher_weights(teacher, replace(live, teacher="cached")) == 2 * 2 * 152_064 * 3584
    four_bit = teacher_weights(teacher, replace(live, teacher="4bit"))
    assert four_bit == pytest.approx(2 * 2 * 152_064 * 3584 + 0.516 * teacher.linear_parameters, rel=1e-3)


def test_the_total_is_less_than_the_parts_but_more_than_what_stays(sizes):
    parts = asdict(step_memory(*sizes, ROW))
    total = parts.pop("total")
    stays = ("student_weights", "adapter", "teacher_weights", "projectors_and_discriminator", "optimizer_states")
    assert sum(parts[name] for name in stays) + CUDA_CONTEXT + parts["activations"] < total < sum(parts.values())


def test_responses_are_a_third_of_the_length():
    assert Step(4, 512).responses == [106, 149, 191, 234]
    assert Step(2, 384, response_tokens=100).responses == [75, 125] and Step(1, 4, response_tokens=9).responses == [3]


def test_an_allocator_needs_more_than_the_tensors():
    # A third on top, as measured on CPUs; between a GPU's blocks lies less.
    assert room(3e9, "cuda") == pytest.approx(3.15e9) and room(3e9, "cpu") == pytest.approx(4.05e9)


def test_free_memory():
    assert free_memory(torch.device("cpu")) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize("free, expected", [(10e9, 10.5e9), (15.9e9, 16e9)])
def test_free_memory_of_a_gpu_includes_the_context(monkeypatch, free, expected):
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (free, 16e9))
    assert free_memory(torch.device("cuda", 0)) == expected
