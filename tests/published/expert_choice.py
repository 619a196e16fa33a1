"""Expert choice (Zhou et al., arXiv:2202.09368, section 3.2): each expert takes its best tokens.

``S = softmax(X Wg)`` over the experts; expert e takes the ``n c / E`` tokens with the largest ``S[:, e]``, which are
its weights. A token may go to any number of experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.published.experts import EXPERTS, Published

FACTOR = 2


class ExpertChoice(Published):
    """One layer."""

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x.float(), self.gate).softmax(0 if self.mistake == "softmax over tokens" else -1)
        capacity = (FACTOR * x.shape[0] + EXPERTS - 1) // EXPERTS
        w, token = scores.t().topk(capacity, -1)
        if self.experts.form == "loop":
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts.experts):
                out.index_add_(0, token[e], (expert(x[token[e]]) * w[e, :, None]).to(x.dtype))
            return out
        ids = torch.arange(EXPERTS)[:, None].expand(EXPERTS, capacity)
        flat = token.reshape(-1)
        rows = self.experts(x[flat], ids.reshape(-1, 1), w.reshape(-1, 1))
        return torch.zeros_like(x).index_add(0, flat, rows)
