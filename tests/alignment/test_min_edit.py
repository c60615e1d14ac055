import random

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_dskd.alignment import min_edit
from hf_dskd.alignment.min_edit import align_tokens, partners, vocabulary_map
from hf_dskd.data.tokens import token_bytes
from hf_dskd.errors import UserError
from hf_dskd.losses.logits import mapped_target


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def characters(data):
    """Characters of UTF-8, and bytes that are none as numbers."""
    found = []
    while data:
        for length in range(1, 5):
            try:
                found.append(data[:length].decode())
                break
            except UnicodeDecodeError:
                continue
        else:
            found.append(data[0])
            length = 1
        data = data[length:]
    return found


def word_tokenizer(words, size=0, eos="</s>"):
    """A byte-level vocabulary of exactly these words, the last ones special if `size` says so."""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = words[len(words) - size :]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, additional_special_tokens=[word for word in special if word != eos]
    )


@pytest.mark.parametrize("swap", [False, True])
def test_map_of_tiny_tokenizers_equals_brute_force(swap, tmp_path):
    student, teacher = tiny.byte_level_tokenizer(330), tiny.sentencepiece_tokenizer(400)
    if swap:
        student, teacher = teacher, student
    found = vocabulary_map(student, teacher, tmp_path).tolist()
    assert len(found) == len(teacher)
    special = {"<|endoftext|>", "<unk>", "<s>", "</s>"}
    candidates = [
        (token, characters(data))
        for token, data in sorted(token_bytes(student).items())
        if student.convert_ids_to_tokens(token) not in special
    ]
    checked = set()
    for token, data in token_bytes(teacher).items():
        if teacher.convert_ids_to_tokens(token) in special:
            assert found[token] == student.eos_token_id
            continue
        text = characters(data)
        distance, nearest = min((levenshtein(text, candidate), other) for other, candidate in candidates)
        assert found[token] == nearest, (data, distance)
        checked.add(min(distance, 2))
    assert checked == {0, 1, 2}


def test_special_tokens_and_padding_rows(tmp_path):
    student = word_tokenizer(["a", "b", "Ġa", "<pad>", "<end>"], size=2, eos="<end>")
    teacher = word_tokenizer(["<end>a", "b", "Ġa", "<pad>", "<turn>", "</s>"], size=3)
    found = vocabulary_map(student, teacher, tmp_path, rows=8)
    # "<end>a" is an ordinary text, to which no special token is compared.
    assert found.tolist() == [0, 1, 2, 3, 4, 4, -1, -1]
    assert vocabulary_map(student, teacher, tmp_path).tolist() == [0, 1, 2, 3, 4, 4]
    target = mapped_target(torch.zeros(1, 8), torch.tensor([True]), found, torch.tensor([0]), 5)
    torch.testing.assert_close(target.exp(), torch.tensor([[1, 1, 1, 1, 2]]) / 6)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # "cat" is one away from "cot", "cut" and " cat": a space counts, and the lowest id is taken.
        (["cot", "cut", "Ġcat", "s"], ["cat", "Ġcats", "s"], [0, 2, 3, 4]),
        # A text with nothing in common has no partner.
        (["cot", "x"], ["zq", "xy", "x"], [-1, 1, 1, 2]),
    ],
)
def test_map_by_hand(student, teacher, expected, tmp_path):
    tokenizers = (word_tokenizer([*words, "</s>"], size=1) for words in (student, teacher))
    assert vocabulary_map(*tokenizers, tmp_path).tolist() == expected


def test_vocabularies_without_a_common_token(tmp_path):
    student, teacher = word_tokenizer(["a", "</s>"], size=1), word_tokenizer(["b", "</s>"], size=1)
    with pytest.raises(UserError, match="share no token"):
        vocabulary_map(student, teacher, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def computed(monkeypatch):
    """The pairs of which a map is computed and not read."""
    calls = []
    compute = min_edit._compute
    monkeypatch.setattr(min_edit, "_compute", lambda *pair: calls.append(pair) or compute(*pair))
    return calls


PAIR = tiny.byte_level_tokenizer(300), tiny.sentencepiece_tokenizer(380)


def test_each_pair_is_computed_once(computed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DSKD_CACHE", str(tmp_path))
    first = vocabulary_map(*PAIR)
    folder = tmp_path / "vocabulary_maps"
    again = vocabulary_map(tiny.byte_level_tokenizer(300), tiny.sentencepiece_tokenizer(380), folder)
    assert len(computed) == 1 and torch.equal(first, again)
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]
    vocabulary_map(PAIR[1], PAIR[0], folder)
    vocabulary_map(tiny.byte_level_tokenizer(301), PAIR[1], folder)
    assert len(computed) == 3 and len(list(folder.iterdir())) == 3


def test_a_damaged_file_is_computed_again(computed, tmp_path):
    expected = vocabulary_map(*PAIR, tmp_path)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    damages = [
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(data[:-8]),
        lambda: path.write_bytes(b"\xff" * len(data)),
        # Of another pair: too short, and ids out of range.
        lambda: save_file({"vocabulary_map": expected[:-1].clone()}, path),
        lambda: save_file({"vocabulary_map": expected + len(PAIR[0])}, path),
    ]
    for number, damage in enumerate(damages, start=2):
        damage()
        assert torch.equal(vocabulary_map(*PAIR, tmp_path), expected)
        assert len(computed) == number and torch.equal(load_file(path)["vocabulary_map"], expected)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="HF_DSKD_CACHE"):
        vocabulary_map(*PAIR, tmp_path / "file" / "maps")


def plain_alignment(student, teacher):
    """Dynamic time warping by two loops and a walk back."""
    infinity = float("inf")
    total = {(-1, -1): 0}
    for t in range(len(teacher)):
        for s in range(len(student)):
            least = min(total.get(pair, infinity) for pair in ((t - 1, s - 1), (t - 1, s), (t, s - 1)))
            total[t, s] = least + levenshtein(teacher[t].replace(" ", ""), student[s].replace(" ", ""))
    t, s = len(teacher) - 1, len(student) - 1
    way = [(t, s)]
    while (t, s) != (0, 0):
        diagonal, up, left = (total.get(pair, infinity) for pair in ((t - 1, s - 1), (t - 1, s), (t, s - 1)))
        if diagonal <= up and diagonal <= left:
            t, s = t - 1, s - 1
        elif up <= left:
            t -= 1
        else:
            s -= 1
        way.append((t, s))
    beside = [[t for t, other in way if other == s] for s in range(len(student))]
    return [places[0] if len(places) == 1 else -1 for places in beside]


def test_alignment_equals_plain_loops_on_random_cuts():
    generator = random.Random(0)
    several = 0
    for _ in range(60):
        text = "".join(generator.choice("ab c") for _ in range(generator.randint(1, 25)))
        student, teacher = ([], [])
        for tokens in (student, teacher):
            start = 0
            while start < len(text):
                end = start + generator.randint(1, 4)
                tokens.append(text[start:end])
                start = end
        expected = plain_alignment(student, teacher)
        assert align_tokens(student, teacher) == expected
        assert align_tokens([t.encode() for t in student], [t.encode() for t in teacher]) == expected
        several += expected.count(-1)
    assert several > 20


def test_bytes_that_are_no_text():
    first, second = "é".encode()[:1], "é".encode()[1:]
    # Costs 1 where it lies beside "x" as where it lies beside "é", and the pair before comes first.
    assert align_tokens([b"x", first, second, b"y"], ["x", "é", "y"]) == [0, 0, 1, 2]
    assert align_tokens([first, second], [first, second]) == [0, 1]


def test_only_tokens_that_map_to_each_other(tmp_path):
    student = word_tokenizer(["The", "Ġcat", "Ġcats", "s", "Ġsat", ".", "</s>"], size=1)
    teacher = word_tokenizer(["</s>", "Ġsat", "The", "Ġcats", "."], eos="</s>")
    found = vocabulary_map(student, teacher, tmp_path)
    assert found.tolist() == [6, 4, 0, 2, 5]
    # " cat" and "s" both lie beside " cats", which maps to neither.
    assert partners([0, 1, 3, 4, 5, 6], [2, 3, 1, 4, 0], student, teacher, found) == [0, -1, -1, 2, 3, 4]
    assert partners([0, 2, 4, 6], [2, 3, 1, 0], student, teacher, found) == [0, 1, 2, 3]


def test_of_one_text_have_the_same_text_before_them(tmp_path):
    student, teacher = tiny.byte_level_tokenizer(330), tiny.sentencepiece_tokenizer(400)
    found = vocabulary_map(student, teacher, tmp_path)
    text = tiny.TEXTS[0] + " " + tiny.TEXTS[4]
    student_ids = student(text)["input_ids"]
    teacher_ids = teacher(text)["input_ids"][1:]
    pairs = partners(student_ids, teacher_ids, student, teacher, found)
    assert len(pairs) == len(student_ids)
    kept = [(s, t) for s, t in enumerate(pairs) if t >= 0]
    assert len(kept) > 10
    for s, t in kept:
        assert found[teacher_ids[t]] == student_ids[s]
    same = sum(
        student.decode(student_ids[: s + 1]).strip() == teacher.decode(teacher_ids[: t + 1]).strip() for s, t in kept
    )
    assert same > 0.9 * len(kept)
