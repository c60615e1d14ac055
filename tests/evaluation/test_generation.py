import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from hf_dskd.data.tokens import response_tokens
from hf_dskd.errors import UserError
from hf_dskd.evaluation.generation import score_generation
from hf_dskd.evaluation.scores import rouge_l
from hf_dskd.models.generation import check_generation_config, end_token_ids, gumbel_noise, response_text, sample


GREEDY = GenerationConfig(do_sample=False)
SAMPLING = GenerationConfig(do_sample=True, temperature=1.0, top_k=0)
PROMPTS = [list(range(5, 5 + length)) for length in (3, 30, 1, 12, 7)]
# A tenth of the vocabulary, so that some samples end and others don't.
ENDS = list(range(0, 400, 10))


def greedy_by_hand(model, prompt, ends, count):
    """One token at a time, without padding, cache or `generate`."""
    response = []
    while len(response) < count and (not response or response[-1] not in ends):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits
        response.append(int(logits[0, -1].argmax()))
    return response


def write(model, prompts=PROMPTS, *, ends=(), count=5, config=GREEDY, **options):
    given = {"pad_token_id": 0, "eos_token_ids": list(ends), "max_new_tokens": count, "generation_config": config}
    return sample(model, prompts, **given, **options)


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.qwen2])
def test_greedy_is_the_most_likely_token_each_time(make):
    model = make(400).eval()
    # Ended by the third token of a free continuation, so that one row ends before its time.
    ends = [greedy_by_hand(model, PROMPTS[1], [], 3)[-1]]
    limits = [6, 9, 4, 0, 9]
    expected = [greedy_by_hand(model, prompt, ends, limit) for prompt, limit in zip(PROMPTS, limits)]
    assert expected[1][-1] == ends[0] and len(expected[1]) <= 3
    assert any(row and row[-1] not in ends for row in expected)
    for batch_size in (1, 2, 5):
        assert write(model, ends=ends, count=limits, batch_size=batch_size) == expected


def test_never_past_the_last_position():
    model = tiny.gpt2(400).eval()
    positions = model.config.n_positions
    prompts = [[7] * (positions - 4), [8, 9]]
    expected = [greedy_by_hand(model, prompts[0], [], 4), greedy_by_hand(model, prompts[1], [], 9)]
    # A cache of 1024 positions for the first row, which is done when the second goes on.
    assert write(model, prompts, count=[50, 9]) == expected
    # In a second call, a named sample has the noise of its places.
    options = {"count": 9, "config": SAMPLING, "seed": 10}
    alone = write(model, prompts[1:], example_ids=[1], **options)
    beside = write(model, prompts, example_ids=[0, 1], **options)
    assert len(beside[0]) == 4 and beside[1] == alone[0]


def test_seed_decides_and_no_other_stream_moves():
    model = tiny.gpt2(400)
    options = {"ends": ENDS, "count": 12, "config": SAMPLING}
    before = torch.get_rng_state()
    first = write(model, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert write(model, seed=3, **options) == first
    assert write(model, seed=4, **options) != first
    # Both kinds of end are there.
    assert {row[-1] in ENDS for row in first} == {True, False}
    assert all(not set(row[:-1]) & set(ENDS) for row in first)
    assert all(len(row) == 12 for row in first if row[-1] not in ENDS)
    before = torch.get_rng_state()
    write(model, **options)
    assert not torch.equal(torch.get_rng_state(), before)


def test_own_config_is_the_default_and_is_kept():
    model = tiny.gpt2(400)
    own = model.generation_config
    own.do_sample = True
    own.top_k = 1
    greedy = write(model)
    # The most likely one of one: the model's own top_k was used.
    assert write(model, config=None, seed=0) == greedy
    own.top_k = 0
    assert write(model, config=None, seed=0) != greedy
    # Greedy stays greedy beside a model's own config that samples.
    assert write(model) == greedy
    assert model.generation_config is own
    assert GREEDY.max_new_tokens is None


def test_in_training_with_adapter_and_checkpointing():
    options = {"ends": ENDS, "count": 8}
    plain = tiny.gpt2(400, dropout=0.5)
    without = write(plain, **options)
    model = get_peft_model(plain, LoraConfig(target_modules=["c_attn"], init_lora_weights=False, lora_dropout=0.5))
    expected = [greedy_by_hand(model.eval(), prompt, ENDS, 8) for prompt in PROMPTS]
    assert expected != without
    model.train()
    frozen = model.get_base_model().transformer.h[0].eval()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    assert write(model, **options) == expected
    assert [module.training for module in model.modules()] == modes
    assert not frozen.training and model.training
    assert model.is_gradient_checkpointing and not model.config.use_cache
    loss = model(input_ids=torch.tensor(PROMPTS[:1]), labels=torch.tensor(PROMPTS[:1])).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    # After an error, too.
    own = plain.generation_config
    with pytest.raises(IndexError):
        write(model, [[400]])
    assert [module.training for module in model.modules()] == modes and plain.generation_config is own


def test_within_autocast_later_gradients_are_whole():
    ids = torch.tensor(PROMPTS[1:2])

    def gradients(writes):
        model = tiny.gpt2(400)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if writes:
                write(model, count=3)
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected, actual = gradients(False), gradients(True)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)


def test_progress(capsys):
    model = tiny.gpt2(400)
    write(model, count=2)
    assert capsys.readouterr().err == ""
    write(model, count=2, description="Answers", batch_size=2)
    assert "Answers: 100%" in capsys.readouterr().err


def test_no_generation_config():
    model = tiny.gpt2(400)
    check_generation_config(model, "the student")
    model.generation_config = None
    message = r"generation_config of the student is None.*set model.generation_config = GenerationConfig\("
    for given in (model, get_peft_model(model, LoraConfig(target_modules=["c_attn"]))):
        with pytest.raises(UserError, match=message):
            check_generation_config(given, "the student")
    with pytest.raises(UserError, match=r"generation_config of the model is None"):
        write(model, config=None)
    # With one from the caller, the model needs none.
    assert write(model, [[1]])[0]


def test_end_tokens():
    tokenizer = tiny.sentencepiece_tokenizer()
    assert end_token_ids(tokenizer, None) == [2]
    assert end_token_ids(tokenizer, GenerationConfig()) == [2]
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=5)) == [2, 5]
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=[5, 2, 7])) == [2, 5, 7]


@pytest.mark.parametrize("make", [tiny.byte_level_tokenizer, tiny.sentencepiece_tokenizer])
@pytest.mark.parametrize("text", [*tiny.TEXTS, " a space first", "\n\nx", "👩‍👩‍👧", "  "])
def test_text_of_a_response_is_the_text_that_was_tokenized(make, text):
    tokenizer = make()
    ids, _ = response_tokens(tokenizer, text)
    special = [tokenizer.eos_token_id]
    assert response_text(tokenizer, special + ids + special) == text


def test_end_and_text_of_half_a_character():
    tokenizer = tiny.byte_level_tokenizer()
    ids, _ = response_tokens(tokenizer, "ok 👍")
    assert response_text(tokenizer, ids[:-1]) == "ok \ufffd"


def test_noise_is_gumbels():
    rows = torch.arange(200)
    noise = gumbel_noise(10, rows, rows % 7, 5000).double()
    assert noise.isfinite().all()
    # A million independent numbers whose chance to be smaller, exp(-exp(-x)), is uniform.
    chances = torch.exp(-torch.exp(-noise)).flatten()
    shares = torch.histc(chances, 100, 0, 1) / chances.numel()
    assert (shares - 0.01).abs().max() < 6 * (0.01 / chances.numel()) ** 0.5
    for other in (noise.roll(1, 1), noise.roll(1, 0), gumbel_noise(11, rows, rows % 7, 5000).double()):
        pairs = torch.stack([noise.flatten(), other.flatten()])
        assert torch.corrcoef(pairs)[0, 1].abs() < 6 / chances.numel() ** 0.5
    # Large noise, from which rare tokens come, isn't coarse: and there is as much of it as there must be.
    for share in (1e-2, 1e-3, 1e-4):
        threshold = -torch.log(-torch.log1p(torch.tensor(-share, dtype=torch.float64)))
        assert (noise > threshold).double().mean() == pytest.approx(share, abs=6 * (share / chances.numel()) ** 0.5)
    top = noise.flatten().topk(1000).values
    assert top.unique().numel() > 990


def test_noise_depends_on_what_it_is_named_by_alone():
    rows, positions = torch.tensor([3, 0, 7]), torch.tensor([5, 0, 2])
    noise = gumbel_noise(10, rows, positions, 50)
    assert torch.equal(gumbel_noise(10, rows.flip(0), positions.flip(0), 60).flip(0)[:, :50], noise)
    for seed, row, position in ((11, 3, 5), (10, 4, 5), (10, 3, 6), (10, 5, 3)):
        other = gumbel_noise(seed, torch.tensor([row]), torch.tensor([position]), 50)
        assert (other != noise[0]).all()


def test_named_samples_depend_on_neither_batch_nor_order_nor_what_is_drawn_elsewhere():
    model = tiny.gpt2(400)
    options = {"ends": ENDS[::2], "count": 12, "config": SAMPLING, "seed": 10}
    names = [40, 3, 0, 12, 7]
    expected = write(model, example_ids=names, batch_size=1, **options)
    assert {row[-1] in ENDS[::2] for row in expected} == {True, False}
    state = torch.get_rng_state()
    for batch_size in (2, 5):
        order = [4, 2, 0, 1, 3]
        torch.rand(1)
        prompts, ids = ([values[index] for index in order] for values in (PROMPTS, names))
        shuffled = write(model, prompts, example_ids=ids, batch_size=batch_size, **options)
        assert [shuffled[order.index(index)] for index in range(5)] == expected
    torch.set_rng_state(state)
    write(model, example_ids=names, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert write(model, example_ids=names, **{**options, "seed": 11}) != expected
    assert write(model, example_ids=range(5), **options) != expected


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        (False, {}),
        *((True, changes) for changes in ({}, {"temperature": 0.5}, {"top_p": 0.7}, {"top_k": 3, "temperature": 2.0})),
    ],
)
def test_samples_follow_the_models_distribution(named, changes):
    model = tiny.gpt2(8).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1]
    expected = (logits / changes.get("temperature", 1.0)).softmax(-1)
    order = expected.argsort(descending=True)
    kept = torch.ones(8, dtype=torch.bool)
    if "top_p" in changes:
        # The fewest that reach it.
        kept[order] = expected[order].cumsum(0) - expected[order] < changes["top_p"]
    if "top_k" in changes:
        kept[order[changes["top_k"] :]] = False
    expected = expected * kept / expected[kept].sum()
    assert kept.all() == (not {"top_p", "top_k"} & set(changes))
    count = 3000
    config = GenerationConfig(**{"do_sample": True, "top_k": 0, **changes})
    options = {"count": 1, "config": config, "seed": 0, "batch_size": 1000}
    written = write(model, [[1, 2, 3]] * count, example_ids=range(count) if named else None, **options)
    shares = torch.bincount(torch.tensor(written)[:, 0], minlength=8) / count
    # Five standard deviations of a share.
    assert (shares - expected).abs().max() < 5 * 0.5 / count**0.5
    assert not shares[~kept].any()
    assert expected.max() - expected.min() > 0.2


def test_scores_of_greedy_answers():
    model, tokenizer = tiny.gpt2(400).eval(), tiny.byte_level_tokenizer()
    ends = [0, greedy_by_hand(model, PROMPTS[0], [0], 1)[0]]
    model.generation_config.eos_token_id = ends[1]
    written = greedy_by_hand(model, PROMPTS[1][:20], ends, 10)
    assert written[-1] not in ends
    text = response_text(tokenizer, written)
    # Ended at once, cut by the length, and without room.
    examples = [(PROMPTS[0], ["cat"]), (PROMPTS[1][:20], ["cat", text]), (PROMPTS[1], ["dog"])]
    model.train()
    metrics, responses = score_generation(model, tokenizer, examples, max_length=30, batch_size=2)
    assert model.training
    # A token that ends an answer is none of its text, whatever token it is.
    assert response_text(tokenizer, ends[1:]) and responses == ["", text.rstrip("\ufffd"), ""]
    assert metrics["exact_match"] == pytest.approx(100 / 3) and metrics["unfinished"] == pytest.approx(2 / 3)
    assert metrics["rouge_l"] == pytest.approx(100 * sum(map(rouge_l, responses, [r for _, r in examples])) / 3)
    assert score_generation(model, tokenizer, examples, max_length=30, batch_size=1) == (metrics, responses)
