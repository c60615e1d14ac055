"""Find which tokens of the two models belong together."""

from ..utils.lazy import public


__getattr__, __dir__, __all__ = public(
    __name__,
    spans="chunk_ids answer_spans",
    cross_model="cross_model_attention unit_std",
    min_edit="align_tokens vocabulary_map",
    weights="AlignmentWeights chunk_mask mean_weights",
)
