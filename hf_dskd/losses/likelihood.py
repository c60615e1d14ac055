"""
Approximate likelihood matching (ALM, arXiv 2503.20083): both models give the same stretches of text the same
probability.

The response is cut into chunks, the smallest spans at whose end a token of both tokenizations ends. That a chunk
follows, or anything else, is a distribution over two outcomes; the two models' are compared, without a projector and
without a map between vocabularies. Axes: B examples, R_s and R_t response tokens (padded), C chunks. Chunk ids are 0,
1, ... along a response and -1 outside it; every chunk has tokens of both models.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.templates import special_ids
from ..data.tokens import token_bytes
from ..kernels.linear_divergence import linear_rows
from ..methods import BINARY_DIVERGENCES
from .cross_entropy import response_rows
from .divergences import precise
from .objective import Objective, Step, Terms
from .states import ResponseStates
from .terms import TERMS


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..config import DSKDConfig
    from ..models.causal_lm import LMHead


class ChunkLikelihood(Objective):
    """
    f(p(c)^(1/τ), q(c)^(1/τ)) of the chunks c of a response (arXiv 2503.20083): `alm`.

    Another method of likelihoods compares them otherwise, and may have a term of its own, the last of its `terms`.
    """

    terms = (TERMS["ce"], TERMS["correct"], TERMS["alm"])

    def __init__(self, config: DSKDConfig, pair: Any, device: torch.device):
        super().__init__(config, pair, device)
        self.boundary_tokens: tuple[Tensor | None, ...] = (None, None)
        if config.alm_bias_threshold is not None:
            sides = zip(pair.tokenizers, (pair.student.rows, pair.teacher.rows))
            self.boundary_tokens = tuple(boundary_tokens(tokenizer, rows).to(device) for tokenizer, rows in sides)

    def __call__(self, student: ResponseStates, teacher: ResponseStates, step: Step) -> Terms:
        options = self.chunks(student.hidden.device)
        own, theirs = (
            likelihood_rows(states, head, tokens, options)
            for states, head, tokens in zip(
                (student, teacher), (student.head, teacher.head.detach()), self.boundary_tokens
            )
        )
        matched, name = self.compare(student, teacher, own, theirs), self.terms[-1].name
        sums = {name: student.per_example(own[name]) for name in ("ce", "correct")}
        rates = self.weights(step)
        return Terms(
            {**sums, name: matched},
            student.counts,
            student_loss=rates["ce"] * sums["ce"].sum(),
            teacher_loss=rates[name] * matched.sum(),
            teacher_tokens=teacher.counts,
            ce_rows=own["ce"].detach(),
        )

    def compare(
        self, student: ResponseStates, teacher: ResponseStates, own: dict[str, Tensor], theirs: dict[str, Tensor]
    ) -> Tensor:
        """
        Compares the two models' likelihoods of the responses, `[B]`: sums over the teacher's tokens.

        `own` and `theirs` are of [`likelihood_rows`], `[N]` each.
        """
        assert student.chunks is not None and teacher.chunks is not None
        chunks = [student.chunks, teacher.chunks]
        if student.silent is not None and teacher.silent is not None:
            # The end is no text, and a teacher that wasn't trained on this data may hardly expect it: matched, it
            # would teach the student to go on. The cross entropy teaches the end.
            chunks = [student.chunks.masked_fill(student.silent, -1), teacher.chunks.masked_fill(teacher.silent, -1)]
        boundaries = [
            boundary_after(rows["boundary"], states.mask) if "boundary" in rows else None
            for rows, states in ((own, student), (theirs, teacher))
        ]
        values = likelihood_matching(
            student.padded(-own["ce"]),
            teacher.padded(-theirs["ce"]),
            *chunks,
            divergence=self.config.alm_divergence,
            temperature=self.config.alm_temperature,
            bias_threshold=self.config.alm_bias_threshold,
            student_boundary=boundaries[0],
            teacher_boundary=boundaries[1],
        )
        # Binary divergences shrink as 1/τ. Times τ they stay nats, whose limit is a log(a/b) + b − a for the
        # surprisals a of the teacher and b of the student, so that `kd_rate` weighs them against the cross entropy at
        # any τ.
        return values * self.config.alm_temperature


def likelihood_rows(
    states: ResponseStates, head: LMHead, boundary_mask: Tensor | None, options: dict[str, Any]
) -> dict[str, Tensor]:
    """
    Computes the cross entropy of each row (`ce`), whether it is `correct`, and with `boundary_mask` `[V]` the
    probability of such a token (`boundary`), `[N]` each.
    """

    def terms(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        rows = response_rows(logits, targets)
        return rows if boundary_mask is None else {**rows, "boundary": boundary_probability(logits, boundary_mask)}

    # A chunk's likelihood is not linear in those of its tokens: the gradient has to wait for the backward pass.
    return linear_rows(
        terms, [states.packed(states.hidden)], [head], [states.packed(states.targets)], weights=None, **options
    )[1]


def likelihood_matching(
    student_logprob: Tensor,
    teacher_logprob: Tensor,
    student_chunks: Tensor,
    teacher_chunks: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 100.0,
    bias_threshold: float | None = None,
    teacher_boundary: Tensor | None = None,
    student_boundary: Tensor | None = None,
) -> Tensor:
    """
    Divergence of the two models' chunk likelihoods, each weighted with the chunk's number of teacher tokens, `[B]`:
    sums over chunks; divided by the teacher's response tokens they are a mean.

    Two tokenizations say different things by ending a token: where one has a token "cats", its token "cat" says too
    that no "s" follows. Boundaries lessen this bias. With `bias_threshold` and the teacher's boundary probabilities,
    chunks that don't seem to end a word are merged with what follows. With both models' boundary probabilities, the
    likelihoods compared are those of a chunk *and* a boundary after it. The authors' scripts do both.

    Args:
        student_logprob (`[B, R_s]`), teacher_logprob (`[B, R_t]`): Of each response token; the teacher's is constant.
        student_chunks (`[B, R_s]`), teacher_chunks (`[B, R_t]`): Chunk of each token; -1 is ignored.
        divergence, temperature: See [`binary_divergence`].
        bias_threshold (*optional*): See [`merge_chunks`]; 0.1 in the authors' scripts. `None` merges nothing.
        teacher_boundary (`[B, R_t]`, *optional*), student_boundary (`[B, R_s]`, *optional*):
            Probability that a boundary follows each response token, from [`boundary_after`].
    """
    if teacher_boundary is not None and bias_threshold is not None:
        student_chunks, teacher_chunks = merge_chunks(student_chunks, teacher_chunks, teacher_boundary, bias_threshold)
    if teacher_boundary is not None and student_boundary is not None:
        student_logprob = _with_boundary(student_logprob, student_chunks, student_boundary)
        teacher_logprob = _with_boundary(teacher_logprob, teacher_chunks, teacher_boundary)
    # No more chunks than teacher tokens: asking the device for their number would make it wait.
    size = teacher_chunks.shape[1]
    values = binary_divergence(
        chunk_log_likelihoods(teacher_logprob.detach(), teacher_chunks, size),
        chunk_log_likelihoods(student_logprob, student_chunks, size),
        divergence,
        temperature,
    )
    tokens = chunk_log_likelihoods(torch.ones_like(teacher_logprob), teacher_chunks, size)
    return (values * tokens).sum(1)


def chunk_log_likelihoods(logprob: Tensor, chunks: Tensor, size: int) -> Tensor:
    """
    Sums the log-probabilities `[B, R]` of the tokens of each chunk, in float32 (float64 stays): `[B, size]`.

    `chunks` `[B, R]` are below `size`, and -1 outside the response. A chunk without tokens is 0.
    """
    logprob = precise(logprob).masked_fill(chunks < 0, 0.0)
    sums = torch.zeros(len(chunks), size, dtype=logprob.dtype, device=logprob.device)
    return sums.scatter_add(1, chunks.long().clamp(min=0), logprob)


def binary_divergence(
    teacher_logp: Tensor, student_logp: Tensor, name: str = "forward_kl", temperature: float = 100.0
) -> Tensor:
    """
    f-divergence of (P_T, 1 − P_T) and (P_S, 1 − P_S), P = exp(logp / τ), in nats, of the inputs' shape.

    `name` is a row of [`~hf_dskd.methods.BINARY_DIVERGENCES`]. `"binary_ce"` is the cross entropy that the authors
    minimise: the gradient of `"forward_kl"`, which is 0 where both are equal. τ above 1 lets small likelihoods say
    more. Log-probabilities count as at most −ε of their precision, for a student that is certain where the teacher
    isn't is infinitely wrong.
    """
    teacher_logp, student_logp = (
        logp.clamp(max=-torch.finfo(logp.dtype).eps) / temperature
        for logp in (precise(teacher_logp), precise(student_logp))
    )
    return BINARY_DIVERGENCES[name].load()(teacher_logp, student_logp)


def merge_chunks(
    student_chunks: Tensor, teacher_chunks: Tensor, teacher_boundary: Tensor, bias_threshold: float
) -> tuple[Tensor, Tensor]:
    """
    Merges each chunk with the following ones until one ends where the teacher expects a boundary.

    A chunk is complete where `teacher_boundary` `[B, R_t]` (see [`boundary_after`]) after its last token is greater
    than `bias_threshold`, and at the end of an answer. Returns new ids of student and teacher, in the layout of the
    old.
    """
    # What follows an answer is another answer, or its end, which is in no chunk.
    last = F.pad(teacher_chunks[:, 1:], (0, 1), value=-1) < 0
    complete = _chunk_ends(teacher_chunks) & ((teacher_boundary > bias_threshold) | last)
    completed = torch.zeros_like(teacher_chunks, dtype=torch.int64)
    completed = completed.scatter_add(1, teacher_chunks.long().clamp(min=0), complete.long())
    # A chunk's new id is how many chunks before it are complete.
    merged = completed.cumsum(1) - completed
    student, teacher = (
        torch.where(chunks < 0, -1, merged.gather(1, chunks.long().clamp(min=0)))
        for chunks in (student_chunks, teacher_chunks)
    )
    return student, teacher


def boundary_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> Tensor:
    """
    Which tokens begin a new word, bool `[rows]`: those whose first byte is white space, and special ones (the end).

    `rows` are those of the model's head, of which there may be more than tokens.
    """
    boundary = {token for token, data in token_bytes(tokenizer).items() if data[:1].isspace()}
    boundary.update(special_ids(tokenizer))
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[[token for token in boundary if token < rows]] = True
    return mask


def boundary_probability(logits: Tensor, boundary_mask: Tensor) -> Tensor:
    """Probability `[N]`, in float32, that the token predicted by `logits` `[N, V]` is one of `boundary_mask` `[V]`."""
    return torch.softmax(precise(logits), dim=-1).masked_fill(~boundary_mask, 0.0).sum(-1)


def boundary_after(probability: Tensor, mask: Tensor) -> Tensor:
    """
    Turns what each row predicts into what follows each response token, `[B, R]`; 1 outside the response.

    Row i of the packed `probability` `[N]` (see [`boundary_probability`]) predicts response token i, so that row i + 1
    tells what follows it. After the last token there is a boundary. `mask` `[B, R]` marks the N real rows, at the
    front.
    """
    padded = torch.ones(mask.shape, dtype=probability.dtype, device=mask.device).masked_scatter(mask, probability)
    return F.pad(padded[:, 1:], (0, 1), value=1.0)


def _chunk_ends(chunks: Tensor) -> Tensor:
    """Which tokens are the last of their chunk, `[B, R]`."""
    return (chunks >= 0) & (chunks != F.pad(chunks[:, 1:], (0, 1), value=-1))


def _with_boundary(logprob: Tensor, chunks: Tensor, boundary: Tensor) -> Tensor:
    """Adds log P(boundary) to the last token of each chunk."""
    # A probability that underflowed has neither a logarithm nor a gradient.
    log_boundary = precise(boundary).clamp(min=1e-30).log()
    return precise(logprob) + torch.where(_chunk_ends(chunks), log_boundary, 0.0)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, exact at both ends."""
    near_zero = x > -math.log(2)
    # Near 0 the other branch would be infinite, and 0 times its gradient NaN: it gets a harmless input there.
    far = torch.log1p(-torch.exp(x.masked_fill(near_zero, -1.0)))
    return torch.where(near_zero, torch.log(-torch.expm1(x)), far)


def binary_forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q), log p and log q given."""
    return log_p.exp() * (log_p - log_q) - torch.expm1(log_p) * (_log1mexp(log_p) - _log1mexp(log_q))


def binary_reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q ‖ p)."""
    return binary_forward_kl(log_q, log_p)


def binary_total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """|p − q|."""
    # |p − q| without a difference of numbers that may both be near 1.
    return -torch.maximum(log_p, log_q).exp() * torch.expm1(-(log_p - log_q).abs())


def binary_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """−p log q − (1 − p) log(1 − q)."""
    return torch.expm1(log_p) * _log1mexp(log_q) - log_p.exp() * log_q
