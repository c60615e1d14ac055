"""Where the teacher's hidden states come from, a model that runs or a cache: what reads them can't tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..models.causal_lm import check_head
from .cache import CachedTeacher, TeacherCache
from .load import Teacher


if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..models.causal_lm import LMHead


class TeacherSource(Protocol):
    """
    What losses read of a teacher.

    Attributes:
        head ([`~hf_dskd.models.causal_lm.LMHead`]): To logits.
        embedding (`torch.Tensor` of shape `[V_t, d_t]`): Input embedding.
        model ([`~transformers.PreTrainedModel`], *optional*): That runs, if one does.
    """

    @property
    def head(self) -> LMHead: ...
    @property
    def embedding(self) -> Tensor: ...
    @property
    def model(self) -> Any: ...

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the last hidden states `[B, R, d_t]` that predict a response token."""


def open_source(cache: TeacherCache | None, load_teacher: Callable[[], Any], device: torch.device) -> TeacherSource:
    """Returns the teacher of a run: that of a `cache`, or the one that is loaded, whose head must be its own."""
    if cache is not None:
        return CachedTeacher(*cache.load_head(device))
    teacher = Teacher(load_teacher(), device)
    check_head(teacher.model, teacher.head, "teacher")
    return teacher
