import pytest
import tiny
import torch
from transformers import GenerationConfig

from hf_dskd.alignment.spans import check_tiling, chunk_ids
from hf_dskd.data.collator import DualCollator
from hf_dskd.data.tokenization import tokenize_dataset
from hf_dskd.models.generation import response_text, sample
from hf_dskd.training.on_policy import is_on_policy, on_policy_batch


STUDENT, TEACHER = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
EOS = STUDENT.eos_token_id
MAX_LENGTH = 120
COLLATE = DualCollator(STUDENT.pad_token_id, TEACHER.pad_token_id)
ROWS = tokenize_dataset(tiny.dataset(8), STUDENT, TEACHER, max_length=MAX_LENGTH)[0].to_list()
SAMPLING = GenerationConfig(do_sample=True, top_k=0)


def writer(weights: dict[int, float]):
    """A student that writes each of these tokens with about this relative frequency, and no other one."""
    model = tiny.gpt2(len(STUDENT))
    model.lm_head = torch.nn.Linear(64, len(STUDENT))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-100.0)
        for token, weight in weights.items():
            model.lm_head.bias[token] = torch.tensor(weight).log()
    return model


def ascii_writer():
    """Ends with one token in twenty."""
    tokens = [token for token in range(len(STUDENT)) if token != EOS and response_text(STUDENT, [token]).isascii()]
    return writer(dict.fromkeys(tokens, 1.0) | {EOS: len(tokens) / 20})


def rewritten(model, rows, *, seed=0, config=SAMPLING, max_length=MAX_LENGTH, **options):
    batch = COLLATE(rows)
    options |= {"max_length": max_length, "generation_config": config, "seed": seed}
    new = on_policy_batch(batch, model, STUDENT, TEACHER, COLLATE, **options)
    assert list(new) == list(batch)
    assert new["example_ids"].tolist() == batch["example_ids"].tolist()
    return new


def response(batch, index, row, prefix):
    """Token ids, byte ends and chunk ids of a response, after a look at what stands before and behind it."""
    start, length = row[f"{prefix}prompt_length"], int(batch[f"{prefix}attention_mask"][index].sum())
    names = ("input_ids", "labels", "byte_ends", "chunk_ids")
    ids, labels, byte_ends, chunks = (batch[f"{prefix}{name}"][index].tolist() for name in names)
    assert ids[:start] == row[f"{prefix}input_ids"][:start]
    assert labels[start:length] == ids[start:length]
    for values, outside in ((labels, -100), (byte_ends, -1), (chunks, -1)):
        assert set(values[:start] + values[length:]) == {outside}
    return ids[start:length], byte_ends[start:length], chunks[start:length]


def test_both_sides_hold_what_the_student_wrote():
    model = ascii_writer()
    written = sample(
        model,
        [row["input_ids"][: row["prompt_length"]] for row in ROWS],
        pad_token_id=STUDENT.pad_token_id,
        eos_token_ids=[EOS],
        max_new_tokens=[MAX_LENGTH - max(row["prompt_length"], row["teacher_prompt_length"]) - 1 for row in ROWS],
        generation_config=SAMPLING,
        seed=0,
        batch_size=len(ROWS),
    )
    new = rewritten(model, ROWS)
    ended = []
    for index, (row, tokens) in enumerate(zip(ROWS, written)):
        text, kept = response_text(STUDENT, tokens), int(new["response_bytes"][index])
        assert text.strip()
        ids, byte_ends, chunks = response(new, index, row, "")
        teacher_ids, teacher_ends, teacher_chunks = response(new, index, row, "teacher_")
        has_eos = ids[-1] == EOS
        assert has_eos == (teacher_ids[-1] == TEACHER.eos_token_id)
        for tokenizer, side, ends in ((STUDENT, ids, byte_ends), (TEACHER, teacher_ids, teacher_ends)):
            assert response_text(tokenizer, side) == text[:kept]
            check_tiling(ends[: len(ends) - has_eos], kept, index, "")
        assert (chunks, teacher_chunks) == chunk_ids(byte_ends, teacher_ends, has_eos, has_eos)
        # The end is where the student put it, and only where the whole text fits for both.
        assert not has_eos or (tokens[-1] == EOS and kept == len(text))
        ended.append(has_eos)
    assert set(ended) == {True, False}
    assert max(new["input_ids"].shape[1], new["teacher_input_ids"].shape[1]) <= MAX_LENGTH


def test_an_answer_that_is_known():
    good, bye = STUDENT("good")["input_ids"], STUDENT(" bye")["input_ids"]
    # Whatever is likely is likely everywhere, so the text is one token over and over.
    model = writer({good[0]: 1.0})
    config = GenerationConfig(do_sample=False, max_new_tokens=3)
    text = response_text(STUDENT, good[:1]) * 3
    new = rewritten(model, ROWS[:2], config=config)
    for index, row in enumerate(ROWS[:2]):
        # It didn't end, so there is no EOS on either side.
        assert response_text(STUDENT, response(new, index, row, "")[0]) == text
        assert response(new, index, row, "")[0][-1] != EOS
        assert response(new, index, row, "teacher_")[0][-1] != TEACHER.eos_token_id
        assert new["response_bytes"][index] == len(text)
    # With a space first, which belongs to the text.
    new = rewritten(writer({bye[0]: 1.0}), ROWS[:1], config=config)
    assert response_text(TEACHER, response(new, 0, ROWS[0], "teacher_")[0]).startswith(" ")


def test_half_a_character_at_the_end_is_left_out():
    first, *_ = STUDENT("é", add_special_tokens=False)["input_ids"]
    assert response_text(STUDENT, [first]) == "\ufffd"
    model = writer({STUDENT("x")["input_ids"][0]: 1.0, first: 1.0})
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=4)
    for seed in range(3):
        new = rewritten(model, ROWS, seed=seed, config=config)
        for index, row in enumerate(ROWS):
            ids, *_ = response(new, index, row, "")
            kept = ids == row["input_ids"][row["prompt_length"] :]
            assert kept or not response_text(STUDENT, ids).endswith("\ufffd")


def test_an_empty_answer_keeps_the_row():
    for weights in ({EOS: 1.0}, {STUDENT(" ")["input_ids"][0]: 1.0}):
        new, old = rewritten(writer(weights), ROWS), COLLATE(ROWS)
        for name, tensor in old.items():
            assert torch.equal(new[name], tensor), name


def test_no_room_keeps_the_row():
    longest = [max(row["prompt_length"], row["teacher_prompt_length"]) for row in ROWS]
    # For one token and EOS in the row of the shortest prompt only.
    max_length = min(longest) + 2
    new, old = rewritten(ascii_writer(), ROWS, max_length=max_length), COLLATE(ROWS)
    changed = [int(new["response_bytes"][i]) != int(old["response_bytes"][i]) for i in range(len(ROWS))]
    assert [i for i, room in enumerate(longest) if max_length - room - 1 > 0 and not changed[i]] == []
    assert any(changed) and not all(changed)
    for index, row in enumerate(ROWS):
        if not changed[index]:
            assert response(new, index, row, "")[0] == row["input_ids"][row["prompt_length"] :]


def test_seed():
    model = ascii_writer()
    state = torch.get_rng_state()
    one, again, other = (rewritten(model, ROWS, seed=seed)["input_ids"] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert one.shape != other.shape or not torch.equal(one, other)


def test_rows_without_chunks():
    rows = [{name: value for name, value in row.items() if "chunk_ids" not in name} for row in ROWS]
    new = rewritten(ascii_writer(), rows)
    assert "chunk_ids" not in new and "teacher_chunk_ids" not in new
    # One row is kept, the others are new.
    assert "chunk_ids" not in rewritten(writer({EOS: 1.0, STUDENT("x")["input_ids"][0]: 1.0}), rows)


def test_within_autocast():
    entered = []

    class Entered(torch.autocast):
        def __enter__(self):
            entered.append(True)
            return super().__enter__()

    rewritten(ascii_writer(), ROWS, autocast=Entered("cpu", dtype=torch.bfloat16))
    assert entered


@pytest.mark.parametrize(
    ("fraction", "steps"),
    [(0.5, [1, 3, 5, 7, 9, 11]), (1 / 3, [2, 5, 8, 11]), (0.75, [1, 2, 3, 5, 6, 7, 9, 10, 11])],
)
def test_on_policy_steps(fraction, steps):
    assert [step for step in range(12) if is_on_policy(step, fraction)] == steps


def test_on_policy_share_is_exact():
    # 100 * 0.29 is 28.999999999999996.
    for hundredths in range(101):
        assert sum(is_on_policy(step, hundredths / 100) for step in range(300)) == 3 * hundredths
