"""What the numbers of a run should make its reader doubt."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..losses.terms import TERMS
from .files import gradient_norms, metrics_before, points_of, settings_of
from .words import number, percent, title_of


WON, GUESSING = 0.99, 0.55
SMALL_GRADIENT, SMALL_MASK, MANY_CUT = 0.01, 0.1, 0.05
SPIKE, SPIKE_SPREADS, NEIGHBOURS = 3.0, 4.0, 5
WORSE, BEST_EARLIER = 0.005, 0.75
DIVERGED = 1.25
UNIFORM = 1.1


def warnings_of(
    result: Mapping[str, Any], history: Sequence[Mapping[str, Any]], analyses: Sequence[Mapping[str, Any]]
) -> list[str]:
    """
    What the numbers of a run should make its reader doubt; each names the number, the step and what to do.

    Args:
        result (`Mapping[str, Any]`): `result.json`.
        history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        analyses (`Sequence[Mapping[str, Any]]`): Lines of `analysis/numbers.jsonl`, by step.
    """
    return [text for found in checks_of(result, history, analyses).values() for text in found]


def checks_of(
    result: Mapping[str, Any], history: Sequence[Mapping[str, Any]], analyses: Sequence[Mapping[str, Any]]
) -> dict[str, list[str]]:
    """Warnings by the check that they come from, with an empty list for one that found nothing."""
    settings = settings_of(result)
    checks: dict[str, list[str] | None] = {
        "loss spikes": _spikes(history),
        "divergence of the training": _divergence(history),
        "gain over the student before": _no_gain(result, history),
        "overfitting": _overfitting(result, history),
        "the discriminator": _discriminator(settings, history),
        "the gradient of matching": _matching_gradient(analyses),
        "the correctness mask": _mask(settings, history),
        "the attention": _attention(analyses),
        "examples cut or skipped": _cut(result),
    }
    return {name: found for name, found in checks.items() if found is not None}


def _last_quarter(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Those logged in the last quarter of the steps."""
    return [point for point in points if point[0] > 0.75 * points[-1][0]]


def _spikes(history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """
    A logged loss more than 3 times the median of the 5 logs before it and of the 5 after it, and more than 4 mean
    absolute deviations above the median of them all, so that neither a fast start nor losses that always jump count.
    """
    found, known = [], False
    for key in ("loss", *(term.log for term in TERMS.values() if term.spikes)):
        points = points_of(history, key)
        known |= len(points) > 3
        spikes = []
        for index in range(3, len(points)):
            value = points[index][1]
            before = [value for _, value in points[max(0, index - NEIGHBOURS) : index]]
            after = [value for _, value in points[index + 1 : index + 1 + NEIGHBOURS]]
            usual = statistics.median(before + after)
            deviation = statistics.fmean(abs(value - usual) for value in before + after)
            if usual <= 0 or value <= usual + SPIKE_SPREADS * deviation:
                continue
            if all(value > SPIKE * statistics.median(part) for part in (before, after) if part):
                spikes.append((value / usual, points[index][0], value, usual))
        if spikes:
            times, step, value, usual = max(spikes)
            others = sorted(step_ for _, step_, _, _ in spikes if step_ != step)
            more = f" (also at step {_some(others)})" if others else ""
            found.append(
                f"{key} jumps to {number(value)} at step {step:,}, {times:.1f} times the {number(usual)} around it"
                f"{more}: look at the examples of that step, lower the learning rate or max_grad_norm, or warm up"
                " for longer"
            )
    return found if known else None


def _divergence(history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    points = points_of(history, "ce_loss")
    if len(points) < 8:
        return None
    size = len(points) // 4
    parts = [points[start : start + size] for start in range(0, size * 3, size)] + [points[3 * size :]]
    medians = [statistics.median(value for _, value in part) for part in parts]
    best = min(medians)
    if medians[-1] <= DIVERGED * best:
        return []
    when = parts[medians.index(best)]
    return [
        f"the training cross entropy ends at {number(medians[-1])} (median from step {parts[-1][0][0]:,}), after"
        f" {number(best)} around step {when[len(when) // 2][0]:,}: training diverged; lower the learning rate or"
        " kd_rate"
    ]


def _evaluation_keys(history: Sequence[Mapping[str, Any]], suffix: str) -> list[str]:
    return sorted({key for entry in history for key in entry if key.startswith("eval_") and key.endswith(suffix)})


def _no_gain(result: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    before, after = metrics_before(result, history), result.get("metrics", {})
    keys = [key for key in before if key.endswith("bits_per_byte") and key in after]
    if not keys:
        return None
    return [
        f"{title_of(key)} is {after[key]:.4f} after {result.get('steps', 0):,} steps and was {before[key]:.4f} at step"
        " 0: training didn't help; look at the learning rate, the data and whether the prompt style fits the model"
        for key in keys
        if after[key] >= before[key]
    ]


def _overfitting(result: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    keys = _evaluation_keys(history, "bits_per_byte") or _evaluation_keys(history, "eval_loss")
    every = {key: points for key in keys if len(points := points_of(history, key)) > 2}
    if not every:
        return None
    # The model that is kept is then one from before it got worse.
    if result.get("best_checkpoint"):
        return []
    found = []
    for key, points in every.items():
        best, step = min((value, step) for step, value in points)
        last_step, last = points[-1]
        if step <= BEST_EARLIER * last_step and last - best > WORSE * abs(best):
            found.append(
                f"{title_of(key)} was best at step {step:,} ({best:.4f}) and ends at {last:.4f} at step {last_step:,}:"
                " the student overfits; stop earlier, or set load_best_model_at_end"
            )
    return found


def _discriminator(settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    names = ("discriminator_accuracy_real", "discriminator_accuracy_fake")
    real, fake = (dict(points_of(history, name)) for name in names)
    steps = sorted(set(real) & set(fake))
    if not steps:
        return None
    late = [step for step, _ in _last_quarter([(step, 0.0) for step in steps])]
    if all(min(real[step], fake[step]) >= WON for step in late):
        since = next(
            step
            for index, step in enumerate(steps)
            if all(min(real[later], fake[later]) >= WON for later in steps[index:])
        )
        remedies = ["a lower discriminator_learning_rate", "scale_queries", "a higher discriminator_dropout"]
        if settings.get("adversarial_loss", "minimax") == "minimax":
            remedies.insert(0, "adversarial_loss=non_saturating")
        return [
            f"the discriminator tells {percent(real[steps[-1]])} of the keys and {percent(fake[steps[-1]])} of the"
            f" queries at step {steps[-1]:,}, and at least {percent(WON)} of both since step {since:,}: it has won,"
            f" its gradient no longer moves the queries; try {', '.join(remedies)}"
        ]
    balanced = {step: (real[step] + fake[step]) / 2 for step in steps}
    if len(steps) > 2 and max(balanced.values()) <= GUESSING:
        step = max(balanced, key=lambda step: balanced[step])
        remedy = (
            "as_published=True never trains it"
            if settings.get("as_published")
            else "raise discriminator_learning_rate or discriminator_steps"
        )
        return [
            f"the discriminator never does better than guessing (mean accuracy on keys and queries at most"
            f" {percent(balanced[step])}, at step {step:,}; {percent(balanced[steps[-1]])} at step {steps[-1]:,}):"
            f" what it teaches the queries is noise; {remedy}"
        ]
    return []


def _matching_gradient(analyses: Sequence[Mapping[str, Any]]) -> list[str] | None:
    divergences = {term.name for term in TERMS.values() if term.from_teacher}
    measured = {
        step: norms for step, norms in gradient_norms(analyses).items() if "kq" in norms and divergences & norms.keys()
    }
    if not measured:
        return None
    step, every = list(measured.items())[-1]
    matching, norms = every["kq"], {term: norm for term, norm in every.items() if term in divergences}
    largest = max(norms, key=lambda term: norms[term])
    if matching >= SMALL_GRADIENT * norms[largest]:
        return []
    share = percent(matching / norms[largest], 2)
    return [
        f"the gradient of key-query matching has {share} of the norm of that of {largest} at step {step:,}"
        f" ({number(matching)} against {number(norms[largest])}): matching hardly changes anything; raise kq_rate, or"
        " leave it out with matching=none"
    ]


def _mask(settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str] | None:
    points = points_of(history, "correctness_mask_rate")
    if not points or settings.get("correctness_mask") is False:
        return None
    late = _last_quarter(points)
    rate = statistics.fmean(value for _, value in late)
    if rate >= SMALL_MASK:
        return []
    return [
        f"the correctness mask lets only {percent(rate)} of the tokens through (mean of the logs"
        f" from step {late[0][0]:,} on): the student-space divergence hardly counts; train for longer, raise"
        " projector_learning_rate, or leave that space out with spaces=teacher"
    ]


def _attention(analyses: Sequence[Mapping[str, Any]]) -> list[str] | None:
    measured = [entry for entry in analyses if "chunk_mass" in entry and "chunk_mass_uniform" in entry]
    if not measured:
        return None
    step, mass, uniform = (measured[-1][name] for name in ("step", "chunk_mass", "chunk_mass_uniform"))
    if mass > UNIFORM * uniform:
        return []
    return [
        f"the attention puts {percent(mass)} of its mass on the teacher tokens of the same text at step {step:,}, and"
        f" uniform attention would put {percent(uniform)} there: it aligns nothing; train for longer, raise"
        " projector_learning_rate, or take alignment=chunk_attention"
    ]


def _cut(result: Mapping[str, Any]) -> list[str] | None:
    parts = {name: part for name in ("train", "eval") if (part := (result.get("data") or {}).get(name))}
    if not parts:
        return None
    found = []
    for name, part in parts.items():
        of = "training" if name == "train" else "evaluation"
        cut, kept, rows = part.get("cut", 0), part["kept"], part["rows"]
        if kept and cut > MANY_CUT * kept:
            found.append(
                f"{cut:,} of {kept:,} {of} responses ({percent(cut / kept)}) were cut to the maximum length, before"
                " step 1: raise max_length, or leave long examples out"
            )
        if rows - kept > MANY_CUT * rows:
            found.append(
                f"{rows - kept:,} of {rows:,} {of} examples ({percent((rows - kept) / rows)}) were skipped before"
                " step 1: look for empty responses, or raise max_length for long prompts"
            )
    return found


def _some(steps: Sequence[int]) -> str:
    return ", ".join(f"{step:,}" for step in steps[:3]) + (f" and {len(steps) - 3} more" if len(steps) > 3 else "")
