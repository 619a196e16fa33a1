"""Experts of hand-written loops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, INNER, E, K = 16, 12, 4, 2


def weights(gen: torch.Generator, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=gen) * 0.3)


class Swiglu(nn.Module):
    """One expert with three matrices."""

    def __init__(self, gen: torch.Generator, inner: int = INNER) -> None:
        super().__init__()
        self.w1, self.w3 = weights(gen, inner, H), weights(gen, inner, H)
        self.w2 = weights(gen, H, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.w1)) * F.linear(x, self.w3), self.w2)


class Mlp(nn.Module):
    """One expert of ``nn.Linear`` with biases and an activation that captures a vector shared by all."""

    def __init__(self, gen: torch.Generator, scale: nn.Parameter) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(H, INNER), nn.Linear(INNER, H), scale
        with torch.no_grad():
            for p in (*self.up.parameters(), *self.down.parameters()):
                p.copy_(torch.randn(p.shape, generator=gen) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)) * self.scale)


class Zero(nn.Module):
    def __init__(self, gen: torch.Generator) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Copy(Zero):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Constant(nn.Module):
    """``a1 x + a2 v`` with ``(a1, a2) = softmax(W x)`` (MoE++, arXiv:2410.07348, equation 6)."""

    def __init__(self, gen: torch.Generator) -> None:
        super().__init__()
        self.v, self.w = weights(gen, H), weights(gen, 2, H)

    def forward(self, x: Tensor) -> Tensor:
        a = F.linear(x, self.w).softmax(-1)
        return torch.einsum("b,bd->bd", a[:, 0], x) + torch.einsum("b,d->bd", a[:, 1], self.v)
