"""
What there is to choose from: methods, alignments, matchings and divergences, each one row that names its code.

Light: nothing here imports torch, so that help answers at once. A row's code is imported when it is used. To add a
divergence, write its function and its row; so with an alignment (a function), a matching (a class), and a method of
logits or likelihoods (an objective: a class of [`hf_dskd.losses.objective`]).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Row:
    """
    What every table has.

    Attributes:
        formula: In one line; p is the teacher's distribution, q the student's.
        code: The function or class that computes it, or where it is, as `"module:name"`.
        source: Paper, with the number of its equation.
    """

    formula: str
    code: str | Callable[..., Any]
    source: str = ""

    def load(self) -> Any:
        """Imports the row's code and returns it."""
        return resolve_name(f"hf_dskd.{self.code}") if isinstance(self.code, str) else self.code


@dataclass(frozen=True)
class Divergence(Row):
    """
    Between two next-token distributions: a function of `(student_logits, teacher_logits)`, nats per row.

    Keyword-only parameters are settings of the same name: see [`~hf_dskd.losses.divergences.divergence_function`].

    Attributes:
        aliases: What papers and other tools call it.
    """

    aliases: tuple[str, ...] = ()


_D = "losses.divergences:"
_SKEWED, _ADAPTIVE = "DistiLLM, arXiv 2402.03898", "arXiv 2404.02657"
DIVERGENCES = {
    "forward_kl": Divergence("KL(p ‖ q)", _D + "forward_kl", aliases=("kl", "fkl", "kld")),
    "reverse_kl": Divergence("KL(q ‖ p)", _D + "reverse_kl", aliases=("rkl",)),
    "symmetric_kl": Divergence("½ KL(p ‖ q) + ½ KL(q ‖ p)", _D + "symmetric_kl"),
    "js": Divergence(
        "w KL(p ‖ m) + (1 − w) KL(q ‖ m), m = w p + (1 − w) q", _D + "js", aliases=("jsd", "jensen_shannon")
    ),
    "skewed_forward_kl": Divergence("KL(p ‖ λ p + (1 − λ) q)", _D + "skewed_forward_kl", _SKEWED, ("sfkl",)),
    "skewed_reverse_kl": Divergence("KL(q ‖ (1 − λ) p + λ q)", _D + "skewed_reverse_kl", _SKEWED, ("srkl",)),
    "adaptive_kl": Divergence(
        "w KL(p ‖ q) + (1 − w) KL(q ‖ p), w = share of Σ|p − q| that lies on p's head",
        _D + "adaptive_kl",
        _ADAPTIVE,
        ("akl",),
    ),
    "total_variation": Divergence("½ Σ|p − q|", _D + "total_variation", aliases=("tvd", "tv")),
}

# Of two outcomes, a chunk and anything else: functions of both log-probabilities, (teacher, student).
_B = "losses.likelihood:binary_"
BINARY_DIVERGENCES = {
    "forward_kl": Divergence("KL(p ‖ q)", _B + "forward_kl", aliases=("kl", "fkl", "kld")),
    "reverse_kl": Divergence("KL(q ‖ p)", _B + "reverse_kl", aliases=("rkl",)),
    "total_variation": Divergence("|p − q|", _B + "total_variation", aliases=("tvd", "tv")),
    "binary_ce": Divergence("−p log q − (1 − p) log(1 − q)", _B + "cross_entropy", aliases=("bce",)),
}


@dataclass(frozen=True)
class Alignment(Row):
    """
    Which teacher positions stand for a student position in hidden spaces, and back: a function of
    `(student, teacher, queries, keys)` to [`~hf_dskd.alignment.weights.AlignmentWeights`].

    Attributes:
        needs: `"queries"` (and keys), `"chunks"` of the same bytes, `"same_vocabulary"` or `"shared_tokens"`.
        one_to_one: Whether a position has one partner at most, whose prediction can be its label.
    """

    needs: tuple[str, ...] = ()
    one_to_one: bool = False


_A = "alignment.weights:"
ALIGNMENTS = {
    "cross_model_attention": Alignment(
        "softmax(Q Kᵀ / √d) over all tokens", _A + "by_attention", "arXiv 2603.22056, Eqs. 1-3", ("queries",)
    ),
    "chunk_attention": Alignment(
        "softmax(Q Kᵀ / √d) over the chunk of the same bytes",
        _A + "by_attention_in_chunks",
        "arXiv 2603.22056, Eq. 13",
        ("queries", "chunks"),
    ),
    "chunk_mean": Alignment(
        "mean over the chunk of the same bytes", _A + "by_chunk", "arXiv 2603.22056, Eqs. 10-12", ("chunks",)
    ),
    "exact_tokens": Alignment(
        "the token of exactly the same bytes",
        _A + "by_exact_token",
        "DSKDv2, arXiv 2504.11426",
        ("chunks", "shared_tokens"),
        one_to_one=True,
    ),
    "identity": Alignment(
        "the same token", _A + "by_place", "arXiv 2406.17328", ("same_vocabulary",), one_to_one=True
    ),
}


@dataclass(frozen=True)
class Matching(Row):
    """
    What makes queries like keys: a class like [`~hf_dskd.losses.matching.Matching`].

    Attributes:
        critic: Name of the networks that are trained against the queries, or `None` without any.
        role: What they do, for who finds their file.
    """

    critic: str | None = None
    role: str = ""


_M = "losses.matching:"
MATCHINGS = {
    "gan": Matching(
        "E_q[log D(q)] + E_k[log(1 − D(k))]",
        _M + "AdversarialMatching",
        "arXiv 2603.22056, Eq. 14",
        "discriminator",
        "tells queries from keys; its logit is that of 'query'",
    ),
    "ct": Matching(
        "½ E_q E_{k|q}[c(q, k)] + ½ E_k E_{q|k}[c(q, k)]",
        _M + "TransportMatching",
        "arXiv 2603.22056, Eq. 15",
        "transport_critics",
        "costs (critics) and plans (navigators) of the transport between queries and keys",
    ),
    "moments": Matching("(mean_q − mean_k)² + (std_q − std_k)²", _M + "MomentMatching"),
    "mmd": Matching("squared maximum mean discrepancy", _M + "DiscrepancyMatching", "Gretton et al., JMLR 2012"),
}


@dataclass(frozen=True)
class Method:
    """
    A method: an objective, and what that composes.

    Attributes:
        alignment: Which teacher positions stand for a student position: a row of [`ALIGNMENTS`] for methods in hidden
            spaces, a word for people (`"position"`, `"min_edit"`, `"chunks"`) for others, whose objective pairs
            positions itself; `None` without a teacher in the loss.
        spaces: Where the two are compared: `"student"` and `"teacher"` are the hidden spaces of DSKD, others are words
            for people. None where no teacher enters the loss.
        summary: One line for people.
        source: Paper with the number of its equation, or the equation itself (p teacher, q student).
        objective: The class of its loss, or where it is, as `"module:name"` in hf_dskd.
        needs: What the objective needs itself, beside what an alignment needs: `"chunks"` of the same bytes,
            `"same_vocabulary"`, `"shared_tokens"`, a `"vocabulary_map"`, or tokens that spell `"bytes"`.
        matching: What makes queries like keys: a row of [`MATCHINGS`], or `None`.
        teacher_value: What t2s projects: `"state_and_target"` is N_std(h) + N_std(embedding of the token that is to be
            predicted) (arXiv 2603.22056, Eq. 5); `"state"` is the hidden state alone.
        label: What the projected teacher is trained to predict: the `"response"`, or the `"teacher"`'s own prediction.
        projector_init: `"random"`, or `"pseudo_inverse"` from the two heads.
        text: Whose responses are learnt: the `"dataset"`'s, or those that the `"teacher"` writes once before training.
    """

    alignment: str | None
    spaces: tuple[str, ...]
    summary: str
    source: str
    objective: str | Callable[..., Any] = "losses.dual_space:DualSpace"
    needs: tuple[str, ...] = ()
    matching: str | None = None
    teacher_value: str = "state_and_target"
    label: str = "response"
    projector_init: str = "random"
    text: str = "dataset"

    def load(self) -> Any:
        """Imports the class of the objective and returns it."""
        return resolve_name(f"hf_dskd.{self.objective}") if isinstance(self.objective, str) else self.objective

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's hidden states enter the loss."""
        return bool(self.spaces)

    @property
    def dual_space(self) -> bool:
        """Whether the two are compared in hidden spaces."""
        return "student" in self.spaces or "teacher" in self.spaces

    @property
    def all_needs(self) -> frozenset[str]:
        """What the objective, its alignment and its projectors need of the pair and of the data."""
        needs = {*self.needs, *(ALIGNMENTS[self.alignment].needs if self.dual_space and self.alignment else ())}
        if self.label == "teacher" or self.projector_init == "pseudo_inverse":
            needs.add("shared_tokens")
        return frozenset(needs)

    @property
    def has_queries(self) -> bool:
        """Whether there are queries and keys."""
        return "queries" in self.all_needs

    @property
    def needs_chunks(self) -> bool:
        """Whether it needs to know which tokens of the two tokenizations cover the same bytes."""
        return "chunks" in self.all_needs

    @property
    def same_vocabulary(self) -> bool:
        """Whether both models must have one vocabulary."""
        return "same_vocabulary" in self.all_needs

    @property
    def has_alignment(self) -> bool:
        """Whether it has an alignment of positions to show."""
        return self.dual_space or self.needs_chunks

    @property
    def composition(self) -> dict[str, Any]:
        """What must be the same for a run to go on from a checkpoint."""
        names = ("alignment", "spaces", "matching", "teacher_value", "label", "projector_init", "text")
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names}


_BOTH = ("student", "teacher")
_CE = "losses.cross_entropy:CrossEntropy"

METHODS = {
    "sft": Method(None, (), "cross entropy on the responses; no teacher", "−log q(y)", _CE),
    "seq_kd": Method(
        None,
        (),
        "cross entropy on responses that the teacher writes",
        "arXiv 1606.07947: −log q(ŷ), ŷ = argmax p",
        _CE,
        text="teacher",
    ),
    "kd": Method(
        "identity",
        ("logits",),
        "divergence of the logits; one vocabulary, of which one model may have more rows",
        "arXiv 1503.02531: f(p, q)",
        "losses.logits:SharedVocabulary",
        ("same_vocabulary",),
    ),
    "dskd": Method(
        "identity",
        _BOTH,
        "distillation in both hidden spaces, position by position; one vocabulary",
        "arXiv 2406.17328: f(p_t, softmax(W_t s2t(h_s))) + f(softmax(W_s t2s(h_t)), q)",
        teacher_value="state",
    ),
    "dskd_cma": Method(
        "cross_model_attention",
        _BOTH,
        "distillation in both hidden spaces, tokens aligned by cross-model attention",
        "arXiv 2406.17328; arXiv 2603.22056, Eqs. 1-9",
    ),
    "dskd_cma_ga": Method(
        "cross_model_attention",
        _BOTH,
        "dskd_cma with queries matched to keys by a discriminator",
        "arXiv 2603.22056, Eqs. 14 and 16",
        matching="gan",
    ),
    "dskd_cma_ct": Method(
        "cross_model_attention",
        _BOTH,
        "dskd_cma with queries matched to keys by conditional transport",
        "arXiv 2603.22056, Eqs. 15 and 16",
        matching="ct",
    ),
    "dskd_clp": Method(
        "chunk_mean",
        _BOTH,
        "distillation in both hidden spaces, means over chunks of the same bytes",
        "arXiv 2603.22056, Eqs. 10-12",
    ),
    "dskd_cla": Method(
        "chunk_attention",
        _BOTH,
        "distillation in both hidden spaces, attention inside chunks of the same bytes",
        "arXiv 2603.22056, Eq. 13",
    ),
    "dskd_eta": Method(
        "exact_tokens",
        _BOTH,
        "distillation in both hidden spaces where both models have the same token (DSKDv2)",
        "arXiv 2504.11426: as dskd, with t2s = pinv(W_s) W_t and label argmax p",
        teacher_value="state",
        label="teacher",
        projector_init="pseudo_inverse",
    ),
    "uld": Method(
        "position",
        ("sorted_logits",),
        "L1 distance of the sorted next-token probabilities",
        "arXiv 2402.12030: Σ |sort(p) − sort(q)|",
        "losses.logits:SortedProbabilities",
    ),
    "min_edit": Method(
        "min_edit",
        ("mapped_logits",),
        "divergence after tokens and vocabularies are mapped by least edit distance",
        "arXiv 2401.10491; arXiv 2406.17328: f(M p, q), M the nearest token by edit distance",
        "losses.logits:MappedVocabulary",
        ("vocabulary_map", "shared_tokens"),
    ),
    "alm": Method(
        "chunks",
        ("likelihood",),
        "likelihoods of the same pieces of the text; no projector",
        "arXiv 2503.20083: f(p(c)^(1/τ), q(c)^(1/τ)), binary, over chunks c",
        "losses.likelihood:ChunkLikelihood",
        ("chunks",),
    ),
    "bpm": Method(
        "byte_prefix",
        ("student_tokens",),
        "the teacher's distribution as one over the student's tokens, by bytes; no projector",
        "arXiv 2607.22334: f(T, q), T(s) = Σ p(v | c) over v = c·u with s the student's first token of u",
        "losses.byte_prefix:BytePrefix",
        ("chunks", "bytes"),
    ),
}
