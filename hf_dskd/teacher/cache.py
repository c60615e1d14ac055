"""
The teacher's last hidden states on disk, computed once per example.

    index.json                 what the states depend on; every file with its size and checksum
    head.safetensors           the teacher's head and input embedding
    states-DIGEST.safetensors  states of some examples, one after another

Training from it runs no teacher and loads none of its weights but the head and the embedding. An example is known by
its tokens, so that a part of the data, or another order of it, fits as well.

Nothing in a file depends on time, host, number of processes or what was there before: a fill that was interrupted and
then goes on leaves the same bytes (on the same hardware, libraries and number of threads) as one that wasn't.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..alignment.spans import answer_spans
from ..errors import UserError
from ..models.causal_lm import LMHead, check_head
from .identity import cache_facts, check_facts, digest_of
from .load import Teacher


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..config import DSKDConfig

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json"
HEAD_NAME = "head.safetensors"
LOCK_NAME = ".lock"
SHARD_BYTES = 64 * 2**20
# Padded tokens that the teacher runs on at a time. Fixed, because a matrix product's last bits depend on its shape.
BATCH_TOKENS = 4096
REPAIR = "repair_teacher_cache=True (--repair_teacher_cache) computes it again"


def open_cache(
    folder: str | Path,
    config: DSKDConfig,
    teacher_model: Any,
    teacher_config: PretrainedConfig,
    teacher_tokenizer: PreTrainedTokenizerBase,
    quantization_config: Any = None,
) -> TeacherCache:
    """Opens a cache with the [`cache_facts`] of a run; a new cache fetches a teacher that isn't here yet."""
    _check_folder(folder)
    new = not (Path(folder) / INDEX_NAME).is_file()
    facts = cache_facts(config, teacher_model, teacher_config, teacher_tokenizer, quantization_config, download=new)
    return TeacherCache.open(folder, facts, repair=config.repair_teacher_cache)


def _error(folder: str | Path, text: str) -> UserError:
    return UserError(f"teacher_cache={str(folder)!r}{text}")


# ---- Examples


@dataclass(frozen=True, slots=True)
class _Example:
    key: str
    split: str
    index: int
    length: int  # tokens
    count: int  # states


def example_key(row: Mapping[str, Any]) -> str:
    """Hashes what an example is known by: the teacher's tokens and where the response begins, 32 hex digits."""
    spans = answer_spans(row, "teacher_")
    digest = hashlib.blake2b(spans[0][0].to_bytes(8, "little"), digest_size=16)
    digest.update(np.asarray(row["teacher_input_ids"]).astype("<i4").tobytes())
    if len(spans) > 1:
        # A single answer goes to the end.
        digest.update(np.array(spans, dtype="<i4").tobytes())
    return digest.hexdigest()


def _predicting(row: Mapping[str, Any]) -> np.ndarray:
    """Positions whose next token belongs to an answer. Nothing predicts the first token of a sequence."""
    return np.concatenate([np.arange(max(start - 1, 0), stop - 1) for start, stop in answer_spans(row, "teacher_")])


def _examples(datasets: Mapping[str, Dataset | IterableDataset | None]) -> dict[str, _Example]:
    """Finds the examples of tokenized datasets by key, in order; one that occurs again is the one that was there."""
    examples: dict[str, _Example] = {}
    for split, dataset in datasets.items():
        if dataset is None:
            continue
        if not hasattr(dataset, "__len__"):
            raise UserError(
                f"teacher_cache needs a dataset with a length: the {split} data is a {type(dataset).__name__}; pass a"
                " datasets.Dataset, or leave teacher_cache out"
            )
        # A dataset that the user has tokenized may be without spans.
        names = sorted({"teacher_input_ids", "teacher_prompt_length", "teacher_spans"} & {*dataset.column_names})
        batches: Any = dataset.select_columns(names).with_format("numpy").iter(batch_size=1000)
        rows = (dict(zip(names, values)) for batch in batches for values in zip(*(batch[name] for name in names)))
        for index, row in enumerate(rows):
            example = _Example(example_key(row), split, index, len(row["teacher_input_ids"]), len(_predicting(row)))
            examples.setdefault(example.key, example)
    return examples


# ---- Shards


@dataclass(frozen=True)
class Shard:
    """
    A file of states.

    Attributes:
        file (`str`): Its name.
        keys (`list[str]`): Its examples.
        counts (`list[int]`): How many states each of them has.
        size (`int`, *optional*), sha256 (`str`, *optional*): Of the file, once it is in the index.
    """

    file: str
    keys: list[str]
    counts: list[int]
    size: int | None = None
    sha256: str | None = None


def _cut(examples: Iterable[_Example], width: int) -> Iterator[Shard]:
    """Cuts examples into shards of up to `SHARD_BYTES` of states, in order."""
    parts: list[list[_Example]] = []
    size = 0
    for example in examples:
        added = 2 * width * example.count
        if not parts or size + added > SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(example)
        size += added
    for part in parts:
        keys = [example.key for example in part]
        yield Shard(_states_name(keys), keys, [example.count for example in part])


def _states_name(keys: list[str]) -> str:
    return f"states-{digest_of(' '.join(keys))}.safetensors"


def _batches(examples: list[_Example]) -> list[list[int]]:
    """Places of examples of similar length, the longest first: memory that doesn't suffice shows at once."""
    batches: list[list[int]] = []
    for index in sorted(range(len(examples)), key=lambda index: -examples[index].length):
        if not batches or (len(batches[-1]) + 1) * examples[batches[-1][0]].length > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


# ---- Files


def _is_states(name: str) -> bool:
    return re.fullmatch(r"states-[0-9a-f]{32}\.safetensors", name) is not None


def _is_own(name: str) -> bool:
    """Tells whether a cache makes files of that name. No other is ever written to or deleted."""
    final = name.removesuffix(".tmp")
    return name == LOCK_NAME or final in (INDEX_NAME, HEAD_NAME) or _is_states(final)


def _check_folder(folder: str | Path) -> None:
    """Raises a [`UserError`] unless a folder is new, empty, or holds an index, as far as names tell."""
    if not str(folder):
        raise _error("", " names no folder: name one, or leave teacher_cache out")
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise _error(folder, " is a file: name a folder")
    if (folder / LOCK_NAME).is_symlink():
        raise _error(folder, f": {LOCK_NAME} is a link out of it: delete the link")
    if not (folder / INDEX_NAME).is_file():
        # Both of an interrupted start. States without an index could be anybody's.
        others = {path.name for path in folder.iterdir()} - {LOCK_NAME, f"{INDEX_NAME}.tmp"}
        if others:
            raise _not_a_cache(folder, others)


def _check_own(folder: Path) -> None:
    """Raises a [`UserError`] unless a folder holds states or a head, and nothing that a cache doesn't make."""
    names = {path.name for path in folder.iterdir()}
    foreign = {name for name in names if not _is_own(name)}
    if foreign or not any(_is_states(name) or name == HEAD_NAME for name in names):
        raise _not_a_cache(folder, foreign or names)


def _not_a_cache(folder: Path, names: Iterable[str]) -> UserError:
    found = sorted(names)
    shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return _error(folder, f" isn't a teacher cache, it holds {shown}: name an empty folder or a new one")


def _parse_index(text: str) -> tuple[dict[str, Any], dict[str, Any] | None, list[Shard], list[Any]]:
    """Reads facts, head, shards and names that no cache gave; raises Python's own errors for a damaged index."""
    index = json.loads(text)
    head, shards = index["head"], [Shard(**listed) for listed in index["shards"]]
    numbers = [number for shard in shards for number in (shard.size, *shard.counts)]
    numbers += [] if head is None else [head["size"]]
    if not all(isinstance(number, int) for number in numbers):
        raise TypeError("a size that is no number")
    if any(len(shard.keys) != len(shard.counts) for shard in shards):
        raise ValueError("examples without a count")
    foreign = [shard.file for shard in shards if shard.file != _states_name(shard.keys)]
    foreign += [] if head is None or head["file"] == HEAD_NAME else [head["file"]]
    return dict(index["facts"]), head, shards, foreign


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside and renames: a file under its name is complete."""
    beside = path.with_name(f"{path.name}.tmp")
    # Of an interrupted fill, or a link, which writing would follow.
    beside.unlink(missing_ok=True)
    write(beside)
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def _save(tensors: dict[str, Tensor], path: Path, about: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    def write(beside: Path) -> None:
        # In one entry: safetensors writes several in an order that changes from run to run.
        save_file(tensors, beside, {"about": json.dumps(about)})
        # safetensors lets nobody but the owner read its file, and a cache can be shared.
        shutil.copymode(path.with_name(INDEX_NAME), beside)

    _write(path, write)


def _is_complete(path: Path) -> bool:
    """Tells whether a file of tensors is there, as long as its header says. A shard's name says of which examples."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _described(path: Path) -> dict[str, Any]:
    """Describes a file as the index lists it."""
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "size": path.stat().st_size, "sha256": checksum}


def _fault(path: Path, listed: dict[str, Any]) -> str | None:
    """Finds what is wrong with a file of the index, if anything."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != listed["size"]:
        return f"has {path.stat().st_size:,} bytes instead of {listed['size']:,}"
    return None if _described(path) == listed else "has another checksum"


def _shown_size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# ---- The cache


class Filled(NamedTuple):
    """What a fill computed: examples and states of all processes, and seconds without loading the teacher."""

    examples: int
    states: int
    seconds: float


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher whose states a batch has already (see [`~hf_dskd.teacher.source.TeacherSource`])."""

    head: LMHead
    embedding: Tensor
    model: ClassVar[None] = None

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the states that [`TeacherCache.batch`] put there, `[B, R, d_t]`."""
        return batch["teacher_states"]


class TeacherCache:
    """
    A folder with the teacher's last hidden states; made by [`TeacherCache.open`].

    Can be pickled and used in the workers of a `DataLoader`: every process maps the files into memory by itself.

    Attributes:
        folder (`Path`): Where it is.
        facts (`dict[str, Any]`): What the states depend on (see [`cache_facts`]).
        shards (`list[Shard]`): The files of states.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder, self.facts = folder, facts
        self.shards: list[Shard] = []
        self._head: dict[str, Any] | None = None
        self._places: dict[str, tuple[str, int, int]] = {}
        self._mapped: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def __len__(self) -> int:
        """Examples whose states are there."""
        return len(self._places)

    @property
    def hidden_size(self) -> int:
        """Width of a state, d_t."""
        return self.facts["hidden_size"]

    def summary(self, filled: Filled) -> str:
        """Says in one line what is there, and what a fill has added."""
        states = sum(count for _, _, count in self._places.values())
        size = sum(path.stat().st_size for path in self.folder.iterdir() if path.suffix and _is_own(path.name))
        speed = f" ({filled.states / filled.seconds:,.0f} states/s)" if filled.seconds else ""
        return (
            f"{self.folder}: {len(self):,} examples, {states:,} states, {_shown_size(size)}; computed"
            f" {filled.examples:,} examples, {filled.states:,} states in {filled.seconds:.1f} s{speed}"
        )

    @classmethod
    def open(cls, folder: str | Path, facts: dict[str, Any], *, repair: bool = False) -> TeacherCache:
        """
        Opens a cache, or a new one where the folder has none, and compares every file with its checksum.

        Of several processes, all must call it; each reads a share of the files.

        `facts` are those of this run, from [`cache_facts`]. `repair` deletes files that are damaged, so that
        [`~TeacherCache.fill`] makes them again.

        Raises:
            UserError:
                If the cache was written with other facts, a file is damaged and `repair` is false, or the folder
                isn't a cache.
        """
        _check_folder(folder)
        cache = cls(Path(folder), facts)
        cache._read_index(repair)
        cache._verify(repair)
        cache._locate()
        return cache

    def missing(self, dataset: Dataset) -> list[str]:
        """Keys of the examples of a tokenized dataset that have no states yet, in order, each once."""
        return [key for key in _examples({"given": dataset}) if key not in self._places]

    def states(self, key: str) -> Tensor:
        """
        Reads the states of an example, `[r, d_t]` in bfloat16, one per response token: those that predict it.

        They are read from the file as they are used, without a copy of their own.
        """
        from safetensors import safe_open

        file, start, count = self._places[key]
        if file not in self._mapped:
            with safe_open(self.folder / file, "pt") as opened:
                self._mapped[file] = opened.get_tensor("states")
        return self._mapped[file][start : start + count]

    def batch(self, rows: list[dict[str, Any]]) -> Tensor:
        """
        Collects the states of tokenized rows, `[B, R, d_t]` in bfloat16, padded with 0 to the longest response.

        Raises:
            UserError: If an example has none.
        """
        keys = [example_key(row) for row in rows]
        for key, row in zip(keys, rows):
            if key not in self._places:
                raise _error(
                    self.folder,
                    f" has no states of example {row.get('example_id')}: fill it with the same data first (hf-dskd"
                    " cache-teacher)",
                )
        states = [self.states(key) for key in keys]
        longest = max(1, *(len(part) for part in states))
        padded = torch.zeros(len(rows), longest, self.hidden_size, dtype=torch.bfloat16)
        for row, part in zip(padded, states):
            row[: len(part)] = part
        return padded

    def load_head(self, device: torch.device | str = "cpu") -> tuple[LMHead, Tensor]:
        """Loads the teacher's head and input embedding `[V_t, d_t]`, in its dtype; one tensor where they are tied."""
        from safetensors import safe_open

        with safe_open(self.folder / HEAD_NAME, "pt") as file:
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}
            about = json.loads(file.metadata()["about"])
        head = LMHead(tensors["weight"], tensors.get("bias"), about["softcap"], about["scale"])
        return head, head.weight if about["tied"] else tensors["embedding"]

    def fill(
        self,
        datasets: Mapping[str, Dataset | IterableDataset | None],
        load_teacher: Callable[[], PreTrainedModel],
    ) -> Filled:
        """
        Computes the states of the examples that have none.

        The shards that are missing are shared out among the processes, all of which must call it. Those that an
        interrupted fill left are used.

        Args:
            datasets (`dict[str, Dataset]`): Tokenized datasets by the name that messages give them; `None` is none.
            load_teacher (`Callable`): Returns the teacher on its device; called only where something is missing.

        Raises:
            UserError:
                For a dataset without a length, too little space on the disk, a folder that can't be written or that
                another process fills now, or weights that can't be compared with those of the cache.
        """
        from accelerate import PartialState

        examples = _examples(datasets)
        planned = self._plan(examples)
        if self._head is not None and planned == self.shards and all(shard.size is not None for shard in planned):
            return Filled(0, 0, 0.0)
        if self.facts["teacher"] is None:
            raise _error(
                self.folder,
                f" lacks states, and the weights of {self.facts['teacher_name']!r} weren't found on this machine:"
                " download them first, or give a loaded model",
            )
        ranks = PartialState()
        main, seconds = ranks.is_main_process, 0.0
        with self._locked() if main else nullcontext():
            ranks.wait_for_everyone()
            # Another run may have filled it since it was opened.
            self._reload()
            shards = self._plan(examples)
            todo = [shard for shard in shards if shard.size is None and not _is_complete(self.folder / shard.file)]
            states = sum(sum(shard.counts) for shard in todo)
            mine = todo[ranks.process_index :: ranks.num_processes]
            lacks_head = main and self._head is None and not _is_complete(self.folder / HEAD_NAME)
            if main:
                self._prepare(shards, states)
            ranks.wait_for_everyone()
            if mine or lacks_head:
                teacher = Teacher(load_teacher())
                check_head(teacher.model, teacher.head, "teacher")
                start = time.perf_counter()
                if lacks_head:
                    self._write_head(teacher, states)
                self._write_shards(mine, examples, datasets, teacher, main)
                seconds = time.perf_counter() - start
                del teacher
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            ranks.wait_for_everyone()
            if main:
                self._write_index(self._head or _described(self.folder / HEAD_NAME), shards)
            ranks.wait_for_everyone()
        self._reload()
        return Filled(sum(len(shard.keys) for shard in todo), states, seconds)

    # ---- The index

    def _read_index(self, repair: bool) -> None:
        from accelerate import PartialState

        path = self.folder / INDEX_NAME
        if not path.is_file():
            return
        try:
            facts, head, shards, foreign = _parse_index(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError):
            # Only the files beside it tell that it was a cache's.
            _check_own(self.folder)
            if not repair:
                raise _error(self.folder, f" is damaged: {INDEX_NAME} can't be read; {REPAIR}") from None
            # Not before every process has read it.
            PartialState().wait_for_everyone()
            # Without checksums, nothing vouches for the other files.
            for file in self.folder.iterdir():
                if file.name != LOCK_NAME:
                    file.unlink(missing_ok=True)
            return
        if foreign:
            raise _error(
                self.folder,
                f": its {INDEX_NAME} lists {foreign[0]!r}, which no cache wrote for those examples: delete that"
                " folder, or name another",
            )
        check_facts(self.folder, facts, self.facts)
        self.shards, self._head = shards, head

    def _verify(self, repair: bool) -> None:
        from accelerate import PartialState
        from tqdm.auto import tqdm

        ranks = PartialState()
        files: list[dict[str, Any]] = [
            {name: getattr(shard, name) for name in ("file", "size", "sha256")} for shard in self.shards
        ]
        files += [] if self._head is None else [self._head]
        files = files[ranks.process_index :: ranks.num_processes]
        size: int = sum(listed["size"] for listed in files)
        silent = not ranks.is_main_process or size < 1e9
        with tqdm(total=size, unit="B", unit_scale=True, desc="Checking teacher_cache", disable=silent) as bar:
            for listed in files:
                path = self.folder / listed["file"]
                fault = _fault(path, listed)
                if fault is not None and not repair:
                    raise _error(self.folder, f" is damaged: {path.name} {fault}; {REPAIR}")
                if fault is not None:
                    logger.warning("teacher_cache=%r: %s %s and is made again", str(self.folder), path.name, fault)
                    path.unlink(missing_ok=True)
                bar.update(listed["size"])
        ranks.wait_for_everyone()

    def _locate(self) -> None:
        """Notes where each example's states are. Only a repair can have left a shard of the index without its file."""
        if not (self.folder / HEAD_NAME).is_file():
            self._head = None
        self.shards = [
            shard if (self.folder / shard.file).is_file() else replace(shard, size=None, sha256=None)
            for shard in self.shards
        ]
        self._mapped = {}
        self._places = {
            key: (shard.file, start, count)
            for shard in self.shards
            if shard.size is not None
            for key, start, count in zip(shard.keys, accumulate(shard.counts, initial=0), shard.counts)
        }

    def _reload(self) -> None:
        self._read_index(repair=False)
        self._locate()

    def _write_index(self, head: dict[str, Any] | None, shards: list[Shard]) -> None:
        listed = [asdict(shard) | ({} if shard.size else _described(self.folder / shard.file)) for shard in shards]
        index = {"facts": self.facts, "dtype": "bfloat16", "head": head, "shards": listed}
        text = json.dumps(index, indent=1, ensure_ascii=False) + "\n"
        _write(self.folder / INDEX_NAME, lambda path: path.write_text(text, encoding="utf-8"))

    # ---- A fill

    def _plan(self, examples: dict[str, _Example]) -> list[Shard]:
        """Plans all shards after a fill: those of the index in their order, then new ones."""
        kept = [shard for shard in self.shards if shard.size is not None or all(key in examples for key in shard.keys)]
        lost = sum(len(shard.keys) for shard in self.shards) - sum(len(shard.keys) for shard in kept)
        if lost:
            logger.warning(
                "teacher_cache=%r: %d examples of damaged files aren't all in this run's data; they are left out",
                *(str(self.folder), lost),
            )
        known = {key for shard in kept for key in shard.keys}
        return [*kept, *_cut((example for key, example in examples.items() if key not in known), self.hidden_size)]

    def _locked(self) -> Any:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return FileLock(self.folder / LOCK_NAME).acquire(timeout=0)
        except Timeout:
            text = " is being filled by another process: wait for its end, or use another folder"
        except OSError as error:
            text = f" is not writable ({error.strerror}): choose another folder"
        raise _error(self.folder, text)

    def _prepare(self, shards: list[Shard], states: int) -> None:
        self._check_space(states)
        logger.warning(
            "teacher_cache=%r: the teacher's states of %d response tokens are computed, %s",
            *(str(self.folder), states, _shown_size(states * self.hidden_size * 2)),
        )
        # Of an interrupted fill, of the same or of other data.
        planned = {shard.file for shard in shards}
        for path in self.folder.iterdir():
            left_over = path.name.endswith(".tmp") or (_is_states(path.name) and path.name not in planned)
            if left_over and _is_own(path.name):
                path.unlink()
        if not (self.folder / INDEX_NAME).is_file():
            # An interrupted fill must be gone on with under the same facts.
            self._write_index(None, [])

    def _check_space(self, count: int, more: int = 0) -> None:
        needed, free = count * self.hidden_size * 2 + more, shutil.disk_usage(self.folder).free
        if needed > free:
            raise _error(
                self.folder,
                f" needs {_shown_size(needed)} and its disk has {_shown_size(free)} left: free space, or choose a"
                " folder on another disk",
            )

    def _write_head(self, teacher: Teacher, count: int) -> None:
        head, embedding = teacher.head, teacher.embedding
        tied = head.weight.data_ptr() == embedding.data_ptr() and head.weight.shape == embedding.shape
        named = {"weight": head.weight, "bias": head.bias, "embedding": None if tied else embedding}
        tensors = {name: value.detach().cpu().contiguous() for name, value in named.items() if value is not None}
        self._check_space(count, sum(value.nbytes for value in tensors.values()))
        about = {"scale": head.scale, "softcap": head.softcap, "tied": tied}
        _save(tensors, self.folder / HEAD_NAME, about)

    def _write_shards(
        self,
        shards: list[Shard],
        examples: dict[str, _Example],
        datasets: Mapping[str, Any],
        teacher: Teacher,
        shown: bool,
    ) -> None:
        from tqdm.auto import tqdm

        total = sum(sum(shard.counts) for shard in shards)
        tokens = sum(examples[key].length for shard in shards for key in shard.keys)
        start, timed = time.perf_counter(), not shown
        with tqdm(total=total, unit=" states", desc="The teacher's states", disable=not shown) as bar:
            for shard in shards:
                part = [examples[key] for key in shard.keys]
                states = torch.empty(sum(shard.counts), self.hidden_size, dtype=torch.bfloat16)
                places = states.split(shard.counts)
                for batch in _batches(part):
                    for index, rows in zip(batch, _run(teacher, [part[index] for index in batch], datasets)):
                        places[index].copy_(rows)
                        bar.update(len(rows))
                    if not timed:
                        # By tokens, not by states as the bar: prompts take time too.
                        seconds = (time.perf_counter() - start) * tokens / sum(part[index].length for index in batch)
                        duration = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
                        logger.warning("teacher_cache=%r: that takes about %s", str(self.folder), duration)
                        timed = True
                about = {"keys": shard.keys, "counts": shard.counts}
                _save({"states": states}, self.folder / shard.file, about)


def _run(teacher: Teacher, examples: list[_Example], datasets: Mapping[str, Any]) -> list[Tensor]:
    """Computes the teacher's states `[r, d_t]` in bfloat16 of each example of a batch, on the CPU."""
    rows = [datasets[example.split][example.index] for example in examples]
    # A causal model's states don't depend on what comes after them: any token can be padding.
    input_ids = torch.zeros(len(rows), max(example.length for example in examples), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for index, (row, example) in enumerate(zip(rows, examples)):
        input_ids[index, : example.length] = torch.as_tensor(row["teacher_input_ids"])
        attention_mask[index, : example.length] = 1
    with torch.inference_mode():
        hidden = teacher(input_ids, attention_mask)
        parts = [part[torch.from_numpy(_predicting(row)).to(part.device)] for part, row in zip(hidden, rows)]
        states = torch.cat(parts).to(torch.bfloat16).cpu()
    return list(states.split([example.count for example in examples]))
