"""A whole run: the trainer that its settings ask for, training, evaluation, and what there is to look at."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..offline.packaged import model_name
from ..report.record import differences, evaluations
from ..training.run_folder import RESULT_NAME, SETTINGS_NAME, check_fresh, held
from ..utils.files import read_yaml, write_json_lines, write_yaml
from .arguments import parse, variant
from .data import load_data
from .settings import Run
from .teacher import chosen_teacher


if TYPE_CHECKING:
    from datasets import Dataset

    from ..trainer import DSKDTrainer


def make_trainer(
    run: Run, student: str | None, teacher: str | None, train: Dataset, held_out: Dataset | None, **options: Any
) -> DSKDTrainer:
    """Makes the trainer of a run; `options` go to [`DSKDTrainer`]."""
    from trl import get_peft_config

    from ..trainer import DSKDTrainer
    from .trl_settings import quantization, student_options, teacher_options, without_place

    config = run.config
    config.model_init_kwargs = student_options(run)
    config.teacher_model_init_kwargs = teacher_options(run)
    if run.options.sft_teacher:
        config.teacher_model_init_kwargs = without_place(config.teacher_model_init_kwargs)
    targets = run.model.lora_target_modules
    if isinstance(targets, str) and re.fullmatch(r"\w+", targets):
        # trl makes a word of a list of one, and peft reads that as a pattern for a module's whole name.
        run.model.lora_target_modules = [targets]
    if held_out is None and config.eval_strategy != "no":
        raise UserError(
            f"eval_strategy={getattr(config.eval_strategy, 'value', 'no')!r} but there is nothing to evaluate on: set"
            " held_out_size"
        )
    try:
        peft_config = get_peft_config(run.model)
    except ValueError as error:
        raise UserError(f"the adapter's settings: {' '.join(str(error).split())}") from error
    return DSKDTrainer(
        student,  # type: ignore[arg-type]  # None is refused with a remedy
        teacher,
        config,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=peft_config,
        quantization_config=quantization(run.model, config.training_dtype),
        **options,
    )


def train(run: Run) -> None:
    """Does a whole run: data, models, training, evaluation, record, report, push; prints the files to look at."""
    folder = Path(str(run.config.output_dir))
    if not run.config.resume_from_checkpoint:
        check_fresh(folder)
    student = model_name(run.model.model_name_or_path)
    if run.config.push_to_hub and run.options.sft_teacher and run.config.process_index == 0:
        from ..hub.identity import identity
        from ..hub.push import check_training

        # The trainer asks as well, but is made when the teacher is there.
        check_training(run.config, identity(student, run.model.use_peft, run.config.method))
    examples, held_out = load_data(run)
    # From here on, and not from the first step: a teacher's training is written there too.
    with held(folder) if run.config.process_index == 0 else nullcontext():
        _train(run, folder, student, examples, held_out)


def _train(run: Run, folder: Path, student: str | None, examples: Any, held_out: Any) -> None:
    teacher = chosen_teacher(run, examples)
    settings = changed_settings(run)
    trainer = make_trainer(run, student, teacher, examples, held_out)
    _note_settings(trainer, folder / SETTINGS_NAME, settings)
    distil(run, trainer)
    if trainer.is_world_process_zero():
        for path in [folder, folder / RESULT_NAME, *show(trainer, folder)]:
            print(path)
    if run.config.push_to_hub:
        pushed = trainer.push_to_hub()
        if pushed is not None:
            print(pushed.commit_url)


def _note_settings(trainer: DSKDTrainer, path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings when training begins: a run that is refused leaves those of the one that is there."""
    from transformers import TrainerCallback

    class Write(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                write_yaml(path, settings)

    trainer.add_callback(Write())


def distil(run: Run, trainer: DSKDTrainer) -> Path:
    """
    Trains (from a checkpoint where that is asked for), saves the student, and evaluates it. `result.json` comes last:
    a folder that has it is complete.
    """
    folder = Path(str(run.config.output_dir))
    output = trainer.train(resume_from_checkpoint=run.config.resume_from_checkpoint)
    # As a user's own call it would push, and the model card isn't there yet.
    trainer.save_model(_internal_call=True)
    metrics: dict[str, float] = {}
    # Before the evaluation below, whose model may be the best of the run, not the last one.
    history = evaluations(trainer.state.log_history)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        if trainer.samples:
            write_json_lines(trainer.analysis_folder / "samples.jsonl", trainer.samples)
        runtime = output.metrics.get("train_runtime")
        record = trainer.run_record(metrics, history, runtime, run.script.dataset_name)
        record.write(folder / RESULT_NAME)
    return folder


def changed_settings(run: Run) -> dict[str, Any]:
    """Collects all settings of a run that aren't at their default: as a configuration file they make the same run."""
    from .trl_settings import unused

    changed: dict[str, Any] = {}
    for part in (run.script, run.model, run.options, run.config):
        changed |= {name: value for name, (_, value) in differences(part).items()}
    # Beside a use_peft that was switched off, the rest of a recipe's adapter would be refused.
    return {name: value for name, value in changed.items() if name not in unused(run.model)}


def show(trainer: DSKDTrainer, folder: Path, example: int = 0) -> list[Path]:
    """
    Writes the report and, where the run made no analyses, a picture of the alignment of a held-out example. Returns
    the files.
    """
    from ..analysis.heatmap import cross_attention, plot_attention
    from ..hub.card import write_own_card
    from ..report.one import write_report

    pictures = []
    rows: Any = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if trainer.args.method_row.has_alignment and trainer.args.analysis_steps is None:
        pictures.append(folder / "alignment.png")
        plot_attention([cross_attention(trainer.distiller, rows[example])], pictures[-1])
    write_own_card(folder, trainer.args.hub_model_id)
    return [*pictures, write_report(folder)]


def analyse(folder: Path, settings: Path, examples: int, output_dir: Path) -> None:
    """
    Analyses the alignment of a run or of a checkpoint of it, whose configuration file is `settings`.

    It takes that many of the held-out examples, or else of the training examples, writes numbers and pictures (see
    [`hf_dskd.analysis.record`]) and prints the numbers and the files.
    """
    from ..analysis.record import probe_rows, record
    from ..training.run_folder import check_analysed

    check_analysed(folder)
    run = parse(None, None, ["--config", str(settings), "--output_dir", str(output_dir)])
    train_data, held_out = load_data(run)
    rows = train_data if held_out is None else held_out
    few = probe_rows(rows, examples)
    # Nothing is trained here: the few examples need not fill a batch.
    nothing = {"save_strategy": "no", "load_best_model_at_end": False, "dataloader_drop_last": False}
    run.config = variant(run.config, eval_strategy="no", **nothing)
    if run.options.sft_teacher:
        teacher: str | None = str(Path(read_yaml("--config", settings)["output_dir"]) / "teacher")
    else:
        teacher = model_name(run.options.teacher_model_name_or_path)
    from datasets import Dataset

    data = Dataset.from_list(few)
    trainer: Any = make_trainer(run, model_name(run.model.model_name_or_path), teacher, data, None)
    trainer.load_trained(folder)
    rows, step = [dict(row) for row in trainer.train_dataset], trainer.state.global_step
    progress = step / max(trainer.state.max_steps, 1)
    numbers = record(trainer.distiller, rows, output_dir, True, step, progress)
    width = max(map(len, numbers))
    for name, value in numbers.items():
        print(f"{name:{width}}  {value:.6g}")
    print(output_dir / f"step-{trainer.state.global_step}")
