"""A small MoE block of the project's own, for tests that need no transformers: quick, and easy to bend."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

EXPERTS = 4
TOP_K = 2
HIDDEN = 16
INNER = 24


class Block(nn.Module):
    """Softmax router and gated experts, one weight of each choice picked and multiplied by ``bmm``.

    Args:
        best_only: Keep each token's largest expert row instead of adding them: nothing that could be fused.
    """

    def __init__(self, *, best_only: bool = False, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.3)

        self.router = weight(EXPERTS, HIDDEN)
        self.gate_up = weight(EXPERTS, 2 * INNER, HIDDEN)
        self.down = weight(EXPERTS, HIDDEN, INNER)
        self.best_only = best_only

    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], ids and weights [T, k] -> [T, H]."""
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(TOP_K, dim=0)
        gate, up = torch.bmm(self.gate_up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        out = torch.bmm(self.down[flat], (functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        out = (out * weights.reshape(-1, 1)).view(-1, TOP_K, x.shape[-1])
        return out.amax(dim=1) if self.best_only else out.sum(dim=1)

    def forward(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, H] -> [T, H]; with ``ids`` int[T, k], the experts are not chosen but given."""
        scores = functional.softmax(functional.linear(x, self.router), dim=-1, dtype=torch.float32)
        if ids is None:
            weights, ids = torch.topk(scores, TOP_K, dim=-1)
        else:
            weights = scores.gather(1, ids.clamp(0, EXPERTS - 1))
        return self.experts(x, ids, weights.to(x.dtype))


class Layers(nn.Module):
    """Blocks one after another with residuals, under the names that a model gives them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def tokens(count: int = 5, seed: int = 1) -> torch.Tensor:
    """[count, HIDDEN]"""
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))
