import pytest
import tiny
import torch

from hf_dskd.errors import UserError
from hf_dskd.losses.states import response_states
from hf_dskd.models.causal_lm import check_head, check_student_head, input_embedding, lm_head
from hf_dskd.teacher.load import Teacher, load_causal_lm, named_device
from hf_dskd.training.published import published_states


IDS = torch.arange(3, 15).view(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = torch.where(torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool(), IDS, -100)


def tied():
    model = tiny.gpt2(450)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def test_states_are_the_models_last_and_nothing_trains():
    model = tiny.gpt2(450, dropout=0.5).train()
    teacher = Teacher(model)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    hidden = teacher(IDS, MASK)
    expected = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(teacher.head(hidden), model(input_ids=IDS, attention_mask=MASK).logits)
    assert hidden.grad_fn is None and not hidden.requires_grad


@pytest.mark.parametrize("view", ["whole", "response", "published"])
def test_states_can_be_learnt_from(view):
    """Made in inference mode, and yet saved for the backward pass of a projector: as they are, gathered, or sliced."""
    teacher = Teacher(tiny.qwen2())
    plain = teacher.model.model(input_ids=IDS, attention_mask=MASK)[0].detach()
    gradients = []
    for hidden in (teacher(IDS, MASK), plain):
        if view == "response":
            hidden = response_states(hidden, IDS, LABELS, teacher.embedding).hidden
        elif view == "published":
            hidden = published_states(hidden[:, :-1], IDS[:, :-1], LABELS[:, 1:], teacher.embedding).hidden
        weight = torch.eye(hidden.shape[-1], requires_grad=True)
        (hidden @ weight).pow(2).sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_no_layer_records_for_a_backward_pass():
    teacher, seen = Teacher(tiny.qwen2()), []
    teacher.model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    teacher(IDS, MASK)
    assert seen[0].is_inference()


# ---- Devices: where the model is and where the losses run. A tensor on "meta" has a device and a shape but no values,
# so each of the two ways is checked from the side that has them.


@pytest.mark.parametrize("make", [tied, tiny.qwen2, tiny.llama])
def test_what_the_losses_read_goes_to_their_device(make):
    teacher = Teacher(make(), "meta")
    assert {p.device.type for p in teacher.model.parameters()} == {"cpu"}
    hidden = teacher(IDS, MASK)
    places = [hidden, teacher.head.weight, teacher.embedding]
    assert {tensor.device.type for tensor in places} == {"meta"}
    assert hidden.shape == (2, 6, teacher.embedding.shape[1]) and not hidden.is_inference()


def test_the_batch_goes_to_the_models_device():
    model = tiny.gpt2(450).to("meta")
    model.set_attn_implementation("eager")  # the other reads whether anything is padded
    teacher = Teacher(model, "meta")
    seen = []
    model.transformer.wte.register_forward_hook(lambda module, args, output: seen.append(args[0].device.type))
    assert teacher(IDS, MASK).device.type == "meta"
    assert seen == ["meta"]


def test_head_has_its_bias_on_the_device():
    model = tiny.gpt2(450)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(450))
    assert Teacher(model, "meta").head.bias.device.type == "meta"
    teacher = Teacher(model, "cpu")
    torch.testing.assert_close(teacher.head(teacher(IDS, MASK)), model(input_ids=IDS, attention_mask=MASK).logits)


def test_one_matrix_for_both_stays_one_and_on_the_same_device_nothing_is_copied():
    for make, same in ((tied, True), (tiny.qwen2, False)):
        for device in (None, "cpu", "meta"):
            teacher = Teacher(make(), device)
            assert (teacher.head.weight is teacher.embedding) == same
            if device != "meta":
                assert teacher.head.weight is lm_head(teacher.model).weight
                assert teacher.embedding is input_embedding(teacher.model)
                check_head(teacher.model, teacher.head, "teacher")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device with values: a GPU")
def test_teacher_beside_the_gpu_gives_what_it_gives_on_it():
    here, there = Teacher(tiny.qwen2(), "cuda"), Teacher(tiny.qwen2().cuda())
    check_head(here.model, here.head, "teacher")
    assert next(here.model.parameters()).device.type == "cpu"
    hidden = here(IDS.cuda(), MASK.cuda())
    assert hidden.is_cuda and here.head.weight.is_cuda and here.embedding.is_cuda
    real = MASK.bool().cuda()
    torch.testing.assert_close(hidden[real], there(IDS.cuda(), MASK.cuda())[real], rtol=1e-4, atol=1e-4)


def test_devices_by_name():
    for name in ("gpu", "cuda:99", "mps:7", "meta", "", "cpu:1"):
        with pytest.raises(UserError) as error:
            named_device(name)
        text = str(error.value)
        assert f"teacher_device={name!r}" in text and "cpu" in text and "\n" not in text
    assert named_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert named_device("cuda:0") == named_device("cuda") == torch.device("cuda:0")


# ---- 4 bits


@pytest.fixture
def four_bit_teacher(tmp_path):
    """With a head and all other linear layers in NF4; by default transformers leaves the head as it is."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny.qwen2(448).save_pretrained(tmp_path)

    def load(**options):
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
        return load_causal_lm(str(tmp_path), quantization_config=quantization, device=torch.device("cpu"))

    return load


def test_nothing_is_dequantised_after_the_first_moment(four_bit_teacher, monkeypatch):
    import bitsandbytes.functional

    model = four_bit_teacher(llm_int8_skip_modules=[])
    assert type(model.lm_head).__name__ == "Linear4bit"
    counted = []
    dequantize = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(
        bitsandbytes.functional, "dequantize_4bit", lambda *args: counted.append(args[0].shape) or dequantize(*args)
    )
    teacher = Teacher(model)
    assert len(counted) == 1 and teacher.head.weight.shape == (448, 128)
    assert teacher.head.weight.is_floating_point()
    counted.clear()
    for _ in range(2):
        teacher.head(teacher(IDS, MASK))
    # The layers may dequantise as they compute; the head, which is no layer's, must not.
    assert not [shape for shape in counted if shape.numel() == teacher.head.weight.numel() // 2]


def test_by_default_head_and_embedding_arent_quantised(four_bit_teacher):
    """Which is why reading the student's in every step costs nothing; a quantised one would be dequantised in each."""
    model = four_bit_teacher()
    assert type(model.model.layers[0].mlp.gate_proj).__name__ == "Linear4bit"
    assert lm_head(model).weight is model.lm_head.weight
    assert input_embedding(model) is model.model.embed_tokens.weight
    check_student_head(model)
    with pytest.raises(UserError, match=r"head is quantized .*llm_int8_skip_modules"):
        check_student_head(four_bit_teacher(llm_int8_skip_modules=[]))


def test_a_head_of_integers_is_refused():
    model = tiny.qwen2(448)
    model.lm_head.weight = torch.nn.Parameter(torch.ones(448, 128, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="quantized to int8"):
        lm_head(model)


def test_four_bit_states_in_inference_mode_are_the_models(four_bit_teacher):
    with torch.no_grad():
        expected = four_bit_teacher().model(input_ids=IDS, attention_mask=MASK)[0]
    teacher = Teacher(four_bit_teacher())
    for _ in range(2):
        torch.testing.assert_close(teacher(IDS, MASK), expected)
    check_head(teacher.model, teacher.head, "teacher")
