"""What the numbers of a run should make its reader doubt."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..losses.terms import TERMS
from .files import RunFiles
from .words import number, percent, title_of


WON, GUESSING = 0.99, 0.55
SMALL_GRADIENT, SMALL_MASK, MANY_CUT = 0.01, 0.1, 0.05
SPIKE, SPIKE_SPREADS, NEIGHBOURS = 3.0, 4.0, 5
WORSE, BEST_EARLIER = 0.005, 0.75
DIVERGED = 1.25
UNIFORM = 1.1


def warnings_of(run: RunFiles) -> list[str]:
    """Says what the numbers of a run should make its reader doubt: the number, the step and what to do."""
    return [text for found in checks_of(run).values() for text in found]


def checks_of(run: RunFiles) -> dict[str, list[str]]:
    """Finds warnings by the check that they come from, with an empty list for one that found nothing."""
    checks = {
        "loss spikes": _spikes(run),
        "divergence of the training": _divergence(run),
        "gain over the student before": _no_gain(run),
        "overfitting": _overfitting(run),
        "the discriminator": _discriminator(run),
        "the gradient of matching": _matching_gradient(run),
        "the correctness mask": _mask(run),
        "the attention": _attention(run),
        "examples cut or skipped": _cut(run),
    }
    return {name: found for name, found in checks.items() if found is not None}


def _spikes(run: RunFiles) -> list[str] | None:
    """
    A logged loss more than 3 times the median of the 5 logs before it and of the 5 after it, and more than 4 mean
    absolute deviations above the median of them all, so that neither a fast start nor losses that always jump count.
    """
    found, known = [], False
    for key in ("loss", *(term.log for term in TERMS.values() if term.spikes)):
        points = run.points(key)
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


def _divergence(run: RunFiles) -> list[str] | None:
    points = run.points("ce_loss")
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


def _evaluation_keys(run: RunFiles, suffix: str) -> list[str]:
    return sorted({key for entry in run.history for key in entry if key.startswith("eval_") and key.endswith(suffix)})


def _no_gain(run: RunFiles) -> list[str] | None:
    before, after = run.metrics_before, run.record.metrics
    keys = [key for key in before if key.endswith("bits_per_byte") and key in after]
    if not keys:
        return None
    return [
        f"{title_of(key)} is {after[key]:.4f} after {run.record.steps:,} steps and was {before[key]:.4f} at step"
        " 0: training didn't help; look at the learning rate, the data and whether the prompt style fits the model"
        for key in keys
        if after[key] >= before[key]
    ]


def _overfitting(run: RunFiles) -> list[str] | None:
    keys = _evaluation_keys(run, "bits_per_byte") or _evaluation_keys(run, "eval_loss")
    every = {key: points for key in keys if len(points := run.points(key)) > 2}
    if not every:
        return None
    # The model that is kept is then one from before it got worse.
    if run.record.best_checkpoint:
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


def _discriminator(run: RunFiles) -> list[str] | None:
    names = ("discriminator_accuracy_real", "discriminator_accuracy_fake")
    real, fake = (dict(run.points(name)) for name in names)
    steps = sorted(set(real) & set(fake))
    if not steps:
        return None
    before = max((step for step in steps if min(real[step], fake[step]) < WON), default=-1)
    if before <= 0.75 * steps[-1]:
        since = min(step for step in steps if step > before)
        remedies = ["a lower discriminator_learning_rate", "scale_queries", "a higher discriminator_dropout"]
        if run.record.all_settings.get("adversarial_loss", "minimax") == "minimax":
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
            if run.record.all_settings.get("as_published")
            else "raise discriminator_learning_rate or discriminator_steps"
        )
        return [
            f"the discriminator never does better than guessing (mean accuracy on keys and queries at most"
            f" {percent(balanced[step])}, at step {step:,}; {percent(balanced[steps[-1]])} at step {steps[-1]:,}):"
            f" what it teaches the queries is noise; {remedy}"
        ]
    return []


def _matching_gradient(run: RunFiles) -> list[str] | None:
    divergences = {term.name for term in TERMS.values() if term.from_teacher}
    measured = {
        step: norms for step, norms in run.gradient_norms.items() if "kq" in norms and divergences & norms.keys()
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


def _mask(run: RunFiles) -> list[str] | None:
    points = run.points("correctness_mask_rate")
    if not points or run.record.all_settings.get("correctness_mask") is False:
        return None
    late = [point for point in points if point[0] > 0.75 * points[-1][0]]
    rate = statistics.fmean(value for _, value in late)
    if rate >= SMALL_MASK:
        return []
    return [
        f"the correctness mask lets only {percent(rate)} of the tokens through (mean of the logs"
        f" from step {late[0][0]:,} on): the student-space divergence hardly counts; train for longer, raise"
        " projector_learning_rate, or leave that space out with spaces=teacher"
    ]


def _attention(run: RunFiles) -> list[str] | None:
    measured = [entry for entry in run.analyses if "chunk_mass" in entry and "chunk_mass_uniform" in entry]
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


def _cut(run: RunFiles) -> list[str] | None:
    parts = {name: part for name in ("train", "eval") if (part := run.record.data.splits.get(name))}
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
