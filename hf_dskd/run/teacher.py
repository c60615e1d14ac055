"""The teacher of a run: named, trained on the same data first, or with its hidden states on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..offline.packaged import model_name
from ..training.run_folder import checkpoints
from ..utils.files import write_json
from .arguments import variant
from .data import load_data
from .settings import Run


if TYPE_CHECKING:
    from datasets import Dataset

    from ..config import DSKDConfig

# What a teacher that was trained first is made of.
TEACHER_NAME = "sft_teacher.json"


def train_teacher(run: Run, teacher: str, train: Dataset) -> str:
    """
    Trains the teacher on the same data first, as the papers' teachers were, and returns its folder.

    Done once: a folder that is complete is used again, if it was made of the same.
    """
    from ..trainer import DSKDTrainer

    folder, facts = Path(str(run.config.output_dir)) / "teacher", teacher_facts(run, teacher, train)
    if folder.exists():
        check_trained_teacher(folder, facts)
        print(f"using the teacher trained before: {folder}")
        return str(folder)
    training = folder.with_name("teacher_training")
    rank, adapter = run.options.sft_teacher_lora_r, None
    if rank:
        from peft import LoraConfig

        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    config = _config(run, training)
    trainer = DSKDTrainer(teacher, args=config, train_dataset=train, peft_config=adapter)
    trainer.train(resume_from_checkpoint=bool(checkpoints(training)))
    if trainer.is_world_process_zero():
        model: Any = trainer.model
        if adapter is not None:
            model = model.merge_and_unload()
        beside = folder.with_name(".teacher")
        model.save_pretrained(beside)
        trainer.processing_class.save_pretrained(beside)  # type: ignore[union-attr]
        write_json(beside / TEACHER_NAME, facts)
        beside.rename(folder)
    trainer.accelerator.wait_for_everyone()
    return str(folder)


def _config(run: Run, output_dir: Path) -> DSKDConfig:
    from .trl_settings import teacher_options

    options = run.options
    return variant(
        run.config,
        output_dir=str(output_dir),
        method="sft",
        num_train_epochs=options.sft_teacher_epochs,
        max_steps=-1,
        learning_rate=options.sft_teacher_learning_rate,
        load_teacher_in_4bit=False,
        eval_strategy="no",
        load_best_model_at_end=False,
        push_to_hub=False,
        model_init_kwargs={
            **{name: value for name, value in teacher_options(run).items() if name != "torch_dtype"},
            "dtype": "bfloat16" if options.sft_teacher_lora_r and run.config.bf16 else "float32",
        },
        teacher_model_init_kwargs=None,
    )


def teacher_facts(run: Run, teacher: str, train: Dataset) -> dict[str, Any]:
    """Collects what a teacher that is trained first depends on, in values of JSON."""
    options = ("sft_teacher_epochs", "sft_teacher_learning_rate", "sft_teacher_lora_r", "teacher_model_revision")
    return {
        "teacher": Path(teacher).resolve().name if Path(teacher).is_dir() else teacher,
        "dataset_name": run.script.dataset_name,
        "rows": len(train) if hasattr(train, "__len__") else None,
        **{name: getattr(run.options, name) for name in options},
        **{name: getattr(run.config, name) for name in ("seed", "max_length", "prompt_style")},
    }


def check_trained_teacher(folder: Path, facts: dict[str, Any]) -> None:
    """Raises a [`UserError`] unless a folder holds a teacher that was trained with these facts."""
    path = folder / TEACHER_NAME
    if not path.is_file():
        raise UserError(
            f"sft_teacher=True trains into {str(folder)!r}, which is there and holds no teacher of a run (no"
            f" {TEACHER_NAME}): move it, or choose another output_dir"
        )
    known = json.loads(path.read_text(encoding="utf-8"))
    for name, value in facts.items():
        if known.get(name) != value:
            raise UserError(
                f"{str(folder)!r} holds a teacher that was trained with {name}={known.get(name)!r}, which is now"
                f" {value!r}: move it, or choose another output_dir"
            )


def chosen_teacher(run: Run, train: Dataset) -> str | None:
    """Gives the teacher's name or folder; with `sft_teacher` trains it on the data first."""
    teacher = model_name(run.options.teacher_model_name_or_path)
    if not run.options.sft_teacher:
        return teacher
    if teacher is None:
        raise UserError("sft_teacher=True trains a teacher, but there is none: set teacher_model_name_or_path")
    return train_teacher(run, teacher, train)


def cache_teacher(run: Run) -> None:
    """
    Fills the cache of the teacher's hidden states with the training and the held-out examples, and prints what it has.

    The data go through the checks and the tokenization of a training run; of the models only the teacher is loaded.
    """
    from accelerate import PartialState

    from ..training.arguments import check_launch
    from ..training.pair import Pair
    from ..training.prepare import Preparation
    from .trl_settings import student_options, teacher_options, without_place

    config = run.config
    if not config.method_row.needs_teacher:
        raise UserError(
            f"method={config.method!r} runs no teacher while it trains: name a method that does, such as dskd_cma"
        )
    examples, held_out = load_data(run)
    student, teacher = model_name(run.model.model_name_or_path), chosen_teacher(run, examples)
    check_launch(config)
    config.model_init_kwargs, config.teacher_model_init_kwargs = student_options(run), teacher_options(run)
    if run.options.sft_teacher:
        config.teacher_model_init_kwargs = without_place(config.teacher_model_init_kwargs)
    pair = Pair(config, student, teacher)
    tokenize = Preparation(pair, aligned=False).tokenize
    with config.main_process_first(desc="tokenization"):
        datasets = {"train": tokenize(examples, "train"), "eval": tokenize(held_out, "eval")}
    cache = pair.open_cache(config.teacher_cache or Path(str(config.output_dir)) / "teacher_cache")
    assert cache is not None
    filled = cache.fill(datasets, pair.load_teacher)
    if PartialState().is_main_process:
        print(cache.summary(filled))
