"""MoE++ (Jin et al., arXiv:2410.07348): experts that compute nothing, and a gating residual from layer to layer.

Section 3.1: among the experts are a zero expert, ``E(x) = 0``; copy experts, ``E(x) = x``; constant experts,
``E(x) = a1 x + a2 v`` with ``[a1, a2] = softmax(Wc x)``. Section 3.2: layer j scores
``W_j x + M_j scores_{j-1}`` (M_1 = 0), the softmax of which is the gate. The zero expert's gate counts as 0 and the
others' are renormalised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.published.experts import EXPERTS, HIDDEN, Experts, made

CONSTANT, COPY, ZERO = EXPERTS, EXPERTS + 1, EXPERTS + 2
TOP_K = 2


class Constant(nn.Module):
    """``a1 x + a2 v``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.mix, self.v = made(3, 2, HIDDEN, dtype=dtype), made(4, HIDDEN, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        a = F.linear(x, self.mix).softmax(-1)
        return a[:, :1] * x + a[:, 1:] * self.v


class Zero(nn.Module):
    """0 for every token."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Layer(nn.Module):
    """One MoE++ layer; ``mistake`` makes it another one."""

    def __init__(self, form: str, dtype: torch.dtype, seed: int, first: bool, mistake: str) -> None:
        super().__init__()
        self.gate = made(seed, EXPERTS + 3, HIDDEN, scale=1.0)
        self.residual = None if first else made(seed + 1, EXPERTS + 3, EXPERTS + 3)
        self.constant = Constant(dtype)
        others = (self.constant, nn.Identity(), Zero())
        self.experts = Experts(form, dtype, spare=True, others=others, mixes=mistake == "experts mix rows")
        self.form, self.mistake = form, mistake

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.float(), self.gate)
        if self.residual is not None and before is not None:
            logits = logits + F.linear(before, self.residual)
        w, ids = logits.softmax(-1).topk(TOP_K, -1)
        if self.mistake == "input scaled in place":  # as the released code does: x is the caller's
            x *= TOP_K
        if self.mistake != "zero expert keeps its gate":
            w = torch.where(ids == ZERO, 0.0, w)
        if self.mistake != "no renormalisation":
            w = w / w.sum(-1, keepdim=True)
        y = self.experts(x, ids, w)
        return (y if self.form == "loop" else y + self._without_gemm(x, ids, w)), logits

    def _without_gemm(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        """Copy and constant experts beside the others, where those are GEMMs of stacked weights."""
        share = [torch.where(ids == e, w, 0.0).sum(-1, keepdim=True).to(x.dtype) for e in (CONSTANT, COPY)]
        return share[0] * self.constant(x) + share[1] * x


class MoEPlusPlus(nn.Module):
    """Two layers with the gating residual between them."""

    def __init__(self, form: str, dtype: torch.dtype = torch.float32, mistake: str = "") -> None:
        super().__init__()
        self.first = Layer(form, dtype, 10, True, mistake)
        self.second = Layer(form, dtype, 20, False, mistake)

    def forward(self, x: Tensor) -> Tensor:
        y, logits = self.first(x, None)
        x = x + y
        y, _ = self.second(x, logits)
        return x + y
