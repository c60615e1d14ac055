"""Models and text for machines without a model hub: real ones out of packages, and tiny stand-ins."""

from ..utils.lazy import public


__getattr__, __dir__, __all__ = public(
    __name__,
    packaged="model_name packaged_model",
    python_functions="load_python_functions",
    tiny_models="tiny_model",
)
