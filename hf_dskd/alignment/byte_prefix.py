"""
Byte prefixes: which of the student's tokens comes next, where the teacher says which of its own does.

Two vocabularies meet in the bytes of the text (arXiv 2607.22334). A student's token begins at a byte a; the teacher's
token there began at or before a, and its first bytes c have been read. Of the teacher's tokens those that begin with c
are possible, and what they add, u, begins with a token of the student. What of that depends on the vocabularies alone
is a table here ([`ByteTables`]), and what depends on the text alone a few integers a token ([`ByteTables.plan`]), so
that a training step only has to add up probabilities (see [`hf_dskd.losses.byte_prefix`]).
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ..data.templates import special_ids
from ..data.tokens import ANCHORS, name_of, tokens_covering, traits_of
from ..errors import UserError
from .spans import answer_spans


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Columns of a plan: the teacher's response token at which a student's token begins (-1: no target), how many of its
# bytes were read before, the range of the teacher's sorted tokens that go on from there, and how many of the teacher's
# next tokens say more of the student's token. For each of those a link: what was read until then, as a node of the
# student's trie, and the student's first token of it by the kind of character that follows.
HEAD, LINK = 5, 5
LINKS = 6
# Kinds of a next byte; white space, a new line and nothing are one kind of the four that a link tells apart.
LETTER, DIGIT, SIGN, SPACE, NOTHING = range(5)
SAMPLES = ("q", "7", ")")
NO_BYTE = 256
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


class ByteTables:
    """
    What two vocabularies have to do with each other byte by byte.

    Args:
        student_tokenizer, teacher_tokenizer (`PreTrainedTokenizerBase`): Fast ones, whose tokens spell bytes.
        segmentation (`str`, *optional*, defaults to `"student"`):
            How a string begins for the student: `"student"` as its own tokenizer cuts it, `"longest"` with the longest
            of its tokens that the string begins with (arXiv 2607.22334).

    Attributes:
        size (`int`), teacher_size (`int`): Tokens of the two vocabularies, V_s and V_t.
        open (`list[bytes]`): Strings of white space up to a new line: how far the student's token goes from there
            depends on what follows. They have columns of their own after V_s and the residual.

    Raises:
        UserError: For a tokenizer without bytes, such as WordPiece.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        segmentation: str = "student",
    ):
        check_bytes(student_tokenizer, teacher_tokenizer)
        self.segmentation = segmentation
        # Two models that cut text alike need no bytes: what a token is to one it is to the other.
        self.identical = _cuts(student_tokenizer) == _cuts(teacher_tokenizer)
        self._segmenter = _Segmenter(student_tokenizer)
        self.size, self.teacher_size = (
            max(tokenizer.get_vocab().values()) + 1 for tokenizer in (student_tokenizer, teacher_tokenizer)
        )
        self.student_bytes = self._segmenter.bytes
        self.teacher_bytes = text_bytes(teacher_tokenizer)
        self._sorted = sorted((data, token) for token, data in self.teacher_bytes.items())
        self._names = [data for data, _ in self._sorted]
        self._defaults: dict[bytes, list[int]] = {}
        self.tensors = self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        """Makes what a device needs (see [`hf_dskd.losses.byte_prefix`])."""
        rank = torch.full((self.teacher_size,), -1, dtype=torch.int32)
        rank[[token for _, token in self._sorted]] = torch.arange(len(self._sorted), dtype=torch.int32)
        offsets, flat = [0] * self.teacher_size, list[bytes]()
        for token, data in sorted(self.teacher_bytes.items()):
            offsets[token] = len(flat)
            # Of a token that is read to its end nothing is left.
            flat += [data[place:] for place in range(len(data) + 1)]
        columns = self._columns(flat)
        if self.identical:
            # Beside what cuts text, each may have added tokens of its own.
            for token, data in self.teacher_bytes.items():
                if self.student_bytes.get(token) == data:
                    columns[offsets[token]] = token
        spaces = [token for token, data in self.student_bytes.items() if data[:1].isspace()]
        members = [token for token in spaces if any(map(self.student_bytes[token].startswith, self.open))]
        found = {
            "rank": rank,
            "offset": torch.tensor(offsets, dtype=torch.int32),
            "column": torch.tensor(columns, dtype=torch.int32),
            "length": torch.tensor([len(self.student_bytes.get(token, b"")) for token in range(self.size)]),
            "teacher_length": torch.tensor(
                [len(self.teacher_bytes.get(token, b"")) for token in range(self.teacher_size)]
            ),
            "members": torch.tensor(members, dtype=torch.int64),
            "opens": torch.tensor(
                [[self.student_bytes[token].startswith(data) for token in members] for data in self.open]
            ).reshape(len(self.open), len(members)),
        }
        return found if self.segmentation == "longest" else {**found, **self._walk_tables()}

    def _columns(self, strings: list[bytes]) -> list[int]:
        """Finds where the mass of each string goes: to the student's first token of it, the residual or an event."""
        self.open: list[bytes] = []
        if self.segmentation == "longest":
            return [self._segmenter.longest(data, self.size) for data in strings]
        first = self._segmenter.first(strings, self.size)
        if not self.identical:
            self.open = sorted({data for data in strings if is_open(data)})
        event = {data: self.size + 1 + place for place, data in enumerate(self.open)}
        return [event.get(data, token) for data, token in zip(strings, first)]

    def _walk_tables(self) -> dict[str, Tensor]:
        """Makes the student's trie, the bytes of the teacher's tokens, and after what a token of the student ends."""
        depth = max(map(len, self.student_bytes.values()))
        width = min(depth, max(map(len, self.teacher_bytes.values())), 32) + 1
        spelled = np.full((self.teacher_size, width), NO_BYTE, dtype=np.int16)
        tokens, strings = zip(*self.teacher_bytes.items())
        # A longer one keeps its next byte in the last column, so that no part of it looks whole.
        padded = np.frombuffer(b"".join(data[:width].ljust(width, b"\0") for data in strings), np.uint8)
        there = np.arange(width) < np.array([len(data) for data in strings])[:, None]
        # As 16 bits first: in 8 there is no NO_BYTE.
        spelled[list(tokens)] = np.where(there, padded.reshape(-1, width).astype(np.int16), NO_BYTE)
        # A token ends with what follows, or where the kind of characters changes. Inside a word or a run of signs it
        # takes merges to know; there the token that ended before is right twice as often as a longer one.
        kinds = torch.tensor([_kind(self.student_bytes.get(token, b"a")[-1]) for token in range(self.size)])
        ends = kinds.unsqueeze(1) != torch.arange(NOTHING + 1)
        # How much of white space goes to the token of what follows differs between tokenizers.
        spaces = [token for token, data in self.student_bytes.items() if data.isspace()]
        ends[spaces, SPACE] = True
        for kind, sample in enumerate(SAMPLES):
            texts = [self.student_bytes[token] + sample.encode() for token in spaces]
            after = self._segmenter.first(texts, -1)
            ends[spaces, kind] = torch.tensor([a == b for a, b in zip(after, spaces)], dtype=torch.bool)
        nodes = self._nodes
        edges = sorted((nodes[data[:-1]] * (NO_BYTE + 1) + data[-1], node) for data, node in nodes.items() if data)
        ended = [self._segmenter.own.get(data, -1) for data in nodes]
        return {
            "spelled": torch.from_numpy(spelled),
            "kind": torch.tensor([_kind(byte) for byte in range(NO_BYTE)] + [NOTHING], dtype=torch.int64),
            "ends": ends,
            "edge": torch.tensor([edge for edge, _ in edges], dtype=torch.int64),
            "child": torch.tensor([node for _, node in edges], dtype=torch.int64),
            "token": torch.tensor(ended, dtype=torch.int64),
        }

    @cached_property
    def _nodes(self) -> dict[bytes, int]:
        """Numbers everything that a token of the student begins with, of those that its own tokenizer makes."""
        nodes: dict[bytes, int] = {b"": 0}
        for data in self._segmenter.own:
            for stop in range(1, len(data) + 1):
                nodes.setdefault(data[:stop], len(nodes))
        return nodes

    def columns_of(self, row: Mapping[str, Any]) -> list[list[int]]:
        """
        Plans a row as [`~hf_dskd.data.tokenization.tokenize_dataset`] writes it: `HEAD` numbers for each response
        token of the student, and `LINK` more for each link.

        A token has no target where the tokens of either model don't spell the text, as where a tokenizer changes
        characters, nor where it is no text.
        """
        sides = [
            _Side(row, prefix, bytes_of)
            for prefix, bytes_of in (("", self.student_bytes), ("teacher_", self.teacher_bytes))
        ]
        student, teacher = sides
        same = [a == b and a >= 0 for a, b in zip(student.data, teacher.data)]
        wrong = [0]
        for fits in same:
            wrong.append(wrong[-1] + (not fits))
        data = bytes(max(byte, 0) for byte in teacher.data)
        plan = []
        for token, (start, stop) in zip(student.ids, student.spans):
            place = bisect_right(teacher.starts, start) - 1
            begin = teacher.starts[place] if place >= 0 else 0
            if stop == start or place < 0 or wrong[stop] > wrong[begin] or token not in self.student_bytes:
                plan.append([-1, 0, 0, 0, 0])
            else:
                plan.append(self._plan(teacher, data, place, start, stop))
        return plan

    def _plan(self, teacher: _Side, data: bytes, place: int, start: int, stop: int) -> list[int]:
        """Plans the student's token of the bytes `start` to `stop`, in which the teacher's text token `place` is."""
        begin = teacher.starts[place]
        read = data[begin:start]
        longest = self.segmentation == "longest"
        if longest and not data[start:stop].strip(b" \t"):
            return [-1, 0, 0, 0, 0]
        # Tokens that are read to their end leave nothing; as published they count as the residual.
        low = (bisect_left if longest else bisect_right)(self._names, read) if read else 0
        links: list[int] = []
        rows = teacher.rows
        for at in range(place, min(place + LINKS, len(rows))):
            end = teacher.ends[at]
            follows = at + 1 < len(rows) and rows[at + 1] == rows[at] + 1
            # Cut alike, a token of the student's is longer only if it was added.
            if (
                (self.identical and end == stop)
                or end > stop
                or (longest and (end == stop or not follows))
                or rows[at] in teacher.last
            ):
                break
            if longest:
                rest = data[end : min(teacher.ends[at + 1], stop)]
                links += [bisect_left(self._names, rest), self._after(rest), 0, 0, 0]
            else:
                links += self._link(data[start:end])
            if end == stop or not follows:
                break
        return [rows[place], len(read), low, self._after(read), len(links) // LINK, *links]

    def _after(self, prefix: bytes) -> int:
        """Finds the end of the range of sorted teacher tokens that begin with `prefix`."""
        end = prefix.rstrip(b"\xff")
        return bisect_left(self._names, end[:-1] + bytes([end[-1] + 1])) if end else len(self._names)

    def _link(self, read: bytes) -> list[int]:
        """Describes what was read: its node, and its first token by the kind of what follows."""
        if read not in self._defaults:
            whole = self._segmenter.first([read], self.size)[0]
            after = [whole] * len(SAMPLES)
            if read[-1:].isspace():
                after = self._segmenter.first([read + sample.encode() for sample in SAMPLES], self.size)
                # One that goes on is known by what follows alone.
                after = [token if len(self.student_bytes.get(token, read)) <= len(read) else whole for token in after]
            self._defaults[read] = [self._nodes.get(read, -1), *after, whole]
        return self._defaults[read]

    def plan(self, rows: Sequence[Mapping[str, Any]], length: int) -> Tensor:
        """Plans a batch: `[B, length, HEAD + LINK n]`, int32, where the student's tokens stand; 0 and -1 elsewhere."""
        planned = [self.columns_of(row) for row in rows]
        width = max((len(columns) for plan in planned for columns in plan), default=HEAD)
        batch = torch.zeros(len(rows), length, width, dtype=torch.int32)
        batch[..., 0] = -1
        for index, (row, plan) in enumerate(zip(rows, planned)):
            places = [place for start, stop in answer_spans(row) for place in range(start, stop)]
            filled = [columns + [0] * (width - len(columns)) for columns in plan]
            batch[index, places] = torch.tensor(filled, dtype=torch.int32).reshape(-1, width)
        return batch


class _Side:
    """One model's response tokens of a row: the bytes that they spell, and those that spell any."""

    def __init__(self, row: Mapping[str, Any], prefix: str, bytes_of: Mapping[int, bytes]):
        spans = answer_spans(row, prefix)
        self.ids = [int(token) for start, stop in spans for token in row[f"{prefix}input_ids"][start:stop]]
        ends = list(map(int, row[f"{prefix}byte_ends"]))
        self.spans = list(zip([0, *ends[:-1]], ends))
        # -1 where a token isn't what stands in the text.
        self.data = [-1] * int(row["response_bytes"])
        self.rows = [place for place, (start, stop) in enumerate(self.spans) if stop > start]
        self.starts = [self.spans[place][0] for place in self.rows]
        self.ends = [self.spans[place][1] for place in self.rows]
        for place in self.rows:
            start, stop = self.spans[place]
            piece = bytes_of.get(self.ids[place], b"")
            if len(piece) == stop - start:
                self.data[start:stop] = piece
        # After the last token of an answer none says more of it.
        self.last = {sum(stop - start for start, stop in spans[: count + 1]) - 1 for count in range(len(spans))}


class _Segmenter:
    """The student's first token of a string, as its tokenizer cuts the string in the middle of a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        # Not the tokenizer itself, which would keep its own tables alive.
        self._backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self._traits = traits_of(tokenizer)
        self.bytes = text_bytes(tokenizer)
        # Of equal tokens the tokenizer's own way is unknown: the lowest id. But one of SentencePiece's bytes, such as
        # <0x28>, stands in for what has no piece, and here there is one.
        bytes_alone = {token for piece, token in tokenizer.get_vocab().items() if BYTE_PIECE.fullmatch(piece)}
        ordered = sorted(self.bytes, key=lambda token: (token in bytes_alone, token), reverse=True)
        self._ids = {self.bytes[token]: token for token in ordered}
        self._longest = max(map(len, self._ids), default=0)
        self._known: dict[bytes, int] = {}

    @cached_property
    def own(self) -> dict[bytes, int]:
        """The tokens that the tokenizer makes of their own bytes."""
        found = zip(self._ids, self.first(list(self._ids), -1))
        return {data: token for data, token in found if token >= 0 and self.bytes[token] == data}

    def longest(self, data: bytes, otherwise: int) -> int:
        """Finds the longest token that a string begins with."""
        sizes = range(min(len(data), self._longest), 0, -1)
        return next((self._ids[data[:size]] for size in sizes if data[:size] in self._ids), otherwise)

    def first(self, strings: Iterable[bytes], otherwise: int) -> list[int]:
        """
        Finds the first token of each string, or `otherwise`.

        A string that ends or begins inside a character has the longest token that it begins with, and so has one that
        the tokenizer changes.
        """
        strings = list(strings)
        unknown = [data for data in dict.fromkeys(strings) if data and data not in self._known]
        texts = dict[bytes, str]()
        for data in unknown:
            try:
                texts[data] = data.decode()
            except UnicodeDecodeError:
                self._known[data] = self.longest(data, -1)
        for data, token in zip(texts, self._encoded(list(texts.values()))):
            fits = token in self.bytes and data.startswith(self.bytes[token])
            self._known[data] = token if fits else self.longest(data, -1)
        found = (self._known[data] if data else -1 for data in strings)
        return [token if token >= 0 else otherwise for token in found]

    def _encoded(self, texts: list[str]) -> list[int]:
        """Encodes texts that follow another, and returns the first token of each, -1 for none."""
        found = [-1] * len(texts)
        left = list(range(len(texts)))
        for anchor in ANCHORS if self._traits.adds_space else ():
            for place, ids in zip(left, self._batch([anchor + texts[place] for place in left])):
                skipped = tokens_covering(self._traits.token_bytes, ids, f" {anchor}".encode())
                if 0 < skipped < len(ids):
                    found[place] = ids[skipped]
            left = [place for place in left if found[place] < 0]
        for place, ids in zip(left, self._batch([texts[place] for place in left])):
            found[place] = ids[0] if ids else -1
        return found

    def _batch(self, texts: list[str]) -> list[list[int]]:
        # The tokenizer's own call makes an object of every text, which takes twice the time.
        backend = self._backend
        kept = backend.encode_special_tokens, backend.truncation, backend.padding
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        try:
            # An encoding of the library takes a kilobyte: some thousands at a time.
            parts = (texts[start : start + 10_000] for start in range(0, len(texts), 10_000))
            return [found.ids for part in parts for found in backend.encode_batch(part, add_special_tokens=False)]
        finally:
            backend.encode_special_tokens = kept[0]
            if kept[1]:
                backend.enable_truncation(**kept[1])
            if kept[2]:
                backend.enable_padding(**kept[2])


_TABLES: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Any, ByteTables]]] = WeakKeyDictionary()


def byte_tables(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase, segmentation: str
) -> ByteTables:
    """Makes the tables of a pair once in a process: 15 s for 50,000 by 150,000 tokens on one core."""
    made = _TABLES.setdefault(student_tokenizer, WeakKeyDictionary()).setdefault(teacher_tokenizer, {})
    # Tokens can be added.
    key = segmentation, len(student_tokenizer), len(teacher_tokenizer)
    if key not in made:
        made[key] = ByteTables(student_tokenizer, teacher_tokenizer, segmentation)
    return made[key]


def check_bytes(*tokenizers: PreTrainedTokenizerBase) -> None:
    """Raises a [`UserError`] for a tokenizer whose tokens don't spell bytes."""
    for tokenizer in tokenizers:
        if not text_bytes(tokenizer):
            raise UserError(
                f"method='bpm' compares tokens by the bytes that they spell, and those of {name_of(tokenizer)} don't"
                " spell any (WordPiece and the like): choose another, such as uld or alm"
            )


def text_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Returns the bytes of each token that is text."""
    special = special_ids(tokenizer)
    return {token: data for token, data in traits_of(tokenizer).token_bytes.items() if data and token not in special}


def _cuts(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Reads how a tokenizer cuts text, and into what."""
    config = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    return [config[part] for part in ("normalizer", "pre_tokenizer", "model")]


def is_open(data: bytes) -> bool:
    """Tells whether a string is white space that ends in a new line."""
    return data.isspace() and data.endswith(b"\n")


def _kind(byte: int) -> int:
    character = chr(byte)
    if byte >= 128 or character.isalpha():
        return LETTER
    return DIGIT if character.isdigit() else SPACE if character.isspace() else SIGN
