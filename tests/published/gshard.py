"""GShard (Lepikhin et al., arXiv:2006.16668, algorithm 1): two experts per token, a capacity per expert.

The two gates are normalised, then tokens are placed in order, all first choices before all second ones; a choice that
finds its expert full is dropped. (The paper sends second choices at random; here they are sent always.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.published.experts import EXPERTS, Published


class GShard(Published):
    """One layer."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x.float(), self.gate).softmax(-1).topk(2, -1)
        capacity = (2 * x.shape[0] + EXPERTS - 1) // EXPERTS
        first, second = F.one_hot(ids, EXPERTS).unbind(1)
        before = 0 if self.mistake == "second choices placed first" else first.sum(0)
        places = torch.stack([first.cumsum(0) - 1, second.cumsum(0) - 1 + before], 1)
        kept = places.gather(-1, ids.unsqueeze(-1)).squeeze(-1) < capacity
        if self.mistake == "normalised after the drop":
            w = torch.where(kept, w, 0.0)
            w = w / w.sum(-1, keepdim=True).clamp_min(1e-9)
        else:
            w = torch.where(kept, w / w.sum(-1, keepdim=True), 0.0)
        out: Tensor = self.experts(x, ids, w)
        return out
