"""Optimizer steps of student, projectors and critic: gradients, clipping, schedules, and which steps are left out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..errors import NonFiniteLossError
from .adversary import Adversary, clip, reduce_over_ranks
from .arguments import making
from .finite import largest_gradient
from .metrics import REMEDY, RunningLog


if TYPE_CHECKING:
    from ..config import DSKDConfig
    from ..losses.projectors import Projectors
    from .distiller import Distiller

logger = logging.getLogger(__name__)


class StepCallback(TrainerCallback):
    """Calls [`Steps`] around Trainer's own optimizer step, where the projectors' gradients and the critic belong."""

    def __init__(self, steps: Steps):
        self.steps = steps

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        # Also where auto_find_batch_size begins once more, or an interrupted training does.
        self.steps._forget_step()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps._before_optimizer_step()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps._after_optimizer_step()


class Steps(Trainer):
    """How [`~hf_dskd.DSKDTrainer`] takes a step; a part of it."""

    args: DSKDConfig
    model: nn.Module
    distiller: Distiller
    projectors: Projectors | None
    adversary: Adversary | None
    running_log: RunningLog
    # Response tokens of the global batch: the student's, the teacher's.
    _items: Tensor | None = None
    _learning_rates: dict[str, float]
    _update_hook: Any = None
    # Whether the last step was taken, which a scaler or `on_nonfinite` may leave out.
    _updated = False
    skipped_steps = 0
    _skipped_in_a_row = 0

    def __init__(self, **given: Any):
        super().__init__(**given)
        self.running_log = RunningLog(self.accelerator.device)
        self._learning_rates = {}
        self.add_callback(StepCallback(self))

    @property
    def _trains_critic(self) -> bool:
        return self.adversary is not None and self.distiller.trains_critic

    def _dropout_seed(self) -> int:
        """Seeds the discriminator's dropout: another one in every step, the same one after a resume."""
        return (self.args.seed + 1) * 1_000_003 + self.state.global_step * 1_009

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in [`~transformers.Trainer`]; the projectors' gradients are averaged where data parallelism does it."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            # Before a gradient scaler looks for overflows: all ranks must find the same, to skip a step together.
            reduce_over_ranks(self._projector_parameters(), self.accelerator, "mean")
        if self.args.on_nonfinite == "skip":
            # Trainer adds them up before it is known whether the step counts.
            self.running_log.add(loss=loss)
            loss = loss.nan_to_num(0.0, 0.0, 0.0)
        return loss

    def _projector_parameters(self) -> list[nn.Parameter]:
        return [] if self.projectors is None else list(self.projectors.parameters())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Makes the student's optimizer, with the projectors as one more group at their own learning rate."""
        with making(self.args, "optim", "optim_args"):
            optimizer = super().create_optimizer(*args, **kwargs)
        if self._update_hook is not None:
            self._update_hook.remove()
        # Accelerate's wrapper, of an earlier training, calls no hooks.
        self._update_hook = getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(self._before_update)
        projectors = self._projector_parameters()
        present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if projectors and id(projectors[0]) not in present:
            optimizer.add_param_group(
                {
                    "params": projectors,
                    "lr": self.args.projector_learning_rate,
                    "weight_decay": self.args.weight_decay,
                }
            )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Makes the student's schedule, and at the same moment the discriminator's optimizer and schedule."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        # This is after the accelerator let go of its memory and before a checkpoint is loaded.
        if self._trains_critic:
            assert self.adversary is not None
            self.adversary.create_optimizer(num_training_steps)
        return scheduler

    def _zero_projectors(self) -> None:
        for parameter in self._projector_parameters():
            parameter.grad = None

    def _forget_step(self) -> None:
        """Forgets what is left of a step that was begun and not ended."""
        self._zero_projectors()
        self.running_log = RunningLog(self.accelerator.device)
        if self.adversary is not None:
            self.adversary.forget()

    def _before_optimizer_step(self) -> None:
        projectors = self._projector_parameters()
        # A scaler that has found an overflow doesn't come to `_before_update`.
        self._updated = self.accelerator.scaler is None
        # Also where such a step is left out: its losses are in the sums.
        self.running_log.add(ranked_sums=1.0)
        # As Trainer logs the student's: the rates of the step, not of the next one.
        if projectors:
            self._learning_rates["projector_learning_rate"] = float(self.optimizer.param_groups[-1]["lr"])  # type: ignore[union-attr]
            self._projector_norm = clip(projectors, self.args.max_grad_norm)
        if self._trains_critic:
            assert self.adversary is not None
            self._learning_rates["discriminator_learning_rate"] = self.adversary.learning_rate

    def _before_update(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        """
        Looks at the gradients just before the optimizer moves student and projectors, and moves the critic.

        Where a scaler of fp16 has found an overflow, an optimizer doesn't come here, or leaves the step out by itself;
        the critic is to agree.
        """
        step, projectors, running = self.state.global_step, self._projector_parameters(), self.running_log
        gradients = {"the student's gradient": largest_gradient(self.model.parameters())}
        if projectors:
            gradients["the projectors' gradient"] = largest_gradient(projectors)
        if self.accelerator.scaler is not None and not all(map(torch.isfinite, gradients.values())):
            return
        skips = self.args.on_nonfinite == "skip"
        if self._trains_critic:
            assert self.adversary is not None and self._items is not None
            before = self.adversary.copy() if skips else None
            report = self.adversary.update(self._items[0], self._items[1], self.accelerator, self._dropout_seed())
            # Of the steps that it is updated in, which a scaler may leave out.
            query_tokens, key_tokens = self._items / self.accelerator.num_processes
            report |= {"query_tokens": query_tokens, "key_tokens": key_tokens}
            running.add(discriminator_grad_norm=report.pop("grad_norm"), **report)
            name = self.distiller.critic_name.replace("_", " ")
            gradients[f"the {name}'s gradient"] = self.adversary.largest_gradient
        running.watch(step, None, gradients)
        if skips and (bad := running.found(self.accelerator)):
            if self._trains_critic:
                self.adversary.take_back(before)  # type: ignore[union-attr, arg-type]
            self._leave_out(bad)
            return
        self._updated = True
        running.add(ranked_steps=1.0)
        if projectors:
            if not self.args.max_grad_norm and self.accelerator.scaler is not None:
                # Nobody has taken the scale away before; an optimizer that does so by itself is told it.
                scale = getattr(optimizer, "grad_scale", None)
                self._projector_norm = clip(projectors, None) / (1.0 if scale is None else scale)
            running.add(projector_grad_norm=self._projector_norm)

    def _leave_out(self, bad: str) -> None:
        """Leaves the step out that is under way: no optimizer moves a parameter without a gradient."""
        self._updated = False
        self.running_log.discard()
        for parameter in (*self.model.parameters(), *self._projector_parameters()):
            parameter.grad = None
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == 10:
            raise NonFiniteLossError(f"{bad}; 10 steps in a row were left out; {REMEDY}")
        logger.warning("%s; the step is left out", bad)

    def _after_optimizer_step(self) -> None:
        # Trainer zeroes the gradients of the student only.
        self._zero_projectors()
        scaler = self.accelerator.scaler
        if self._updated:
            self._skipped_in_a_row = 0
        elif scaler is not None and scaler.get_scale() < 1:
            # Of a gradient that is too large without any scale, no lower one will ever make a step.
            self.running_log.watch(
                self.state.global_step, None, {"the gradient, at a loss scale of 1,": torch.tensor(torch.inf)}
            )
        # So that Trainer's schedule leaves out what the optimizer did.
        self.optimizer._is_overflow = not self._updated  # type: ignore[union-attr]
        if self.adversary is not None:
            self.adversary.forget()
            if self._trains_critic and self._updated:
                self.adversary.scheduler.step()
