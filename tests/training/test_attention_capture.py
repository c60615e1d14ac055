"""Queries and keys of every supported family, against the weights that the model itself returns in eager attention."""

from __future__ import annotations

import pytest
import torch
import transformers

from hf_dskd.errors import UserError
from hf_dskd.losses.attention import AttentionInputs
from hf_dskd.models.hidden_states import LastHiddenState
from hf_dskd.settings import parse_layers
from hf_dskd.training.attention_capture import AttentionCapture, AttentionPairs, layer_pairs


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Large, so that attention is far from even.
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 64},
    "Gemma": {},
    "Gemma2": {"attn_logit_softcapping": None, "sliding_window": 64, "query_pre_attn_scalar": 5},
    "Gemma3": {"sliding_window": 64, "query_pre_attn_scalar": 5},
    "GPT2": {},
}


def model(family: str, attention: str = "sdpa", **changes):
    """A random model of one family, the same for every `attention`; the sizes don't need to fit any other one."""
    settings = {**SIZES, **FAMILIES[family], **changes}
    if family == "GPT2":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        names |= {"max_position_embeddings": "n_positions"}
        others = {name: settings[name] for name in ("vocab_size", "initializer_range", "eos_token_id")}
        settings = {**others, **{theirs: settings[name] for name, theirs in names.items()}}
        settings |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    kind = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, kind)(**settings, attn_implementation=attention)
    torch.manual_seed(0)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return getattr(transformers, family + head)(config).eval()


def tokens(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def weights(inputs: AttentionInputs) -> torch.Tensor:
    """softmax(scale q kᵀ) `[B, H, N, N]`, causal."""
    keys = inputs.keys.repeat_interleave(inputs.queries.shape[1] // inputs.keys.shape[1], dim=1)
    scores = inputs.scale * inputs.queries @ keys.transpose(2, 3)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


def recorded(network, layers, ids, **inputs) -> dict[int, AttentionInputs]:
    with AttentionCapture(network, "student").recording(layers) as states:
        network(input_ids=ids, use_cache=False, **inputs)
    return states


# From transformers 5 on Gemma 2 has no other attention than eager.
EVERY = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")]
EVERY.remove(("Gemma2", "sdpa"))


@pytest.mark.parametrize(("family", "attention"), EVERY)
def test_captured_give_the_models_own_weights(family, attention):
    ids = tokens()
    with torch.no_grad():
        expected = model(family, "eager")(input_ids=ids, output_attentions=True, use_cache=False).attentions
        network = model(family, attention)
        states = recorded(network, [0, 1], ids)
    assert AttentionCapture(network, "student").check([0, 1], 64) == {0: (4, 8), 1: (4, 8)}
    for layer in (0, 1):
        torch.testing.assert_close(weights(states[layer]), expected[layer], atol=1e-5, rtol=0)
        # Far from even: the next-to-last row has ten keys.
        assert expected[layer][:, :, -2].max() > 0.3
        assert states[layer].keys.shape[1] == (4 if family == "GPT2" else 2)


def refusal(network, layers=(0, 1), max_length=64, role="student"):
    with pytest.raises(UserError) as error:
        AttentionCapture(network, role).check(layers, max_length)
    return str(error.value)


def test_recording_changes_nothing_and_ends():
    network, ids = model("Qwen2"), tokens()
    modules = [layer.self_attn for layer in network.model.layers]
    with torch.no_grad():
        plain = network(input_ids=ids).logits
        capture = AttentionCapture(network, "student")
        with capture.recording([1]) as first:
            within = network(input_ids=ids).logits
            network(input_ids=ids.flip(1))
    torch.testing.assert_close(within, plain, atol=0, rtol=0)
    assert all(module.config is network.config for module in modules)
    # Of the first pass alone.
    torch.testing.assert_close(first[1].queries, recorded(network, [1], ids)[1].queries, atol=0, rtol=0)
    assert list(first) == [1]


def test_recording_ends_where_a_forward_pass_fails():
    network = model("Qwen2")
    with pytest.raises(IndexError), AttentionCapture(network, "student").recording([0, 1]):
        network(input_ids=torch.tensor([[64]]))
    assert all(layer.self_attn.config is network.config for layer in network.model.layers)


def step(network, checkpointing: bool | None = None) -> dict[str, torch.Tensor]:
    """Gradients of a sum of weights in the last layer, read off a forward pass that returns its last hidden state."""
    network.train()
    capture, last_hidden_state = AttentionCapture(network, "student"), LastHiddenState(network)
    if checkpointing is not None:
        network.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    ids = tokens()
    with capture.recording([1]) as states:
        hidden = last_hidden_state(network, ids, torch.ones_like(ids))
    (weights(states[1]).square().sum() + hidden.square().mean()).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma3"])
def test_gradient_reaches_the_projections_with_and_without_checkpointing(family):
    plain = step(model(family))
    checkpointed = step(model(family), checkpointing=False)
    projections = [name for name in plain if "c_attn.weight" in name or "q_proj" in name or "k_proj" in name]
    assert len(projections) >= 2
    assert all(plain[name].abs().max() > 0 for name in projections)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(UserError, match="layer 1 carry no gradient: set gradient_checkpointing_kwargs="):
        step(model("Llama"), checkpointing=True)


def test_adapter():
    from peft import LoraConfig, get_peft_model

    network = get_peft_model(model("Qwen2"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    plain = model("Qwen2")
    ids = tokens()
    with torch.no_grad():
        adapted, base = (recorded(one, [1], ids)[1] for one in (network, plain))
    assert (adapted.queries - base.queries).abs().max() > 0.01
    gradients = step(network)
    assert all("lora" in name for name in gradients)
    assert all(gradients[name].abs().max() > 0 for name in gradients if "layers.1" in name)


def test_autocast_and_bf16():
    ids = tokens()
    plain = recorded(model("Qwen3"), [1], ids)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = recorded(model("Qwen3"), [1], ids)[1]
        AttentionCapture(model("Qwen3"), "student").check([0, 1], 64)
    low = recorded(model("Qwen3").bfloat16(), [1], ids)[1]
    assert low.queries.dtype == low.keys.dtype == torch.bfloat16
    for other in (mixed, low):
        difference = weights(AttentionInputs(other.queries.float(), other.keys.float(), other.scale)) - weights(plain)
        assert difference.abs().mean() < 0.02


def test_a_model_that_follows_the_config_after_the_capture_was_made():
    network, ids = model("Llama", "sdpa"), tokens()
    capture = AttentionCapture(network, "student")
    network.set_attn_implementation("eager")
    with torch.no_grad(), capture.recording([0]) as states:
        returned = network(input_ids=ids, output_attentions=True).attentions[0]
    torch.testing.assert_close(weights(states[0]), returned, atol=1e-5, rtol=0)


def test_unsupported_models():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.FalconConfig(**sizes)
    said = "student FalconForCausalLM has no layer that calls the attention functions"
    assert said in refusal(transformers.FalconForCausalLM(config))
    config = transformers.MambaConfig(state_size=4, **sizes)
    said = "teacher MambaForCausalLM has no layer that calls"
    assert said in refusal(transformers.MambaForCausalLM(config), role="teacher")
    few = {"num_experts": 2, "num_experts_per_tok": 1}
    config = transformers.Qwen3NextConfig(**SIZES, **few, layer_types=["linear_attention", "full_attention"])
    said = "Qwen3NextForCausalLM calls no attention function of transformers in layer 0"
    assert said in refusal(transformers.Qwen3NextForCausalLM(config))
    capped = model("Gemma2", "eager", attn_logit_softcapping=50.0)
    assert "Gemma2ForCausalLM caps attention scores at 50.0 in layer 1" in refusal(capped, [1])
    said = "the student's attention has a window of 64 tokens in layer 0, and max_length"
    assert said in refusal(model("Mistral"), [0], 65)
    # Gemma 3 has its window in some layers only, GPT-OSS gives a share of every row to a sink.
    gemma = model("Gemma3", layer_types=["sliding_attention", "full_attention"])
    assert list(AttentionCapture(gemma, "student").check([1], 128)) == [1]
    assert "window of 64 tokens in layer 0" in refusal(gemma, max_length=128)
    sizes = {**SIZES, "sliding_window": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
    oss = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, attn_implementation="eager"))
    assert "GptOssForCausalLM has another attention in layer 1 than queries and keys" in refusal(oss, [1], 16)


def test_layer_pairs():
    assert layer_pairs("last", 12, 24) == [(11, 23)]
    assert layer_pairs("uniform", 3, 12) == [(0, 3), (1, 7), (2, 11)]
    assert layer_pairs("uniform", 2, 3) == [(0, 1), (1, 2)]
    assert layer_pairs("uniform", 4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert layer_pairs("3:7, 5:11", 6, 12) == parse_layers("3:7,5:11") == [(3, 7), (5, 11)]
    assert parse_layers("uniform") is None
    for wrong in ("first", "", "3", "3:7,", "a:b", "-1:2"):
        with pytest.raises(UserError, match="is none of 'last', 'uniform' and pairs of layers"):
            layer_pairs(wrong, 12, 24)
    with pytest.raises(UserError, match="the student has no layer 12, its 12 layers count from 0 to 11"):
        layer_pairs("1:1,12:3", 12, 24)
    with pytest.raises(UserError, match="the teacher has no layer 24"):
        layer_pairs("3:24", 12, 24)


def test_pairs_refuse_heads_that_do_not_fit():
    with pytest.raises(UserError, match=r"attention_relation_heads=5 doesn't divide the 4 x 8 numbers"):
        AttentionPairs(model("Llama"), model("GPT2"), relation_heads=5, max_length=64)
    AttentionPairs(model("Llama"), model("GPT2"), relation_heads=16, max_length=64)


def test_a_layer_in_two_pairs():
    student, teacher, ids = model("Llama"), model("Qwen2"), tokens()
    pairs = AttentionPairs(student, teacher, "0:1,1:1", max_length=64)
    with pairs.recording() as states:
        student(input_ids=ids)
        teacher(input_ids=ids)
    assert states[0][1].keys.equal(states[1][1].keys)
    assert not states[0][0].keys.equal(states[1][0].keys)
