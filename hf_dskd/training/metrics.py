"""Sums of what a run shows, kept on the device until they are logged."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteLossError
from ..losses.terms import ratios


REMEDY = (
    "checkpoints from before are untouched: lower the learning rate, use bf16 or float32 instead of fp16, look at"
    " these examples, or leave such steps out with on_nonfinite='skip'"
)
NEVER = float(2**30)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Chooses what sums over a run are added up in: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class RunningLog:
    """
    Adds up named sums without waiting for the device; one transfer reads them all.

    It also remembers the first step at which a loss term or a gradient was not finite, and looks at that whenever
    something is logged, evaluated or saved: looking at every step would stall a GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._first_bad: dict[str, Tensor] = {}
        self._batches: dict[int, list[Tensor]] = {}
        self._before: tuple[int, dict[str, Tensor]] = (-1, {})
        self._loss = self._steps = 0.0
        self._since = time.perf_counter()

    def add(self, **sums: Tensor | float) -> None:
        for name, value in sums.items():
            dtype = exact_dtype(self.device)
            if isinstance(value, Tensor):
                value = value.detach().to(self.device, dtype)
            else:
                # A copy from the host would be waited for.
                value = torch.full((), value, dtype=dtype, device=self.device)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def watch(self, step: int, example_ids: Tensor | None, terms: dict[str, Tensor]) -> None:
        """Notes which of `terms` (any shape) are not finite at `step`, and which examples they were computed on."""
        if self._before[0] != step:
            self._before = step, dict(self._sums)
        if example_ids is not None:
            self._batches.setdefault(step, []).append(example_ids)
        for name, value in terms.items():
            bad = torch.where(torch.isfinite(value.detach()).all(), NEVER, float(step)).to(self.device)
            self._first_bad[name] = torch.minimum(self._first_bad[name], bad) if name in self._first_bad else bad

    def found(self, accelerator: Any) -> str | None:
        """Finds what was not finite since the last look, on any rank, at which step and on which examples; waits."""
        return self._read(accelerator, with_sums=False)[1]

    def check(self, accelerator: Any) -> None:
        """Raises a [`~hf_dskd.NonFiniteLossError`] on every rank if something was not finite on one."""
        _refuse(self.found(accelerator))

    def discard(self) -> None:
        """Forgets the sums of the step that was watched last: it is left out."""
        self._before = -1, self._before[1]
        self._sums = dict(self._before[1])

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Reads everything since the last call as ratios over all ranks, in one transfer; checks as `check` does."""
        totals, bad = self._read(accelerator, with_sums=True)
        _refuse(bad)
        self._sums = {}
        self._before = -1, {}
        self._loss += totals.get("loss", 0.0)
        self._steps += totals.get("ranked_sums", 0.0)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        logs = ratios(totals)
        if "discriminator_query_loss" in totals:
            logs["discriminator_loss"] = (
                totals["discriminator_query_loss"] / totals["query_tokens"]
                + totals["discriminator_key_loss"] / totals["key_tokens"]
            )
        if "student_tokens" in totals:
            logs["response_tokens_per_second"] = totals["student_tokens"] / seconds
        return logs

    @property
    def mean_loss(self) -> float | None:
        """Mean of all steps that were drained; `None` where no loss was added up."""
        return self._loss / self._steps if self._steps else None

    def restart_clock(self) -> None:
        """Begins to count anew: evaluation and saving are not training time."""
        self._since = time.perf_counter()

    def _read(self, accelerator: Any, with_sums: bool) -> tuple[dict[str, float], str | None]:
        sums = self._sums if with_sums else {}
        flags = list(self._first_bad)
        if not sums and not flags:
            return {}, None
        values = [value.to(exact_dtype(value.device)) for value in (*sums.values(), *self._first_bad.values())]
        gathered = accelerator.gather(torch.stack(values).unsqueeze(0)).tolist()
        first_bad = [min(row[len(sums) + index] for row in gathered) for index in range(len(flags))]
        batches, self._first_bad, self._batches = self._batches, {}, {}
        totals = {name: sum(row[index] for row in gathered) for index, name in enumerate(sums)}
        if not flags or min(first_bad) == NEVER:
            return totals, None
        step = int(min(first_bad))
        names = [name for name, value in zip(flags, first_bad) if value == step]
        batch = [int(i) for ids in batches.get(step, []) for i in ids.tolist()]
        return totals, f"{', '.join(names)} became NaN or infinite at step {step} (examples {batch} on this process)"


def _refuse(bad: str | None) -> None:
    if bad is not None:
        raise NonFiniteLossError(f"{bad}; {REMEDY}")
