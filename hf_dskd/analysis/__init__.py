"""Look into a run: what its alignment attends to, how far queries are from keys, how its losses went."""

from ..utils.lazy import public


__getattr__, __dir__, __all__ = public(
    __name__,
    callback="AnalysisCallback",
    curves="plot_analysis plot_curves",
    distributions="distribution_metrics linear_probe_auc pca sliced_wasserstein",
    heatmap="AlignmentExample cross_attention plot_attention same_chunk same_text",
    metrics="alignment_metrics",
    probe="Analysis analyse",
    projection="plot_projection",
    record="gradient_norms",
)
