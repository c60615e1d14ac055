"""What a run needs and how runs compare: memory of a step, settings for a pair, grids of runs."""

from ..utils.lazy import public


__getattr__, __dir__, __all__ = public(
    __name__, autoconfig="Derived derive", memory="Size Step estimate free_memory room step_memory"
)
