"""Several gates over shared experts (Ma et al., MMoE, doi:10.1145/3219819.3220007, equations 5 to 7).

Task j mixes the same experts by a gate of its own. The paper's gates are dense: every expert sees every token. Sparse
gates keep each token's best experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.published.experts import EXPERTS, HIDDEN, Experts, made

TASKS, TOP_K = 2, 2


class MultiGate(nn.Module):
    """One output per task; ``mistake`` makes it another layer."""

    def __init__(self, form: str, dtype: torch.dtype = torch.float32, mistake: str = "") -> None:
        super().__init__()
        self.gates = nn.ParameterList([made(10 + j, EXPERTS, HIDDEN, scale=1.0) for j in range(TASKS)])
        self.experts = Experts(form, dtype, mixes=mistake == "experts mix rows")
        self.mistake = mistake

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for gate in self.gates:
            w, ids = F.linear(x.float(), gate).softmax(-1).topk(TOP_K, -1)
            if self.mistake != "no renormalisation":
                w = w / w.sum(-1, keepdim=True)
            found.append(self.experts(x, ids, w))
        return torch.cat(found, -1)


class DenseMixture(nn.Module):
    """The paper's own: all experts for all tokens."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gates = nn.ParameterList([made(10 + j, EXPERTS, HIDDEN, scale=1.0) for j in range(TASKS)])
        self.experts = Experts("batched", dtype)

    def forward(self, x: Tensor) -> Tensor:
        g, u = torch.einsum("th,enh->etn", x, self.experts.w13).chunk(2, -1)
        y = torch.einsum("eti,ehi->teh", F.silu(g) * u, self.experts.w2)
        mixed = [torch.einsum("te,teh->th", F.linear(x, gate).softmax(-1), y) for gate in self.gates]
        return torch.cat(mixed, -1)
