"""
Minimum edit distance (FuseLLM, arXiv 2401.10491): which teacher token stands for which student token.

Two questions are answered by edit distance between token texts: which token of the student's vocabulary is most like
a token of the teacher's, once per pair of tokenizers ([`vocabulary_map`]), and which teacher position lies beside a
student position, once per example ([`partners`]).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.templates import special_ids
from ..data.tokens import token_bytes
from ..data.vocabulary import shared_tokens
from ..errors import UserError
from ..offline.packaged import CACHE_VARIABLE, default_cache_dir


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raise this when maps that earlier versions wrote must be computed again.
FORMAT_VERSION = 1
# Teacher tokens compared with the whole student vocabulary at a time: 25 MB for 50,000 student tokens.
CHUNK = 256


def vocabulary_map(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | os.PathLike[str] | None = None,
    rows: int | None = None,
    ends: tuple[int, int] | None = None,
) -> Tensor:
    """
    For each token of the teacher the student's token with the least edit distance between their texts.

    The distance is Levenshtein's, in characters; a space mark is a space, and a byte that is no character counts as
    one. Of several equally near tokens the one with the lowest id is taken, so the same text always wins. A text that
    shares nothing with the nearest goes to none: released, the many Chinese tokens that GPT-2 has no like of all teach
    one arbitrary token. Special tokens are compared with none: the end-of-sequence tokens belong together, any other
    special token of the teacher goes to the student's token of the same name or, without one, to its end of sequence.

    Computed once per pair of tokenizers (about a minute for 150,000 by 50,000 tokens on one core) and kept on disk.

    Args:
        student_tokenizer, teacher_tokenizer (`PreTrainedTokenizerBase`): Fast ones.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where maps are kept; by default `vocabulary_maps` in [`~hf_dskd.offline.packaged.default_cache_dir`].
        rows (`int`, *optional*): Rows of the teacher's head, if it has more than its tokenizer has tokens.
        ends (`tuple[int, int]`, *optional*): Tokens that end an answer, which belong together too.

    Returns:
        `torch.Tensor` of shape `[V_t]`, int64: student ids; -1 for ids of the teacher without a text, such as the rows
        that pad its head, and texts that have nothing in common with any of the student's.

    Raises:
        UserError: If the vocabularies share no token, or the cache folder can't be made.
    """
    folder = default_cache_dir() / "vocabulary_maps" if cache_dir is None else Path(cache_dir).expanduser()
    path = folder / f"{_fingerprint(student_tokenizer, teacher_tokenizer)}.safetensors"
    found = _read(path, _size(student_tokenizer), _size(teacher_tokenizer))
    if found is None:
        shared_tokens(student_tokenizer, teacher_tokenizer)  # raises if there are none
        found = _compute(student_tokenizer, teacher_tokenizer)
        _write(path, found)
    if ends is not None:
        found[ends[1]] = ends[0]
    return F.pad(found, (0, (rows or len(found)) - len(found)), value=-1)


def align_tokens(student_tokens: list[str] | list[bytes], teacher_tokens: list[str] | list[bytes]) -> list[int]:
    """
    Dynamic time warping of two token sequences, neither of them empty.

    The cost of two tokens is the edit distance of their texts without spaces. Where ways are equally cheap, the one
    through the pair before, then the one through the teacher's token before is taken, as in the released code.

    Returns:
        `list[int]`: for each student token the place of the teacher's token beside it; -1 if it lies beside several.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    texts = [[_text(token).replace(" ", "") for token in tokens] for tokens in (teacher_tokens, student_tokens)]
    total = _cumulative_cost(cdist(*texts, scorer=Levenshtein.distance, dtype=np.int64)).tolist()

    beside: list[list[int]] = [[] for _ in student_tokens]
    t, s = len(teacher_tokens) - 1, len(student_tokens) - 1
    beside[s].append(t)
    while t > 0 or s > 0:
        ways = [(t - 1, s - 1), (t - 1, s), (t, s - 1)]
        t, s = min((way for way in ways if min(way) >= 0), key=lambda way: total[way[0]][way[1]])
        beside[s].append(t)
    return [places[0] if len(places) == 1 else -1 for places in beside]


def partners(
    student_ids: list[int],
    teacher_ids: list[int],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    vocabulary_map: Tensor,
) -> list[int]:
    """
    The teacher's position to learn from at each student position, or -1.

    It is the only one that [`align_tokens`] puts beside the student's, provided that the vocabulary map sends the
    teacher's token there to the student's.

    The tokens to compare are those of the response, which the rows predict. The released code compares those that the
    rows read: the same pairs, but for the ends of the two prompts, which differ between chat templates.

    `student_ids` and `teacher_ids` are one or more; the map is that of [`vocabulary_map`].
    """
    student_bytes, teacher_bytes = token_bytes(student_tokenizer), token_bytes(teacher_tokenizer)
    aligned = align_tokens(
        [student_bytes.get(token, b"") for token in student_ids],
        [teacher_bytes.get(token, b"") for token in teacher_ids],
    )
    mapped = vocabulary_map[torch.tensor(teacher_ids)].tolist()
    return [index if index >= 0 and mapped[index] == token else -1 for token, index in zip(student_ids, aligned)]


def _text(token: str | bytes) -> str:
    # Bytes that are no UTF-8 become characters of their own, which no other text has.
    return token if isinstance(token, str) else token.decode(errors="surrogateescape")


def _cumulative_cost(cost: np.ndarray) -> np.ndarray:
    """
    Least cost of a way from the first pair to each pair, `[T, S]` as `cost`.

    Along a row, D[j] = cost[j] + min(above[j], D[j − 1]), where above[j] is the least of the two pairs in the row
    before. With C the running sum of the row's costs, D[j] = C[j] + min over k <= j of above[k] − C[k − 1]: one pass.
    """
    total = np.empty_like(cost)
    total[0] = cost[0].cumsum()
    for row in range(1, len(cost)):
        above = total[row - 1].copy()
        above[1:] = np.minimum(above[1:], total[row - 1, :-1])
        running = cost[row].cumsum()
        total[row] = running + np.minimum.accumulate(above - (running - cost[row]))
    return total


def _compute(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> Tensor:
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist
    from tqdm.auto import tqdm

    candidates: dict[str, int] = {}  # in the order of their ids, so that the first of the nearest is the lowest
    for token, text in _texts(student_tokenizer).items():
        candidates.setdefault(text, token)
    ids = np.array(list(candidates.values()))

    found = np.full(_size(teacher_tokenizer), -1)
    teacher = _texts(teacher_tokenizer)
    for token, text in teacher.items():
        found[token] = candidates.get(text, -1)
    rest = [token for token in teacher if found[token] < 0]
    student_texts = list(candidates)
    with tqdm(total=len(rest), desc="Mapping the teacher's vocabulary", unit=" tokens") as bar:
        for start in range(0, len(rest), CHUNK):
            tokens = rest[start : start + CHUNK]
            distances = cdist(
                [teacher[token] for token in tokens], student_texts, scorer=Levenshtein.distance, dtype=np.uint16
            )
            nearest = distances.argmin(1)
            lengths = np.array([len(teacher[token]) for token in tokens])
            lengths = np.maximum(lengths, [len(student_texts[index]) for index in nearest])
            found[tokens] = np.where(distances.min(1) < lengths, ids[nearest], -1)
            bar.update(len(tokens))

    student_vocabulary, end = student_tokenizer.get_vocab(), student_tokenizer.eos_token_id
    for token, name in _special_tokens(teacher_tokenizer).items():
        found[token] = student_vocabulary.get(name, end)
    found[teacher_tokenizer.eos_token_id] = end
    return torch.from_numpy(found)


def _texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    special = _special_tokens(tokenizer)
    return {
        token: _text(data) for token, data in sorted(token_bytes(tokenizer).items()) if data and token not in special
    }


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    # Not `len`: some vocabularies leave ids out.
    return max(tokenizer.get_vocab().values()) + 1


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    special = special_ids(tokenizer)
    return {token: name for name, token in tokenizer.get_vocab().items() if token in special}


def _fingerprint(*tokenizers: PreTrainedTokenizerBase) -> str:
    content = [
        [sorted(tokenizer.get_vocab().items()), sorted(_special_tokens(tokenizer)), tokenizer.eos_token_id]
        for tokenizer in tokenizers
    ]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, content]).encode()).hexdigest()


def _read(path: Path, student_size: int, teacher_size: int) -> Tensor | None:
    """The map that `path` holds; `None` if there is none or the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)["vocabulary_map"]
    except (OSError, KeyError, SafetensorError):
        return None
    whole = found.shape == (teacher_size,) and found.dtype == torch.int64
    return found if whole and found.min() >= -1 and found.max() < student_size else None


def _write(path: Path, found: Tensor) -> None:
    from safetensors.torch import save_file

    # Under a name of its own first: another process may be writing the same map, or this one be killed.
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"vocabulary_map": found}, unfinished)
        unfinished.replace(path)
    except OSError as error:
        raise UserError(
            f"the vocabulary map can't be kept in {path.parent} ({error}); set {CACHE_VARIABLE} to another folder"
        ) from error
