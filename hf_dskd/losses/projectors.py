"""The trained maps between the student's and the teacher's spaces (arXiv 2603.22056, Eqs. 1, 4 and 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..utils.random import cpu_seed


if TYPE_CHECKING:
    from ..models.causal_lm import LMHead


class Projectors(nn.Module):
    """
    Three linear maps between spaces of `student_size` d_s and `teacher_size` d_t.

    The initialisation draws from a source of its own, by `seed`: two methods on one seed see the same data order and
    dropout whether or not they have projectors.

    Attributes:
        query: `[..., 2 d_s] -> [..., 2 d_t]`, from the student's input and target embeddings to keys' space; only
            alignments by attention have it.
        s2t: `[..., d_s] -> [..., d_t]`, student's hidden state to teacher space.
        t2s: `[..., d_t] -> [..., d_s]`, teacher's to student space.
    """

    def __init__(self, student_size: int, teacher_size: int, seed: int = 0, has_query: bool = True):
        super().__init__()
        with cpu_seed(seed):
            query = nn.Linear(2 * student_size, 2 * teacher_size)
            if has_query:
                self.query = query
            self.s2t = nn.Linear(student_size, teacher_size)
            self.t2s = nn.Linear(teacher_size, student_size)

    @torch.no_grad()
    def init_from_heads(
        self, student_head: LMHead, teacher_head: LMHead, student_ids: Tensor, teacher_ids: Tensor
    ) -> dict[str, float]:
        """
        Sets t2s and s2t so that a projected state has, on shared tokens, nearly the logits it had before.

        t2s = pinv(W_s) W_t and s2t = pinv(W_t) W_s over the rows of the shared tokens `[n]` (DSKDv2, arXiv 2504.11426,
        which multiplies from the other side). A narrower space can't hold all logits of a wider one.

        Returns ‖W_s t2s − W_t‖ / ‖W_t‖ under `"t2s"`, and the same of `"s2t"`.
        """
        residuals = {}
        heads = {"t2s": (student_head, student_ids, teacher_head, teacher_ids)}
        heads["s2t"] = (teacher_head, teacher_ids, student_head, student_ids)
        for name, (to_head, to_ids, from_head, from_ids) in heads.items():
            solution, residuals[name] = least_squares(to_head, to_ids, from_head, from_ids)
            layer: nn.Linear = getattr(self, name)
            layer.weight.copy_(solution)
            layer.bias.zero_()
        return residuals


def least_squares(
    to_head: LMHead, to_ids: Tensor, from_head: LMHead, from_ids: Tensor, rows: int = 4096
) -> tuple[Tensor, float]:
    """
    The matrix M that minimises ‖A M − B‖, where A `[n, d_to]` and B `[n, d_from]` are rows of two heads.

    From the normal equations in float64, summed over chunks of `rows` tokens: a head of 150,000 tokens never exists in
    another precision as a whole, and only `[d_to, d_to]` is decomposed.

    Returns:
        M of shape `[d_to, d_from]`, float64, and the relative residual ‖A M − B‖ / ‖B‖.
    """
    # Apple GPUs have no float64.
    device = torch.device("cpu") if to_head.weight.device.type == "mps" else to_head.weight.device
    gram, cross, square = torch.zeros(0), torch.zeros(0), torch.zeros(())
    for start in range(0, len(to_ids), rows):
        a = to_head.weight[to_ids[start : start + rows].to(to_head.weight.device)].to(device).double() * to_head.scale
        b = from_head.weight[from_ids[start : start + rows].to(from_head.weight.device)].to(device).double()
        b = b * from_head.scale
        if start == 0:
            gram, cross, square = a.T @ a, a.T @ b, b.square().sum()
        else:
            gram, cross, square = gram + a.T @ a, cross + a.T @ b, square + b.square().sum()
    solution = torch.linalg.pinv(gram, hermitian=True) @ cross
    # ‖A M − B‖² = ‖B‖² − tr(Mᵀ AᵀB) at the minimum.
    left = (square - (solution * cross).sum()).clamp_min(0)
    return solution, float((left / square).sqrt())
