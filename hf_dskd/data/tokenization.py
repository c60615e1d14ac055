"""
One text, two tokenizations.

Both models get their own token ids of the same prompt and responses. For every response token the byte of the
responses at which it ends is kept, so that tokens of the two models can be matched through the text.
"""

import re
import reprlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from logging import getLogger
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_dskd.alignment.spans import check_tiling, chunk_ids
from hf_dskd.data.formats import Example, detect_format, read_examples
from hf_dskd.data.kinds import as_dataset, as_tokenizer
from hf_dskd.data.prompts import (
    Frame,
    answer_frame,
    check_eos,
    closing_tokens,
    plain_tokens,
    rendered_tokens,
    uses_template,
    written_tokens,
)
from hf_dskd.data.templates import Template, Turn, check_rendered, control_pattern
from hf_dskd.data.tokens import answer_tokens, look_again, traits_of
from hf_dskd.errors import UserError, check_name


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


logger = getLogger(__name__)

# Of the columns of each model.
_PREFIXES = {"student": "", "teacher": "teacher_"}


# What else became of rows and answers, by the name of the count.
_REMARKS = {
    "left_out": "answers of these rows are empty or too far back to be learnt",
    "ends_removed": "rows had an end-of-turn token in an answer, which was taken off",
    "control_as_text": "rows have control tokens in their text, which are read as text",
    "control_live": "rows have control tokens in a prompt that act as such: take them out of the data",
    "one_sided": "rows have tools or the like that only one of the two chat templates writes",
    "foreign_calls": "answers are in the format of one model's chat template, text to the other",
    "unasked": "rows have an answer where a chat template asks for a thought, and are learnt without one",
}


@dataclass(frozen=True)
class TokenizationReport:
    """
    What became of the rows of a data set.

    Attributes:
        rows (`int`): Rows of the source.
        kept (`int`): Rows that are trained on.
        cut (`int`): Answers of kept rows that were shortened to fit into the maximum length.
        empty_responses (`int`): Rows skipped because their response is empty, or has no token for one of the models.
        long_prompts (`int`): Rows skipped because their prompt leaves no room for a response.
        answers (`int`): Answers that are learnt: more than `kept` where conversations have several.
        left_out, ends_removed, control_as_text, control_live, one_sided, foreign_calls, unasked (`int`):
            What the text of the report says; `left_out` and `foreign_calls` count answers, the others rows.
        parts (`int`): Rows that are trained on, of which a conversation can become several.
        bad (`dict[str, int]`):
            Rows skipped because they can't be read: the first of each kind of fault, and how many there are.
        lost (`dict[str, int]`):
            Rows with characters that the `"student"`'s or the `"teacher"`'s tokenizer doesn't give back.
    """

    rows: int
    kept: int
    cut: int
    empty_responses: int
    long_prompts: int
    answers: int = 0
    left_out: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    ends_removed: int = 0
    control_as_text: int = 0
    control_live: int = 0
    one_sided: int = 0
    foreign_calls: int = 0
    unasked: int = 0
    parts: int = 0
    lost: dict[str, int] = field(default_factory=dict)

    @property
    def remarkable(self) -> bool:
        """Tells whether there is something that the user should see."""
        return self.kept < self.rows or self.cut > 0 or len(self._remarks()) > 0

    def _remarks(self) -> list[str]:
        said = [f"{count} {what}" for name, what in _REMARKS.items() if (count := getattr(self, name))]
        return said + [f"{n} rows have characters that the {name}'s tokenizer loses" for name, n in self.lost.items()]

    def __str__(self) -> str:
        answers = "" if self.answers in (0, self.kept) else f", {self.answers} answers in {self.parts}"
        said = (
            f"kept {self.kept} of {self.rows} rows{answers} ({self.cut} with a response cut to the maximum length), "
            f"skipped {self.empty_responses} with an empty response and {self.long_prompts} with a prompt that leaves "
            f"no room for a response"
        )
        if self.bad:
            first = "; ".join(f"{count} such as {message}" for message, count in self.bad.items())
            said += f", and {sum(self.bad.values())} that can't be read: {first}"
        return "; ".join([said, *self._remarks()])


def common_cut(text: str, *sides: tuple[list[int], int]) -> int:
    """
    Finds the largest byte position at which a response can be cut, or 0: every side has the end of a token that fits
    there, and no character is split. `sides` have the byte ends of its tokens and how many there is room for.
    """
    data = text.encode()
    common = set.intersection(*(set(byte_ends[: max(room, 0)]) for byte_ends, room in sides))
    # A byte 0b10xxxxxx goes on with the character before it.
    return max((end for end in common if end == len(data) or data[end] & 0xC0 != 0x80), default=0)


class _Side(NamedTuple):
    """An answer for one model: its prompt, the answer's tokens with the bytes at which they end, and its end."""

    prompt: list[int]
    ids: list[int]
    byte_ends: list[int]
    end: list[int]
    opening: int = 0  # tokens before the text

    @property
    def has_text(self) -> bool:
        return bool(self.byte_ends) and self.byte_ends[-1] > 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.ids + self.end


class _Answer(NamedTuple):
    """An answer for both models, as much of it as there is room for; `cut` ones have no end."""

    sides: dict[str, _Side]
    size: int  # in UTF-8 bytes
    cut: bool

    def ends(self, name: str) -> list[int]:
        """Byte at which each token of a side ends, those of its end included."""
        side = self.sides[name]
        return side.byte_ends + [self.size] * len(side.end)


def _opening(lead: str, byte_ends: list[int]) -> int:
    """Counts the tokens that a template has put before the text."""
    return next((index for index, end in enumerate(byte_ends) if end), 0) if lead else 0


def _fitted(text: str, sides: dict[str, _Side], max_length: int, finished: bool = True) -> _Answer | None:
    """Cuts an answer to what fits on every side; `None` if nothing of it does."""
    if finished and max(len(side.tokens) for side in sides.values()) <= max_length:
        return _Answer(sides, len(text.encode()), False)
    size = common_cut(text, *((side.byte_ends, max_length - len(side.prompt)) for side in sides.values()))
    if size == 0:
        return None
    cut = {}
    for name, side in sides.items():
        count = bisect_left(side.byte_ends, size) + 1
        cut[name] = side._replace(ids=side.ids[:count], byte_ends=side.byte_ends[:count], end=[])
    return _Answer(cut, size, True)


def _row(answers: list[_Answer], example_id: int) -> dict[str, Any]:
    """Joins answers that follow each other to a row: the prompt of each begins with all tokens before it."""
    offsets = list(accumulate((answer.size for answer in answers), initial=0))
    row: dict[str, Any] = {"response_bytes": offsets[-1], "example_id": example_id, "cut": answers[-1].cut}
    names = list(answers[0].sides)
    for name in names:
        for answer in answers:
            check_tiling(answer.sides[name].byte_ends, answer.size, example_id, name)
        sides = [answer.sides[name] for answer in answers]
        spans = [index for side in sides for index in (len(side.prompt), len(side.tokens))]
        byte_ends = [offset + end for offset, answer in zip(offsets, answers) for end in answer.ends(name)]
        columns = {"input_ids": sides[-1].tokens, "prompt_length": spans[0], "byte_ends": byte_ends, "spans": spans}
        row |= {_PREFIXES[name] + column: values for column, values in columns.items()}
    if len(names) == 2:
        chunks: tuple[list[int], list[int]] = ([], [])
        count = 0
        for answer in answers:
            one, other = (answer.sides[name] for name in names)
            ends = answer.ends(names[0]), answer.ends(names[1])
            numbered = chunk_ids(*ends, len(one.end), len(other.end), one.opening, other.opening)
            for of_row, numbers in zip(chunks, numbered):
                of_row += [count + number if number >= 0 else -1 for number in numbers]
            count += max(numbered[0]) + 1
        row |= {f"{_PREFIXES[name]}chunk_ids": numbers for name, numbers in zip(names, chunks)}
    return row


def encode_response(
    prompts: dict[str, list[int]],
    tokenizers: "dict[str, PreTrainedTokenizerBase]",
    response: str,
    max_length: int,
    *,
    example_id: int,
    finished: bool = True,
    frames: dict[str, Frame] | None = None,
) -> dict[str, Any] | None:
    """
    Puts a response after a prompt that is tokenized already, for both models.

    Args:
        prompts (`dict[str, list[int]]`), tokenizers (`dict[str, PreTrainedTokenizerBase]`):
            Token ids and tokenizers by model: `"student"` and, where there is one, `"teacher"`.
        response (`str`), max_length (`int`), example_id (`int`): As in [`tokenize_dataset`].
        finished (`bool`, *optional*, defaults to `True`):
            Whether the response is whole. One that isn't has no end on either side, as if it had been cut.
        frames (`dict[str, Frame]`, *optional*):
            What stands around a response (see [`answer_frame`]); by default the end-of-sequence token after it.

    Returns:
        `dict[str, Any]` or `None`: the row's columns as in [`tokenize_dataset`], or `None` if the response has no
        token for one of the models or none that fits.
    """
    sides = {}
    for name, tokenizer in tokenizers.items():
        frame = answer_frame(tokenizer, "plain") if frames is None else frames[name]
        ids, byte_ends, _ = answer_tokens(tokenizer, frame.lead, response)
        sides[name] = _Side(prompts[name], ids, byte_ends, frame.end, _opening(frame.lead, byte_ends))
    if not all(side.has_text for side in sides.values()):
        return None
    answer = _fitted(response, sides, max_length, finished)
    return None if answer is None else _row([answer], example_id)


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
    train_on: str = "all",
    on_bad_row: str = "stop",
    finished_column: str | None = None,
    num_proc: int | None = None,
    description: str = "train",
) -> "tuple[Dataset | IterableDataset, TokenizationReport | None]":
    """
    Tokenizes a data set for both models.

    In chat style an answer ends as the model's own template ends it (see [`answer_frame`]), else with the
    end-of-sequence token. A response that doesn't fit is cut at the same byte for both models and then has no end; a
    prompt is never cut. Rows with an empty response, or one without any token for one of the models, are skipped.

    The answers of a conversation are in one row as far as each model's prompt of a later answer begins with the tokens
    of the row so far. Where it doesn't, as with templates that leave out earlier thoughts, or plain text, whose
    answers end with a token that the next prompt hasn't, the later answer begins a row of its own: in training, every
    answer follows the tokens that the model will be asked with.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows in one of the formats of [`read_examples`], which `prompt_column` and `response_column` are for.
        student_tokenizer, teacher_tokenizer (`PreTrainedTokenizerBase`, the latter *optional*): Fast ones.
        max_length (`int`): The most tokens that prompt, response and its end may have together, on either side.
        prompt_style (`str`, *optional*, defaults to `"chat"`):
            `"chat"` for each model's chat template where it has one, `"plain"` for the same plain text for both.
        chat_template_kwargs (`dict[str, Any]`, *optional*): Of which each template takes what it knows.
        skip_long_prompts (`bool`, *optional*, defaults to `False`):
            Whether to skip rows whose prompt leaves no room for a response instead of raising an error.
        train_on (`str`, *optional*, defaults to `"all"`):
            Which answers of a conversation are learnt: `"all"`, or the `"last"`.
        on_bad_row (`str`, *optional*, defaults to `"stop"`):
            What to do about a row that can't be read: `"stop"` with an error, or `"skip"` and count it.
        finished_column (`str`, *optional*):
            Where it is false, the response isn't whole and is treated as a cut one: no end follows it.
        num_proc (`int`, *optional*): Number of processes. Not used for an `IterableDataset`.
        description (`str`, *optional*, defaults to `"train"`): Name of the data set in the progress bar and in errors.

    Returns:
        The tokenized rows, and what became of the source's rows (`None` for an `IterableDataset`, whose rows aren't
        read yet). The columns are `input_ids`; `spans`, the place of the first token of each answer and the place
        after its end, `[start, stop, start, ...]`; `prompt_length`, the first of them; `byte_ends` (one per token of
        the answers and their ends, see [`response_tokens`]; bytes are counted through all answers of the row); the
        same four with the prefix `teacher_`; `response_bytes` (UTF-8 bytes of the answers that are kept), `example_id`
        (number of the row in the source) and `cut`; with a teacher also `chunk_ids` and `teacher_chunk_ids`, parallel
        to the byte ends (see [`~hf_dskd.alignment.spans.chunk_ids`]).

    Raises:
        `UserError`: if a tokenizer has no end-of-sequence token or isn't a fast one, if the data set has no usable
        row, or if a row can't be read or leaves no room for a response.
    """
    from datasets import Dataset, Features

    for name, value, known in (
        ("prompt_style", prompt_style, ("chat", "plain")),
        ("train_on", train_on, ("all", "last")),
        ("on_bad_row", on_bad_row, ("stop", "skip")),
    ):
        check_name(f"{name}=", value, known)
    dataset = as_dataset(dataset, "dataset")
    student_tokenizer = as_tokenizer(student_tokenizer, "student_tokenizer")
    teacher_tokenizer = as_tokenizer(teacher_tokenizer, "teacher_tokenizer")
    for name, tokenizer in (("student", student_tokenizer), ("teacher", teacher_tokenizer)):
        if tokenizer is not None:
            check_eos(tokenizer, name)
            traits_of(tokenizer)  # raises for a slow one
    streamed = not isinstance(dataset, Dataset)
    tokenize_rows = _RowTokenizer(
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
        train_on,
        on_bad_row,
        streamed,
    )
    features = _features(with_teacher=teacher_tokenizer is not None)
    columns = [name for name in features if name != "notes"]
    if streamed:
        # In two steps: a stream needn't know its columns, and only those that are known could be left out at once.
        rows = dataset.map(tokenize_rows.listed, with_indices=True).select_columns(["tokenized"])
        rows = rows.map(_unlisted, batched=True, batch_size=1, remove_columns=["tokenized"])
        # The types come last: datasets 4 can't filter the typed rows of `map`.
        return rows.select_columns(columns).cast(Features({name: features[name] for name in columns})), None

    if len(dataset) == 0:
        raise UserError(f"the {description} data set has no rows; pass a data set with at least one")
    detect_format(dataset.column_names, prompt_column, response_column)
    tokenized = dataset.map(
        tokenize_rows,
        with_indices=True,
        batched=True,
        batch_size=100,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=None if num_proc == 1 else num_proc,  # datasets 4 would start another process
        desc=f"Tokenizing {description}",
    )
    report = _report(tokenized["notes"])
    if report.kept == 0:
        raise UserError(
            f"no row of the {description} data set is left: {report.empty_responses} have an empty response and "
            f"{report.long_prompts} a prompt that leaves no room for a response"
            + "".join(f", {count} can't be read, such as {message}" for message, count in report.bad.items())
            + f"; check the response column or raise max_length={max_length}"
        )
    kept = [index for index, size in enumerate(tokenized["response_bytes"]) if size]
    if len(kept) < len(tokenized):
        tokenized = tokenized.select(kept)
    return tokenized.select_columns(columns), report


def is_tokenized(dataset: Any) -> bool:
    """Tells whether a data set has been tokenized already: its columns say so, whatever else they are called."""
    return {"input_ids", "prompt_length"} <= set(getattr(dataset, "column_names", None) or [])


def _report(notes: Iterable[list[str]]) -> TokenizationReport:
    counts = Counter(chain.from_iterable(notes))
    bad: dict[str, list[Any]] = {}
    for note, count in counts.items():
        if note.startswith(_BAD):
            # One kind of fault, whatever the values are.
            kind = bad.setdefault(_kind_of(note), [note.removeprefix(_BAD), 0])
            kind[1] += count
    skipped = counts["empty"] + counts["long"] + sum(count for _, count in bad.values())
    lost = {name: counts[f"lost {name}"] for name in _PREFIXES if counts[f"lost {name}"]}
    return TokenizationReport(
        rows=counts["kept"] + skipped,
        kept=counts["kept"],
        cut=counts["cut"],
        empty_responses=counts["empty"],
        long_prompts=counts["long"],
        answers=counts["answer"],
        parts=counts["part"],
        bad=dict(bad.values()),
        lost=lost,
        **{name: counts[name] for name in _REMARKS},
    )


_BAD = "bad: "


def _kind_of(message: str) -> str:
    return re.sub(r"\(.*?\): |\d+|'[^']*'|\"[^\"]*\"", "…", message)


@lru_cache(maxsize=100)
def _say_once(kind: str, message: str) -> None:
    logger.warning("%s; rows of this kind are skipped (on_bad_row='skip')", message)


class _Skipped(Exception):
    """A row that has nothing to learn, and why: `"empty"` or `"long"`."""


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
    train_on: str = "all"
    on_bad_row: str = "stop"
    streamed: bool = False

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        models = self._models()
        tokenized = [new for row, index in zip(rows, indices) for new in self._rows(row, index, models)]
        return {name: [row[name] for row in tokenized] for name in tokenized[0]}

    def listed(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """Puts the rows that one row of a stream becomes, in one column."""
        return {"tokenized": self._rows(row, index, self._models())}

    def _models(self) -> "dict[str, _Model]":
        tokenizers = {"student": self.student_tokenizer, "teacher": self.teacher_tokenizer}
        return {
            name: _Model.of(tokenizer, self.prompt_style, self.chat_template_kwargs)
            for name, tokenizer in tokenizers.items()
            if tokenizer is not None
        }

    def _rows(self, row: dict[str, Any], index: int, models: "dict[str, _Model]") -> list[dict[str, Any]]:
        """Makes the rows that a row becomes, or one without tokens that says why there is none."""
        try:
            answers, notes = self._answers(row, models)
            rows = [_row(part, index) for part in _joined(answers)]
            return [{**new, "notes": [*(notes if new is rows[0] else []), "part"]} for new in rows]
        except _Skipped as skipped:
            return [self._nothing(index, str(skipped))]
        except UserError as error:
            # The number is that of what is left after shuffling and holding out: the row itself tells which one.
            message = f"{self.description} data set, row {index} ({_excerpt(row)}): {error}"
            if self.on_bad_row == "stop":
                raise UserError(message) from error
            if self.streamed:
                _say_once(_kind_of(message), message)
            return [self._nothing(index, f"{_BAD}{message}")]

    def _answers(self, row: dict[str, Any], models: "dict[str, _Model]") -> tuple[list[_Answer], list[str]]:
        """Tokenizes the answers of a row that are learnt, and says what is to be noted of it."""
        examples = read_examples(
            row,
            prompt_column=self.prompt_column,
            response_column=self.response_column,
            train_on=self.train_on,
            ends=[end for model in models.values() for end in model.end_texts],
        )
        notes = {"ends_removed"} if examples[0].ended else set[str]()
        templates = [model.template for model in models.values() if model.template is not None]
        if not check_rendered(examples[-1], templates, len(models)):
            notes.add("one_sided")
        finished = True if self.finished_column is None else bool(row[self.finished_column])
        answers: list[_Answer] = []
        reasons: list[str] = []
        for example in examples:
            if not (example.response.strip() or example.extras):
                reasons.append("empty")
                continue
            text, sides = _sides(example, models, notes)
            if not all(side.has_text for side in sides.values()):
                reasons.append("empty")
                continue
            if any(len(side.prompt) > 2 * self.max_length for side in sides.values()):
                # What follows is longer still.
                reasons += ["long"] * (len(examples) - len(answers) - len(reasons))
                break
            answer = _fitted(text, sides, self.max_length, finished or example is not examples[-1])
            if answer is None:
                reasons.append("long")
            else:
                answers.append(answer)
        if answers:
            repeated = ["answer"] * len(answers) + ["cut"] * sum(answer.cut for answer in answers)
            return answers, ["kept", *sorted(notes), *repeated, *["left_out"] * len(reasons)]
        if "long" in reasons and not self.skip_long_prompts:
            name = max(sides, key=lambda side: len(sides[side].prompt))
            raise UserError(
                f"the prompt has {len(sides[name].prompt)} tokens for the {name}, which leaves no room for a response "
                f"within max_length={self.max_length}; raise max_length or set skip_long_prompts=True"
            )
        raise _Skipped("long" if "long" in reasons else "empty")

    def _nothing(self, index: int, note: str) -> dict[str, Any]:
        numbers = {"example_id": index, "response_bytes": 0, "prompt_length": 0, "teacher_prompt_length": 0}
        columns = _features(with_teacher=self.teacher_tokenizer is not None)
        return {**{name: numbers.get(name, []) for name in columns}, "cut": False, "notes": [note]}


class _Model(NamedTuple):
    """How a model reads rows: its tokenizer, its chat template where one is used, and how answers end as text."""

    tokenizer: "PreTrainedTokenizerBase"
    template: Template | None
    end_texts: list[str]

    @classmethod
    def of(cls, tokenizer: Any, prompt_style: str, chat_template_kwargs: dict[str, Any] | None) -> "_Model":
        look_again(tokenizer)
        if not uses_template(tokenizer, prompt_style):
            return cls(tokenizer, None, [tokenizer.eos_token])
        template = Template(tokenizer, chat_template_kwargs)
        closing = template.frame[1].strip()
        texts = [tokenizer.eos_token, *control_pattern(tokenizer).findall(closing)]
        return cls(tokenizer, template, [*texts, closing] if len(texts) > 1 else texts)


def _sides(example: Example, models: dict[str, _Model], notes: set[str]) -> tuple[str, dict[str, _Side]]:
    """Finds the text of an answer, the same for both models, and what each of them reads; adds to `notes`."""
    text, turns = _turns(example, {name: model.template for name, model in models.items() if model.template})
    if len({name not in turns or turns[name].verbatim for name in models}) > 1:
        notes.add("foreign_calls")
    if not all(turn.asked for turn in turns.values()):
        notes.add("unasked")
    sides = {}
    for name, (tokenizer, template, _) in models.items():
        turn, found = turns.get(name, Turn("", "", text, "")), None
        if template is None:
            prompt, note = plain_tokens(tokenizer, example.prompt), None
            if control_pattern(tokenizer).search(example.prompt):
                note = "control_as_text"
        else:
            prompt, note = rendered_tokens(template, example, len(template.prompt(example)) - len(turn.prompt))
        if not prompt:
            raise UserError(
                f"the prompt has no tokens for the {name}, so nothing could predict the first token of the "
                f"response; give the row a prompt"
            )
        if template is None or turn.verbatim:
            ids, byte_ends, whole = answer_tokens(tokenizer, turn.lead, text)
            if control_pattern(tokenizer).search(text):
                found = "control_as_text"
        else:
            ids, byte_ends, whole, found = written_tokens(template, example, turn)
        notes |= {what for what in (note, found) if what is not None}
        if not whole or _unknown(tokenizer) in prompt:
            notes.add(f"lost {name}")
        opening = _opening(turn.lead, byte_ends)
        sides[name] = _Side(prompt, ids, byte_ends, closing_tokens(tokenizer, turn.closing), opening)
    return text, sides


def _unknown(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Finds the token of what a tokenizer doesn't know, where it has one for that alone."""
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id


def _turns(example: Example, templates: dict[str, Template]) -> tuple[str, dict[str, Turn]]:
    """
    Finds the text of an answer and each template's view of it.

    It is the row's own, or that without white space around it where a template trims it. Calls of tools and thoughts
    have the format of the first template that writes them; to another model, which has another format, they are text.
    """
    if not example.extras:
        for text in dict.fromkeys((example.response, example.response.strip())):
            turns = {name: turn for name, template in templates.items() if (turn := template.turn(example, text))}
            if len(turns) == len(templates):
                return text, turns
    plain = example._replace(extras={})
    written = {
        name: turn
        for name, template in templates.items()
        if (turn := template.written(example)) and (not example.extras or template.renders(example, plain))
    }
    text = next((turn.answer for turn in written.values() if turn.answer), example.response)
    return text, {
        name: written[name] if name in written and written[name].answer == text else template.foreign(example, text)
        for name, template in templates.items()
    }


def _joined(answers: list[_Answer]) -> list[list[_Answer]]:
    """Parts that are a row each: within one, the prompt of an answer begins with all tokens up to the one before."""
    parts = [[answers[0]]]
    for before, answer in pairwise(answers):
        follows = not before.cut and all(
            answer.sides[name].prompt[: len(tokens)] == tokens
            for name, side in before.sides.items()
            for tokens in [side.tokens]
        )
        if follows:
            parts[-1].append(answer)
        else:
            parts.append([answer])
    return parts


def _excerpt(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={reprlib.repr(value)}" for name, value in row.items())[:200]


def _unlisted(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = list(chain.from_iterable(batch["tokenized"]))
    kept = [row for row in rows if row["input_ids"]]
    return {name: [row[name] for row in kept] for name in rows[0]}


def _features(with_teacher: bool) -> Any:
    from datasets import Features, Sequence, Value

    # Stated, because a first batch of skipped rows would leave the element type of the lists open.
    number, numbers = Value("int32"), Sequence(Value("int32"))
    columns = {"input_ids": numbers, "prompt_length": number, "byte_ends": numbers, "spans": numbers}
    if with_teacher:
        columns["chunk_ids"] = numbers
    prefixes = ("", "teacher_") if with_teacher else ("",)
    features = {prefix + name: kind for prefix in prefixes for name, kind in columns.items()}
    others = {"response_bytes": number, "example_id": Value("int64"), "cut": Value("bool")}
    return Features({**features, **others, "notes": Sequence(Value("string"))})
