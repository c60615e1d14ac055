"""All numbers of a run's alignment at one moment, measured on a fixed set of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.linear_divergence import linear_rows
from ..losses.cross_entropy import response_rows
from ..losses.dual_space import DualSpace
from ..losses.objective import Step
from ..losses.states import ResponseStates
from .distributions import distribution_metrics
from .heatmap import AlignmentExample, chunks_of, cross_attention
from .metrics import alignment_metrics


if TYPE_CHECKING:
    from ..training.distiller import Distiller

# Sums of a batch → (name in the numbers, whose response tokens divide them)
_RATIOS = {
    "t2s_correct": ("t2s_accuracy", "student"),
    "t2s_ce": ("t2s_ce_loss", "student"),
    "s2t_correct": ("s2t_accuracy", "teacher"),
    "s2t_agree": ("s2t_agreement", "teacher"),
}


@dataclass(frozen=True, eq=False)
class Analysis:
    """What [`analyse`] measures; numbers that don't apply to the method are absent."""

    step: int
    numbers: dict[str, float]
    examples: list[AlignmentExample]
    # Of all response tokens, [n, 2 d_t] and [m, 2 d_t], float32, on the CPU. `None` for a method without queries.
    queries: Tensor | None = None
    keys: Tensor | None = None


def analyse(
    distiller: Distiller, rows: Sequence[Mapping[str, Any]], *, step: int = 0, batch_size: int | None = None
) -> Analysis:
    """
    Measures a run's alignment in its present state, which it leaves as it is: no gradient, no random number, no mode.

    - The attention: see [`~hf_dskd.analysis.metrics.alignment_metrics`].
    - Queries and keys, for methods with queries: see [`~hf_dskd.analysis.distributions.distribution_metrics`]. Rows
      are the examples by which it groups tokens. `discriminator_auc` is that of the run's discriminator, without
      dropout.
    - The projected states, for methods in hidden spaces: `t2s_accuracy` is how often the projected teacher is right
      about the student's token (the share that the correctness mask lets through; about its label, where that is the
      teacher's own prediction) and `t2s_ce_loss` its cross entropy; `s2t_accuracy` how often the projected student is
      right about the teacher's token, and `s2t_agreement` how often it predicts what the teacher does. All are
      divided by all response tokens, as in the training log.
    - What the attention adds (as arXiv 2603.22056 probes it): the same four numbers of the same projectors where the
      mean over a token's chunk (`probe_clp_…`) or attention inside of it (`probe_cla_…`, for methods with queries)
      takes the alignment's place, without training. The chunk is that of the token to be predicted.

    With `as_published`, where standard deviations depend on the other examples of a batch, each row is alone. Both
    models are run, unless the teacher's states are cached, which must then have those of the rows. With several
    processes each one computes everything; none waits for another.

    Args:
        distiller ([`~hf_dskd.training.distiller.Distiller`]): With a teacher, such as `trainer.distiller`.
        rows (`Sequence[Mapping[str, Any]]`):
            Tokenized for both models, such as `trainer.eval_dataset.select(range(64))`.
        step (`int`, *optional*, defaults to `0`): Steps that the run has done.
        batch_size (`int`, *optional*, defaults to `per_device_eval_batch_size`): Changes rounding only.

    Raises:
        UserError: If there are no rows, the method has no alignment, or the rows aren't tokenized for both models.
    """
    taken = [dict(row) for row in rows]
    if not taken:
        raise UserError("analyse got no rows: pass tokenized ones, such as trainer.eval_dataset")
    examples = [
        cross_attention(distiller, row, f"example {row.get('example_id', index)}") for index, row in enumerate(taken)
    ]
    numbers = alignment_metrics(examples)
    config = distiller.config
    method = config.method_row
    if not method.dual_space:
        return Analysis(step, numbers, examples)

    size = (batch_size or config.per_device_eval_batch_size) if distiller.exact_means else 1
    with distiller.unchanged(), torch.no_grad():
        batches = [
            _measured(distiller, taken[start : start + size], examples[start : start + size], start)
            for start in range(0, len(taken), size)
        ]
    sums, vectors = ([part[index] for part in batches] for index in (0, 1))
    totals = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
    for alignment in ("", "probe_clp_", "probe_cla_"):
        for name, (shown, side) in _RATIOS.items():
            if alignment + name in totals:
                numbers[alignment + shown] = totals[alignment + name] / totals[f"{side}_tokens"]
    if not method.has_queries:
        return Analysis(step, numbers, examples)
    joined: dict[str, Any] = {name: torch.cat([part[name] for part in vectors]) for name in vectors[0]}
    numbers |= distribution_metrics(**joined)
    return Analysis(step, numbers, examples, joined["queries"], joined["keys"])


def _measured(
    distiller: Distiller, rows: list[dict[str, Any]], examples: list[AlignmentExample], first: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums over a batch, and its arguments of `distribution_metrics`. `first` is the number of the first row."""
    objective, has_queries = distiller.objective, distiller.config.method_row.has_queries
    assert isinstance(objective, DualSpace)
    views = distiller.views(distiller.student, distiller.batch(rows))
    student, teacher = views.student, views.teacher
    assert teacher is not None
    with distiller.autocast():
        sums = {"student_tokens": student.counts.sum(), "teacher_tokens": teacher.counts.sum()}
        sums |= _space_sums(distiller, student, teacher)
        of_student, of_teacher = zip(*map(chunks_of, examples))
        chunked = _with_chunks(student, of_student), _with_chunks(teacher, of_teacher)
        probes = {"probe_clp_": "chunk_mean", **({"probe_cla_": "chunk_attention"} if has_queries else {})}
        for prefix, alignment in probes.items():
            probed = _space_sums(distiller, *chunked, alignment)
            sums |= {prefix + name: value for name, value in probed.items()}
        queries, keys = objective.queries_and_keys(student, teacher)
        if queries is None or keys is None:
            return sums, {}
        vectors = {
            "queries": student.packed(queries).float(),
            "keys": teacher.packed(keys).float(),
            "query_groups": student.mask.nonzero()[:, 0] + first,
            "key_groups": teacher.mask.nonzero()[:, 0] + first,
        }
    if objective.matching is not None:
        for name, side in (("query_scores", "queries"), ("key_scores", "keys")):
            scores = objective.matching.scores(vectors[side])
            if scores is not None:
                vectors[name] = scores
    return sums, {name: values.cpu() for name, values in vectors.items()}


def _space_sums(
    distiller: Distiller, student: ResponseStates, teacher: ResponseStates, alignment: str | None = None
) -> dict[str, Tensor]:
    """What projected states get right under an alignment, the method's or another, summed over the batch."""
    objective = distiller.objective
    assert isinstance(objective, DualSpace)
    weights = distiller.align(student, teacher, alignment)
    terms = dict(objective.compare(student, teacher, weights, Step()).sums)
    if "teacher" in distiller.config.method_row.spaces:
        value = student.unpacked(objective.projectors.s2t(student.packed(student.hidden).float()))
        projected, targets = teacher.packed(weights.to_teacher(value)), teacher.packed(teacher.targets)
        chunks = objective.chunks(student.hidden.device)
        rows = linear_rows(response_rows, [projected], [teacher.head.detach()], [targets], weights={}, **chunks)[1]
        terms["s2t_correct"] = rows["correct"] * teacher.packed(weights.has_student)
    return {name: terms[name].double().sum() for name in _RATIOS if name in terms}


def _with_chunks(states: ResponseStates, chunks: Sequence[Sequence[int]]) -> ResponseStates:
    """The states with the chunk of each response token: one sequence for each example."""
    ids = torch.tensor([chunk for example in chunks for chunk in example], device=states.mask.device)
    padded = torch.full(states.mask.shape, -1, device=ids.device)
    return replace(states, chunks=padded.masked_scatter(states.mask, ids))
