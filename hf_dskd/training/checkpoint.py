"""What a run writes at a checkpoint and what it goes on from; nothing that isn't finite is saved."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from ..data.fingerprint import fingerprint
from ..errors import NonFiniteLossError, UserError
from ..models.generation import save_generation_config
from ..redaction import without_secrets
from . import run_folder
from .compatibility import check_trainable
from .finite import spoilt
from .metrics import REMEDY
from .prepare import check_steps
from .resume import active_adapter, check_checkpoint, check_settings, rates, set_rates, trajectory
from .run_folder import (
    RESULT_NAME,
    check_fresh,
    check_no_other,
    held,
    last_checkpoint,
    note,
    noted,
    recover,
    remove_run,
)
from .steps import Steps


logger = logging.getLogger(__name__)


class Checkpoints(Steps):
    """What [`~hf_dskd.DSKDTrainer`] saves, and goes on from; a part of it."""

    # What must agree for a checkpoint to be resumed from.
    _facts: dict[str, Any]
    _run_id: str | None = None
    # Fingerprint of the training data, made when it is needed.
    _data: str | None = None
    _changed_settings = False
    # Where a checkpoint is written before it gets its name.
    _staging: Path | None = None
    # Of a search.
    _trial: Any = None

    def __init__(self, **given: Any):
        super().__init__(**given)
        # The runs of this trainer, by their folders.
        self._begun: dict[str, str | None] = {}

    @property
    def analysis_folder(self) -> Path:
        """Where the analyses of the run are written (see [`hf_dskd.analysis.record`])."""
        return Path(super()._get_output_dir(self._trial)) / "analysis"

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in [`~transformers.Trainer`]; a checkpoint of another run is refused before anything is touched."""
        if self.train_dataset is None:
            raise UserError("train_dataset=None: pass the examples to train on")
        # Both may have changed since the trainer was made.
        check_steps(self.args, self.train_dataset)
        self._data = None
        if self.model is not None:  # as it is between the trials of a search
            check_trainable(self.model)
            # Which every checkpoint says: it must not fail only there.
            self._trajectory()
        trial = args[0] if args else kwargs.get("trial")
        if resume_from_checkpoint is None and trial is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if resume_from_checkpoint in ("last", "true", "True"):
            resume_from_checkpoint = True
        folder = Path(super()._get_output_dir(trial))
        with ExitStack() as stack:
            begun = self._on_main(lambda: self._begin(folder, resume_from_checkpoint, stack))
            checkpoint, self._run_id, self.skipped_steps, self._changed_settings = begun
            self._begun[str(folder)] = self._run_id
            if checkpoint is not None:
                finished = self._finished_at(checkpoint)
                if finished is not None:
                    return finished
            if self.is_world_process_zero():
                self._forget_earlier(checkpoint is not None)
            result = super().train(checkpoint, *args, **kwargs)
            if not self.state.global_step and not hasattr(self.train_dataset, "__len__"):
                raise UserError(
                    "no step was taken: train_dataset is a stream that gave no batch; pass one with examples"
                )
            self._check_finite()
        # Of steps that were left out Trainer knows nothing.
        return result._replace(training_loss=result.metrics["train_loss"])

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on the main process; what it returns or refuses is so on all of them."""
        answer: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                answer[0] = work()
            except UserError as error:
                answer[1] = str(error)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def _begin(
        self, folder: Path, resume: str | bool | None, stack: ExitStack
    ) -> tuple[str | None, str | None, int, bool]:
        """
        Takes the folder until `stack` ends, and finds what to go on from: the checkpoint, the run's id, the steps that
        it has left out, and whether settings have changed.
        """
        stack.enter_context(held(folder))
        recover(folder)
        if not resume:
            if getattr(self.args, "overwrite_output_dir", False):
                remove_run(folder)
            # Training again is this trainer's own affair.
            if noted(folder).get("run_id") is None or noted(folder)["run_id"] != self._begun.get(str(folder)):
                check_fresh(folder)
            run = uuid.uuid4().hex
            note(folder, run_id=run)
            return None, run, 0, False
        checkpoint = last_checkpoint(folder) if resume is True else Path(str(resume))
        saved, changed = self._check_checkpoint(checkpoint)
        if checkpoint.parent.resolve() != folder.resolve():
            check_no_other(folder, saved.get("run_id"))
        note(folder, run_id=saved.get("run_id"))
        return str(checkpoint), saved.get("run_id"), saved.get("skipped_steps", 0), changed

    def _check_checkpoint(self, checkpoint: Path) -> tuple[dict[str, Any], bool]:
        """Reads a checkpoint that this run can go on from; returns what it says, and whether with other settings."""
        if getattr(self.model, "_hf_peft_config_loaded", False):
            raise UserError(
                f"resume_from_checkpoint={str(checkpoint)!r}: transformers loads no weights of an adapter made by"
                " add_adapter; pass the model without its adapter, and peft_config"
            )
        shapes = {
            name: {key: list(value.shape) for key, value in module.state_dict().items()}
            for name, module in self.distiller.auxiliary().items()
        }
        needed = [run_folder.DISCRIMINATOR_OPTIMIZER_NAME] if self._trains_critic else []
        needed += ["scaler.pt"] if self.accelerator.scaler is not None else []
        # Where every node has files of its own, this one hasn't those of the others.
        ranks = 0 if self.args.save_on_each_node else self.accelerator.num_processes
        saved = check_checkpoint(checkpoint, self._facts, shapes, needed, ranks)
        if "settings" in saved:
            return saved, bool(check_settings(checkpoint, saved["settings"], self._trajectory(), self.args))
        logger.warning("%s is of an earlier version, without settings that could be compared", checkpoint)
        return saved, False

    def _trajectory(self) -> dict[str, Any]:
        """Returns what a checkpoint says of the settings that decide what becomes of the student."""
        self._data = self._data or fingerprint(self.train_dataset)
        found = trajectory(self.args, self.accelerator.num_processes, self._data, active_adapter(self.model))
        student_dtype = str(next(self.model.parameters()).dtype)
        found |= {"student_dtype": student_dtype, "per_device_train_batch_size": self._train_batch_size}
        return without_secrets(found)

    def _forget_earlier(self, resumed: bool) -> None:
        """Deletes what an earlier run left in the output folder and this one may not write again."""
        folder = Path(str(self.args.output_dir))
        # A folder that has a result is complete, and this one now isn't.
        for name in (RESULT_NAME, "alignment.png"):
            (folder / name).unlink(missing_ok=True)
        if not resumed:
            if os.path.realpath(getattr(self.model, "name_or_path", "")) != os.path.realpath(folder):
                (folder / "chat_template.jinja").unlink(missing_ok=True)

    def _finished_at(self, checkpoint: str) -> TrainOutput | None:
        """
        Loads a checkpoint that was saved after a run's last step, before the final save; Trainer would do one step
        more.
        """
        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        steps, epochs = self.args.max_steps, self.args.num_train_epochs
        if state.global_step < steps if steps > 0 else (state.epoch or 0) < epochs:
            return None
        logger.warning(
            "%s was saved after the last of %d steps: nothing is left to train", checkpoint, state.global_step
        )
        self.state = state
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    def _check_finite(self) -> None:
        """Raises a [`NonFiniteLossError`] on every rank for what was not finite on one: terms, gradients, weights."""
        self.running_log.check(self.accelerator)
        found = self.accelerator.gather(spoilt(self._trained(), self.accelerator.device).unsqueeze(0))
        self._refuse_spoilt(found.any(0))

    def _trained(self) -> dict[str, list[nn.Parameter]]:
        """Returns what a run trains, by its part."""
        parts = {"the student": [weight for weight in self.model.parameters() if weight.requires_grad]}
        named = self.distiller.auxiliary().items()
        return parts | {f"the {name.replace('_', ' ')}": list(module.parameters()) for name, module in named}

    def _refuse_spoilt(self, found: Tensor) -> None:
        names = [name for name, bad in zip(self._trained(), found.tolist()) if bad]
        if names:
            raise NonFiniteLossError(
                f"weights of {', '.join(names)} are NaN or infinite after step {self.state.global_step}, and aren't"
                f" saved; {REMEDY}"
            )

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As in [`~transformers.Trainer`]; weights that are NaN or infinite aren't saved."""
        # On this process alone: of several, one may be asked to save.
        self._refuse_spoilt(spoilt(self._trained(), self.accelerator.device))
        super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with _saved_for_others(self):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir if output_dir is not None else self.args.output_dir
            if self._facts["adapter"]:
                # PEFT saves none, and that of the base may stop at other tokens.
                save_generation_config(self.model, str(folder))
            facts = {**self._facts, "run_id": self._run_id, "skipped_steps": self.skipped_steps}
            if self.distiller.objective.fitted:
                facts["fitted"] = dict(self.distiller.objective.fitted)
            if self._staging is not None:
                facts["settings"] = self._trajectory()
            run_folder.save_auxiliary(str(folder), self.distiller.auxiliary(), facts)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.adversary is not None and self.adversary.optimizer is not None and self.args.should_save:
            path = os.path.join(output_dir, run_folder.DISCRIMINATOR_OPTIMIZER_NAME)
            torch.save(self.adversary.state_dict(), path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        run_folder.load_auxiliary(resume_from_checkpoint, self.distiller.auxiliary())
        if self.distiller.objective.fits:
            # Not what fits the data of today.
            self.distiller.objective.take(run_folder.read_auxiliary(resume_from_checkpoint).get("fitted", {}))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer: Any = self.optimizer
        kept = rates(optimizer, self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._changed_settings:
            set_rates(optimizer, self.lr_scheduler, kept)
        if checkpoint is not None and self._trains_critic:
            assert self.adversary is not None and self.adversary.optimizer is not None
            kept = rates(self.adversary.optimizer, self.adversary.scheduler)
            path = os.path.join(checkpoint, run_folder.DISCRIMINATOR_OPTIMIZER_NAME)
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self.adversary.load_state_dict(state)
            if self._changed_settings:
                set_rates(self.adversary.optimizer, self.adversary.scheduler, kept)

    def load_trained(self, folder: str | Path) -> None:
        """
        Takes student, projectors and discriminator as a run saved them, to look at; to go on training, resume instead.

        `folder` is the output folder of a run with the same settings, or a checkpoint in it.
        """
        run_folder.check_facts(folder, self._facts, "folder=")
        self._load_from_checkpoint(str(folder))
        state = Path(folder) / "trainer_state.json"
        if state.is_file():
            self.state = TrainerState.load_from_json(str(state))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        run_folder.load_auxiliary(str(self.state.best_model_checkpoint), self.distiller.auxiliary())

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes beside and renames, so that a full disk or a kill never leaves half a checkpoint under its name."""
        self._check_finite()
        run_dir = Path(super()._get_output_dir(trial))
        staging = run_dir / run_folder.STAGING_NAME
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            best = self.state.best_model_checkpoint
            is_best = best is not None and Path(best).parent == staging
            if is_best:
                self.state.best_model_checkpoint = str(run_dir / Path(str(best)).name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if is_best:
                    # The state was written while the checkpoint still had its temporary place.
                    self.state.save_to_json(str(staging / name / "trainer_state.json"))
                run_folder.publish(staging / name, run_dir / name)
                shutil.rmtree(staging)
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            last = run_folder.checkpoints(run_dir)
            kept = f"the last good one is {last[-1]}" if last else "there is no earlier one"
            raise UserError(
                f"{name} could not be saved ({type(error).__name__}: {error}); {kept}: free space or choose another"
                " output_dir, then go on with resume_from_checkpoint"
            ) from error
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            run_folder.rotate(run_dir, self.args.save_total_limit, best, self._run_id)
        self.running_log.restart_clock()


@contextmanager
def _saved_for_others(trainer: Any) -> Iterator[None]:
    """Keeps tokens out of the settings that Trainer saves, and PEFT from its card, whose base may be a folder here."""
    args, model = trainer.args, trainer.model
    trainer.args = args.without_tokens()
    writes_card = hasattr(model, "create_or_update_model_card")
    if writes_card:
        model.create_or_update_model_card = lambda folder: None
    try:
        yield
    finally:
        trainer.args = args
        if writes_card:
            del model.create_or_update_model_card
