"""
One text, two tokenizations.

Both models get their own token ids of the same prompt and response. For every response token the byte of the response
at which it ends is kept, so that tokens of the two models can be matched through the text.
"""

import json
import re
import reprlib
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from hf_dskd.alignment.spans import check_tiling, chunk_ids
from hf_dskd.data.formats import Example, detect_format, read_example
from hf_dskd.errors import UserError


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


SPACE_MARK = "\u2581"
# Texts put before a response to keep a tokenizer from putting a space there. Llama's and Mistral's newline is a byte
# token that merges with nothing, so it nearly always serves; the others are for vocabularies with merged newlines.
ANCHORS = ("\n", "a", ".")


@dataclass(frozen=True)
class TokenizationReport:
    """
    What became of the rows of a data set.

    Attributes:
        rows (`int`):
            Rows of the source.
        kept (`int`):
            Rows that are trained on.
        cut (`int`):
            Kept rows whose response was shortened to fit into the maximum length.
        empty_responses (`int`):
            Rows skipped because their response is empty, or has no token for one of the models.
        long_prompts (`int`):
            Rows skipped because their prompt leaves no room for a response.
    """

    rows: int
    kept: int
    cut: int
    empty_responses: int
    long_prompts: int

    def __str__(self) -> str:
        return (
            f"kept {self.kept} of {self.rows} rows ({self.cut} with a response cut to the maximum length), skipped "
            f"{self.empty_responses} with an empty response and {self.long_prompts} with a prompt that leaves no room "
            f"for a response"
        )


@dataclass(frozen=True)
class _Traits:
    token_bytes: dict[int, bytes]
    adds_space: bool
    start_ids: list[int]


_TRAITS: "WeakKeyDictionary[PreTrainedTokenizerBase, _Traits]" = WeakKeyDictionary()


def response_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[list[int], list[int]]:
    """
    Tokenizes a response as it stands after a prompt, and tells which bytes each token covers.

    No special token is added, nor the space that tokenizers of the Llama 2 kind put before any text. The tokens' byte
    spans tile the response: token `i` covers `[byte_ends[i - 1], byte_ends[i])` of its UTF-8 bytes, the first one
    starts at 0 and the last one ends at the last byte. A span can be empty.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            A fast tokenizer.
        text (`str`):
            The response.

    Returns:
        `tuple[list[int], list[int]]`: token ids and byte ends, of the same length.

    Raises:
        `UserError`: if the tokenizer isn't a fast one.
    """
    traits = _traits(tokenizer)
    for anchor in ANCHORS if traits.adds_space else ():
        ids = _encode(tokenizer, anchor + text)
        skipped = _tokens_covering(traits.token_bytes, ids, f" {anchor}".encode())
        if skipped:
            ids = ids[skipped:]
            break
    else:
        anchor, skipped, ids = "", 0, _encode(tokenizer, text)

    data = text.encode()
    pieces = [traits.token_bytes.get(token, b"") for token in ids]
    if b"".join(pieces) == data:
        return ids, list(accumulate(map(len, pieces)))
    # The tokenizer changed the text (normalization, an unknown token), so the vocabulary doesn't say where tokens end.
    encoding = tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = [
        (max(start - len(anchor), 0), max(end - len(anchor), 0)) for start, end in encoding["offset_mapping"][skipped:]
    ]
    return ids, _byte_ends_from_offsets(offsets, text)


def prompt_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    example: Example,
    prompt_style: str = "chat",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """
    Tokenizes a prompt, the same way for training and for generation.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            A fast tokenizer.
        example (`Example`):
            Its messages are rendered by the tokenizer's chat template, or its plain prompt text is taken.
        prompt_style (`str`, *optional*, defaults to `"chat"`):
            `"chat"` renders the chat template, which then decides on every special token, and is plain for tokenizers
            without one. `"plain"` takes the plain text after the special tokens with which the tokenizer begins.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            For the chat template, such as `{"enable_thinking": False}`.

    Returns:
        `list[int]`: token ids.

    Raises:
        `UserError`: if the chat template rejects the messages.
    """
    if prompt_style == "plain" or not tokenizer.chat_template:
        return _traits(tokenizer).start_ids + _encode(tokenizer, example.prompt)

    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            example.messages, add_generation_prompt=True, tokenize=False, **(chat_template_kwargs or {})
        )
    except TemplateError as error:
        raise UserError(
            f"the chat template of {_name(tokenizer)} rejects the messages ({' '.join(str(error).split())}); change "
            f"them or set prompt_style='plain'"
        ) from error
    return _encode(tokenizer, str(rendered))


def common_cut(text: str, *sides: tuple[list[int], int]) -> int:
    """
    Finds where to cut a response so that it fits on every side.

    Args:
        text (`str`):
            The response.
        sides (`tuple[list[int], int]`):
            For each model the byte ends of the response's tokens and how many of these tokens there is room for.

    Returns:
        `int`: the largest byte position at which every side has the end of a token that fits and at which no
        character is split, or 0 if there is none.
    """
    data = text.encode()
    common = set.intersection(*(set(byte_ends[: max(room, 0)]) for byte_ends, room in sides))
    # A byte 0b10xxxxxx goes on with the character before it.
    return max((end for end in common if end == len(data) or data[end] & 0xC0 != 0x80), default=0)


def encode_response(
    prompts: dict[str, list[int]],
    tokenizers: "dict[str, PreTrainedTokenizerBase]",
    response: str,
    max_length: int,
    *,
    example_id: int,
    finished: bool = True,
) -> dict[str, Any] | None:
    """
    Puts a response after a prompt that is tokenized already, for both models.

    Args:
        prompts (`dict[str, list[int]]`):
            Token ids of the prompt for the `"student"` and, where there is one, the `"teacher"`.
        tokenizers (`dict[str, PreTrainedTokenizerBase]`):
            Tokenizers of the same models.
        response (`str`):
            The response.
        max_length (`int`):
            The most tokens that prompt, response and end-of-sequence token may have together, on either side.
        example_id (`int`):
            Number of the example.
        finished (`bool`, *optional*, defaults to `True`):
            Whether the response is whole. One that isn't has no end-of-sequence token on either side, as if it had
            been cut.

    Returns:
        `dict[str, Any]` or `None`: the row's columns as in [`tokenize_dataset`], or `None` if the response has no
        token for one of the models or none that fits.
    """
    responses = {name: response_tokens(tokenizer, response) for name, tokenizer in tokenizers.items()}
    if not all(ids for ids, _ in responses.values()):
        return None
    rooms = {name: max_length - len(prompt) for name, prompt in prompts.items()}
    cut = not finished or any(len(responses[name][0]) + 1 > rooms[name] for name in tokenizers)
    kept_bytes = len(response.encode())
    if cut:
        kept_bytes = common_cut(response, *((responses[name][1], rooms[name]) for name in tokenizers))
    if kept_bytes == 0:
        return None

    result: dict[str, Any] = {"response_bytes": kept_bytes, "example_id": example_id, "cut": cut}
    for name, tokenizer in tokenizers.items():
        ids, byte_ends = responses[name]
        if cut:
            count = bisect_left(byte_ends, kept_bytes) + 1
            ids, byte_ends = ids[:count], byte_ends[:count]
        check_tiling(byte_ends, kept_bytes, example_id, name)
        if not cut:
            ids, byte_ends = [*ids, tokenizer.eos_token_id], [*byte_ends, kept_bytes]
        prefix = "" if name == "student" else "teacher_"
        result[f"{prefix}input_ids"] = prompts[name] + ids
        result[f"{prefix}prompt_length"] = len(prompts[name])
        result[f"{prefix}byte_ends"] = byte_ends
    if "teacher" in tokenizers:
        result["chunk_ids"], result["teacher_chunk_ids"] = chunk_ids(
            result["byte_ends"], result["teacher_byte_ends"], not cut, not cut
        )
    return result


def set_pad_token(tokenizer: "PreTrainedTokenizerBase", name: str) -> str | None:
    """
    Lets the end-of-sequence token serve as padding where the tokenizer has no padding token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Changed in place.
        name (`str`):
            Whose tokenizer it is, such as `"student"`.

    Returns:
        `str` or `None`: a sentence for the log, or `None` if nothing was changed.
    """
    if tokenizer.pad_token_id is not None:
        return None
    tokenizer.pad_token = tokenizer.eos_token
    return f"the {name}'s tokenizer has no padding token: its end-of-sequence token {tokenizer.eos_token!r} is used"


def depends_on_the_day(
    tokenizer: "PreTrainedTokenizerBase", name: str, chat_template_kwargs: dict[str, Any] | None = None
) -> str | None:
    """
    Tells of a chat template that writes today's date into every prompt.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Of the chat template.
        name (`str`):
            Whose tokenizer it is, such as `"student"`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            For the chat template; Llama's takes the date as `date_string`.

    Returns:
        `str` or `None`: a sentence for the log, or `None` if prompts are the same on every day.
    """
    template = json.dumps(tokenizer.chat_template or "")
    takes_date = "date_string" in template
    if "strftime_now" not in template or (takes_date and "date_string" in (chat_template_kwargs or {})):
        return None
    remedy = (
        """set chat_template_kwargs={"date_string": "26 Jul 2024"}, or another date"""
        if takes_date
        else "change tokenizer.chat_template, or set prompt_style='plain'"
    )
    return (
        f"the {name}'s chat template writes today's date into the prompts, so that a run which goes on tomorrow, or a"
        f" teacher_cache, sees other prompts: {remedy}"
    )


def tokenize_dataset(
    dataset: "Dataset | IterableDataset",
    student_tokenizer: "PreTrainedTokenizerBase",
    teacher_tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    max_length: int,
    prompt_style: str = "chat",
    chat_template_kwargs: dict[str, Any] | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    skip_long_prompts: bool = False,
    finished_column: str | None = None,
    num_proc: int | None = None,
    description: str = "train",
) -> "tuple[Dataset | IterableDataset, TokenizationReport | None]":
    """
    Tokenizes a data set for both models.

    A response that doesn't fit is cut at the same byte for both models and then ends without an end-of-sequence token;
    a prompt is never cut. Rows with an empty response, or one without any token for one of the models, are skipped.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows in one of the formats of [`read_example`].
        student_tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the student.
        teacher_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the teacher. Without it, only the student's columns are written.
        max_length (`int`):
            The most tokens that prompt, response and end-of-sequence token may have together, on either side.
        prompt_style (`str`, *optional*, defaults to `"chat"`):
            `"chat"` for each model's chat template where it has one, `"plain"` for the same plain text for both.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            For the chat templates of both, of which each takes what it knows.
        prompt_column (`str`, *optional*):
            Column of the prompt.
        response_column (`str`, *optional*):
            Column of the response.
        skip_long_prompts (`bool`, *optional*, defaults to `False`):
            Whether to skip rows whose prompt leaves no room for a response instead of raising an error.
        finished_column (`str`, *optional*):
            Column that tells whether the response is whole. Where it is false, the response is treated as a cut one:
            no end-of-sequence token follows it.
        num_proc (`int`, *optional*):
            Number of processes. Not used for an `IterableDataset`.
        description (`str`, *optional*, defaults to `"train"`):
            Name of the data set in the progress bar and in errors.

    Returns:
        `tuple[Dataset | IterableDataset, TokenizationReport | None]`: the tokenized rows, and what became of the
        source's rows (`None` for an `IterableDataset`, whose rows aren't read yet). The columns are `input_ids`,
        `prompt_length`, `byte_ends` (one per response token and end-of-sequence token, see [`response_tokens`]), the
        same three with the prefix `teacher_`, `response_bytes` (UTF-8 bytes of the response that are kept),
        `example_id` (number of the row in the source) and `cut`; with a teacher also `chunk_ids` and
        `teacher_chunk_ids`, parallel to the byte ends (see [`~hf_dskd.alignment.spans.chunk_ids`]).

    Raises:
        `UserError`: if a tokenizer has no end-of-sequence token or isn't a fast one, if the data set has no usable
        row, or if a row can't be read or leaves no room for a response.
    """
    from datasets import Dataset, Features

    if prompt_style not in ("chat", "plain"):
        raise UserError(f"prompt_style={prompt_style!r} is unknown; set it to 'chat' or 'plain'")
    for name, tokenizer in (("student", student_tokenizer), ("teacher", teacher_tokenizer)):
        if tokenizer is not None:
            _check_tokenizer(tokenizer, name)
    tokenize_row = _RowTokenizer(
        student_tokenizer,
        teacher_tokenizer,
        max_length,
        prompt_style,
        chat_template_kwargs,
        prompt_column,
        response_column,
        skip_long_prompts,
        description,
        finished_column,
    )
    features = _features(with_teacher=teacher_tokenizer is not None)
    columns = [name for name in features if name != "status"]
    if not isinstance(dataset, Dataset):
        rows = dataset.map(tokenize_row, with_indices=True, remove_columns=dataset.column_names).filter(_is_kept)
        # The types come last: datasets 4 can't filter the typed rows of `map`.
        return rows.select_columns(columns).cast(Features({name: features[name] for name in columns})), None

    if len(dataset) == 0:
        raise UserError(f"the {description} data set has no rows; pass a data set with at least one")
    detect_format(dataset.column_names, prompt_column, response_column)
    tokenized = dataset.map(
        tokenize_row,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=None if num_proc == 1 else num_proc,  # datasets 4 would start another process
        desc=f"Tokenizing {description}",
    )
    statuses = list(tokenized["status"])
    counts = Counter(statuses)
    kept = [index for index, status in enumerate(statuses) if status == "kept"]
    if not kept:
        raise UserError(
            f"no row of the {description} data set is left: {counts['empty']} have an empty response and "
            f"{counts['long']} a prompt that leaves no room for a response; check the response column or raise "
            f"max_length={max_length}"
        )
    if len(kept) < len(tokenized):
        tokenized = tokenized.select(kept)
    tokenized = tokenized.select_columns(columns)
    report = TokenizationReport(len(statuses), len(kept), sum(tokenized["cut"]), counts["empty"], counts["long"])
    return tokenized, report


@dataclass(frozen=True)
class _RowTokenizer:
    # An instance is pickled for worker processes, and hashed to find rows that are already in the cache.
    student_tokenizer: "PreTrainedTokenizerBase"
    teacher_tokenizer: "PreTrainedTokenizerBase | None"
    max_length: int
    prompt_style: str
    chat_template_kwargs: dict[str, Any] | None
    prompt_column: str | None
    response_column: str | None
    skip_long_prompts: bool
    description: str
    finished_column: str | None = None

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            return self._tokenize(row, index)
        except UserError as error:
            # The number is that of what is left after shuffling and holding out: the row itself tells which one.
            raise UserError(f"{self.description} data set, row {index} ({_excerpt(row)}): {error}") from error

    def _tokenize(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        example = read_example(row, prompt_column=self.prompt_column, response_column=self.response_column)
        if not example.response.strip():
            return self._skipped("empty", index)

        tokenizers = {"student": self.student_tokenizer}
        if self.teacher_tokenizer is not None:
            tokenizers["teacher"] = self.teacher_tokenizer
        prompts = {
            name: prompt_tokens(tokenizer, example, self.prompt_style, self.chat_template_kwargs)
            for name, tokenizer in tokenizers.items()
        }
        for name, prompt in prompts.items():
            if not prompt:
                raise UserError(
                    f"the prompt has no tokens for the {name}, so nothing could predict the first token of the "
                    f"response; give the row a prompt"
                )
        finished = True if self.finished_column is None else bool(row[self.finished_column])
        result = encode_response(
            prompts, tokenizers, example.response, self.max_length, example_id=index, finished=finished
        )
        if result is not None:
            return {**result, "status": "kept"}
        if not all(response_tokens(tokenizer, example.response)[0] for tokenizer in tokenizers.values()):
            return self._skipped("empty", index)
        if self.skip_long_prompts:
            return self._skipped("long", index)
        name = max(prompts, key=lambda side: len(prompts[side]))
        raise UserError(
            f"the prompt has {len(prompts[name])} tokens for the {name}, which leaves no room for a response "
            f"within max_length={self.max_length}; raise max_length or set skip_long_prompts=True"
        )

    def _skipped(self, status: str, index: int) -> dict[str, Any]:
        result: dict[str, Any] = {"response_bytes": 0, "example_id": index, "cut": False, "status": status}
        for prefix in ("",) if self.teacher_tokenizer is None else ("", "teacher_"):
            result |= {f"{prefix}input_ids": [], f"{prefix}prompt_length": 0, f"{prefix}byte_ends": []}
        if self.teacher_tokenizer is not None:
            result |= {"chunk_ids": [], "teacher_chunk_ids": []}
        return result


def _excerpt(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={reprlib.repr(value)}" for name, value in row.items())[:200]


def _is_kept(row: dict[str, Any]) -> bool:
    return row["status"] == "kept"


def _features(with_teacher: bool) -> Any:
    from datasets import Features, Sequence, Value

    # Stated, because a first batch of skipped rows would leave the element type of the lists open.
    features = {}
    for prefix in ("", "teacher_") if with_teacher else ("",):
        features[f"{prefix}input_ids"] = Sequence(Value("int32"))
        features[f"{prefix}prompt_length"] = Value("int32")
        features[f"{prefix}byte_ends"] = Sequence(Value("int32"))
        if with_teacher:
            features[f"{prefix}chunk_ids"] = Sequence(Value("int32"))
    features["response_bytes"] = Value("int32")
    features["example_id"] = Value("int64")
    features["cut"] = Value("bool")
    features["status"] = Value("string")
    return Features(features)


def _check_tokenizer(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the {name}'s tokenizer {_name(tokenizer)} has no end-of-sequence token; set its eos_token to the token "
            f"that ends an answer"
        )
    _traits(tokenizer)


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> dict[int, bytes]:
    """Bytes of each token; empty for vocabularies whose pieces don't spell the text, such as WordPiece's."""
    return _traits(tokenizer).token_bytes


def _traits(tokenizer: "PreTrainedTokenizerBase") -> _Traits:
    # Tokens added later are missing here, and then located by offsets. Asking for the length of the vocabulary to
    # notice them takes longer than tokenizing a row.
    traits = _TRAITS.get(tokenizer)
    if traits is None:
        traits = _TRAITS[tokenizer] = _read_traits(tokenizer)
    return traits


def _read_traits(tokenizer: "PreTrainedTokenizerBase") -> _Traits:
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {_name(tokenizer)} of class {type(tokenizer).__name__} is a slow one, which doesn't tell "
            f"where its tokens lie in the text; load the fast one (use_fast=True)"
        )
    token_bytes = _token_bytes(tokenizer)
    bare = _encode(tokenizer, "a")
    framed = tokenizer("a", verbose=False)["input_ids"]
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    return _Traits(
        token_bytes=token_bytes,
        adds_space=b"".join(token_bytes.get(token, b"") for token in bare) == b" a",
        start_ids=framed[:start],
    )


def _token_bytes(tokenizer: "PreTrainedTokenizerBase") -> dict[int, bytes]:
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


def _tokens_covering(token_bytes: dict[int, bytes], ids: list[int], data: bytes) -> int:
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
