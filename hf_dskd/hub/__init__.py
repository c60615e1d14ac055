"""Publish a student: its model card, its folder, one commit."""

from ..utils.lazy import public


__getattr__, __dir__, __all__ = public(__name__, card="model_card", folder="write_model_folder", push="push_run")
