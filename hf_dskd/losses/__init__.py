"""Compute losses: pure functions of tensors, one number per row or per example. Means are taken by the caller."""

from ..utils.lazy import public


__getattr__, __dir__, __all__ = public(
    __name__,
    divergences=(
        "forward_kl reverse_kl symmetric_kl js "
        "skewed_forward_kl skewed_reverse_kl adaptive_kl total_variation divergence_function"
    ),
    temperature="Temperatures with_temperature schedule_factor",
    likelihood="likelihood_matching chunk_log_likelihoods",
    logits="uld mapped_kd",
    key_query="Discriminator moment_matching mmd",
    conditional_transport="TransportCritics transport_cost",
    attention="attention_kl chunk_attention_kl",
    terms="Term",
)
