"""The discriminator's side of adversarial matching: its own optimizer, schedule and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .losses.key_query import Discriminator, discriminator_loss, row_noise


if TYPE_CHECKING:
    from .config import DSKDConfig


class Features(NamedTuple):
    """Queries `[N_s, d]` and keys `[N_t, d]` of a micro-batch without gradient, and the names of their rows."""

    queries: Tensor
    keys: Tensor
    query_names: Tensor
    key_names: Tensor


class Adversary:
    """
    Trains a [`~hf_dskd.losses.key_query.Discriminator`] on the features that the student's passes leave behind.

    The discriminator is frozen except inside [`~Adversary.update`], so nothing reaches it from the student's backward
    pass. Features of all micro-batches of an optimizer step are kept until its update: with them the result depends
    neither on gradient accumulation nor on how often it is updated. The update runs in float32 without a loss scale,
    since it has no long chain of half-precision layers behind it.

    Args:
        discriminator: Already on its device.
        config ([`DSKDConfig`]): Learning rate, betas, schedule, steps.
    """

    def __init__(self, discriminator: Discriminator, config: DSKDConfig):
        self.discriminator = discriminator.requires_grad_(False)
        self.config = config
        self.optimizer: torch.optim.AdamW | None = None
        self.scheduler: Any = None
        self._features: list[Features] = []

    def create_optimizer(self, num_training_steps: int) -> None:
        """Optimizer and schedule for a run of `num_training_steps` student updates."""
        from transformers import get_scheduler

        config = self.config
        self.optimizer = torch.optim.AdamW(
            self.discriminator.parameters(),
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
        `discriminator_steps` steps on the kept features, which are then forgotten.

        Args:
            query_count, key_count: Response tokens of the global batch, over all ranks and micro-batches.
            accelerator ([`~accelerate.Accelerator`]): Averages gradients over ranks.
            seed (`int`, *optional*, defaults to `0`): Of the dropout.

        Returns:
            Sums over this rank's tokens before the first step, without gradient: `discriminator_query_loss`,
            `query_as_query` (queries taken for queries), `discriminator_key_loss`, `key_as_key`; and `grad_norm`.
        """
        assert self.optimizer is not None and self.scheduler is not None
        parameters = list(self.discriminator.parameters())
        self.discriminator.train().requires_grad_(True)
        report: dict[str, Tensor] = {}
        for step in range(self.config.discriminator_steps):
            self.optimizer.zero_grad(set_to_none=False)
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            for queries, keys, query_names, key_names in self._features:
                # Negative names keep the noise of a key apart from that of a query at the same place.
                query_noise = row_noise(query_names, queries.shape[-1], seed + step + 1)
                key_noise = row_noise(-1 - key_names, keys.shape[-1], seed + step + 1)
                query_logits = self.discriminator(queries, query_noise)
                key_logits = self.discriminator(keys, key_noise)
                query_loss, key_loss = discriminator_loss(query_logits, key_logits)
                (query_loss.sum() / query_count + key_loss.sum() / key_count).backward()
                if step == 0:
                    numbers = {
                        "discriminator_query_loss": query_loss.detach().sum(),
                        "query_as_query": (query_logits > 0).sum(),
                        "discriminator_key_loss": key_loss.detach().sum(),
                        "key_as_key": (key_logits < 0).sum(),
                    }
                    report = {name: report.get(name, 0) + value for name, value in numbers.items()}
            # Counts are global, so that the ranks' gradients add up.
            reduce_over_ranks(parameters, accelerator, "sum")
            norm = clip(parameters, self.config.max_grad_norm)
            if step == 0:
                report["grad_norm"] = norm
            # In fp16 a forward pass may overflow; the scaler then skips the student's step, and this one is skipped.
            if not (self.config.fp16 and not bool(torch.isfinite(norm))):
                self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        self.discriminator.requires_grad_(False)
        self.scheduler.step()
        self.forget()
        return report

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
