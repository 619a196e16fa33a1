"""Small MoE blocks for ahead-of-time compilation: one that is embedded, and others of which something is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN, TOP_K = 16, 2


class Block(nn.Module):
    """Softmax router and gated experts as batched GEMMs on indexed weights."""

    def __init__(self, experts: int = 4, inner: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.router = self.weight(experts, HIDDEN)
        self.gate_up = self.weight(experts, 2 * inner, HIDDEN)
        self.down = self.weight(experts, HIDDEN, inner)

    def weight(self, *shape: int) -> nn.Parameter:
        """Random numbers."""
        return nn.Parameter(torch.randn(shape, generator=self.generator) * 0.3)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids ``[T, k]``."""
        weights, ids = functional.softmax(functional.linear(x, self.router), dim=-1).topk(TOP_K, dim=-1)
        return weights, ids

    def activation(self, gate: Tensor) -> Tensor:
        """Of the gate."""
        return functional.silu(gate)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, H]`` to ``[T, H]``."""
        weights, ids = self.choose(x)
        flat, rows = ids.reshape(-1), x.repeat_interleave(TOP_K, dim=0)
        gate, up = torch.bmm(self.gate_up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        out = torch.bmm(self.down[flat], (self.activation(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(-1, TOP_K, HIDDEN).sum(dim=1)


class Odd(Block):
    """An activation that has no vector form."""

    def activation(self, gate: Tensor) -> Tensor:
        return torch.sin(gate)


class Sorting(Block):
    """A router that no attribute describes."""

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = functional.softmax(functional.linear(x, self.router), dim=-1)
        ids = (scores + scores.cumsum(-1)).argsort(-1, descending=True)[:, :TOP_K]
        return scores.gather(1, ids).sqrt(), ids


class Strided(Block):
    """Every other number of a weight is none of it."""

    def __init__(self) -> None:
        super().__init__()
        wide = torch.stack([self.gate_up.detach(), self.gate_up.detach()], dim=-1).flatten(-2)
        self.gate_up = nn.Parameter(wide[..., ::2])


class WithShared(Block):
    """A dense MLP beside the experts.

    Args:
        odd: Its activation has no vector form, and that of the experts has; or the other way round.
    """

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.odd = odd
        self.shared_up, self.shared_down = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)

    def activation(self, gate: Tensor) -> Tensor:
        return functional.silu(gate) if self.odd else torch.sin(gate)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.shared_up(x)
        shared: Tensor = self.shared_down(torch.sin(hidden) if self.odd else functional.silu(hidden))
        return super().forward(x) + shared


class Expert(nn.Module):
    """One expert of :class:`Ragged`."""

    def __init__(self, up: nn.Parameter, down: nn.Parameter) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        """``[R, H]`` to ``[R, H]``."""
        return functional.linear(functional.silu(functional.linear(x, self.up)), self.down)


class Ragged(Block):
    """Experts of different widths, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        del self.gate_up, self.down
        widths = (4, 8, 12, 5)
        self.experts = nn.ModuleList(Expert(self.weight(i, HIDDEN), self.weight(HIDDEN, i)) for i in widths)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class Model(nn.Module):
    """Blocks one after another, with norms and residuals, which keep a difference in one from growing in the next."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, H]`` to ``[T, H]``."""
        for layer in self.layers:
            x = x + layer(functional.layer_norm(x, (HIDDEN,)))
        return x


def tokens(count: int) -> Tensor:
    """``[count, H]``"""
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count))
