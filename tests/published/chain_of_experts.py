"""Chain-of-experts (Wang et al., arXiv:2506.18945, section 2): tokens pass through the same experts several times.

``x_t = Σ_i g_{t,i} E_i(x_{t-1}) + x_{t-1}`` for t = 1 .. C: the rounds share the experts' weights, each has a router of
its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.published.experts import EXPERTS, HIDDEN, Experts, made

ROUNDS, TOP_K = 2, 2


class ChainOfExperts(nn.Module):
    """One layer; ``mistake`` makes it another one."""

    def __init__(self, form: str, dtype: torch.dtype = torch.float32, mistake: str = "") -> None:
        super().__init__()
        self.gates = nn.ParameterList([made(10 + t, EXPERTS, HIDDEN, scale=1.0) for t in range(ROUNDS)])
        self.experts = Experts(form, dtype, mixes=mistake == "experts mix rows")
        self.mistake = mistake

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for gate in self.gates:
            seen = first if self.mistake == "routed by the layer's input" else x
            w, ids = F.linear(seen.float(), gate).softmax(-1).topk(TOP_K, -1)
            y = self.experts(x, ids, w)
            x = y if self.mistake == "no inner residual" else y + x
        return x
