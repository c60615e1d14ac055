"""What a method is: one row that composes an alignment, the spaces it compares in, and a matching."""

from __future__ import annotations

from dataclasses import dataclass


DUAL_SPACE_ALIGNMENTS = ("cross_model_attention", "chunk_attention", "chunk_mean", "exact_tokens", "identity")
ATTENTION_ALIGNMENTS = ("cross_model_attention", "chunk_attention")
MATCHINGS = ("gan", "ct", "moments", "mmd")


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        alignment: Which teacher positions stand for a student position: one of `DUAL_SPACE_ALIGNMENTS`;
            `"position"` (the i-th token with the i-th), `"min_edit"` or `"chunks"` for methods without hidden spaces;
            `None` without a teacher in the loss.
        spaces: Where the two are compared: `"student"` and `"teacher"` are the hidden spaces of DSKD; `"logits"`,
            `"sorted_logits"`, `"mapped_logits"` and `"likelihood"` need no projector.
        summary: One line for people.
        source: Paper with the number of its equation, or the equation itself (p teacher, q student).
        matching: What makes queries like keys: one of `MATCHINGS`, or `None`.
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
    matching: str | None = None
    teacher_value: str = "state_and_target"
    label: str = "response"
    projector_init: str = "random"
    text: str = "dataset"

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's hidden states enter the loss."""
        return bool(self.spaces)

    @property
    def dual_space(self) -> bool:
        return "student" in self.spaces or "teacher" in self.spaces

    @property
    def has_queries(self) -> bool:
        return self.dual_space and self.alignment in ATTENTION_ALIGNMENTS

    @property
    def needs_chunks(self) -> bool:
        """Whether it needs to know which tokens of the two tokenizations cover the same bytes."""
        return self.alignment in ("chunk_attention", "chunk_mean", "exact_tokens", "chunks")

    @property
    def same_vocabulary(self) -> bool:
        return self.alignment == "identity"


_BOTH = ("student", "teacher")

METHODS = {
    "sft": Method(None, (), "cross entropy on the responses; no teacher", "−log q(y)"),
    "seq_kd": Method(
        None,
        (),
        "cross entropy on responses that the teacher writes",
        "arXiv 1606.07947: −log q(ŷ), ŷ = argmax p",
        text="teacher",
    ),
    "kd": Method(
        "identity",
        ("logits",),
        "divergence of the logits; one vocabulary, of which one model may have more rows",
        "arXiv 1503.02531: f(p, q)",
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
    ),
    "min_edit": Method(
        "min_edit",
        ("mapped_logits",),
        "divergence after tokens and vocabularies are mapped by least edit distance",
        "arXiv 2401.10491; arXiv 2406.17328: f(M p, q), M the nearest token by edit distance",
    ),
    "alm": Method(
        "chunks",
        ("likelihood",),
        "likelihoods of the same pieces of the text; no projector",
        "arXiv 2503.20083: f(p(c)^(1/τ), q(c)^(1/τ)), binary, over chunks c",
    ),
}
