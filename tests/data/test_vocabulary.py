import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_dskd.data.vocabulary import same_vocabulary, shared_tokens
from hf_dskd.errors import UserError


def byte_level(pieces, eos="</s>"):
    """A byte-level vocabulary of exactly these pieces, by id."""
    vocabulary = pieces if isinstance(pieces, dict) else {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def pieces(tokenizer):
    """(id, bytes) of the tokens that aren't special, spelled out for the two tiny vocabularies."""
    character_to_byte = {}
    others = 256
    for byte in range(256):
        # GPT-2's table: a printable byte is itself, any other the next character from U+0100 on.
        if chr(byte).isprintable() and chr(byte) != " ":
            character_to_byte[chr(byte)] = byte
        else:
            character_to_byte[chr(others)] = byte
            others += 1
    found = []
    for piece, token in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if token in tokenizer.all_special_ids:
            continue
        if tokenizer.eos_token == "<|endoftext|>":
            found.append((token, bytes(character_to_byte[character] for character in piece)))
        elif piece.startswith("<0x"):
            found.append((token, bytes([int(piece[3:5], 16)])))
        else:
            found.append((token, piece.replace("▁", " ").encode()))
    return found


@pytest.mark.parametrize("swap", [False, True])
def test_shared_tokens_equal_brute_force(swap):
    pair = (tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer())
    student, teacher = reversed(pair) if swap else pair
    expected, taken = [(student.eos_token_id, teacher.eos_token_id)], set()
    teacher_pieces = pieces(teacher)
    for token, data in pieces(student):
        # Of several tokens for the same bytes ('<0x61>' and 'a') the lowest id.
        others = [other for other, other_data in teacher_pieces if other_data == data]
        if others and data not in taken:
            expected.append((token, min(others)))
            taken.add(data)
    student_ids, teacher_ids = shared_tokens(student, teacher)
    assert list(zip(student_ids.tolist(), teacher_ids.tolist())) == sorted(expected)
    assert len(expected) > 300 and student_ids.is_contiguous() and teacher_ids.is_contiguous()


def shared_pieces(student, teacher):
    return [
        tuple(tokenizer.convert_ids_to_tokens(token) for tokenizer, token in zip((student, teacher), pair))
        for pair in zip(*(ids.tolist() for ids in shared_tokens(student, teacher)))
    ]


def test_pairs_by_hand():
    pairs = shared_pieces(tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer())
    # Space marks of both kinds are a space. One space alone is a byte token too, which has the lower id.
    assert ("Ġthe", "▁the") in pairs and ("Ġ", "<0x20>") in pairs and ("<|endoftext|>", "</s>") in pairs
    few = byte_level(["</s>", "x", "a"])
    assert shared_pieces(tiny.sentencepiece_tokenizer(), few) == [("</s>", "</s>"), ("<0x61>", "a"), ("<0x78>", "x")]
    # '</s>' is plain text for the student; as the teacher's end it belongs to the student's end.
    student, teacher = byte_level(["<end>", "</s>", "a"], eos="<end>"), byte_level(["a", "</s>"])
    assert shared_pieces(student, teacher) == [("<end>", "</s>"), ("a", "a")]


@pytest.mark.parametrize("listed", [True, False])
def test_special_tokens_are_not_paired_by_their_text(listed):
    expected = shared_pieces(tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer())
    student, teacher = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    for tokenizer in (student, teacher):
        if listed:
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
        else:
            tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    assert shared_pieces(student, teacher) == expected


@pytest.mark.parametrize("other", [["</s>", "ĠQQ"], ["</s>"]])
def test_no_overlap(other):
    tokenizers = [byte_level(["</s>", "a", "b"]), byte_level(other)]
    for student, teacher in (tokenizers, tokenizers[::-1]):
        with pytest.raises(UserError, match="share no token: use ") as error:
            shared_tokens(student, teacher)
        assert "\n" not in str(error.value)


def test_same_vocabulary():
    base = ["</s>", "a", "b"]
    for other, same in (
        (base, True),
        ([*base, "c", "d"], True),
        (["</s>", "b", "a"], False),
        (["</s>", "a", "c"], False),
        # The same pieces, but not under the same ids; and an id that only one of them has, among the common ones.
        ({"</s>": 0, "a": 1, "b": 3}, False),
        ({"</s>": 0, "a": 1, "x": 2, "b": 3}, False),
    ):
        assert same_vocabulary(byte_level(base), byte_level(other)) is same, other
        assert same_vocabulary(byte_level(other), byte_level(base)) is same, other
    assert not same_vocabulary(tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer())
    assert same_vocabulary(tiny.byte_level_tokenizer(), tiny.byte_level_tokenizer())
