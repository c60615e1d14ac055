import re

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AttentionInterface,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_dskd.errors import UserError
from hf_dskd.models.causal_lm import check_head, lm_head
from hf_dskd.models.hidden_states import LastHiddenState


MODELS = {"gpt2": tiny.gpt2, "llama": tiny.llama, "qwen2": tiny.qwen2}
LENGTHS = (7, 12, 1, 9)
SHAPE = {"vocab_size": 450, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def batch(seed=0):
    """Examples of LENGTHS, padded on the right to more than the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 400, (len(LENGTHS), 14), generator=generator)
    mask = (torch.arange(14) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    return ids.masked_fill(mask == 0, 0), mask


def model_of(name, attention="sdpa"):
    model = MODELS[name](450)
    with torch.no_grad():
        # As little as models are before training, another example's tokens would hardly be seen.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    model.set_attn_implementation(attention)
    return model


def states_and_gradients(model, catch, wrapped=None):
    ids, mask = batch()
    hidden = catch(model if wrapped is None else wrapped, ids, mask)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)) * mask.unsqueeze(-1)
    model.zero_grad()
    (hidden * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), gradients


def assert_same(model, wrapped=None):
    """Packed and padded give one result, and packed nothing where there is padding."""
    _, mask = batch()
    expected, expected_gradients = states_and_gradients(model, LastHiddenState(model))
    actual, gradients = states_and_gradients(model, LastHiddenState(model, padding_free=True), wrapped)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert not actual[~mask.bool()].any()
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=1e-5, atol=1e-5 * max(1, gradient.abs().max())
        )


def opt():
    """Its forward calls a part of its base model; its states are narrower inside than at both ends."""
    return OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32))


def gemma3():
    """Every other layer sees a window that is shorter than an example."""
    window = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, intermediate_size=64, num_key_value_heads=1, head_dim=32, **window)
    )


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama, tiny.qwen2, opt, gemma3])
def test_states_are_those_that_the_head_reads(make):
    model, (ids, mask) = make().eval(), batch()
    with torch.no_grad():
        hidden = LastHiddenState(model)(model, ids, mask)
        expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(lm_head(model)(hidden), expected, rtol=1e-5, atol=1e-5)
    check_head(model, lm_head(model), "student")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_states_and_gradients_are_those_of_padded_ones(name, attention):
    assert_same(model_of(name, attention))


def test_packed_in_a_window_and_with_gradient_checkpointing():
    assert_same(gemma3())
    model = model_of("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model)


@pytest.mark.parametrize("name, target", [("gpt2", "c_attn"), ("qwen2", "q_proj")])
def test_packed_with_an_adapter(name, target):
    adapter = LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model_of(name), adapter)
    assert_same(model)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if "lora" in name
    }


def test_packed_through_data_parallelism(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = model_of("llama")
        # Under this wrapper no logits are made, so that the head gets no gradient.
        assert_same(model, DistributedDataParallel(model, find_unused_parameters=True))
    finally:
        torch.distributed.destroy_process_group()


def test_packed_in_any_order_and_beside_any_example():
    model = model_of("qwen2").eval()
    catch, (ids, mask) = LastHiddenState(model, padding_free=True), batch()
    with torch.no_grad():
        hidden = catch(model, ids, mask)
        for rows in ([2, 0, 3, 1], [1], [3, 1]):
            torch.testing.assert_close(catch(model, ids[rows], mask[rows]), hidden[rows], rtol=1e-5, atol=1e-5)
        # Examples that fill the batch, and padding on the left.
        ids, mask = ids[:2, :7], torch.ones(2, 7, dtype=torch.long)
        whole = catch(model, ids, mask)
        torch.testing.assert_close(whole, LastHiddenState(model)(model, ids, mask), rtol=1e-5, atol=1e-5)
        shifted = catch(model, ids.roll(2, 1), torch.cat([mask * 0, mask], 1)[:, 5:12])
        torch.testing.assert_close(shifted[:, 2:], catch(model, ids[:, :5], mask[:, :5]), rtol=1e-5, atol=1e-5)


def test_packed_in_half_precision():
    model, (ids, mask) = model_of("llama"), batch()
    real = mask.bool()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        packed = LastHiddenState(model, padding_free=True)(model, ids, mask)
        padded = LastHiddenState(model)(model, ids, mask)
    torch.testing.assert_close(packed[real], padded[real], rtol=0.05, atol=0.05)


def test_trying_a_model_leaves_it_as_it_was():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for training in (True, False):
        model = tiny.gpt2(450, dropout=0.3).train(training)
        torch.set_rng_state(state)
        LastHiddenState(model, padding_free=True)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training == training and all(p.grad is None for p in model.parameters())


def blind_attention(module, query, key, value, attention_mask, **kwargs):
    """Of a kernel that knows nothing of packing: a causal mask over the whole row, whatever it is told."""
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_attention_that_mixes_examples_is_refused(name):
    AttentionInterface.register("blind", blind_attention)
    model = MODELS[name](450)  # as initialised, where attention hardly matters yet
    LastHiddenState(model, padding_free=True)
    model.set_attn_implementation("blind")
    LastHiddenState(model)
    with pytest.raises(UserError) as error:
        LastHiddenState(model, padding_free=True)
    text = str(error.value)
    assert "attn_implementation='blind'" in text and type(model).__name__ in text and "\n" not in text
    assert "padding_free=False" in text and "sees" in text.replace("see ", "sees ")


def openai_gpt():
    """Takes positions, but has a causal mask of its own."""
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=450, n_embd=64, n_layer=2, n_head=2, n_positions=256))


def bloom():
    """Has no positions to begin anew."""
    return BloomForCausalLM(BloomConfig(vocab_size=450, hidden_size=64, n_layer=2, n_head=2))


def lfm2():
    """Convolves over the row."""
    layers = ["conv", "full_attention"]
    return Lfm2ForCausalLM(Lfm2Config(**SHAPE, intermediate_size=64, num_key_value_heads=2, layer_types=layers))


@pytest.mark.parametrize(
    "make, reason",
    [
        (openai_gpt, "lets an example see the one before it"),
        (lfm2, "lets an example see the one before it"),
        (bloom, "takes no position_ids"),
    ],
)
def test_model_that_mixes_examples_is_refused(make, reason):
    model = make()
    LastHiddenState(model)
    with pytest.raises(UserError, match=reason) as error:
        LastHiddenState(model, padding_free=True)
    assert type(model).__name__ in str(error.value) and "padding_free=False" in str(error.value)


def test_model_that_reads_positions_wrongly_is_refused():
    """Keeps the examples apart, but counts on from one to the next."""
    model = model_of("gpt2")
    forward = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda positions: forward(torch.arange(positions.shape[1]).unsqueeze(0))
    with pytest.raises(UserError, match="other states for packed examples than for padded ones"):
        LastHiddenState(model, padding_free=True)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"lm_head_multiplier": 0.5}, "lm_head_multiplier=0.5 in its config is not supported"),
        ({}, "a transform of the logits in its forward pass, or its head (Linear), is not supported"),
    ],
)
def test_a_head_with_an_unknown_transform_is_refused_by_name(settings, named):
    model = tiny.llama(450)
    for name, value in settings.items():
        setattr(model.config, name, value)
    check_head(model, lm_head(model), "student")
    model.lm_head.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    with pytest.raises(UserError, match=re.escape(named)):
        check_head(model, lm_head(model), "student")
