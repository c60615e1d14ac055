"""One model's view of the responses of a batch: nothing after this point sees a prompt or padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.causal_lm import answer_positions


IGNORE = -100


@dataclass(frozen=True)
class ResponseStates:
    """
    One model's view of the responses of a batch.

    Attributes:
        hidden (`[B, R, d]`): Last hidden state at the positions that predict a response token.
        input_embedding (`[B, R, d]`): Of the token at that position; carries no gradient.
        target_embedding (`[B, R, d]`): Of the token to be predicted; carries no gradient.
        targets (`[B, R]`): The token to be predicted; 0 where `mask` is false.
        mask (`[B, R]`): Which rows are real.
        statistics_mask (`[B, R]`, *optional*):
            Which rows enter standard deviations; `None` is all of the batch together, padding included.
        chunks (`[B, R]`, *optional*): Chunk of the token to be predicted, -1 outside the response.
        partners (`[B, R]`, *optional*): Which response token of the other model stands for it, -1 for none.
        places (`[B, R]`, *optional*): Which answer of the row it belongs to, and where in it; -1 outside the response.
        silent (`[B, R]`, bool, *optional*): Whether it stands before the text of an answer, or closes it.
        plan (`[B, R, F]`, *optional*): Where a byte-prefix target is from, -1 in the first column for nowhere.
        head ([`~hf_dskd.models.causal_lm.LMHead`], *optional*): The model's, from hidden states to logits.
        example_ids (`[B]`, *optional*): Of the dataset; by default places in the batch.
    """

    hidden: Tensor
    input_embedding: Tensor
    target_embedding: Tensor
    targets: Tensor
    mask: Tensor
    statistics_mask: Tensor | None
    chunks: Tensor | None = None
    partners: Tensor | None = None
    places: Tensor | None = None
    silent: Tensor | None = None
    plan: Tensor | None = None
    head: Any = None
    example_ids: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """Response tokens per example, `[B]`."""
        return self.mask.sum(1)

    def packed(self, values: Tensor) -> Tensor:
        """The real rows of `values` `[B, R, ...]` as `[N, ...]`."""
        return values[self.mask]

    @property
    def row_names(self) -> Tensor:
        """A number for each packed row `[N]`, made of its example's id and its place in the response."""
        example, index = self.mask.nonzero(as_tuple=True)
        ids = torch.arange(len(self.mask), device=self.mask.device) if self.example_ids is None else self.example_ids
        return ids[example] * 2**20 + index

    def per_example(self, rows: Tensor) -> Tensor:
        """Sums packed row values `[N]` by example, `[B]`."""
        return sum_by_example(rows, self.mask)

    def padded(self, rows: Tensor) -> Tensor:
        """Packed row values `[N]` as `[B, R]`, 0 where there is no row."""
        return torch.zeros(self.mask.shape, dtype=rows.dtype, device=rows.device).masked_scatter(self.mask, rows)

    def unpacked(self, rows: Tensor) -> Tensor:
        """Packed rows `[N, d]` as `[B, R, d]`, 0 where there is no row."""
        padded = rows.new_zeros(*self.mask.shape, rows.shape[-1])
        return padded.index_put(self.mask.nonzero(as_tuple=True), rows)


def sum_by_example(rows: Tensor, mask: Tensor) -> Tensor:
    """Sums values `[N]` of the rows that `mask` `[B, R]` marks by example, `[B]`."""
    example = mask.nonzero()[:, 0]
    return torch.zeros(len(mask), dtype=rows.dtype, device=rows.device).index_add(0, example, rows)


def response_states(
    hidden: Tensor,
    input_ids: Tensor,
    labels: Tensor,
    embedding: Tensor,
    chunks: Tensor | None = None,
    partners: Tensor | None = None,
    gathered: bool = False,
    places: Tensor | None = None,
    silent: Tensor | None = None,
    plan: Tensor | None = None,
    **more: Any,
) -> ResponseStates:
    """
    Gathers the rows that predict a response token, so that nothing after this point sees a prompt or padding.

    Args:
        hidden (`[B, S, d]`, or `[B, R, d]` with `gathered`): Last hidden state; `gathered` ones are those rows alone.
        input_ids (`[B, S]`), labels (`[B, S]`): Tokens, and these with -100 on prompt and padding, not shifted.
        embedding (`[V, d]`): Input embedding; used as a constant.
        chunks, partners, places, silent (`[B, S]`, *optional*): Of each token, as
            [`~hf_dskd.data.collator.DualCollator`] has them; -1 or false where there is none.
        plan (`[B, S, F]`, *optional*): Of each token (see [`~hf_dskd.alignment.byte_prefix.ByteTables.plan`]).
        more: `head` and `example_ids` of [`ResponseStates`].
    """

    def of_targets(values: Tensor | None, nothing: int = -1) -> Tensor | None:
        return None if values is None else values[:, 1:].gather(1, rows).masked_fill(~mask, nothing)

    rows, mask = answer_positions(labels)
    inputs = input_ids.gather(1, rows)
    targets = labels[:, 1:].gather(1, rows).masked_fill(~mask, 0)
    embedding = embedding.detach()
    if not gathered:
        hidden = hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return ResponseStates(
        hidden=hidden,
        input_embedding=F.embedding(inputs, embedding),
        target_embedding=F.embedding(targets, embedding),
        targets=targets,
        mask=mask,
        statistics_mask=mask,
        chunks=of_targets(chunks),
        partners=of_targets(partners),
        places=of_targets(places),
        silent=of_targets(silent, 0),
        plan=None if plan is None else plan[:, 1:].gather(1, rows.unsqueeze(-1).expand(-1, -1, plan.shape[-1])),
        **more,
    )
