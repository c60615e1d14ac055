"""Data for distillation across tokenizers: formats, tokenization for both models, batches."""
