"""
The papers' evaluation: answers to every set, greedy and sampled with several seeds, and what they are worth.

    OUTPUT_DIR/
      evaluation.json          what is evaluated and how, hardware, versions, seconds
      answers/SET-greedy.jsonl   one JSON object an answer, in the order of the set
      answers/SET-seed10.jsonl   the same, sampled
      references/SET.jsonl       what the model makes of the references: nats, bytes, correct tokens
      scores.json, table.md

Answers are appended as they come, and none that is there is made again: an evaluation that was stopped goes on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..data.prompts import Frame, answer_frame, check_eos
from ..data.tokenization import encode_response
from ..errors import UserError
from ..launch import check_processes
from ..models.causal_lm import base_causal_lm
from ..models.generation import end_token_ids, padding_token_id, read_response, sample
from ..models.pretrained import commit, loading
from ..offline.packaged import model_name
from ..utils.environment import hardware, versions
from ..utils.files import plain, whole_lines, write_json_lines, write_text
from .likelihood import row_likelihoods
from .scores import answer_scores, average, reference_scores
from .sets import PROMPT_STYLES, QuestionSet, load_set, question_tokens
from .table import table


if TYPE_CHECKING:
    from accelerate import PartialState

SETTINGS_NAME = "evaluation.json"
REMEDIES = {
    "the model": "name a model on the hub, a folder or a packaged model",
    "the base model": "name the adapter's with --base_model",
}
DTYPES = ("float32", "bfloat16", "float16", "auto")
# What a model and its tokenizer are read from; a run leaves other files beside them.
MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("*.safetensors", "pytorch_model*.bin", "adapter_model.bin"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
)


@dataclass(frozen=True)
class EvaluationSettings:
    """
    What is evaluated, and how. The defaults are those of the papers, whose scripts also block repeated 6-grams.

    Attributes:
        model: Name or folder of a model or an adapter, or a packaged model.
        output_dir: Where everything is written.
        sets: Names of sets, each with a file or, where it comes from the hub, with `None`.
        base_model: Of an adapter; the one that its config names by default.
        load_in_4bit: Whether to quantize the model to NF4.
        dtype: What the model computes in: one of `DTYPES`. Only in `"float32"` is an answer the same in any batch.
        prompt_style: One of `PROMPT_STYLES` (see [`~hf_dskd.evaluation.sets.question_tokens`]).
        chat_template_kwargs: For the chat template, such as `{"enable_thinking": False}`.
        in_distribution: Sets of the kind that the model was trained on; the others are averaged on their own.
        limit: Takes this many examples of each set, the first ones.
        seeds: Of the sampling; none for greedy answers alone.
        temperature, top_p: Of the sampling.
        no_repeat_ngram_size: No sequence of this many tokens is written twice, prompt included; 0 allows it.
        max_prompt_length: Tokens; of a longer prompt the first ones are taken, as in the papers.
        max_length: Tokens; an answer has room for `max_length - max_prompt_length`, as in the papers.
        batch_size: Answers that are written at a time, of each process.
    """

    model: str
    output_dir: Path
    sets: dict[str, str | None]
    base_model: str | None = None
    load_in_4bit: bool = False
    dtype: str = "float32"
    prompt_style: str = "alpaca"
    chat_template_kwargs: dict[str, Any] | None = None
    in_distribution: tuple[str, ...] = ("dolly",)
    limit: int | None = None
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    temperature: float = 1.0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 6
    max_prompt_length: int = 256
    max_length: int = 512
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("prompt_style", PROMPT_STYLES)):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} {getattr(self, name)!r} is unknown: one of {', '.join(known)}")
        if self.chat_template_kwargs and self.prompt_style != "chat":
            raise UserError(f"--chat_template_kwargs goes with --prompt_style chat, not {self.prompt_style!r}")
        for name in ("limit", "max_prompt_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value} is less than 1: give 1 or more")
        if self.max_length <= self.max_prompt_length:
            raise UserError(
                f"--max_length {self.max_length} leaves no room for answers after prompts of up to --max_prompt_length"
                f" {self.max_prompt_length} tokens: raise the one or lower the other"
            )
        if self.temperature <= 0:
            raise UserError(f"--temperature {self.temperature} is not above 0: use --greedy_only for the likeliest")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p} is no share: give a number above 0, up to 1")
        if self.no_repeat_ngram_size < 0:
            raise UserError(f"--no_repeat_ngram_size {self.no_repeat_ngram_size} is less than 0: 0 allows repeats")
        for option, values in (("seeds", self.seeds), ("in_distribution", self.in_distribution)):
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise UserError(f"--{option} has {twice[0]!r} twice: name it once")
        if min(self.seeds, default=0) < 0 or max(self.seeds, default=0) >= 2**63:
            raise UserError(f"--seeds {','.join(map(str, self.seeds))}: give whole numbers from 0 on, below 2**63")


class Task(NamedTuple):
    """Lines to make for the examples of a set, and where they are written."""

    title: str  # for the progress bar
    path: Path
    lengths: list[int]  # of each example; those of about one length share a batch
    lines: Callable[[list[int]], list[dict[str, Any]]]  # from numbers of examples


@dataclass
class Evaluation:
    """An evaluation in progress, in one process of those that share it."""

    settings: EvaluationSettings
    sets: list[QuestionSet]
    state: PartialState
    # Time it took to make each file, in this run and in those before it that were stopped.
    seconds: dict[str, float] = field(default_factory=dict)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Loads the model's, or that of the base of an adapter which has none beside it."""
        from transformers import AutoTokenizer

        name, base = model_and_base(self.settings)
        if base is not None and not any(Path(name).glob("tokenizer*")):
            name = base
        with loading("the tokenizer of", name, ("tokenizer_config.json", "tokenizer*", "vocab*"), "save it there"):
            tokenizer = AutoTokenizer.from_pretrained(name)
        check_eos(tokenizer, "model")
        return tokenizer

    @functools.cached_property
    def model(self) -> Any:
        """Loads it when the first answer is asked for: a finished evaluation needs none."""
        return load_model(self.settings, self.state.device)

    @functools.cached_property
    def frame(self) -> Frame:
        """Finds what stands around an answer: in chat style what the template puts there."""
        style = "chat" if self.settings.prompt_style == "chat" else "plain"
        return answer_frame(self.tokenizer, style, self.settings.chat_template_kwargs)

    @functools.cached_property
    def prompts(self) -> dict[str, list[list[int]]]:
        """Tokenizes the prompts of each set, whole."""
        style = self.settings.prompt_style, self.settings.chat_template_kwargs
        return {
            questions.name: [question_tokens(self.tokenizer, question, *style) for question in questions.questions]
            for questions in self.sets
        }

    def answers_path(self, questions: QuestionSet, seed: int | None) -> Path:
        """Names the file of the answers to a set: the greedy ones without a seed, else the sampled ones."""
        kind = "greedy" if seed is None else f"seed{seed}"
        return self.settings.output_dir / "answers" / f"{questions.name}-{kind}.jsonl"

    def references_path(self, questions: QuestionSet) -> Path:
        """Names the file of the likelihoods of a set's references."""
        return self.settings.output_dir / "references" / f"{questions.name}.jsonl"

    def answers(self, questions: QuestionSet, seed: int | None) -> Task:
        """Makes the task of answering a set: greedily without a seed, else by sampling."""
        prompts = [prompt[: self.settings.max_prompt_length] for prompt in self.prompts[questions.name]]
        path = self.answers_path(questions, seed)
        lines = functools.partial(self.answer, questions, prompts, seed)
        return Task(path.stem, path, [len(prompt) for prompt in prompts], lines)

    def answer(
        self, questions: QuestionSet, prompts: list[list[int]], seed: int | None, examples: list[int]
    ) -> list[dict[str, Any]]:
        """Writes one line of an answers file for each of `examples`, in one batch."""
        from transformers import GenerationConfig

        settings, tokenizer = self.settings, self.tokenizer
        ends = end_token_ids(tokenizer, base_causal_lm(self.model).generation_config, self.frame.end[-1])
        config = GenerationConfig(no_repeat_ngram_size=settings.no_repeat_ngram_size)
        if seed is not None:
            config.update(do_sample=True, temperature=settings.temperature, top_p=settings.top_p, top_k=0)
        responses = sample(
            self.model,
            [prompts[example] for example in examples],
            pad_token_id=padding_token_id(tokenizer),
            eos_token_ids=ends,
            max_new_tokens=settings.max_length - settings.max_prompt_length,
            generation_config=config,
            seed=seed,
            example_ids=examples,
            batch_size=len(examples),
        )
        read = [read_response(tokenizer, response, ends, self.frame) for response in responses]
        return [
            {
                "example": example,
                "prompt": tokenizer.decode(prompts[example], clean_up_tokenization_spaces=False),
                "response": text,
                "references": questions.questions[example].references,
                "tokens": len(response),
                "finished": finished,
            }
            for example, response, (text, finished) in zip(examples, responses, read)
        ]

    def references(self, questions: QuestionSet) -> Task:
        """Makes the task of reading a set's references after whole prompts."""
        prompts = self.prompts[questions.name]
        lengths = [
            len(prompt) + max(len(text.encode()) for text in question.references)
            for prompt, question in zip(prompts, questions.questions)
        ]
        lines = functools.partial(self.reference_likelihoods, questions, prompts)
        return Task(f"{questions.name} references", self.references_path(questions), lengths, lines)

    def reference_likelihoods(
        self, questions: QuestionSet, prompts: list[list[int]], examples: list[int]
    ) -> list[dict[str, Any]]:
        """Computes one line for each of `examples`: sums over its references."""
        # Not `max_length`: where a tokenization has more tokens, another text would be cut away.
        room = getattr(base_causal_lm(self.model).config.get_text_config(), "max_position_embeddings", None) or 2**31
        lines = {
            example: {"example": example, "nats": 0.0, "bytes": 0, "correct": 0, "tokens": 0, "cut": 0, "skipped": 0}
            for example in examples
        }
        rows: list[dict[str, Any]] = []
        for example in examples:
            for text in questions.questions[example].references:
                of_model: tuple[Any, Any] = {"student": prompts[example]}, {"student": self.tokenizer}
                row = encode_response(*of_model, text, room, example_id=example, frames={"student": self.frame})
                if row is None:
                    lines[example]["skipped"] += 1
                else:
                    lines[example]["cut"] += row["cut"]
                    rows.append(row)
        rows.sort(key=lambda row: -len(row["input_ids"]))
        for start in range(0, len(rows), self.settings.batch_size):
            batch = rows[start : start + self.settings.batch_size]
            for row, found in zip(batch, row_likelihoods(self.model, batch)):
                for name, value in found._asdict().items():
                    lines[row["example_id"]][name] += value
        return [{**line, "nats": round(line["nats"], 3)} for line in lines.values()]

    def tasks(self) -> Iterable[Task]:
        """Yields set by set its references, the greedy answers, those of each seed."""
        for questions in self.sets:
            yield self.references(questions)
            for seed in (None, *self.settings.seeds):
                yield self.answers(questions, seed)

    def fill(self, task: Task, number: int, count: int) -> None:
        """
        Makes the lines that a task still lacks.

        Batches are the same whatever is there already, and each belongs to one process. With several of them, each
        appends to a file of its own, and the first one puts these together in the end.
        """
        from tqdm.auto import tqdm

        rank, world = self.state.process_index, self.state.num_processes
        begin, done = time.perf_counter(), read_lines(task.path)
        own = task.path if world == 1 else task.path.with_suffix(f".part{rank}.jsonl")
        size, order = self.settings.batch_size, sorted(range(len(task.lengths)), key=lambda i: (-task.lengths[i], i))
        batches = [order[start : start + size] for start in range(0, len(order), size)][rank::world]
        bar = tqdm(
            total=sum(map(len, batches)),
            desc=f"{task.title} ({number}/{count})",
            disable=not self.state.is_main_process,
        )
        own.parent.mkdir(parents=True, exist_ok=True)
        whole_lines(own)
        with bar, own.open("a", encoding="utf-8", newline="\n") as file:
            for batch in batches:
                # The whole batch even where a part is there: rounding may depend on what else is in it.
                if not done.keys() >= set(batch):
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in task.lines(batch))
                    file.flush()
                bar.update(len(batch))
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            merge(task.path)
            name = task.path.relative_to(self.settings.output_dir).as_posix()
            if len(done) < len(order):
                self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begin, 1)
        self.state.wait_for_everyone()

    def scores(self) -> dict[str, Any]:
        """Collects everything that `scores.json` says, from the files."""
        sets = {questions.name: self.set_scores(questions) for questions in self.sets}
        inside = [name for name in sets if name in self.settings.in_distribution]
        outside = [name for name in sets if name not in inside]
        groups = {"in_distribution": inside, "out_of_distribution": outside, "all": list(sets)}
        return {
            "model": self.settings.model,
            "settings": how(self.settings),
            "sets": sets,
            "averages": {
                group: {"sets": names, **average([sets[name] for name in names])}
                for group, names in groups.items()
                if names
            },
        }

    def set_scores(self, questions: QuestionSet) -> dict[str, Any]:
        """Scores one set."""
        found = {
            seed: list(read_lines(self.answers_path(questions, seed)).values())
            for seed in (None, *self.settings.seeds)
        }
        longest = self.settings.max_prompt_length
        seeds = self.settings.seeds
        sampled = {"sampled": answer_scores([found[seed] for seed in seeds])} if seeds else {}
        return {
            "source": questions.source,
            "examples": len(questions.questions),
            "prompts_cut": sum(len(prompt) > longest for prompt in self.prompts[questions.name]),
            **reference_scores(read_lines(self.references_path(questions)).values()),
            "greedy": answer_scores([found[None]]),
            **sampled,
        }


def evaluate(settings: EvaluationSettings) -> dict[str, Any]:
    """
    Runs the whole evaluation, or the rest of one that was stopped; writes `scores.json` and `table.md`.

    Returns:
        `dict`: the content of `scores.json`; empty in processes other than the first.

    Raises:
        UserError: For sets or models that can't be had, and for a folder with an evaluation of something else.
    """
    from accelerate import PartialState

    check_own(settings.output_dir)
    sets = [load_set(name, path, settings.limit) for name, path in settings.sets.items()]
    # Without being told, accelerate takes several processes on a CPU for as many single ones.
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_processes(state.num_processes)
    run = Evaluation(settings, sets, state)
    evaluated = facts(settings, sets)
    known = settings.output_dir / SETTINGS_NAME
    if known.is_file():
        before = read_known(known)
        check_facts(settings.output_dir, before["evaluated"], evaluated)
        run.seconds.update(before["seconds"])
    # Before a process writes what another one still has to look for.
    state.wait_for_everyone()

    def note() -> None:
        about = {"hardware": hardware(state.num_processes), "versions": versions(), "seconds": run.seconds}
        write(known, {"model": settings.model, "evaluated": evaluated, **about})

    if state.is_main_process:
        note()
    count = len(sets) * (2 + len(settings.seeds))
    for number, task in enumerate(run.tasks(), start=1):
        run.fill(task, number, count)
        if state.is_main_process:
            note()
    if not state.is_main_process:
        return {}
    scores = run.scores()
    write(settings.output_dir / "scores.json", scores)
    write_text(settings.output_dir / "table.md", table(scores))
    return scores


def write(path: Path, content: Any) -> None:
    """Writes JSON with its characters as they are."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# ---- Models


def model_and_base(settings: EvaluationSettings) -> tuple[str, str | None]:
    """Finds name or folder of the model, and of its base where it is an adapter."""
    name = str(model_name(settings.model))
    adapter = Path(name) / "adapter_config.json"
    if not adapter.is_file():
        if settings.base_model is not None:
            raise UserError(
                f"--base_model {settings.base_model!r}: --model {settings.model!r} is no folder of an adapter (without"
                " adapter_config.json); leave --base_model out"
            )
        return name, None
    base = settings.base_model or json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(f"adapter {name!r} doesn't say what it adapts: name it with --base_model")
    return name, str(model_name(base))


def load_model(settings: EvaluationSettings, device: torch.device) -> Any:
    """Loads the model on its device, in eval mode."""
    from transformers import AutoConfig, GenerationConfig

    from ..models.causal_lm import check_config
    from ..teacher.load import check_four_bit_shapes, four_bit_config, load_causal_lm

    name, base = model_and_base(settings)
    dtype: Any = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    role, full = ("the model", name) if base is None else ("the base model", base)
    with loading(role, full, ("config.json",), REMEDIES[role]):
        config = AutoConfig.from_pretrained(full)
    check_config(config, full, role)
    quantization = None
    if settings.load_in_4bit:
        quantization = four_bit_config(torch.bfloat16 if dtype == "auto" else dtype, "--load_in_4bit")
        if device.type == "cpu":
            check_four_bit_shapes(config, full, "--load_in_4bit")
    with loading(role, full, ("config.json",), REMEDIES[role]):
        model = load_causal_lm(full, quantization_config=quantization, device=device, dtype=dtype)
    if base is not None:
        from peft import PeftModel

        with loading("the adapter", name, ("adapter_config.json",), "save it anew"):
            model = PeftModel.from_pretrained(model, name)
            if (Path(name) / "generation_config.json").is_file():
                # The adapter may have been taught to stop at other tokens than its base.
                base_causal_lm(model).generation_config = GenerationConfig.from_pretrained(name)
    if quantization is None:
        model.to(device)
    return model.eval()


# ---- What is evaluated


def how(settings: EvaluationSettings) -> dict[str, Any]:
    """Lists the settings that answers depend on, as JSON has them."""
    others = ("model", "base_model", "output_dir", "sets", "in_distribution", "batch_size")
    return {name: plain(value) for name, value in asdict(settings).items() if name not in others}


def facts(settings: EvaluationSettings, sets: list[QuestionSet]) -> dict[str, Any]:
    """Collects what answers depend on; an evaluation may go on with another batch size, from a folder that moved."""
    name, base = model_and_base(settings)
    models = {"model": name} if base is None else {"adapter": name, "base model": base}
    files = {
        f"{role}: {file}": digest
        for role, place in models.items()
        for file, digest in model_files(place, f"the {role}")
    }
    data = {f"set {questions.name}": f"sha256 {questions.sha256}" for questions in sets}
    return {**how(settings), **data, **files}


def model_files(name: str, role: str = "the model") -> list[tuple[str, str]]:
    """Lists the files of a model's folder with their sha256; for a model on the hub, its revision."""
    folder = Path(name)
    if not folder.is_dir():
        from transformers import AutoConfig

        with loading(role, name, (), REMEDIES[role]):
            AutoConfig.from_pretrained(name)  # which fetches it
            return [(name, str(commit(name)))]
    found = []
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}):
        with path.open("rb") as file:
            found.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return found


def check_facts(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a [`UserError`] that names what differs from the evaluation in a folder."""
    changed = [
        f"{name} was {then.get(name, 'not there')!r} and is {now.get(name, 'not there')!r} now"
        for name in {**then, **now}
        if then.get(name, ...) != now.get(name, ...)
    ]
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"{folder} has an evaluation of something else: {'; '.join(changed[:3])}{more}. Choose another"
            f" --output_dir, or delete {folder}"
        )


# ---- Files of lines


def check_own(folder: Path) -> None:
    """Raises a [`UserError`] if an evaluation would write over, or go on with, what isn't of one."""
    there = [name for name in ("answers", "references", "scores.json", "table.md") if (folder / name).exists()]
    if there and not (folder / SETTINGS_NAME).is_file():
        raise UserError(
            f"--output_dir {str(folder)!r} has {', '.join(there)} but no {SETTINGS_NAME}, which says of what:"
            " choose another folder"
        )


def read_known(path: Path) -> dict[str, Any]:
    """Reads what an evaluation before this one in the folder was of."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"evaluated": dict(found["evaluated"]), "seconds": dict(found["seconds"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{str(path)!r} isn't what `hf-dskd evaluate` writes: choose another --output_dir") from None


def parts(path: Path) -> list[Path]:
    """Lists the file itself and those that processes have written beside it."""
    pattern = re.compile(rf"{re.escape(path.stem)}\.part\d+\.jsonl")
    return [path, *sorted(part for part in path.parent.glob("*.jsonl") if pattern.fullmatch(part.name))]


def read_lines(path: Path) -> dict[int, dict[str, Any]]:
    """Reads the whole lines of a file and of the parts beside it, by their example, in the order of the examples."""
    lines: dict[int, dict[str, Any]] = {}
    for part in filter(Path.is_file, parts(path)):
        for number, line in enumerate(part.read_bytes().splitlines(keepends=True), start=1):
            if line.endswith(b"\n"):
                try:
                    content = json.loads(line)
                except ValueError:
                    raise UserError(f"{part}, line {number} is damaged: delete the line") from None
                lines[content["example"]] = content
    return dict(sorted(lines.items()))


def merge(path: Path) -> None:
    """Puts the parts of a file together, in the order of the examples."""
    write_json_lines(path, read_lines(path).values())
    for part in parts(path)[1:]:
        part.unlink()
