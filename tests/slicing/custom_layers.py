"""MoE layers written by hand in plain torch, and whether each can be fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, INNER, E, K = 16, 8, 4, 2


class Moe(nn.Module):
    """A layer with batched GEMMs of indexed weights; the cases override what they are about."""

    dtype = torch.float32
    fused = 1
    reason = ""
    trains = True

    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=gen) * 0.3).to(self.dtype))

        self.gate, self.w13, self.w2 = make(E, H), make(E, 2 * INNER, H), make(E, H, INNER)
        self.extra, self.low, self.high = make(E, H), make(E, 2 * INNER, 2), make(E, 2, H)
        self.register_buffer("seen", torch.zeros(E))
        self.register_buffer("bias", torch.randn(E, generator=gen))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = F.linear(x, self.gate).softmax(-1).topk(K, -1)
        return w / w.sum(-1, keepdim=True), ids

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        k = ids.shape[-1]
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(k, 0)
        g, u = torch.bmm(self.w13[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.w2[flat], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, k, H).sum(1)

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        return self.experts(x, w, ids)


class Batched(Moe):
    pass


class Grouped(Moe):
    """bf16, torch._grouped_mm, weights sorted along."""

    dtype = torch.bfloat16

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.histc(flat.float(), E, 0, E - 1).cumsum(0).to(torch.int32)
        h = torch._grouped_mm(x[order // K], self.w13.transpose(1, 2), offs=ends)
        g, u = h[:, :INNER], h[:, INNER:]
        y = torch._grouped_mm(F.silu(g) * u, self.w2.transpose(-2, -1), offs=ends)
        y = y * w.reshape(-1)[order].unsqueeze(-1)
        return y[torch.argsort(order)].view(-1, K, H).sum(1)


class GroupedLate(Grouped):
    """The weights are applied in slot order; rows are written back in place."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        order = ids.view(-1).sort().indices
        ends = torch.cumsum(torch.histc(ids.view(-1).float(), bins=E, min=0, max=E - 1), 0, dtype=torch.int32)
        g, u = torch._grouped_mm(x[order // K], self.w13.mT, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.gelu(g) * u, self.w2.mT, offs=ends)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return (y[inverse].view(-1, K, H) * w.unsqueeze(-1)).sum(dim=1)


class Scattered(Grouped):
    """Rows are added to their tokens by index_add: not a sum over k."""

    fused = 0
    reason = "added by index_add"

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.histc(flat.float(), E, 0, E - 1).cumsum(0).to(torch.int32)
        g, u = torch._grouped_mm(x[order // K], self.w13.transpose(1, 2), offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(g) * u, self.w2.transpose(-2, -1), offs=ends)
        return torch.zeros_like(x).index_add(0, order // K, y * w.reshape(-1)[order].unsqueeze(-1))


class Transposed(Moe):
    """Weights lie as [E, in, out], rows stand on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.w13 = nn.Parameter(self.w13.detach().transpose(1, 2))
        self.w2 = nn.Parameter(self.w2.detach().transpose(1, 2).contiguous())

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.view(-1)
        rows = x[:, None, :].expand(-1, K, -1).reshape(-1, H)
        g, u = self._up(rows, flat)
        y = torch.bmm(input=(F.relu(g) * u)[:, None, :], mat2=self.w2[flat]).squeeze(1)
        return (y.view(-1, K, H) * w[:, :, None]).sum(1)

    def _up(self, rows: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.bmm(rows[:, None, :], self.w13.index_select(0, index=flat)).squeeze(1)
        return h[..., ::2], h[..., 1::2]


class SeparateGate(Moe):
    """Gate and up are two weights, as in the first Mixtral."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(K, dim=0).unsqueeze(-1)
        w1, w3 = self.w13[:, :INNER], self.w13[:, INNER:]
        h = F.silu(torch.bmm(w1[flat], rows).squeeze(-1)) * torch.bmm(w3[flat], rows).squeeze(-1)
        y = torch.bmm(self.w2[flat], h.unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, K, H).sum(1)


class RoutingSeen(Moe):
    """Weights, ids and logits go out as well, for a loss on the load."""

    def forward(self, x: Tensor) -> Any:
        logits = F.linear(x, self.gate)
        p = logits.softmax(-1)
        w, ids = p.topk(K, -1)
        load = F.one_hot(ids, E).float().mean((0, 1)) * p.mean(0)
        return self.experts(x, w, ids), load.sum(), w, ids, logits


class SharedExpert(Moe):
    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        shared = F.linear(F.silu(F.linear(x, self.gate)), self.extra.t())
        return x + self.experts(x, w, ids) + shared


class Stacked(Moe):
    """Two layers, one after the other, the second on a norm of the first."""

    fused = 2

    def forward(self, x: Tensor) -> Any:
        x = x + self.experts(x, *self.route(x))
        x = F.layer_norm(x, (H,))
        return x + self.experts(x, *self.route(x))


class WeightsUsedBefore(Moe):
    """The router's weights are used before the experts run."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        x = x * w.sum(-1, keepdim=True).sin()
        return self.experts(x, w, ids)


class CountsOnTheWay(Moe):
    """The load is counted into a buffer between routing and experts."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        self.seen.add_(F.one_hot(ids, E).sum((0, 1)))
        return self.experts(x, w, ids), self.seen.clone()


class MovesItsBias(Moe):
    """The bias of the selection is overwritten after the choice, before the experts' sum."""

    fused = 0
    reason = "overwritten"

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.gate).sigmoid()
        ids = (scores + self.bias).topk(K, -1)[1]
        self.bias.add_(0.1)
        return scores.gather(1, ids), ids


class OverwritesTokens(Moe):
    """The tokens are overwritten, through a view, after they were gathered."""

    trains = False

    fused = 0
    reason = "overwritten"

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(K, 0)
        x.view(-1).mul_(0.5)
        g, u = torch.bmm(self.w13[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.w2[flat], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, K, H).sum(1)


class InPlace(Moe):
    """Writes to memory of its own, which is no obstacle."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        h = torch.bmm(self.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
        g, u = h.chunk(2, -1)
        a = F.silu(g) * u
        a.clamp_(max=1.0)
        y = torch.bmm(self.w2[flat], a.unsqueeze(-1)).squeeze(-1)
        y = y * w.reshape(-1, 1)
        return y.view(-1, K, H).sum(1)


class LowRank(Moe):
    """LoRA: the experts' weights are computed in every call."""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        w13 = self.w13 + torch.matmul(self.low, self.high) * 0.5
        g, u = torch.bmm(w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.w2[flat], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, K, H).sum(1)


class Argmax(Moe):
    """One expert per token, by argmax."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = F.linear(x, self.gate).softmax(-1)
        ids = p.argmax(-1, keepdim=True)
        return p.gather(1, ids), ids


class Switch(Moe):
    """One expert per token, ids of one dimension, no sum."""

    def forward(self, x: Tensor) -> Any:
        p, ids = F.linear(x, self.gate).softmax(-1).max(-1)
        g, u = torch.bmm(self.w13[ids], x.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.w2[ids], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return y * p.unsqueeze(-1)


class NoTopK(Moe):
    """All experts for all tokens: ids from a range."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.arange(E).expand(x.shape[0], E)
        return F.linear(x, self.gate).softmax(-1), ids


class Hashed(Moe):
    """Experts chosen by the sign of two columns, without a router's logits."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.stack([(x[:, 0] > 0).long(), 2 + (x[:, 1] > 0).long()], 1)
        return torch.full(ids.shape, 0.5), ids


class MixesRows(Moe):
    fused = 0
    reason = "may mix rows"

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        h = torch.bmm(self.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
        g, u = h.softmax(0).chunk(2, -1)
        y = torch.bmm(self.w2[flat], (g * u).unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, K, H).sum(1)


class InsideSeen(Moe):
    fused = 0
    reason = "also used elsewhere"

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        flat = ids.reshape(-1)
        g, u = torch.bmm(self.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        a = F.silu(g) * u
        y = torch.bmm(self.w2[flat], a.unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, K, H).sum(1), a.abs().mean()


class Unweighted(Moe):
    fused = 0
    reason = "not multiplied by router weights"

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        g, u = torch.bmm(self.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.w2[flat], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return y.view(-1, K, H).sum(1)


class OtherIds(Moe):
    fused = 0
    reason = "group their rows differently"

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        g, u = torch.bmm(self.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.w2[flat.flip(0)], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, K, H).sum(1)


class Dropped(Moe):
    """Dropout between the GEMMs, in training."""

    fused = 0
    reason = "dropout inside the block has an effect"

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        g, u = torch.bmm(self.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        a = F.dropout(F.silu(g) * u, 0.5, True)
        y = torch.bmm(self.w2[flat], a.unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, K, H).sum(1)


class NoDrop(Dropped):
    """The same dropout, switched off."""

    fused = 1
    reason = ""

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        g, u = torch.bmm(self.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        a = F.dropout(F.silu(g) * u, 0.0, False)
        y = torch.bmm(self.w2[flat], a.unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, K, H).sum(1)


class OneGemm(Moe):
    fused = 0
    reason = "without a second one"

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        h = torch.bmm(self.w13[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
        return (h[:, :H] * w.reshape(-1, 1)).view(-1, K, H).sum(1)


CASES = [c for c in vars().values() if isinstance(c, type) and issubclass(c, Moe) and c is not Moe]
