"""Text as tokens of one model, and which bytes of it each token covers."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..errors import UserError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE_MARK = "\u2581"
# Texts put before a response to keep a tokenizer from putting a space there. Llama's and Mistral's newline is a byte
# token that merges with nothing, so it nearly always serves; the others are for vocabularies with merged newlines.
ANCHORS = ("\n", "a", ".")


@dataclass(frozen=True)
class Traits:
    token_bytes: dict[int, bytes]
    adds_space: bool
    start_ids: list[int]
    size: int
    # By what a template puts after an answer, and the end-of-sequence token.
    closings: dict[tuple[str, int], list[int]] = field(default_factory=dict)


_TRAITS: WeakKeyDictionary[PreTrainedTokenizerBase, Traits] = WeakKeyDictionary()


def response_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, control: bool = False
) -> tuple[list[int], list[int]]:
    """
    Tokenizes a response as it stands after a prompt: token ids, and the byte at which each token ends.

    No special token is added, nor the space that tokenizers of the Llama 2 kind put before any text. The tokens' byte
    spans tile the response: token `i` covers `[byte_ends[i - 1], byte_ends[i])` of its UTF-8 bytes, the first one
    starts at 0 and the last one ends at the last byte. A span can be empty. Control tokens that are spelled out in the
    text, which in data are text like any other, are such only with `control`.

    Raises:
        `UserError`: if the tokenizer isn't a fast one.
    """
    return located_tokens(tokenizer, text, control)[:2]


def located_tokens(tokenizer: PreTrainedTokenizerBase, text: str, control: bool) -> tuple[list[int], list[int], bool]:
    """Finds token ids and byte ends as in [`response_tokens`], and whether the tokens give the text back."""
    traits = traits_of(tokenizer)
    for anchor in ANCHORS if traits.adds_space else ():
        ids = encode(tokenizer, anchor + text, control)
        skipped = tokens_covering(traits.token_bytes, ids, f" {anchor}".encode())
        if skipped:
            ids = ids[skipped:]
            break
    else:
        anchor, skipped, ids = "", 0, encode(tokenizer, text, control)

    data = text.encode()
    pieces = [traits.token_bytes.get(token, b"") for token in ids]
    if b"".join(pieces) == data:
        return ids, list(accumulate(map(len, pieces))), True
    # The tokenizer changed the text (normalization, an unknown token), so the vocabulary doesn't say where tokens end.
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    encoding = tokenizer(anchor + text, **options, split_special_tokens=not control)
    offsets = [
        (max(start - len(anchor), 0), max(end - len(anchor), 0)) for start, end in encoding["offset_mapping"][skipped:]
    ]
    decoded = tokenizer.decode(encoding["input_ids"], clean_up_tokenization_spaces=False)
    # One character that is written as two is the same text. A space may be added before the first.
    whole = {unicodedata.normalize("NFC", anchor + text), unicodedata.normalize("NFC", f" {anchor}{text}")}
    return ids, _byte_ends_from_offsets(offsets, text), unicodedata.normalize("NFC", str(decoded)) in whole


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, lead: str, text: str, control: bool = False
) -> tuple[list[int], list[int], bool]:
    """Does as [`located_tokens`] for an answer after what a template puts there, which is none of its bytes."""
    head = lead.rstrip()
    before = located_tokens(tokenizer, head, control=True)[0] if head else []
    # White space can be one token with what follows it.
    space = lead[len(head) :]
    ids, byte_ends, whole = located_tokens(tokenizer, space + text, control)
    return before + ids, [0] * len(before) + [max(end - len(space.encode()), 0) for end in byte_ends], whole


def encode(tokenizer: PreTrainedTokenizerBase, text: str, control: bool) -> list[int]:
    """Encodes a text; control tokens that are spelled out in it are such only with `control`."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(text, **options, split_special_tokens=not control)["input_ids"]


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Finds the bytes of each token; empty for vocabularies whose pieces don't spell the text, such as WordPiece's."""
    return traits_of(tokenizer).token_bytes


def look_again(tokenizer: PreTrainedTokenizerBase) -> None:
    """Forgets what was read of a tokenizer that has had tokens added since."""
    traits = _TRAITS.get(tokenizer)
    if traits is not None and traits.size != len(tokenizer):
        del _TRAITS[tokenizer]


def traits_of(tokenizer: PreTrainedTokenizerBase) -> Traits:
    # Tokens added later are missing here, and then located by offsets. Asking for the length of the vocabulary to
    # notice them takes longer than tokenizing a row.
    traits = _TRAITS.get(tokenizer)
    if traits is None:
        traits = _TRAITS[tokenizer] = _read_traits(tokenizer)
    return traits


def _read_traits(tokenizer: PreTrainedTokenizerBase) -> Traits:
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {name_of(tokenizer)} of class {type(tokenizer).__name__} is a slow one, which doesn't tell "
            f"where its tokens lie in the text; load the fast one (use_fast=True)"
        )
    token_bytes = _token_bytes(tokenizer)
    bare = encode(tokenizer, "a", control=False)
    framed = tokenizer("a", verbose=False)["input_ids"]
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    return Traits(
        token_bytes=token_bytes,
        adds_space=b"".join(token_bytes.get(token, b"") for token in bare) == b" a",
        start_ids=framed[:start],
        size=len(tokenizer),
    )


def name_of(tokenizer: Any) -> str:
    """Names a tokenizer in a message."""
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    # Empty for kinds of vocabulary whose pieces don't spell the text, such as WordPiece's.
    config = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    parts = json.dumps([config["normalizer"], config["pre_tokenizer"], config["decoder"]], ensure_ascii=False)
    added = {token["id"]: token for token in config["added_tokens"]}
    byte_level = '"ByteLevel"' in parts
    if not byte_level and SPACE_MARK not in parts:
        return {}

    token_bytes = {}
    unmapped = _byte_level_table()
    for piece, token in tokenizer.get_vocab().items():
        # Added tokens stand for themselves, except the runs of space marks that Gemma lists among them.
        if token in added and (byte_level or added[token]["special"]):
            token_bytes[token] = piece.encode()
        elif byte_level:
            token_bytes[token] = piece.translate(unmapped).encode("latin-1", errors="replace")
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            token_bytes[token] = bytes.fromhex(piece[3:5])
        else:
            token_bytes[token] = piece.replace(SPACE_MARK, " ").encode()
    return token_bytes


def _byte_level_table() -> dict[int, int]:
    # GPT-2 writes each printable byte as the Latin-1 character and the others, in order, as those from U+0100 on.
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    return {256 + index: byte for index, byte in enumerate(others)}


def tokens_covering(token_bytes: dict[int, bytes], ids: list[int], data: bytes) -> int:
    # How many first tokens spell exactly these bytes, or 0 if none do.
    spelled = b""
    for count, token in enumerate(ids, start=1):
        spelled += token_bytes.get(token, b"")
        if spelled == data:
            return count
        if not data.startswith(spelled):
            break
    return 0


def _byte_ends_from_offsets(offsets: list[tuple[int, int]], text: str) -> list[int]:
    to_byte = [0, *accumulate(len(character.encode()) for character in text)]
    starts = [to_byte[start] for start, _ in offsets]
    covered = {position for start, end in offsets for position in range(start, end)}

    def end_byte(end: int) -> int:
        # An accent that was composed with its letter lies outside the offsets of the token that holds both.
        while end < len(text) and end not in covered and not text[end].isspace():
            end += 1
        return to_byte[end]

    ends = list(accumulate((end_byte(end) for _, end in offsets), max))
    # Text dropped at the end belongs to the last token.
    if ends:
        ends[-1] = to_byte[-1]

    tiling: list[int] = []
    first = 0
    while first < len(ends):
        # Tokens up to the same end are pieces of one character, whose bytes they share; text dropped before them goes
        # to the first one.
        past = first
        while past < len(ends) and ends[past] == ends[first]:
            past += 1
        begin = max(starts[first], tiling[-1] if tiling else 0)
        width = max(ends[first] - begin, 0)
        tiling += [ends[first] - width + width * (share + 1) // (past - first) for share in range(past - first)]
        first = past
    return tiling
