"""
Key-query matching around its losses: what the student's pass contributes, and the networks that are trained against it
with an optimizer, schedule and steps of their own.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .losses.conditional_transport import TransportCritics, published_transport_loss, transport_cost
from .losses.key_query import (
    Discriminator,
    discriminator_loss,
    generator_loss,
    mmd,
    moment_matching,
    published_key_query_loss,
    row_noise,
)
from .training.finite import largest_gradient


if TYPE_CHECKING:
    from .config import DSKDConfig
    from .losses.dual_space import ResponseStates


class Features(NamedTuple):
    """
    Queries and keys of a micro-batch, in float32 and without gradient.

    Attributes:
        queries (`[B, R_s, d]`), keys (`[B, R_t, d]`): Padded to the longest response.
        query_mask (`[B, R_s]`), key_mask (`[B, R_t]`): Which rows are real.
        query_names (`[N_s]`), key_names (`[N_t]`): A number for each real row, in order.
    """

    queries: Tensor
    keys: Tensor
    query_mask: Tensor
    key_mask: Tensor
    query_names: Tensor
    key_names: Tensor

    def noise(self, width: int, seed: int) -> tuple[Tensor, Tensor]:
        """The dropout's, of real queries `[N_s, width]` and keys `[N_t, width]`."""
        # Negative names keep the noise of a key apart from that of a query at the same place.
        return row_noise(self.query_names, width, seed), row_noise(-1 - self.key_names, width, seed)


def matching_term(
    matching: str,
    critic: nn.Module | None,
    config: DSKDConfig,
    student: ResponseStates,
    teacher: ResponseStates,
    queries: Tensor,
    keys: Tensor,
    example_ids: Tensor,
    seed: int,
) -> tuple[Tensor, Features | None]:
    """
    What the query projector minimises, and what the networks against it learn from.

    Args:
        matching (`str`): `"gan"`, `"ct"`, `"moments"` or `"mmd"`.
        critic ([`~hf_dskd.losses.key_query.Discriminator`] for `"gan"`,
            [`~hf_dskd.losses.conditional_transport.TransportCritics`] for `"ct"`): `None` for the others.
        config ([`DSKDConfig`]): `adversarial_loss`, for `"gan"`.
        student, teacher ([`~hf_dskd.losses.dual_space.ResponseStates`]): The two views of the batch.
        queries (`torch.Tensor` of shape `[B, R_s, 2 d_t]`), keys (`torch.Tensor` of shape `[B, R_t, 2 d_t]`): Padded.
        example_ids (`torch.Tensor` of shape `[B]`): With `seed` they decide the dropout of the critic.
        seed (`int`): Of the dropout.

    Returns:
        Sums over student response tokens `[B]`, and [`Features`] to keep for [`Adversary.update`], which are `None`
        where there is nothing to train.
    """
    if matching in ("moments", "mmd"):
        function = {"moments": moment_matching, "mmd": mmd}[matching]
        return function(queries, keys, student.mask, teacher.mask), None
    features = Features(
        queries.detach().float(),
        keys.detach().float(),
        student.mask,
        teacher.mask,
        student.row_names(example_ids),
        teacher.row_names(example_ids),
    )
    if matching == "gan":
        assert isinstance(critic, Discriminator)
        logits = critic(student.packed(queries), row_noise(features.query_names, queries.shape[-1], seed))
        return student.per_example(generator_loss(logits, config.adversarial_loss)), features
    assert matching == "ct" and isinstance(critic, TransportCritics)
    noise = features.noise(2 * queries.shape[-1], seed)
    cost = transport_cost(critic, queries, keys.detach(), student.mask, teacher.mask, noise)
    return cost * student.counts, features


def published_matching_term(
    matching: str, critic: nn.Module | None, queries: Tensor, keys: Tensor, seed: int
) -> Tensor:
    """
    The matching loss of the released code, a scalar: one number for the batch, not a sum over tokens.

    Args:
        matching (`str`): `"gan"` or `"ct"`; the released code has no other.
        critic: As for [`matching_term`].
        queries, keys (`torch.Tensor` of shape `[B, S, 2 d_t]`): Of every position.
        seed (`int`): Of the dropout.
    """

    def noise(features: Tensor, width: int) -> Tensor:
        positions = torch.arange(features[..., 0].numel(), device=features.device)
        return row_noise(positions, width, seed).view(*features.shape[:2], width)

    width = queries.shape[-1]
    if matching == "gan":
        assert isinstance(critic, Discriminator)
        return published_key_query_loss(critic, queries, keys, (noise(queries, width), noise(keys, width)))
    assert matching == "ct" and isinstance(critic, TransportCritics)
    return published_transport_loss(critic, queries, keys, (noise(queries, 2 * width), noise(keys, 2 * width)))


class Adversary:
    """
    Trains a discriminator or transport critics on the features that the student's passes leave behind.

    The critic is frozen except inside [`~Adversary.update`], so nothing reaches it from the student's backward pass.
    Features of all micro-batches of an optimizer step are kept until its update: with them the result depends
    neither on gradient accumulation nor on how often it is updated. The update runs in float32 without a loss scale,
    since it has no long chain of half-precision layers behind it. `largest_gradient` of the last update is NaN or
    infinite if a gradient of one of its steps was.

    Args:
        critic ([`~hf_dskd.losses.key_query.Discriminator`] or
            [`~hf_dskd.losses.conditional_transport.TransportCritics`]): Already on its device.
        config ([`DSKDConfig`]): Learning rate, betas, schedule, steps.
    """

    def __init__(self, critic: Discriminator | TransportCritics, config: DSKDConfig):
        self.critic = critic.requires_grad_(False)
        self.config = config
        self.optimizer: torch.optim.AdamW | None = None
        self.scheduler: Any = None
        self._features: list[Features] = []
        self.largest_gradient = torch.zeros(())

    def create_optimizer(self, num_training_steps: int) -> None:
        """Optimizer and schedule for a run of `num_training_steps` student updates."""
        from transformers import get_scheduler

        config, critic = self.config, self.critic
        groups: list[dict[str, Any]] = (
            [{"params": critic.descending()}, {"params": critic.ascending(), "maximize": True}]
            if isinstance(critic, TransportCritics)
            else [{"params": list(critic.parameters())}]
        )
        self.optimizer = torch.optim.AdamW(
            groups,
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

        Args:
            query_count, key_count: Response tokens of the global batch, over all ranks and micro-batches.
            accelerator ([`~accelerate.Accelerator`]): Averages gradients over ranks.
            seed (`int`, *optional*, defaults to `0`): Of the dropout.

        Returns:
            Sums over this rank's tokens before the first step, without gradient, and `grad_norm`. For a discriminator
            `discriminator_query_loss`, `query_as_query` (queries taken for queries), `discriminator_key_loss` and
            `key_as_key`; for transport critics `transport_cost`, over queries.
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
                if isinstance(self.critic, TransportCritics):
                    loss, numbers = _transport_loss(self.critic, features, query_count, seed + step + 1)
                else:
                    loss, numbers = _discriminator_loss(self.critic, features, query_count, key_count, seed + step + 1)
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


def _discriminator_loss(
    critic: Discriminator, features: Features, query_count: Tensor, key_count: Tensor, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of what the discriminator minimises, and sums for the report."""
    query_noise, key_noise = features.noise(features.queries.shape[-1], seed)
    query_logits = critic(features.queries[features.query_mask], query_noise)
    key_logits = critic(features.keys[features.key_mask], key_noise)
    query_loss, key_loss = discriminator_loss(query_logits, key_logits)
    return query_loss.sum() / query_count + key_loss.sum() / key_count, {
        "discriminator_query_loss": query_loss.detach().sum(),
        "query_as_query": (query_logits > 0).sum(),
        "discriminator_key_loss": key_loss.detach().sum(),
        "key_as_key": (key_logits < 0).sum(),
    }


def _transport_loss(
    critics: TransportCritics, features: Features, query_count: Tensor, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of what navigators minimise and critics maximise, and a sum for the report."""
    cost = transport_cost(
        critics,
        features.queries,
        features.keys,
        features.query_mask,
        features.key_mask,
        features.noise(2 * features.queries.shape[-1], seed),
    )
    cost = (cost * features.query_mask.sum(1)).sum()
    return cost / query_count, {"transport_cost": cost.detach()}


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
