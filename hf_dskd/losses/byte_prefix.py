"""
The byte-prefix target (BPM, arXiv 2607.22334): the teacher's next-token distribution as one over the student's tokens.

Where a student's token begins inside a teacher's token, the teacher's distribution is that of its tokens that go on
from the bytes read so far. What each of them adds begins with a token of the student, which gets its probability. On
the text's own path, where the teacher's token may be less than the student's, the teacher's next positions say what
follows. Nothing is trained, and mass is only ever added up (see [`hf_dskd.alignment.byte_prefix`] for the tables).

Axes: N and M packed response tokens of student and teacher, V_s and V_t vocabularies, C columns (the student's tokens,
the residual, events), k kept columns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..alignment.byte_prefix import HEAD, LINK, NO_BYTE, SPACE, byte_tables
from ..errors import UserError
from ..kernels.linear_divergence import linear_rows
from .cross_entropy import response_rows
from .divergences import DivergenceFunction, divergence_function, precise
from .logits import TARGET_FLOOR, packed_partners
from .objective import Objective, Step, Terms
from .states import ResponseStates
from .temperature import Temperatures, schedule_factor, with_temperature
from .terms import TERMS


if TYPE_CHECKING:
    from ..models.causal_lm import LMHead

logger = logging.getLogger(__name__)

# Below this the text begins a token that the teacher doesn't expect, and what it thinks of the rest is of no account.
LEAST_MASS = 0.01
# Of the teacher's next tokens, at a link: the rest stays with the student's token that ends there.
NEXT_TOKENS = 128
# Temperatures that are tried, a sixth of an octave apart.
TRIED = [2.0 ** (step / 6) for step in range(-4, 10)]
# How many times the teacher's own bits a target may need: it doesn't know that a token before didn't go on.
TOLERANCE = 1.05


@dataclass(frozen=True)
class Targets:
    """
    What the teacher thinks of the student's next tokens.

    Attributes:
        columns (`[N, k]`, int64), mass (`[N, k]`): The likeliest columns, and their shares.
        there (`[N]`, bool): Whether there is a target.
        own (`[N]`): The share of the token that comes.
    """

    columns: Tensor
    mass: Tensor
    there: Tensor
    own: Tensor


@dataclass(frozen=True)
class Quality:
    """
    How much of a text a target says.

    Attributes:
        target_bits, teacher_bits: −log₂ of the probability of the text, per byte, by the target over the student's
            tokens and by the teacher over its own. Both are of the same bytes, those of the student's tokens that have
            a target: of a token of the teacher that lies there in part, that part of its bits counts.
        rows: Share of the student's tokens of text that have a target.
    """

    target_bits: float
    teacher_bits: float
    rows: float

    def __str__(self) -> str:
        return (
            f"the target has {self.target_bits:.3f} bits per byte, over {self.rows:.1%} of the student's tokens, and"
            f" the teacher {self.teacher_bits:.3f} there"
        )

    def check(self, segmentation: str = "student") -> None:
        """
        Raises a [`UserError`] where there is no target, or one that needs over `TOLERANCE` times the teacher's bits:
        then it isn't what the teacher thinks. `"longest"` is known to need more, and is warned of.
        """
        right = self.target_bits <= TOLERANCE * self.teacher_bits
        said = f"({self}; right is at most {TOLERANCE:g} times that)"
        if not self.rows > 0.01 or not (right or segmentation == "longest"):
            raise UserError(f"method='bpm' makes no right target of this pair {said}: choose another, such as alm")
        if not right:
            logger.warning("bpm_segmentation='longest' makes a wrong target of this pair %s: try 'student'", said)
        if self.rows < 0.5:
            logger.warning("method='bpm' has a target for few of the student's tokens (%s); alm may suit better", self)


class BytePrefix(Objective):
    """
    f(T, q) over the student's tokens, T the teacher's byte-prefix target: `bpm`.

    The end of an answer is the text's to teach: T and q are of text, and beside f(T, q) stands −log of the
    probability that the student gives text at all. A position without a target learns the text alone.
    """

    terms = (TERMS["ce"], TERMS["correct"], TERMS["kd"], TERMS["target_rows"])
    fits = True

    def __init__(self, config: Any, pair: Any, device: torch.device):
        super().__init__(config, pair, device)
        student_tokenizer, teacher_tokenizer = pair.tokenizers
        tables = byte_tables(student_tokenizer, teacher_tokenizer, config.bpm_segmentation)
        if config.bpm_top_k >= tables.size:
            raise UserError(
                f"bpm_top_k={config.bpm_top_k} is above what the student's {tables.size:,} tokens have: set it to less"
                " (64 is the default)"
            )
        self.size, self.teacher_size = tables.size, tables.teacher_size
        self.columns = self.size + 1 + len(tables.open)
        self.tables = {name: tensor.to(device) for name, tensor in tables.tensors.items()}
        self.longest = config.bpm_segmentation == "longest"
        # Rows of a head that pad it are no text either.
        self.text = F.pad(self.tables["length"] > 0, (0, pair.student.rows - self.size))
        self.teacher_temperature = config.teacher_temperature or 1.0

    # ---- Loss

    def __call__(self, student: ResponseStates, teacher: ResponseStates, step: Step) -> Terms:
        config, factor = self.config, self._factor(step)
        found = self.targets(student, teacher, factor)
        # The target has its temperature already.
        taus = Temperatures(factor * (config.student_temperature or 1.0), factor * self.teacher_temperature)
        divergence = divergence_function(config.divergence, config)
        divergence = with_temperature(divergence, Temperatures(taus.student, 1.0))
        scale = taus.factor(config.temperature_scaling)
        known = self.size, self.text, self.tables["members"], self.tables["opens"]

        def terms(logits: Tensor, targets: Tensor, columns: Tensor, mass: Tensor, there: Tensor) -> dict[str, Tensor]:
            rows = response_rows(logits, targets)
            value, ending = bpm(logits, columns, mass, *known, divergence, taus.student)
            # On its own samples a student would learn to write, and to end, as it does.
            learnt = scale * value if step.on_policy else scale * value + ending
            alone = torch.zeros_like(value) if step.on_policy else rows["ce"]
            return {**rows, "kd": torch.where(there, learnt, alone), "target_rows": there.to(logits.dtype)}

        loss, rows = linear_rows(
            terms,
            [student.packed(student.hidden)],
            [student.head],
            [student.packed(student.targets), found.columns, found.mass, found.there],
            weights=self.weights(step),
            **self.chunks(student.hidden.device),
        )
        assert loss is not None
        return Terms(
            {name: student.per_example(values) for name, values in rows.items()},
            *(student.counts, loss, None, teacher.counts, rows["ce"]),
        )

    def _factor(self, step: Step) -> float:
        config = self.config
        ratio = (config.final_kd_temperature or config.kd_temperature) / config.kd_temperature
        return schedule_factor(config.temperature_schedule, ratio, step.progress)

    # ---- Target

    @torch.no_grad()
    def targets(self, student: ResponseStates, teacher: ResponseStates, factor: float = 1.0) -> Targets:
        """Adds up the targets of a batch, for some rows at a time; `factor` is of the teacher's temperature."""
        if student.plan is None:
            raise UserError(
                "method='bpm' reads where its targets are from the batch, which has no prefix_plan: leave"
                " data_collator out, or give DualCollator a prefix_plan: the plan of"
                " hf_dskd.alignment.byte_prefix.byte_tables(...)"
            )
        plan, own = student.packed(student.plan).long(), student.packed(student.targets)
        places = packed_partners(student.plan[..., 0].long(), student.mask, teacher.mask)
        theirs, count, size = teacher.packed(teacher.targets), len(plan), self.config.bpm_top_k
        logits = self._logits(teacher.packed(teacher.hidden), teacher.head, factor)
        following = self._following(logits, theirs) if plan.shape[1] > HEAD else None
        columns, there = torch.zeros(count, size, dtype=torch.int64, device=plan.device), places >= 0
        mass, share = (torch.zeros(*shape, device=plan.device) for shape in ((count, size), (count,)))
        for at in self._parts(count if len(theirs) else 0):
            here = places[at].clamp(min=0)
            target, inside = self.add_up(logits(here).softmax(-1), plan[at], own[at], here, theirs, following)
            there[at] &= inside >= LEAST_MASS
            # What no token of the student begins stays in the rest.
            target[:, self.size] = 0
            mass[at], columns[at] = target.topk(size, -1)
            share[at] = target.gather(1, own[at].unsqueeze(1)).squeeze(1)
        return Targets(columns, mass, there, share)

    def _logits(self, hidden: Tensor, head: LMHead, factor: float) -> Callable[[Any], Tensor]:
        """Returns what gives the teacher's softened logits of some rows; they are kept where there is room for all."""
        head, temperature = head.detach(), factor * self.teacher_temperature

        def softened(at: Any) -> Tensor:
            return precise(head(hidden[at])[:, : self.teacher_size]) / temperature

        if 8e-6 * len(hidden) * self.teacher_size > self.config.loss_memory_mb:
            return softened
        kept = softened(slice(None))
        return lambda at: kept[at]

    def _following(self, logits: Callable[[Any], Tensor], theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Finds the likeliest tokens at each of the teacher's rows, `[M, w]`, their probabilities, `[M, w]`, and that of
        the text's own token, `[M]`.
        """
        found = []
        for at in self._parts(len(theirs)):
            p = logits(at).softmax(-1)
            likely = p.topk(min(NEXT_TOKENS, self.teacher_size), -1)
            found.append((likely.indices, likely.values, p.gather(1, theirs[at].unsqueeze(1)).squeeze(1)))
        tokens, top, own = (torch.cat(parts) for parts in zip(*found)) if found else (theirs.unsqueeze(1),) * 3
        return tokens, top, own

    def add_up(
        self, p: Tensor, plan: Tensor, own: Tensor, here: Tensor, theirs: Tensor, following: Any
    ) -> tuple[Tensor, Tensor]:
        """
        Adds up the targets of n rows.

        Args:
            p (`torch.Tensor` of shape `[n, V_t]`): The teacher's probabilities where the student's token begins.
            plan (`torch.Tensor` of shape `[n, F]`): See [`~hf_dskd.alignment.byte_prefix.ByteTables.plan`].
            own (`torch.Tensor` of shape `[n]`): The student's token of the text.
            here (`torch.Tensor` of shape `[n]`): The packed row of the teacher.
            theirs (`torch.Tensor` of shape `[M]`): The teacher's tokens of the text.
            following: Of the teacher's rows, for links (see `_following`).

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: shares `[n, C]`, which sum to 1, and the probability `[n]` of all
            tokens that go on from what was read.
        """
        rank, offset, column = (self.tables[name] for name in ("rank", "offset", "column"))
        read, low, high, count = plan[:, 1:HEAD].split(1, 1)
        p = torch.where((rank >= low) & (rank < high), p, 0.0)
        inside = p.sum(-1)
        p = p / inside.clamp(min=1e-30).unsqueeze(1)
        token = theirs[here].unsqueeze(1)
        path, target = p.gather(1, token), p.new_zeros(len(p), self.columns)
        # Outside of the range, where a token may have no such place, there is no mass.
        target.scatter_add_(1, column[(offset + read).clamp(max=len(column) - 1)].long(), p)
        # The text's own token is what its links make of it.
        begun = column[offset[token] + read].long()
        moved = path * (count > 0) if self.longest else path
        target.scatter_add_(1, begun, -moved)
        path = moved
        for link in range((plan.shape[1] - HEAD) // LINK):
            node, *_ = now = plan[:, HEAD + LINK * link : HEAD + LINK * (link + 1)].split(1, 1)
            row, on = (here + link + 1).clamp(max=len(theirs) - 1), count > link
            tokens, q, ours = following[0][row], following[1][row], following[2][row].unsqueeze(1)
            if self.longest:
                # Of the last of the text's tokens, all that begin like it.
                alike = (q * ((rank[tokens] >= node) & (rank[tokens] < now[1]))).sum(1, keepdim=True)
                ahead = torch.where(count == link + 1, torch.maximum(alike, ours), ours)
            else:
                others, ahead = q * (tokens != theirs[row].unsqueeze(1)) * path * on, ours
                target.scatter_add_(1, self._first(node, torch.cat(now[1:], 1), tokens), others)
                left = path * on * (1 - ours) - others.sum(1, keepdim=True)
                target.scatter_add_(1, now[-1], left.clamp(min=0))
            path = torch.where(on, path * ahead, path)
        if self.longest:
            target.scatter_add_(1, begun, moved - path)
        target.scatter_add_(1, own.unsqueeze(1), path)
        return target.clamp_(min=0), inside

    def _first(self, node: Tensor, otherwise: Tensor, tokens: Tensor) -> Tensor:
        """
        Finds the student's first token of what was read, at `node` `[n, 1]`, and each of the teacher's `tokens`
        `[n, w]`: the longest that can end there, or else that of what was read, by what follows (`[n, 4]`).
        """
        tables, width = self.tables, self.tables["spelled"].shape[1]
        spelled = tables["spelled"][tokens].long()
        kinds = tables["kind"][spelled]
        found, node = otherwise.gather(1, kinds[..., 0].clamp(max=SPACE)), node.expand_as(tokens)
        for place in range(width - 1):
            key = node * (NO_BYTE + 1) + spelled[..., place]
            edge = torch.searchsorted(tables["edge"], key).clamp(max=len(tables["edge"]) - 1)
            there = (tables["edge"][edge] == key) & (node >= 0)
            # On another device to look would be to wait.
            if tokens.device.type == "cpu" and not there.any():
                break
            node = torch.where(there, tables["child"][edge], -1)
            token = torch.where(there, tables["token"][node.clamp(min=0)], -1)
            ends = tables["ends"][token.clamp(min=0), kinds[..., place + 1]]
            found = torch.where((token >= 0) & ends, token, found)
        return found

    def _parts(self, rows: int) -> Iterator[slice]:
        # Logits, probabilities, columns and what is made of them.
        size = int(self.config.loss_memory_mb * 1e6 // (40 * self.teacher_size + 8 * self.columns)) or 1
        return (slice(start, start + size) for start in range(0, rows, size))

    # ---- Before training

    @torch.no_grad()
    def fit(self, sample: Sequence[tuple[ResponseStates, ResponseStates]]) -> dict[str, float]:
        """
        Finds the temperature at which the teacher expects the text most, unless one is set, and checks the target.

        Raises:
            UserError: For a target that needs over `TOLERANCE` times the teacher's bits for the text.
        """
        fitted = {}
        if self.config.teacher_temperature is None:
            self.teacher_temperature = 1.0
            losses = sum(self._surprise(teacher, TRIED) for _, teacher in sample)
            self.teacher_temperature = round(lowest(TRIED, torch.as_tensor(losses).tolist()), 2)
            fitted = {"teacher_temperature": self.teacher_temperature}
        found = self.quality(sample)
        logger.info("bpm at teacher_temperature=%s: %s", self.teacher_temperature, found)
        found.check(self.config.bpm_segmentation)
        return fitted

    def take(self, fitted: Mapping[str, float]) -> None:
        """Takes the teacher's temperature, unless one is set."""
        if self.config.teacher_temperature is None and "teacher_temperature" in fitted:
            self.fitted, self.teacher_temperature = dict(fitted), fitted["teacher_temperature"]

    @torch.no_grad()
    def quality(self, sample: Sequence[tuple[ResponseStates, ResponseStates]]) -> Quality:
        """Measures the targets of responses, against the teacher's own predictions of the same text."""
        totals = torch.zeros(5, dtype=torch.float64)
        for student, teacher in sample:
            found, tokens = self.targets(student, teacher), student.packed(student.targets)
            sizes = self.tables["length"][tokens]
            text = sizes > 0 if student.silent is None else ~student.packed(student.silent)
            surprise, there = -found.own.clamp(min=1e-30).log(), found.there & text
            theirs = self._surprise_of(student, teacher, sizes)
            parts = (surprise * there, theirs * there, sizes * there, there, text)
            totals += torch.stack([part.sum() for part in parts]).double().cpu()
        target, own, size, there, text = totals.tolist()
        bits = max(size, 1.0) * math.log(2)
        return Quality(target / bits, own / bits, there / max(text, 1.0))

    def _surprise_of(self, student: ResponseStates, teacher: ResponseStates, sizes: Tensor) -> Tensor:
        """Shares the teacher's cross entropy out to the student's tokens `[N]` of `sizes` bytes, evenly over bytes."""
        assert student.plan is not None
        places = packed_partners(student.plan[..., 0].long(), student.mask, teacher.mask).clamp(min=0)
        lengths = self.tables["teacher_length"][teacher.packed(teacher.targets)]
        ends = lengths.cumsum(0)
        begin = (ends - lengths)[places] + student.packed(student.plan)[:, 1]
        losses = self._cross_entropies(teacher, (1.0,))[0] * (lengths > 0)
        before = losses.cumsum(0) - losses

        def until(place: Tensor) -> Tensor:
            at = torch.searchsorted(ends, place, right=True).clamp(max=len(ends) - 1)
            share = ((place - ends[at] + lengths[at]) / lengths[at].clamp(min=1)).clamp(0, 1)
            return before[at] + share * losses[at]

        return until(begin + sizes) - until(begin)

    def _surprise(self, teacher: ResponseStates, factors: Sequence[float]) -> Tensor:
        """Adds up the teacher's cross entropy over its tokens of the text, at each factor of its temperature."""
        return self._cross_entropies(teacher, factors).sum(1)

    def _cross_entropies(self, teacher: ResponseStates, factors: Sequence[float]) -> Tensor:
        """Computes the teacher's cross entropy of its tokens, `[factors, M]`; 0 for those that aren't text."""
        tokens = teacher.packed(teacher.targets)
        text = torch.ones_like(tokens, dtype=torch.bool) if teacher.silent is None else ~teacher.packed(teacher.silent)
        logits, found = self._logits(teacher.packed(teacher.hidden), teacher.head, 1.0), list[Tensor]()
        for at in self._parts(len(tokens)):
            rows = logits(at)
            losses = [F.cross_entropy(rows / factor, tokens[at], reduction="none") for factor in factors]
            found.append((torch.stack(losses) * text[at]).double())
        return torch.cat(found, 1)


def lowest(tried: Sequence[float], losses: Sequence[float]) -> float:
    """Finds the lowest point of a parabola through the least of `losses` and its neighbours, in the log of `tried`."""
    best = min(range(1, len(losses) - 1), key=losses.__getitem__)
    left, middle, right = losses[best - 1 : best + 2]
    curve = left - 2 * middle + right
    shift = max(min(0.5 * (left - right) / curve, 1.0), -1.0) if curve > 0 else 0.0
    return tried[best] * (tried[best + 1] / tried[best]) ** shift


def bpm(
    logits: Tensor,
    columns: Tensor,
    mass: Tensor,
    size: int,
    text: Tensor,
    members: Tensor,
    opens: Tensor,
    divergence: DivergenceFunction,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """
    f(T, q given text) and −log q(text), per row `[n]` each.

    T is known for k columns: tokens, and events ("a token that begins with this white space"). What it doesn't tell
    apart, the tokens of an event and the rest, it gets from the student, in the student's own proportions. That is the
    f-divergence of the coarser partition, with its gradient: 0 where the student has the right mass in each part.

    Args:
        logits (`torch.Tensor` of shape `[n, V]`): The student's, with their gradient.
        columns (`torch.Tensor` of shape `[n, k]`), mass (`torch.Tensor` of shape `[n, k]`): See [`Targets`].
        size (`int`): Tokens of the vocabulary, V_s; heads can have more rows.
        text (`torch.Tensor` of shape `[V]`, bool): Which tokens are text.
        members (`torch.Tensor` of shape `[m]`): Tokens that are part of an event.
        opens (`torch.Tensor` of shape `[events, m]`, bool): Which of them are part of which event.
        divergence: Of `(student_logits, teacher_logits)`, per row; divides the student's by its temperature.
        temperature (`float`, *optional*, defaults to `1.0`): The student's.
    """
    logits = precise(logits)
    # Far enough for a probability of 0, and finite for what multiplies it.
    of_text = logits.masked_fill(~text, -1e4)
    with torch.no_grad():
        q = (of_text.detach() / temperature).softmax(-1)
        target = completed(columns, mass, q, size, members, opens).clamp(min=TARGET_FLOOR).log()
    return divergence(of_text, target), logits.logsumexp(-1) - of_text.logsumexp(-1)


def completed(columns: Tensor, mass: Tensor, q: Tensor, size: int, members: Tensor, opens: Tensor) -> Tensor:
    """
    Spreads the mass of a target over a vocabulary, `[n, V]`, in the proportions of `q` `[n, V]` where it doesn't tell;
    other arguments as of [`bpm`].
    """
    spread = q.new_zeros(len(q), size + 1 + len(opens)).scatter(1, columns, mass.to(q.dtype))
    target = F.pad(spread[:, :size], (0, q.shape[-1] - size))
    others = q.masked_fill(target > 0, 0.0)
    rest = (1 - mass.sum(-1, keepdim=True)).clamp(min=0)
    target = target + others * (rest / others.sum(-1, keepdim=True).clamp(min=1e-30))
    if not len(opens):
        return target
    among, part_of = q[:, members], opens.to(q.dtype)
    share = spread[:, size + 1 :] / (among @ part_of.T).clamp(min=1e-30)
    return target.index_add(1, members, among * (share @ part_of))
