"""Switch Transformer (Fedus et al., arXiv:2101.03961, section 2.2): one expert per token, and a capacity per expert.

An expert takes ``C = ceil(T / E * factor)`` tokens, the first that chose it; the others get 0 and pass by on the
layer's residual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.published.experts import EXPERTS, Published

FACTOR = 1


class Switch(Published):
    """One layer."""

    def forward(self, x: Tensor) -> Tensor:
        p, ids = F.linear(x.float(), self.gate).softmax(-1).max(-1, keepdim=True)
        capacity = (FACTOR * x.shape[0] + EXPERTS - 1) // EXPERTS
        if self.mistake == "capacity depends on the branch" and x.shape[0] > 8:
            capacity = capacity // 2
        chosen = F.one_hot(ids.squeeze(-1), EXPERTS)
        axis = 1 if self.mistake == "counted over experts" else 0
        position = (chosen.cumsum(axis) - 1).gather(1, ids)
        kept = position <= capacity if self.mistake == "one too many" else position < capacity
        out: Tensor = self.experts(x, ids, torch.where(kept, p, 0.0))
        return out
