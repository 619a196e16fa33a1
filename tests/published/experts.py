"""The experts of the published layers: one set of weights, in the three forms in which people write the computation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, INNER, EXPERTS = 16, 8, 4
FORMS = ("loop", "batched", "grouped")
"""A Python loop over modules; GEMMs of indexed weights; grouped GEMMs of rows sorted by expert (bf16 alone)."""


class Expert(nn.Module):
    """``W2 (silu(W1 x) * W3 x)``, gate and up together."""

    def __init__(self, w13: Tensor, w2: Tensor, mixes: bool) -> None:
        super().__init__()
        self.w13, self.w2, self.mixes = nn.Parameter(w13.clone()), nn.Parameter(w2.clone()), mixes

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(between(F.linear(x, self.w13), self.mixes), self.w2)


def between(h: Tensor, mixes: bool) -> Tensor:
    """The activation; with ``mixes`` of rows that know of each other."""
    g, u = (h.softmax(0) if mixes else h).chunk(2, -1)
    return F.silu(g) * u


def made(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> nn.Parameter:
    """A parameter of normal numbers."""
    gen = torch.Generator().manual_seed(seed)
    return nn.Parameter((torch.randn(shape, generator=gen) * scale).to(dtype))


def loop(experts: nn.ModuleList, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """``Σ_k weights[t, k] · experts[ids[t, k]](x[t])``; slots whose id no expert has add nothing."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, (expert(x[token]) * weights[token, slot, None]).to(x.dtype))
    return out


class Experts(nn.Module):
    """``EXPERTS`` feed-forward experts on rows ``x`` [T, H] at given ``ids`` and ``weights`` [T, k].

    Args:
        form: One of :data:`FORMS`.
        spare: Ids of ``count`` and more mean no expert.
        count: Number of experts.
        others: Further experts for the loop, which follow in the order of ids.
        mixes: The experts look at their neighbours' rows: what nothing may take for a layer of experts.
    """

    def __init__(
        self,
        form: str,
        dtype: torch.dtype = torch.float32,
        *,
        spare: bool = False,
        count: int = EXPERTS,
        others: tuple[nn.Module, ...] = (),
        mixes: bool = False,
    ) -> None:
        super().__init__()
        self.form, self.spare, self.count, self.mixes = form, spare, count, mixes
        w13 = made(1, count, 2 * INNER, HIDDEN, dtype=dtype)
        w2 = made(2, count, HIDDEN, INNER, dtype=dtype)
        if form == "loop":
            ffn = [Expert(w13[e].detach(), w2[e].detach(), mixes) for e in range(count)]
            self.experts = nn.ModuleList([*ffn, *others])
        else:
            self.w13, self.w2 = w13, w2

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.form == "loop":
            return loop(self.experts, x, ids, weights)
        if self.spare:
            there = ids < self.count
            ids, weights = torch.where(there, ids, 0), torch.where(there, weights, 0)
        weights = weights.to(x.dtype)
        return self._grouped(x, ids, weights) if self.form == "grouped" else self._batched(x, ids, weights)

    def _batched(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        k, flat = ids.shape[-1], ids.reshape(-1)
        rows = x.repeat_interleave(k, 0)
        a = between(torch.bmm(self.w13[flat], rows.unsqueeze(-1)).squeeze(-1), self.mixes)
        y = torch.bmm(self.w2[flat], a.unsqueeze(-1)).squeeze(-1)
        return (y.view(-1, k, HIDDEN) * weights.unsqueeze(-1)).sum(1)

    def _grouped(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        k, flat = ids.shape[-1], ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.histc(flat.float(), self.count, 0, self.count - 1).cumsum(0).to(torch.int32)
        h = torch._grouped_mm(x[order // k], self.w13.transpose(1, 2), offs=ends)
        y = torch._grouped_mm(between(h, self.mixes), self.w2.transpose(1, 2), offs=ends)
        y = y[torch.argsort(order)].view(-1, k, HIDDEN)
        return (y * weights.unsqueeze(-1)).sum(1)


class Published(nn.Module):
    """Base of the layers that route once: a gate, the experts, and a ``mistake`` that makes it another layer.

    Args:
        form: One of :data:`FORMS`.
        count: Number of experts.
        spare: Ids of ``count`` and more mean no expert.
    """

    def __init__(
        self,
        form: str,
        dtype: torch.dtype = torch.float32,
        mistake: str = "",
        *,
        count: int = EXPERTS,
        spare: bool = False,
    ) -> None:
        super().__init__()
        self.gate = made(10, count, HIDDEN, scale=1.0)
        self.experts = Experts(form, dtype, count=count, spare=spare, mixes=mistake == "experts mix rows")
        self.mistake = mistake
