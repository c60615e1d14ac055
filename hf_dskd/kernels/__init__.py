"""
Compute from hidden states, queries and keys what would not fit into memory as a whole.

The function `stream_kl` is in the module of its name: `from hf_dskd.kernels.stream_kl import stream_kl`.
"""

from ..utils.lazy import public


__getattr__, __dir__, __all__ = public(
    __name__,
    linear_divergence="chunk_sizes linear_rows",
    stream_kl="stream_cross_entropy",
)
