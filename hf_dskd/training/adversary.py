"""The networks that are trained against the queries, with an optimizer, schedule and steps of their own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .finite import largest_gradient


if TYPE_CHECKING:
    from ..config import DSKDConfig
    from ..losses.matching import Features, Matching


class Adversary:
    """
    Trains the critic of a matching on the features that the student's passes leave behind.

    The critic is frozen except inside [`~Adversary.update`], so nothing reaches it from the student's backward pass.
    Features of all micro-batches of an optimizer step are kept until its update: with them the result depends neither
    on gradient accumulation nor on how often it is updated. The update runs in float32 without a loss scale, since it
    has no long chain of half-precision layers behind it. `largest_gradient` of the last update is NaN or infinite if
    one was.
    """

    def __init__(self, matching: Matching, config: DSKDConfig):
        assert matching.critic is not None
        self.matching, self.critic = matching, matching.critic.requires_grad_(False)
        self.config = config
        self.optimizer: torch.optim.AdamW | None = None
        self.scheduler: Any = None
        self._features: list[Features] = []
        self.largest_gradient = torch.zeros(())

    def create_optimizer(self, num_training_steps: int) -> None:
        """Optimizer and schedule for a run of `num_training_steps` student updates."""
        from transformers import get_scheduler

        config = self.config
        self.optimizer = torch.optim.AdamW(
            self.matching.parameter_groups(),
            lr=config.discriminator_learning_rate,
            betas=(config.discriminator_adam_beta1, config.discriminator_adam_beta2),
            weight_decay=config.discriminator_weight_decay,
        )
        self.scheduler = get_scheduler(
            config.discriminator_lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=config.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
        )

    @property
    def learning_rate(self) -> float:
        assert self.scheduler is not None
        return float(self.scheduler.get_last_lr()[0])

    def keep(self, features: Features) -> None:
        """Remembers the features of a micro-batch for the coming update."""
        self._features.append(features)

    def forget(self) -> None:
        self._features = []

    def update(
        self,
        query_count: Tensor,
        key_count: Tensor,
        accelerator: Any,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """
        `discriminator_steps` steps on the kept features, which are then forgotten. Its schedule is not moved.

        The counts are response tokens of the global batch, over all ranks and micro-batches; `seed` is that of the
        dropout. Returns sums over this rank's tokens before the first step, without gradient, and `grad_norm`: for a
        discriminator `discriminator_query_loss`, `query_as_query` (queries taken for queries),
        `discriminator_key_loss` and `key_as_key`, for transport critics `transport_cost`, over queries.
        """
        assert self.optimizer is not None and self.scheduler is not None
        parameters = list(self.critic.parameters())
        self.critic.train().requires_grad_(True)
        report: dict[str, Tensor] = {}
        # A copy from the host would be waited for.
        self.largest_gradient = torch.zeros((), device=parameters[0].device)
        for step in range(self.config.discriminator_steps):
            self.optimizer.zero_grad(set_to_none=False)
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            for features in self._features:
                loss, numbers = self.matching.critic_loss(features, query_count, key_count, seed + step + 1)
                loss.backward()
                if step == 0:
                    report = {name: report.get(name, 0) + value for name, value in numbers.items()}
            # Counts are global, so that the ranks' gradients add up.
            reduce_over_ranks(parameters, accelerator, "sum")
            largest = largest_gradient(parameters)
            self.largest_gradient = torch.maximum(self.largest_gradient.to(largest.device), largest)
            norm = clip(parameters, self.config.max_grad_norm)
            if step == 0:
                report["grad_norm"] = norm
            self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        self.critic.requires_grad_(False)
        self.forget()
        return report

    def copy(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What an update changes, to [`~Adversary.take_back`] one."""
        assert self.optimizer is not None
        return copy.deepcopy((self.critic.state_dict(), self.optimizer.state_dict()))

    def take_back(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Undoes the updates since [`~Adversary.copy`] returned `state`."""
        assert self.optimizer is not None
        self.critic.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])

    def state_dict(self) -> dict[str, Any]:
        assert self.optimizer is not None and self.scheduler is not None
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.optimizer is not None and self.scheduler is not None
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def reduce_over_ranks(parameters: list[torch.nn.Parameter], accelerator: Any, reduction: str) -> None:
    """Replaces gradients by their `"sum"` or `"mean"` over all processes."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.copy_(accelerator.reduce(parameter.grad, reduction=reduction))


def clip(parameters: list[torch.nn.Parameter], max_norm: float | None) -> Tensor:
    """Clips in place where `max_norm` is above 0, and returns the norm from before."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm else float("inf"))
