"""Data before training: the teacher's own responses, and one tokenization for each of the two models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..alignment.byte_prefix import byte_tables
from ..alignment.min_edit import partners
from ..alignment.spans import answer_spans
from ..data.collator import DualCollator
from ..data.kinds import as_dataset
from ..data.tokenization import TokenizationReport, is_tokenized, tokenize_dataset
from ..data.tokenized import check_tokenized
from ..errors import UserError
from ..models.pretrained import options_of
from ..teacher.responses import write_responses
from .arguments import check_collator
from .published import padded_length


if TYPE_CHECKING:
    from torch import Tensor

    from ..config import DSKDConfig
    from ..teacher.cache import TeacherCache
    from .pair import Pair

logger = logging.getLogger(__name__)


def written_by_teacher(dataset: Any, pair: Pair) -> Any:
    """Returns the same prompts with the teacher's responses, written once into the output folder (`seq_kd`)."""
    if dataset is None:
        return None
    args, teacher = pair.args, pair.teacher
    assert teacher is not None
    if is_tokenized(dataset):
        raise UserError(
            f"method={args.method!r} needs prompts as text for the teacher to answer, and the train data is"
            " already tokenized: pass the text"
        )
    if not hasattr(dataset, "__len__"):
        raise UserError(
            f"method={args.method!r} needs all prompts before training for the teacher to answer, and"
            f" train_dataset is a {type(dataset).__name__}: pass a datasets.Dataset"
        )
    with args.main_process_first(desc="teacher's responses"):
        return write_responses(
            dataset,
            pair.load_teacher,
            teacher.tokenizer,
            Path(str(args.output_dir)) / "teacher_responses",
            max_length=args.max_length,
            prompt_style=args.prompt_style,
            chat_template_kwargs=options_of(args.chat_template_kwargs),
            prompt_column=args.prompt_column,
            response_column=args.response_column,
            on_bad_row=args.on_bad_row,
            facts={
                "teacher": teacher.short_name,
                "dtype": args.training_dtype if args.teacher_dtype == "auto" else args.teacher_dtype,
                "load_in_4bit": args.load_teacher_in_4bit,
            },
        )


class Preparation:
    """
    Makes of datasets what a run reads: tokens of both models and, where there is a cache, the teacher's states.

    With `aligned` it also finds partners of tokens, where the method needs them. `reports` says what was cut or
    skipped, by split.
    """

    def __init__(self, pair: Pair, cache: TeacherCache | None = None, aligned: bool = True):
        self.pair, self.cache, self.args, self.frames = pair, cache, pair.args, pair.frames
        self.reports: dict[str, TokenizationReport] = {}
        self.student, self.teacher = pair.tokenizers
        found = pair.vocabulary_map if aligned else None
        self.partners = None if found is None else _Partners(self.student, self.teacher, found)

    def begin(self, train: Any, evaluation: Any, collator: Any = None) -> tuple[Any, Any]:
        """
        Prepares the data of a run, whose training data the teacher writes first where the method says so.

        A `collator` of the user's is tried on them.
        """
        if self.args.method_row.text == "teacher":
            train = written_by_teacher(train, self.pair)
        splits = {"eval": evaluation}
        if isinstance(evaluation, dict):
            splits = {f"eval_{name}": split for name, split in evaluation.items()}
        with self.args.main_process_first(desc="tokenization"):
            train = self.tokenize(train, "train")
            splits = {name: self.tokenize(split, name) for name, split in splits.items()}
        if train is not None:
            check_steps(self.args, train)
        if collator is not None:
            check_collator(collator, train, self.args.method_row.needs_teacher)
        if self.cache is not None:
            self.cache.fill({"train": train, **splits}, self.pair.load_teacher)
        if isinstance(evaluation, dict):
            return train, dict(zip(evaluation, splits.values()))
        return train, splits["eval"]

    def later(self, dataset: Any, parameter: str, split: str) -> Any:
        """Tokenizes data that a run is given to evaluate on later, as `parameter`, and fills the cache with them."""
        dataset = self.tokenize(as_dataset(dataset, parameter), split)
        if self.cache is not None:
            self.cache.fill({split: dataset}, self.pair.load_teacher)
        return dataset

    def collator(self) -> DualCollator:
        """Returns the collator of the tokens and states."""
        tables = None
        if "bytes" in self.args.method_row.all_needs:
            tables = byte_tables(self.student, self.teacher, self.args.bpm_segmentation)
        return DualCollator(
            student_pad_token_id=self.student.pad_token_id,
            teacher_pad_token_id=None if self.teacher is None else self.teacher.pad_token_id,
            pad_to_length=padded_length(self.args),
            teacher_states=None if self.cache is None else self.cache.batch,
            prefix_plan=None if tables is None else tables.plan,
        )

    def tokenize(self, dataset: Any, split: str) -> Any:
        """Tokenizes a dataset for both models unless that has been done, and keeps what was cut or skipped."""
        if dataset is not None and is_tokenized(dataset):
            both = {"": self.student, "teacher_": self.teacher}
            both = {prefix: tokenizer for prefix, tokenizer in both.items() if tokenizer is not None}
            dataset = check_tokenized(dataset, split, both, self.args.max_length)
        elif dataset is not None:
            written = self.args.method_row.text == "teacher" and split == "train"
            dataset, report = tokenize_dataset(
                dataset,
                self.student,
                self.teacher,
                # A response that the teacher had no room to end doesn't end for the student either.
                finished_column="finished" if written else None,
                # The teacher writes the last answer; the released code has no other.
                train_on="last" if written or self.args.as_published else self.args.train_on,
                on_bad_row=self.args.on_bad_row,
                max_length=self.args.max_length,
                prompt_style=self.args.prompt_style,
                chat_template_kwargs=options_of(self.args.chat_template_kwargs),
                prompt_column=self.args.prompt_column,
                response_column=self.args.response_column,
                skip_long_prompts=self.args.skip_long_prompts,
                num_proc=self.args.dataset_num_proc,
                description=split,
            )
            if report is not None:
                self.reports[split] = report
                logger.log(logging.WARNING if report.remarkable else logging.INFO, "%s: %s", split, report)
        check_columns(self.args, dataset, split)
        columns = getattr(dataset, "column_names", None) or []
        if dataset is not None and self.partners is not None and "partners" not in columns:
            options = {"desc": f"Aligning {split}"} if hasattr(dataset, "__len__") else {}
            dataset = dataset.map(self.partners, **options)
        return dataset


class _Partners:
    """Finds the teacher's token for each of the student's by edit distance (`min_edit`), once per example."""

    def __init__(self, student: Any, teacher: Any, vocabulary_map: Tensor):
        self.student, self.teacher, self.vocabulary_map = student, teacher, vocabulary_map

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        found: list[int] = []
        before = 0
        for (start, stop), (first, last) in zip(answer_spans(row), answer_spans(row, "teacher_")):
            ids, teacher_ids = row["input_ids"][start:stop], row["teacher_input_ids"][first:last]
            places = partners(ids, teacher_ids, self.student, self.teacher, self.vocabulary_map)
            found += [index + before if index >= 0 else -1 for index in places]
            before += last - first
        return {"partners": found}


def check_columns(config: DSKDConfig, dataset: Any, split: str) -> None:
    """Checks that an alignment through the text has it: data tokenized elsewhere may not say what tokens cover."""
    columns = getattr(dataset, "column_names", None) or []
    row = config.method_row
    if row.needs_chunks and columns and "chunk_ids" not in columns:
        raise UserError(
            f"method={config.method!r} aligns tokens by the bytes of the text that they cover, and the {split} data"
            " has no column chunk_ids: pass the text (prompt and response) instead of tokens, or tokenize it with"
            " hf_dskd.tokenize_dataset"
        )
    if config.attention_kd_rate and columns and "chunk_ids" not in columns:
        raise UserError(
            f"attention_kd_rate={config.attention_kd_rate} compares attention over the bytes of the text, and the"
            f" {split} data has no column chunk_ids: pass the text instead of tokens, or tokenize it with"
            " hf_dskd.tokenize_dataset"
        )


def check_steps(config: DSKDConfig, train_dataset: Any) -> None:
    """
    Refuses a run in which no optimizer step would be taken; a stream's length isn't known before it ends.

    Of too few micro-batches for `gradient_accumulation_steps` Trainer makes a step all the same.
    """
    if config.max_steps < -1 or config.max_steps == 0:
        raise UserError(
            f"max_steps={config.max_steps} takes no step: set it to 1 or more, or to -1 for num_train_epochs; pass no"
            " train_dataset to evaluate only"
        )
    if config.max_steps < 0 and not config.num_train_epochs > 0:
        raise UserError(
            f"num_train_epochs={config.num_train_epochs} takes no step: set it above 0, or max_steps to 1 or more;"
            " pass no train_dataset to evaluate only"
        )
    if not hasattr(train_dataset, "__len__"):
        return
    rows = len(train_dataset)
    if not rows:
        raise UserError("train_dataset has no examples: nothing would be trained; pass some")
    shared = getattr(config.accelerator_config, "split_batches", False)
    processes = 1 if shared else config.world_size
    if config.dataloader_drop_last and rows < config.train_batch_size * processes:
        batch = f"per_device_train_batch_size={config.per_device_train_batch_size}"
        if processes > 1:
            batch += f" on {processes} processes"
        raise UserError(
            f"dataloader_drop_last=True drops all of {rows} examples, fewer than {batch}: set it to False, or smaller"
            " batches"
        )
