"""MoE layers written as a Python loop over experts, as papers' code has them, and whether each can be fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.slicing.loop_experts import INNER, Constant, Copy, E, H, K, Mlp, Swiglu, Zero, weights


class Loop(nn.Module):
    """The plainest form; the cases override what they are about."""

    fused = True
    reason = ""
    trains = True
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.gen = torch.Generator().manual_seed(0)
        self.gate = weights(self.gen, self.routed(), H)
        self.experts = nn.ModuleList(self.expert(e) for e in range(self.routed()))
        del self.gen  # generators cannot be copied

    def routed(self) -> int:
        return E

    def expert(self, e: int) -> nn.Module:
        return Swiglu(self.gen)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = F.linear(x, self.gate).softmax(-1).topk(K, -1)
        return w / w.sum(-1, keepdim=True), ids

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.rows(e, expert, x[token]) * w[token, slot, None])
        return out

    def rows(self, e: int, expert: Any, x: Tensor) -> Tensor:
        """What expert ``e`` makes of its tokens."""
        found: Tensor = expert(x)
        return found


class Biased(Loop):
    """Biases, a captured vector, a function after the down projection, weights on the other side of the product."""

    def __init__(self) -> None:
        super().__init__()
        scale = nn.Parameter(torch.linspace(0.5, 2, INNER))
        gen = torch.Generator().manual_seed(1)
        self.experts = nn.ModuleList(Mlp(gen, scale) for _ in range(E))

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, w[token, slot].unsqueeze(-1) * F.rms_norm(expert(x[token]), (H,)).tanh())
        return out


class PlusEqual(Loop):
    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += w[token, slot, None] * expert(x[token])
        return out


class IndexPut(Loop):
    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = x.new_zeros(x.shape)
        for e, expert in enumerate(self.experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            out.index_put_((token,), expert(x[token]) * w[token, slot][:, None], accumulate=True)
        return out


class OutOfPlace(Loop):
    """nonzero as a table; ``out = out.index_add``; ``scatter_add`` would do as well."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros(x.shape, dtype=x.dtype)
        for e, expert in enumerate(self.experts):
            table = (ids == e).nonzero()
            token, slot = table[:, 0], table[:, 1]
            rows = expert(x.index_select(0, token)) * w[token, slot].view(-1, 1)
            if e % 2:
                out = out.index_add(0, token, rows)
            else:
                out = out.scatter_add(0, token[:, None].expand(-1, H), rows)
        return out


class OneHot(Loop):
    """transformers' old form: the mask of an expert is a slice of a one-hot tensor."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            current = x[None, token].reshape(-1, H)
            rows = self.experts[e](current) * w[token, slot, None]
            out.index_add_(0, token, rows.to(x.dtype))
        return out, w


class Stacked(Loop):
    """Weights of all experts in one tensor, gate and up together, biases added by hand."""

    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(2)
        self.gate_up, self.down = weights(gen, E, H, 2 * INNER), weights(gen, E, INNER, H)
        self.gate_up_bias, self.down_bias = weights(gen, E, 2 * INNER), weights(gen, E, H)

    def rows(self, e: int, expert: Any, x: Tensor) -> Tensor:
        g, u = (x @ self.gate_up[e] + self.gate_up_bias[e]).chunk(2, dim=-1)
        return F.silu(g) * u @ self.down[e] + self.down_bias[e]


class StackedLinear(Stacked):
    def rows(self, e: int, expert: Any, x: Tensor) -> Tensor:
        h = F.linear(x, self.gate_up[e].T)
        return F.linear(F.silu(h[:, ::2]) * h[:, 1::2], self.down[e].T)


class Residual(Loop):
    """The sum starts at the tokens themselves; what comes before and after the loop is not of the block."""

    def forward(self, x: Tensor) -> Any:
        x = F.layer_norm(x, (H,))
        w, ids = self.route(x)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        out += x.tanh()
        return out.view(-1, 2, H // 2)


class Top1(Loop):
    """One expert per token: masks of tokens, rows that are written rather than added."""

    def forward(self, x: Tensor) -> Any:
        w, ids = F.linear(x, self.gate).softmax(-1).max(-1)
        out = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            out[mask] = expert(x[mask]) * w[mask].unsqueeze(-1)
        return out


class Slots(Loop):
    """DeepSeek's form for training: tokens repeated k times, every slot's row written once, weighted at the end."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        flat = ids.view(-1)
        rows = x.repeat_interleave(K, dim=0)
        y = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            y[flat == e] = expert(rows[flat == e])
        return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


class GatesByExpert(Loop):
    """A mask of tokens, and gates that have a column for every expert: a softmax over the chosen scores alone."""

    def forward(self, x: Tensor) -> Any:
        top, ids = F.linear(x, self.gate).topk(K, -1)
        gates = torch.full((x.shape[0], E), float("-inf")).scatter(-1, ids, top).softmax(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            out[mask] += expert(x[mask]) * gates[mask, e].unsqueeze(1)
        return out


class GatesOfTokens(Loop):
    """The same gates, at tokens that were searched for."""

    def forward(self, x: Tensor) -> Any:
        gates = F.linear(x, self.gate).sigmoid()
        ids = gates.topk(K, -1).indices
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = (ids == e).any(dim=-1).nonzero().squeeze(1)
            out.index_add_(0, token, expert(x[token]) * gates[token, e, None])
        return out


class Kept(Loop):
    """Choices of small weight do not count."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        keep = w > 0.4
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where((ids == e) & keep)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return out


class Missing(Loop):
    """The last experts of the router do not occur in the loop; the others are counted from one."""

    def routed(self) -> int:
        return E + 2

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in (3, 1, 4):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return out


class ZeroCompute(Loop):
    """MoE++: zero, copy and constant experts behind the usual ones."""

    def routed(self) -> int:
        return E + 4

    def expert(self, e: int) -> nn.Module:
        kinds: list[type[nn.Module]] = [Zero, Copy, Constant, Constant]
        return Swiglu(self.gen) if e < E else kinds[e - E](self.gen)


class HalfPrecision(Loop):
    """bf16 experts, router weights in f32, a sum in f32."""

    dtype = torch.bfloat16

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = F.linear(x, self.gate).float().softmax(-1).topk(K, -1)
        return w / w.sum(-1, keepdim=True), ids

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x, dtype=torch.float32)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += expert(x[token]) * w[token, slot, None]
        return out.to(x.dtype)


class HalfWeights(HalfPrecision):
    """The weights are cast after they are gathered, and the rows before they are added."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            rows = expert(x[token]).float() * w[token, slot, None].to(x.dtype)
            out.index_add_(0, token, rows.to(out.dtype))
        return out


class Chosen(Loop):
    """Expert choice: every expert takes the tokens that it scores highest."""

    def forward(self, x: Tensor) -> Any:
        scores = F.linear(x, self.gate).softmax(-1)
        g, chosen = scores.t().topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = chosen[e]
            out.index_add_(0, token, expert(x[token]) * g[e][:, None])
        return out


class ChosenResidual(Chosen):
    """The same with ``+=`` on the tokens themselves, and without weights."""

    def forward(self, x: Tensor) -> Any:
        chosen = F.linear(x, self.gate).t().topk(2, dim=-1).indices
        out = x.clone()
        for token, expert in zip(chosen, self.experts, strict=True):
            out[token] += expert(x[token])
        return out


class Dense(Loop):
    """Every expert on every token, with gates that are zero but for the chosen."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + gates[:, e : e + 1] * expert(x)
        return out


class DenseInPlace(Stacked):
    """The same in place, with stacked weights and a sum that starts at a number."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        gates = torch.zeros_like(x[:, :E])
        gates.scatter_(1, ids, w)
        out: Any = 0
        for e in range(E):
            g, u = (x @ self.gate_up[e] + self.gate_up_bias[e]).chunk(2, dim=-1)
            out += (F.silu(g) * u @ self.down[e]) * gates[:, e].unsqueeze(-1)
        return out


class CrossedGates(Loop):
    """Experts in another order than their modules."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        out = torch.zeros_like(x)
        for e in reversed(range(E)):
            out = out + self.experts[E - 1 - e](x) * gates[:, e : e + 1]
        return out


FUSED = [c for c in list(vars().values()) if isinstance(c, type) and issubclass(c, Loop)]
