"""Looks on while a run trains: an analysis before, every `analysis_steps` steps, and after."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .record import forget, probe_rows, read_numbers, record


class AnalysisCallback(TrainerCallback):
    """
    Writes analyses of a run to its [`~hf_dskd.DSKDTrainer.analysis_folder`], and logs their numbers.

    On one process: the others wait for it at the next step.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = self.trainer.analysis_folder
        if not state.global_step:
            forget(folder, -1)
        if args.analysis_steps is None:
            return
        forget(folder, state.global_step)
        if not read_numbers(folder):
            self._analyse(pictures=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (
            args.analysis_steps
            and state.global_step % args.analysis_steps == 0
            and state.global_step < state.max_steps
        ):
            self._analyse(pictures=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._analyse(pictures=True)

    def _analyse(self, pictures: bool) -> None:
        trainer = self.trainer
        if trainer.args.analysis_steps is None or trainer.teacher is None or not trainer.is_world_process_zero():
            return
        dataset: Any = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        rows = probe_rows(dataset, trainer.args.analysis_examples)
        step = trainer.state.global_step
        progress = step / max(trainer.state.max_steps, 1)
        numbers = record(trainer.distiller, rows, trainer.analysis_folder, pictures, step, progress)
        # All of them are in the file; a log of fifty numbers hides the rest.
        shown = [name for name in numbers if name == "s2t_accuracy" or not name.startswith(("s2t_", "probe_"))]
        should_log = trainer.control.should_log
        trainer.log({f"analysis_{name}": numbers[name] for name in shown})
        # A callback of transformers takes any log for that of the step, which would be left out.
        trainer.control.should_log = should_log
        trainer.running_log.restart_clock()
