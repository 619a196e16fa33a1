"""Mixture of grouped experts (Pangu Pro MoE, Tang et al., arXiv:2505.21411, section 2.1).

The softmax runs over all experts, the top-k' inside each of M groups of neighbours: every group gets k' slots of every
token, so that groups that lie on devices of their own have equal loads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.published.experts import Published

COUNT, GROUPS = 8, 4
SIZE = COUNT // GROUPS


class MoGE(Published):
    """One layer.

    Args:
        way: How the router is written: ``topk`` per group, ``max`` (k' = 1), or ``masked``: the others are ruled out
            and the top-k runs over all.
        per_group: k'.
        mistake: What makes it another layer.
    """

    def __init__(
        self, form: str, dtype: torch.dtype = torch.float32, mistake: str = "", way: str = "topk", per_group: int = 1
    ) -> None:
        super().__init__(form, dtype, mistake, count=COUNT)
        self.register_buffer("first", torch.arange(0, COUNT, SIZE))
        self.way, self.each = way, per_group

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [T, GROUPS * per_group]."""
        if self.mistake == "softmax in each group":
            p = logits.view(-1, GROUPS, SIZE).softmax(-1).flatten(1)
        else:
            p = logits.softmax(-1)
        if self.mistake == "groups of every fourth expert":
            w, i = p.view(-1, SIZE, GROUPS).topk(self.each, 1)
            return w.flatten(1), (i * GROUPS + torch.arange(GROUPS)).flatten(1)
        by_group = p.view(-1, GROUPS, SIZE)
        if self.way == "max":
            w, i = by_group.max(-1)
            return w, i + torch.arange(0, COUNT, SIZE)
        w, i = by_group.topk(self.each, -1)
        if self.way == "masked":
            kept = torch.zeros_like(by_group).scatter(-1, i, 1.0).view(-1, COUNT)
            fill = 0.0 if self.mistake == "filled with 0" else float("-inf")
            k = GROUPS * self.each - (self.mistake == "fewer than the groups give")
            w, ids = p.masked_fill(kept == 0, fill).topk(k, -1)
            return w, ids
        if self.mistake == "first experts in a buffer":
            first = self.first
        elif self.mistake == "first experts one apart":
            first = torch.arange(GROUPS)
        else:
            first = torch.arange(GROUPS) * SIZE
        return w.flatten(1), (i + first[:, None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(F.linear(x.float(), self.gate))
        out: Tensor = self.experts(x, ids, w)
        return out
