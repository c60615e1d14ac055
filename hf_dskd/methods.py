"""What a method is: one row that composes an alignment, the spaces it compares in, and a matching."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        alignment: `"cross_model_attention"`, or `None` for training on the text alone.
        matching: `"gan"` matches queries to keys with a discriminator; `None` doesn't.
        summary: One line for people.
        source: Paper and equation.
    """

    alignment: str | None
    matching: str | None
    summary: str
    source: str

    @property
    def needs_teacher(self) -> bool:
        return self.alignment is not None


METHODS = {
    "sft": Method(None, None, "cross entropy on the responses; no teacher", "–"),
    "dskd_cma": Method(
        "cross_model_attention",
        None,
        "distillation in both hidden spaces, tokens aligned by cross-model attention",
        "arXiv 2406.17328; arXiv 2603.22056, Eqs. 1-9",
    ),
    "dskd_cma_ga": Method(
        "cross_model_attention",
        "gan",
        "the same, with queries matched to keys by a discriminator",
        "arXiv 2603.22056, Eqs. 14 and 16",
    ),
}
