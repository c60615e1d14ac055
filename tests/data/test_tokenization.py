import random
from itertools import pairwise

import pytest
import tiny
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_dskd.data.formats import Example
from hf_dskd.data.prompts import depends_on_the_day, prompt_tokens, set_pad_token
from hf_dskd.data.tokenization import tokenize_dataset
from hf_dskd.data.tokens import _byte_ends_from_offsets, located_tokens, response_tokens, traits_of
from hf_dskd.errors import UserError


REAL = ["gpt2", "qwen1.5", "tinyllama", "mistral"]
SENTENCEPIECE = ["sentencepiece", "sentencepiece_newlines", "sentencepiece_metaspace"]
BUILT = ["bytes", "bytes_with_space", *SENTENCEPIECE, "wordpiece"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog.\nHello world, hello again!\n",
    "A naïve café owner said: 'Why not?'\n\nNumbers 1234567890, and  two  spaces.",
    "Distilling a large model into a small one whose tokenizer is different.",
    "日本語のテキスト и русский текст",
] * 4
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not\nsupported') }}{% endif %}"
    "<s>[{{ m.role }}]\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<s>[assistant]\n{% endif %}"
)

NASTY = [
    "Hello world",
    "x",
    " leading space",
    "   three leading spaces",
    "trailing spaces   ",
    "\nnewline first",
    "\n\n\nnewlines first",
    "\r\nwindows\r\nlines\r\n",
    "\ttab\t\ttabs\t",
    "👩‍👩‍👧‍👦 family 👍🏽 flag 🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "e\u0301a\u0308o\u0302 and precomposed éäô",
    "\u0301begins with a combining mark",
    "Z\u0351\u036b\u0343a\u0328\u0302lgo",
    "日本語のテキスト、中文文本，한국어",
    "\u1112\u1161\u11ab\u1100\u1173\u11af decomposed Hangul",
    "שלום עולם, \u202eright to left\u202c مرحبا ﷺ",
    "control \x01\x02\x07\x1b[0m\x7f characters",
    " " * 700 + "after a long run" + " " * 300,
    "a" * 500,
    "▁literal▁marks▁▁",
    "<0x0A> <0xE2> spelled",
    "non-breaking\u00a0 and \u3000 and \u200b zero width",
    "ﬁ ﾊﾝｶｸ ½ ™ K Å",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff \ufffd",
    "</s> in <s> the <|endoftext|> text <unk>",
    "for i in range(3):\n    print(i)\n\n\n    # end",
    " ",
    "\u3000",
]


def build(kind):
    special = ["<unk>", "<s>", "</s>"]
    trainer = {"vocab_size": 500, "show_progress": False, "special_tokens": special}
    if kind.startswith("bytes"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes_with_space")
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(initial_alphabet=alphabet, **trainer))
        # Some versions of transformers overwrite what the tokenizer says about the space.
        options = {"add_prefix_space": True} if kind == "bytes_with_space" else {}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **options)
    if kind.startswith("sentencepiece"):
        byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        characters = sorted(set("".join(CORPUS)) - {" ", "\n"}) + ["▁"]
        newlines = ["\n", "\n\n", "\n\n\n"] if kind == "sentencepiece_newlines" else []
        merges = [("▁", "▁"), ("▁", "t"), ("t", "h"), ("h", "e"), ("▁", "w"), ("l", "l"), ("▁", "h"), ("a", "n")]
        if newlines:
            merges = [("\n", "\n"), ("\n\n", "\n"), *merges]
        pieces = special + byte_pieces + characters + newlines + ["".join(merge) for merge in merges]
        vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
        model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        tokenizer = Tokenizer(model)
        if kind == "sentencepiece_metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(**trainer))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


CACHE = {}


def get(name):
    if name not in CACHE:
        CACHE[name] = tiny.real_tokenizer(name) if name in REAL else build(name)
    return CACHE[name]


@pytest.fixture(params=BUILT + REAL)
def tokenizer(request):
    return get(request.param)


def spans(text, byte_ends):
    data = text.encode()
    return [data[start:end] for start, end in pairwise([0, *byte_ends])]


def test_spans_tile_any_response(tokenizer):
    generator = random.Random(0)
    alphabet = "ab  \n\t\r▁é\u0301日👩\u200d🇩שﷺ<s>/0xA"
    texts = ["".join(generator.choices(alphabet, k=generator.randint(1, 30))) for _ in range(200)]
    for text in NASTY + texts:
        ids, byte_ends = response_tokens(tokenizer, text)
        assert len(ids) == len(byte_ends) and byte_ends == sorted(byte_ends), text
        if ids:
            assert byte_ends[0] >= 0 and b"".join(spans(text, byte_ends)) == text.encode(), text


# Without the texts whose characters a tokenizer doesn't tell from its own.
OWN = [text for text in NASTY if "▁" not in text and "<s>" not in text]


@pytest.mark.parametrize("name", ["bytes", "bytes_with_space", "sentencepiece", "gpt2", "tinyllama", "mistral"])
def test_spans_are_what_the_tokens_decode_to(name):
    tokenizer = get(name)
    # After a first token no decoder strips anything.
    first = tokenizer("x", add_special_tokens=False)["input_ids"]
    start = tokenizer.decode(first)
    for text in OWN:
        ids, byte_ends = response_tokens(tokenizer, text)
        assert tokenizer.decode(first + ids, clean_up_tokenization_spaces=False) == start + text
        for count, end in enumerate(byte_ends, start=1):
            decoded = tokenizer.decode(first + ids[:count], clean_up_tokenization_spaces=False)
            try:
                assert decoded == start + text.encode()[:end].decode()
            except UnicodeDecodeError:
                assert decoded.endswith("\ufffd")


@pytest.mark.parametrize("name", ["bytes_with_space", *SENTENCEPIECE, "tinyllama", "mistral"])
def test_no_space_is_put_before_a_response(name):
    spaced = get(name)
    assert traits_of(spaced).adds_space
    # The plain call does put one there, so that the test of its absence means something.
    assert spaced("Hello", add_special_tokens=False)["input_ids"] != response_tokens(spaced, "Hello")[0]
    for text in NASTY:
        ids, byte_ends = response_tokens(spaced, text)
        if not text.startswith(("▁", "<")):
            assert traits_of(spaced).token_bytes[ids[0]] == spans(text, byte_ends)[0], text


@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece_metaspace", "tinyllama", "mistral"])
def test_same_ids_as_in_context(name):
    tokenizer = get(name)
    prompt = "### Response:\n"
    prompt_ids = tokenizer(prompt)["input_ids"]
    for text in NASTY:
        # Control tokens in data are text.
        whole = tokenizer(prompt + text, split_special_tokens=True)["input_ids"]
        assert prompt_ids + response_tokens(tokenizer, text)[0] == whole
        assert prompt_ids + response_tokens(tokenizer, text, control=True)[0] == tokenizer(prompt + text)["input_ids"]


def test_newline_that_merges_with_the_anchor():
    tokenizer = get("sentencepiece_newlines")
    ids, byte_ends = response_tokens(tokenizer, "\nhe")
    assert tokenizer.convert_ids_to_tokens(ids) == ["\n", "he"]
    assert byte_ends == [1, 3]


def test_composed_accents_stay_with_their_letter():
    tokenizer = build("bytes")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    # Each composed letter is two byte tokens for three bytes of the text.
    ids, byte_ends = response_tokens(tokenizer, "xe\u0301 a\u0308")
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "x"
    assert byte_ends[0] == 1
    assert {4, 8} <= set(byte_ends)
    real = get("qwen1.5")
    assert response_tokens(real, "e\u0301a\u0308 ok")[1] == [3, 6, 9]


def test_whitespace_and_characters_that_a_tokenizer_drops():
    wordpiece, text = get("wordpiece"), "  fox   dog  "
    ids, byte_ends = response_tokens(wordpiece, text)
    assert wordpiece.convert_ids_to_tokens(ids) == ["fox", "dog"]
    assert spans(text, byte_ends) == [b"  fox", b"   dog  "]
    ids, byte_ends = response_tokens(wordpiece, "the 🦊 dog")
    assert spans("the 🦊 dog", byte_ends)[ids.index(wordpiece.unk_token_id)] == " 🦊".encode()


def test_special_token_in_the_response():
    tokenizer = get("sentencepiece")
    ids, byte_ends = response_tokens(tokenizer, "an</s>he")
    assert tokenizer.eos_token_id not in ids
    assert b"".join(spans("an</s>he", byte_ends)) == b"an</s>he" and len(ids) == 6
    # Where a template has written it, it is one.
    ids, byte_ends = response_tokens(tokenizer, "an</s>he", control=True)
    assert tokenizer.convert_ids_to_tokens(ids) == ["an", "</s>", "▁", "he"]
    # The tokenizer says that this mark lies on the letter after it.
    assert byte_ends == [2, 6, 7, 8]


def test_byte_ends_from_offsets():
    # Four tokens of one character, after dropped spaces.
    assert _byte_ends_from_offsets([(0, 1), (3, 4), (3, 4), (3, 4), (3, 4)], "a  👍") == [1, 4, 5, 6, 7]
    # More tokens than bytes, offsets that go back, text dropped at the end.
    assert _byte_ends_from_offsets([(0, 1)] * 4 + [(0, 1), (2, 3)], "é a ") == [0, 0, 1, 1, 2, 5]


def test_token_added_later():
    tokenizer = build("bytes")
    response_tokens(tokenizer, "x")
    tokenizer.add_tokens(["fox trot"])
    ids, byte_ends = response_tokens(tokenizer, "x fox trot é")
    assert ids.count(tokenizer.convert_tokens_to_ids("fox trot")) == 1
    assert {2, 10, 13} <= set(byte_ends)


def test_slow_tokenizer():
    class Slow:
        is_fast = False
        name_or_path = "some/slow"

    with pytest.raises(UserError, match=r"'some/slow' of class Slow is a slow one.*use_fast=True"):
        response_tokens(Slow(), "x")


# Prompts


def example(prompt="Hi", role="user"):
    return Example([{"role": role, "content": prompt}], prompt, "Yes")


def test_plain_prompt_has_bos_and_no_eos():
    spaced, wordpiece = get("sentencepiece"), get("wordpiece")
    assert prompt_tokens(spaced, example()) == spaced("Hi")["input_ids"]
    assert prompt_tokens(spaced, example())[0] == spaced.bos_token_id
    assert wordpiece("Hi")["input_ids"][-1] == wordpiece.eos_token_id
    assert prompt_tokens(wordpiece, example()) == wordpiece("Hi")["input_ids"][:-1]


def test_chat_template_decides_on_bos():
    tokenizer = build("sentencepiece")
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = prompt_tokens(tokenizer, example())
    rendered = "<s>[user]\nHi\n<s>[assistant]\n"
    assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 2
    # A template without the special token gets none.
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<s>", "")
    assert tokenizer.bos_token_id not in prompt_tokens(tokenizer, example())
    assert prompt_tokens(tokenizer, example(), "plain") == tokenizer("Hi")["input_ids"]


def test_chat_template_kwargs_reach_both_templates():
    student, teacher = build("bytes"), build("sentencepiece")
    thinking = "{% if think is defined and not think %}no thoughts\n{% endif %}"
    student.chat_template, teacher.chat_template = CHAT_TEMPLATE + thinking, CHAT_TEMPLATE + thinking.replace("k", "g")
    rows = Dataset.from_list([{"prompt": "Hi", "completion": "Yes"}])

    def prompts(**options):
        row = tokenize_dataset(rows, student, teacher, max_length=99, **options)[0][0]
        sides = ((student, ""), (teacher, "teacher_"))
        return [tokenizer.decode(row[f"{side}input_ids"][: row[f"{side}prompt_length"]]) for tokenizer, side in sides]

    without = prompts()
    assert all(text.endswith("[assistant]\n") for text in without)
    # Each takes what it knows.
    assert prompts(chat_template_kwargs={"think": False}) == [without[0] + "no thoughts\n", without[1]]
    assert prompts(chat_template_kwargs={"think": False, "thing": False})[1] == without[1] + "no thoughts\n"
    plain = prompts(prompt_style="plain")
    assert prompts(prompt_style="plain", chat_template_kwargs={"think": False}) == plain


def test_template_that_writes_todays_date():
    tokenizer = build("bytes")
    assert depends_on_the_day(tokenizer, "student") is None
    tokenizer.chat_template = CHAT_TEMPLATE
    assert depends_on_the_day(tokenizer, "student") is None
    tokenizer.chat_template = "{% set date_string = date_string or strftime_now('%d %b %Y') %}" + CHAT_TEMPLATE
    said = depends_on_the_day(tokenizer, "student")
    assert "the student's chat template writes today's date" in said and "teacher_cache" in said
    assert """set chat_template_kwargs={"date_string": "26 Jul 2024"}""" in said
    assert depends_on_the_day(tokenizer, "student", {"date_string": "1 May 2025"}) is None
    assert depends_on_the_day(tokenizer, "student", {"enable_thinking": False}) == said
    # One that can't be told the date.
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    said = depends_on_the_day(tokenizer, "teacher", {"date_string": "1 May 2025"})
    assert "the teacher's" in said and "prompt_style='plain'" in said and "date_string" not in said


def test_template_that_rejects_the_messages():
    tokenizer = build("bytes")
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(UserError, match=r"System role not supported.*prompt_style='plain'"):
        prompt_tokens(tokenizer, example(role="system"))
    row = {"messages": [{"role": role, "content": "x"} for role in ("system", "assistant")]}
    with pytest.raises(UserError, match=r"^valid data set, row 0 \(messages=.*\): the chat template of"):
        tokenize_dataset(Dataset.from_list([row]), tokenizer, max_length=99, description="valid")


# Cutting


PAIRS = [("bytes", "sentencepiece"), ("sentencepiece", "wordpiece"), ("gpt2", "mistral"), ("qwen1.5", "tinyllama")]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("max_length", [12, 20, 33, 70])
def test_cut_property(pair, max_length):
    student, teacher = map(get, pair)
    rows = [{"prompt": "Hi\n", "completion": text} for text in NASTY]
    options = {"max_length": max_length, "prompt_style": "plain", "skip_long_prompts": True}
    tokenized, report = tokenize_dataset(Dataset.from_list(rows), student, teacher, **options)
    assert report.kept == len(tokenized) and report.cut == sum(tokenized["cut"]) > 0
    prompts = [prompt_tokens(tokenizer, example("Hi\n"), "plain") for tokenizer in (student, teacher)]
    seen = set()
    for row in tokenized:
        text = rows[row["example_id"]]["completion"]
        seen.add(row["example_id"])
        kept = row["response_bytes"]
        text.encode()[:kept].decode()
        fits = []
        for prefix, tokenizer, prompt in zip(("", "teacher_"), (student, teacher), prompts):
            ids, ends = response_tokens(tokenizer, text)
            fits.append((ends, max_length - len(prompt)))
            got = row[f"{prefix}input_ids"]
            assert len(got) <= max_length
            assert row[f"{prefix}prompt_length"] == len(prompt)
            assert got[: len(prompt)] == prompt
            assert len(row[f"{prefix}byte_ends"]) == len(got) - len(prompt)
            assert row[f"{prefix}byte_ends"][-1] == kept
            if row["cut"]:
                assert got[len(prompt) :] == ids[: len(got) - len(prompt)]
                assert row[f"{prefix}byte_ends"] == ends[: len(got) - len(prompt)]
            else:
                assert got[len(prompt) :] == [*ids, tokenizer.eos_token_id]
                assert row[f"{prefix}byte_ends"] == [*ends, kept]
                assert kept == len(text.encode())
        assert_chunks(row)
        needs_cut = any(len(ends) + 1 > room for ends, room in fits)
        assert row["cut"] == needs_cut
        if needs_cut:
            assert kept == largest_cut(text, fits)
    for index, text in enumerate(NASTY):
        if index not in seen and text.strip():
            fits = [
                (response_tokens(tokenizer, text)[1], max_length - len(prompt))
                for tokenizer, prompt in zip((student, teacher), prompts)
            ]
            assert largest_cut(text, fits) == 0


def assert_chunks(row):
    """A token's chunk is the number of bytes before its end at which tokens of both sides end; then comes the EOS."""
    ends = row["byte_ends"], row["teacher_byte_ends"]
    if not row["cut"]:
        ends = ends[0][:-1], ends[1][:-1]
    common = set(ends[0]) & set(ends[1])
    for side, chunks in zip(ends, (row["chunk_ids"], row["teacher_chunk_ids"])):
        expected = [sum(place < end for place in common) for end in side]
        assert chunks == (expected if row["cut"] else [*expected, len(common)])


def largest_cut(text, fits):
    """The definition, tried character by character from the end."""
    for count in range(len(text), 0, -1):
        position = len(text[:count].encode())
        if all(position in ends and ends.index(position) < room for ends, room in fits):
            return position
    return 0


# Data sets

COLUMNS = {"input_ids", "prompt_length", "spans", "byte_ends", "response_bytes", "example_id", "cut"}
TEACHER_COLUMNS = {f"teacher_{name}" for name in ("input_ids", "prompt_length", "spans", "byte_ends", "chunk_ids")}
TEACHER_COLUMNS |= {"chunk_ids"}


def dataset():
    rows = [{"prompt": f"Prompt {i}\n", "completion": f"Answer number {i}, naïve 👍", "other": i} for i in range(20)]
    rows[3]["completion"] = "  \n"
    rows[7]["completion"] = None
    rows[11]["prompt"] = "long " * 200
    return Dataset.from_list(rows)


def test_columns_and_counts():
    student, teacher = get("bytes"), get("sentencepiece")
    tokenized, report = tokenize_dataset(dataset(), student, teacher, max_length=100, skip_long_prompts=True)
    assert set(tokenized.column_names) == COLUMNS | TEACHER_COLUMNS
    assert tokenized["example_id"][:] == [i for i in range(20) if i not in (3, 7, 11)]
    assert (report.rows, report.kept, report.cut, report.empty_responses, report.long_prompts) == (20, 17, 0, 2, 1)
    assert str(report) == (
        "kept 17 of 20 rows (0 with a response cut to the maximum length), skipped 2 with an empty response and 1 "
        "with a prompt that leaves no room for a response"
    )
    alone, alone_report = tokenize_dataset(dataset(), student, max_length=100, skip_long_prompts=True)
    assert set(alone.column_names) == COLUMNS
    assert alone_report.kept == 17
    assert alone[0] == {name: tokenized[0][name] for name in COLUMNS}


def test_chunks_with_bos_on_one_side_only():
    student, teacher = get("bytes"), get("sentencepiece")
    rows = Dataset.from_list([{"prompt": "Hi\n", "completion": "the 👍"}])
    row = tokenize_dataset(rows, student, teacher, max_length=100)[0][0]
    tokens = [
        tokenizer.convert_ids_to_tokens(row[f"{prefix}input_ids"][row[f"{prefix}prompt_length"] :])
        for prefix, tokenizer in (("", student), ("teacher_", teacher))
    ]
    assert tokens == [
        ["t", "he", "Ġ", "ð", "Ł", "ĳ", "į", "</s>"],
        ["th", "e", "▁", "<0xF0>", "<0x9F>", "<0x91>", "<0x8D>", "</s>"],
    ]
    assert row["teacher_input_ids"][0] == teacher.bos_token_id
    assert row["chunk_ids"] == row["teacher_chunk_ids"] == [0, 0, 1, 2, 3, 4, 5, 6]
    # Without room for the last byte, the emoji goes as a whole, and no end-of-sequence token follows.
    room = len(response_tokens(student, "the 👍")[0]) - 1
    cut = tokenize_dataset(rows, student, teacher, max_length=row["teacher_prompt_length"] + room)[0][0]
    assert cut["cut"] and cut["chunk_ids"] == cut["teacher_chunk_ids"] == [0, 0, 1]


def test_spans_that_do_not_cover_the_response(monkeypatch):
    def broken(tokenizer, text, control):
        ids, byte_ends, whole = located_tokens(tokenizer, text, control)
        return ids, [*byte_ends[:-1], byte_ends[-1] - 1], whole

    monkeypatch.setattr("hf_dskd.data.tokens.located_tokens", broken)
    with pytest.raises(RuntimeError, match=r"student's tokens .* example 0: the last token ends at byte .* a bug"):
        tokenize_dataset(dataset(), get("bytes"), get("sentencepiece"), max_length=100)


def test_response_without_tokens_for_one_model():
    # WordPiece drops control characters.
    rows = Dataset.from_list([{"prompt": "Hi", "completion": text} for text in ("\x07", "x")])
    assert response_tokens(get("wordpiece"), "\x07") == ([], [])
    tokenized, report = tokenize_dataset(rows, get("bytes"), get("wordpiece"), max_length=100)
    assert tokenized["example_id"][:] == [1]
    assert report.empty_responses == 1


def test_processes_give_the_same_rows_and_errors():
    options = {"max_length": 100, "skip_long_prompts": True}
    one, one_report = tokenize_dataset(dataset(), get("bytes"), get("sentencepiece"), **options)
    two, two_report = tokenize_dataset(dataset(), get("bytes"), get("sentencepiece"), num_proc=2, **options)
    assert one.to_list() == two.to_list()
    assert one_report == two_report
    with pytest.raises(UserError, match=r"^train data set, row 11 \(prompt='long long lo...ng long long "):
        tokenize_dataset(dataset(), get("bytes"), get("sentencepiece"), max_length=100, num_proc=2)


def test_error_names_row_and_remedy():
    with pytest.raises(UserError) as error:
        tokenize_dataset(dataset(), get("bytes"), get("sentencepiece"), max_length=100)
    length = len(get("sentencepiece")("long " * 200)["input_ids"])
    assert str(error.value) == (
        "train data set, row 11 (prompt='long long lo...ng long long ', completion='Answer number 11, naïve 👍',"
        f" other=11): the prompt has {length} tokens for the teacher, which leaves no room for a response "
        "within max_length=100; raise max_length or set skip_long_prompts=True"
    )
    bad = dataset().map(lambda row, index: {"prompt": None} if index == 15 else row, with_indices=True)
    message = r"^eval data set, row 15 \(prompt=None, .*\): column 'prompt' holds None; .*string$"
    with pytest.raises(UserError, match=message):
        tokenize_dataset(bad, get("bytes"), max_length=100, skip_long_prompts=True, description="eval")


def test_nothing_left():
    empty = Dataset.from_list([{"prompt": "x", "completion": " "}, {"prompt": "y " * 99, "completion": "z"}])
    with pytest.raises(UserError, match=r"1 have an empty response and 1 a prompt .* max_length=50"):
        tokenize_dataset(empty, get("bytes"), max_length=50, skip_long_prompts=True)
    with pytest.raises(UserError, match="the train data set has no rows"):
        tokenize_dataset(empty.select([]), get("bytes"), max_length=50)


def test_prompt_without_tokens():
    rows = Dataset.from_list([{"prompt": "", "completion": "x"}])
    with pytest.raises(
        UserError, match=r"row 0 \(prompt='', completion='x'\): the prompt has no tokens for the student"
    ):
        tokenize_dataset(rows, get("bytes"), max_length=50)
    row = tokenize_dataset(rows, get("sentencepiece"), max_length=50)[0][0]
    assert row["input_ids"][0] == get("sentencepiece").bos_token_id


def test_what_is_found_before_any_row():
    with pytest.raises(UserError, match=r"^column 'question' is missing"):
        tokenize_dataset(dataset(), get("bytes"), max_length=50, prompt_column="question")
    with pytest.raises(UserError, match="prompt_style='Plain' is unknown: did you mean 'plain'"):
        tokenize_dataset(dataset(), get("bytes"), max_length=50, prompt_style="Plain")
    tokenizer = build("bytes")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"the teacher's tokenizer .* has no EOS token: set tokenizer.eos_token"):
        tokenize_dataset(dataset(), get("bytes"), tokenizer, max_length=50)


def test_many_skipped_rows_first():
    # More than a writer's batch, which would fix the types of the columns.
    rows = [{"prompt": "x", "completion": ""}] * 1100 + [{"prompt": "x", "completion": "y"}]
    tokenized, report = tokenize_dataset(Dataset.from_list(rows), get("bytes"), max_length=50)
    assert tokenized["example_id"][:] == [1100]
    assert report.empty_responses == 1100


@pytest.mark.parametrize("resolved", [True, False])
def test_iterable(resolved):
    options = {"max_length": 100, "skip_long_prompts": True}
    iterable = dataset().to_iterable_dataset(num_shards=2)
    if not resolved:
        iterable = iterable.map(lambda row: row)
        assert iterable.column_names is None
    tokenized, report = tokenize_dataset(iterable, get("bytes"), get("sentencepiece"), num_proc=2, **options)
    assert report is None
    assert set(tokenized.column_names) == COLUMNS | TEACHER_COLUMNS
    expected = tokenize_dataset(dataset(), get("bytes"), get("sentencepiece"), **options)[0]
    assert list(tokenized) == expected.to_list()
    with pytest.raises(UserError, match="row 11"):
        list(tokenize_dataset(iterable, get("bytes"), get("sentencepiece"), max_length=100)[0])


def test_cache_key_is_stable(tmp_path):
    dataset().to_json(tmp_path / "rows.jsonl")
    source = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))

    def run(**options):
        # Fresh tokenizers, as a second run of a program has them.
        students = build("bytes"), build("sentencepiece")
        return tokenize_dataset(source, *students, **{"max_length": 100, "skip_long_prompts": True, **options})

    first, report = run()
    files = set(tmp_path.rglob("*.arrow"))
    again, again_report = run()
    assert set(tmp_path.rglob("*.arrow")) == files
    assert (again.to_list(), again_report) == (first.to_list(), report)
    run(max_length=99)
    assert set(tmp_path.rglob("*.arrow")) > files


def test_set_pad_token():
    tokenizer = build("bytes")
    sentence = set_pad_token(tokenizer, "student")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "student" in sentence and "'</s>'" in sentence
    assert set_pad_token(tokenizer, "student") is None
