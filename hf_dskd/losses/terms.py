"""The one place that knows a loss term: by what it is divided, its weight, and how logs, plots and reports call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Term:
    """
    A sum over a batch, and what is made of it.

    Attributes:
        name: In what an objective returns, and of `gradient_norm_{name}`.
        per: The sum that divides it, such as `"student_tokens"`, `"teacher_tokens"` or, for what a critic reports,
            `"query_tokens"`.
        log: Its name in the training log.
        title: What it is, for people.
        rate: The setting that weighs it in the loss; `None` for a number that is no loss, and for the student's own
            cross entropy, whose weight is what distillation leaves.
        panel: Title of its curve in a report; made of `title` and `log` for losses, and without one there is none.
        evaluated: Its name among the metrics of an evaluation, where that isn't `log`.
        better: `"lower"` or `"higher"` where evaluations are compared by it.
        spikes: Whether a jump of its log is worth a warning: not of a game, nor of what the correctness mask cuts.
        from_teacher: Whether it is a divergence from the teacher, against which matching is weighed.
    """

    name: str
    per: str = "student_tokens"
    log: str = ""
    title: str = ""
    rate: str | None = None
    panel: str | None = None
    evaluated: str = ""
    better: str | None = None
    spikes: bool = False
    from_teacher: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "log", self.log or f"{self.name}_loss")
        object.__setattr__(self, "evaluated", self.evaluated or self.log)
        if self.panel is None and self.is_loss:
            object.__setattr__(self, "panel", f"{self.title} ({self.log})")

    @property
    def is_loss(self) -> bool:
        return self.log == f"{self.name}_loss"


_DISTILS: dict[str, Any] = {"rate": "kd_rate", "from_teacher": True}
# By name. To add one, add a row: logs, evaluations, plots, reports and warnings read it here.
TERMS: dict[str, Term] = {
    term.name: term
    for term in (
        Term("ce", title="cross entropy", better="lower", spikes=True),
        Term("correct", log="token_accuracy", title="token accuracy", better="higher"),
        Term("t2s_ce", title="projected teacher's cross entropy", rate="kd_rate", spikes=True),
        Term("t2s_kd", title="divergence, student space", **_DISTILS),
        Term("s2t_kd", "teacher_tokens", title="divergence, teacher space", spikes=True, **_DISTILS),
        Term("kd", title="divergence of logits", spikes=True, **_DISTILS),
        Term("alm", "teacher_tokens", title="divergence of chunk likelihoods", spikes=True, **_DISTILS),
        Term("kq", title="key-query matching", rate="kq_rate"),
        Term("attention", title="divergence of attention", rate="attention_kd_rate"),
        # Of a step, over its micro-batches and all ranks: what the loss has of it.
        Term("aux", "ranked_sums", title="what the model adds: routers, adapter"),
        Term(
            "t2s_correct",
            log="correctness_mask_rate",
            title="projected teacher is right",
            panel="projected teacher is right (mask rate)",
            evaluated="t2s_accuracy",
            better="higher",
        ),
        Term("t2s_rows", log="aligned_rate", panel="student tokens with a partner"),
        Term("target_rows", log="target_rate", panel="student tokens with a target of the teacher"),
        Term(
            *("s2t_agree", "teacher_tokens", "s2t_agreement"),
            title="projected student agrees with the teacher",
            better="higher",
        ),
        # What the critics report of an update.
        Term("query_as_query", "query_tokens", "discriminator_accuracy_fake"),
        Term("key_as_key", "key_tokens", "discriminator_accuracy_real"),
        Term("transport_cost", "query_tokens", "transport_cost", panel="transport cost under the critics"),
        Term("projector_grad_norm", "ranked_steps", "projector_grad_norm"),
        Term("discriminator_grad_norm", "ranked_steps", "discriminator_grad_norm"),
        # Where steps are left out, which Trainer's own mean counts.
        Term("loss", "ranked_sums", "loss"),
    )
}


def ratios(totals: Mapping[str, float], evaluated: bool = False) -> dict[str, float]:
    """
    Divides sums by theirs, as logs show them.

    Args:
        totals (`Mapping[str, float]`): Terms and what divides them, by name.
        evaluated (`bool`, *optional*, defaults to `False`): Use the names of an evaluation's metrics.
    """
    return {
        term.evaluated if evaluated else term.log: totals[term.name] / totals[term.per]
        for term in TERMS.values()
        if term.name in totals and totals.get(term.per)
    }
