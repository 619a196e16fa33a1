"""AdaMoE (Zeng et al., arXiv:2406.13233): null experts make the number of true experts differ from token to token.

Section 3.1: the softmax and the top-k run over true and null experts together; what the null experts get is dropped and
the weights are renormalised over the true ones. A token whose experts are all null gets 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.published.experts import EXPERTS, HIDDEN, Published, made

NULLS, TOP_K = 4, 3


class AdaMoE(Published):
    """One layer."""

    def __init__(self, form: str, dtype: torch.dtype = torch.float32, mistake: str = "") -> None:
        super().__init__(form, dtype, mistake, spare=True)
        self.null_gate = made(11, NULLS, HIDDEN, scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        logits = torch.cat([F.linear(h, self.gate), F.linear(h, self.null_gate)], -1)
        w, ids = logits.softmax(-1).topk(TOP_K, -1)
        true = torch.where(ids < EXPERTS, w, 0.0)
        if self.mistake == "no renormalisation":
            return self._mixed(x, ids, true)
        total = (w if self.mistake == "renormalised over null experts too" else true).sum(-1, keepdim=True)
        return self._mixed(x, ids, true / torch.where(total > 0, total, 1.0))

    def _mixed(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out: Tensor = self.experts(x, ids, w)
        return out
