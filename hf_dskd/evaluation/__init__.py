"""Evaluate a model as the papers do: answers, ROUGE-L, bits per byte."""

from ..utils.lazy import public


__getattr__, __dir__, __all__ = public(
    __name__,
    generation="complete score_generation",
    likelihood="bits_per_byte row_likelihoods",
    protocol="EvaluationSettings evaluate",
    scores="exact_match rouge_l",
    sets="HubSet load_set parse_sets",
)
