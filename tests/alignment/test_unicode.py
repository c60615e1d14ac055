"""
Chunks of arbitrary Unicode text, for every pair of tokenizers.

`HF_DSKD_EXAMPLES=N` checks N (text, pair) examples with the papers' tokenizers, and other ones on every run
(`--hypothesis-seed=0` repeats them). Without it the examples are always the same.
"""

import os
import tempfile
from collections import defaultdict
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import configuration, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from hf_dskd.alignment.spans import check_tiling, chunk_ids
from hf_dskd.alignment.weights import chunk_mask, mean_weights
from hf_dskd.data.tokens import response_tokens


# Hypothesis keeps its tables of Unicode categories in a folder, by default one in the working directory.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hf_dskd_hypothesis")

GROUPS = {
    "papers": ["gpt2", "qwen1.5", "tinyllama", "mistral"],
    "tiny": ["bytes", "more_bytes", "sentencepiece"],
}
LONGER = os.environ.get("HF_DSKD_EXAMPLES")
# The tiny ones are for machines that don't have the others.
EXAMPLES = {"papers": int(LONGER or 4_000), "tiny": int(LONGER or 4_000) // 4}

# Pieces that a random text is put together from, so that rare characters stand next to one another and to plain ones.
SCRIPTS = "abzéßäñČđøΩλжЯґאשلاﷺनमिঅกำ가한ㄱゆめ漢字\ufa11𠮷𓀀𝔘ﬁ½Å™\ufffd"
MARKS = "\u0301\u0308\u0302\u0327\u0345\u0483\u05b4\u064b\u093c\u0e49\u1161\u11ab\u20dd\u3099\ufe0f\u200c\u200d\u202e"
SPACES = " \t\n\r\v\f\x85\xa0\u2003\u2028\u200b\u3000\ufeff"
EMOJI = ["👍", "👍\U0001f3fd", "\U0001f3fd", "👩\u200d👩\u200d👧\u200d👦", "👩\U0001f3ff\u200d🚀", "🏳\ufe0f\u200d🌈"]
EMOJI += ["❤\ufe0f", "1\ufe0f\u20e3", "\U0001f1e9\U0001f1ea", "\U0001f1e9", "🏴\U000e0067\U000e0062\U000e007f"]
CODE = [
    "def f(x):\n    return x\n",
    "\n\n\n",
    "!=",
    "->",
    "${}",
    "'''",
    "<s>",
    "</s>",
    "<0x0A>",
    "▁",
    "Ġ",
    "<|im_end|>",
]
PIECES = [
    st.text(min_size=1, max_size=5),
    st.text(SCRIPTS, min_size=1, max_size=8),
    st.text(MARKS, min_size=1, max_size=4),
    st.text(SPACES, min_size=1, max_size=6),
    st.builds(lambda space, count: space * count, st.sampled_from(" \n\t"), st.integers(1, 40)),
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
    st.sampled_from(EMOJI),
    st.sampled_from(CODE),
    st.sampled_from(["The ", "quick", " brown fox", "'s ", "1234567", "naïve", " don't"]),
]
TEXTS = st.text(min_size=1, max_size=40) | st.lists(st.one_of(PIECES), min_size=1, max_size=10).map("".join)


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    if name in GROUPS["papers"]:
        return tiny.real_tokenizer(name)
    if name == "sentencepiece":
        return tiny.sentencepiece_tokenizer()
    return tiny.byte_level_tokenizer(400 if name == "bytes" else 600)


def check_chunks(ends: tuple[list[int], list[int]], ids: tuple[list[int], list[int]]) -> None:
    """Chunks are numbered in order and each ends on both sides at one byte, where no earlier token does on both."""
    last = []
    chunks = []
    for side_ends, side_ids in zip(ends, ids):
        assert len(side_ids) == len(side_ends)
        assert side_ids[0] == 0
        assert all(after - before in (0, 1) for before, after in pairwise(side_ids))
        by_chunk = defaultdict(list)
        for end, chunk in zip(side_ends, side_ids):
            by_chunk[chunk].append(end)
        chunks.append(by_chunk)
        last.append([by_chunk[chunk][-1] for chunk in sorted(by_chunk)])
    assert last[0] == last[1]
    assert all(before < after for before, after in pairwise(last[0]))
    for chunk, end in enumerate(last[0]):
        inner = [{place for place in by_chunk[chunk] if place < end} for by_chunk in chunks]
        assert inner[0].isdisjoint(inner[1])


def check_text(text: str, names: list[str], has_eos: bool) -> None:
    size = len(text.encode())
    ends = {}
    for name in names:
        ids, ends[name] = response_tokens(tokenizer(name), text)
        assert len(ids) == len(ends[name]) > 0
        assert all(before <= after for before, after in pairwise([0, *ends[name], size]))
        assert ends[name][-1] == size
        check_tiling(ends[name], size, 0, name)

    students, teachers = [], []
    for pair in combinations(names, 2):
        both = ends[pair[0]], ends[pair[1]]
        chunks = chunk_ids(*([*side, size] if has_eos else side for side in both), has_eos, has_eos)
        if has_eos:
            assert chunks[0][-1] == chunks[1][-1] == chunks[0][-2] + 1
            check_chunks(both, (chunks[0][:-1], chunks[1][:-1]))
        else:
            check_chunks(both, chunks)
        students.append(torch.tensor(chunks[0]))
        teachers.append(torch.tensor(chunks[1]))

    # All pairs as one padded batch: [pairs, R_s] and [pairs, R_t].
    student = pad_sequence(students, batch_first=True, padding_value=-1)
    teacher = pad_sequence(teachers, batch_first=True, padding_value=-1)
    t2s, s2t = mean_weights(chunk_mask(student, teacher))
    torch.testing.assert_close(t2s.sum(2), (student >= 0).float())
    torch.testing.assert_close(s2t.sum(2), (teacher >= 0).float())


@pytest.mark.parametrize("group", GROUPS)
def test_chunks_of_any_text(group):
    names = GROUPS[group]
    # Skips what needs a tokenizer that isn't there.
    for name in names:
        tokenizer(name)
    pairs = len(names) * (len(names) - 1) // 2

    @settings(max_examples=-(-EXAMPLES[group] // pairs), deadline=None, database=None, derandomize=LONGER is None)
    @given(TEXTS, st.booleans())
    def check(text, has_eos):
        check_text(text, names, has_eos)

    check()
