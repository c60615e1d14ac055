"""The trained maps between the student's and the teacher's spaces (paper A, Eqs. 1, 4 and 5)."""

from __future__ import annotations

import torch
from torch import nn


class Projectors(nn.Module):
    """
    Three linear maps.

    Args:
        student_size (`int`): d_s, width of the student's last hidden state.
        teacher_size (`int`): d_t, the teacher's.
        seed (`int`, *optional*, defaults to `0`):
            Of the initialisation, which draws from a source of its own: two methods on one seed see the same data
            order and dropout whether or not they have projectors.

    Attributes:
        query: `[..., 2 d_s] -> [..., 2 d_t]`, from the student's input and target embeddings to keys' space.
        s2t: `[..., d_s] -> [..., d_t]`, student's hidden state to teacher space.
        t2s: `[..., d_t] -> [..., d_s]`, teacher's to student space.
    """

    def __init__(self, student_size: int, teacher_size: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.query = nn.Linear(2 * student_size, 2 * teacher_size)
            self.s2t = nn.Linear(student_size, teacher_size)
            self.t2s = nn.Linear(teacher_size, student_size)
