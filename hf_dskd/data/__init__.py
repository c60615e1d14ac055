"""Make batches of text: read rows, tokenize prompt and response for both models, collate."""

from ..utils.lazy import public


__getattr__, __dir__, __all__ = public(
    __name__,
    collator="DualCollator",
    files="load_file",
    formats="Example detect_format read_example",
    sampler="EpochSampler LengthGroupedEpochSampler",
    tokenization="TokenizationReport tokenize_dataset",
    tokens="token_bytes",
    vocabulary="same_vocabulary shared_tokens",
)
