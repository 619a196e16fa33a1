"""Top-p routing (Huang et al., "Harder Tasks Need More Experts", arXiv:2403.07652).

Section 3.2: a token goes to the smallest set of experts whose probabilities reach p together, so to one at least; their
probabilities are the weights, as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.published.experts import EXPERTS, Published


class TopP(Published):
    """One layer."""

    def __init__(self, form: str, dtype: torch.dtype = torch.float32, mistake: str = "", p: float = 0.5) -> None:
        super().__init__(form, dtype, mistake)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x.float(), self.gate).softmax(-1).topk(EXPERTS, -1)
        reached = w.cumsum(-1)
        if self.mistake == "none at least":
            kept = reached <= self.p
        elif self.mistake == "the running sum of tokens":
            kept = w.cumsum(0) - w < self.p
        else:
            kept = reached - w < self.p
        w = torch.where(kept, w, 0.0)
        if self.mistake == "renormalised":
            w = w / w.sum(-1, keepdim=True)
        out: Tensor = self.experts(x, ids, w)
        return out
