"""Loops over experts that only look like a MoE layer, or that no block can say, and the reason that is given."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.slicing.loop_experts import Copy, E, H, K, weights
from tests.slicing.loop_layers import Loop, ZeroCompute


class Refused(Loop):
    """Base of what follows."""

    fused = False


class Differing(Refused):
    """Two activations."""

    reason = "different programs"

    def rows(self, e: int, expert: Any, x: Tensor) -> Tensor:
        act = F.silu if e else F.gelu
        return F.linear(act(F.linear(x, expert.w1)) * F.linear(x, expert.w3), expert.w2)


class OwnNorm(Refused):
    """A norm with weights of each expert's own."""

    reason = "besides the weights and biases"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.ParameterList(torch.ones(H) for _ in range(E))

    def rows(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return F.rms_norm(expert(x), (H,), self.norm[e])


class MixedRows(Refused):
    """A softmax over the tokens of an expert."""

    reason = "may mix rows"

    def rows(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, expert.w1).softmax(0) * F.linear(x, expert.w3), expert.w2)


class MixedTerm(Refused, ZeroCompute):
    """A copy expert that takes the mean off its tokens."""

    reason = "may mix rows"

    def rows(self, e: int, expert: Any, x: Tensor) -> Tensor:
        found: Tensor = expert(x)
        return found - found.mean(0, keepdim=True) if isinstance(expert, Copy) else found


class Wide(Refused, ZeroCompute):
    """A single large matrix is neither an expert nor cheap."""

    reason = "not an up and a down projection"

    def __init__(self) -> None:
        super().__init__()
        self.wide = weights(torch.Generator().manual_seed(4), 3 * H, H)

    def rows(self, e: int, expert: Any, x: Tensor) -> Tensor:
        found: Tensor = F.linear(x, self.wide)[:, :H] if isinstance(expert, Copy) else expert(x)
        return found


class ScaledInput(Refused):
    """Later experts see other tokens."""

    reason = "different tensors"

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
            x = x * 0.5
        return out


class ScaledInPlace(Refused):
    """The same in place, as MoE++'s released code has it."""

    reason = "overwritten"
    trains = False

    def forward(self, x: Tensor) -> Any:
        x = x + 0
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
            x *= 0.5
        return out


class OtherRows(Refused):
    """Every expert sees what the ones before it made."""

    reason = "also used inside it"

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, expert(out[token]) * w[token, slot, None])
        return out


class OtherWeights(Refused):
    """Each expert is weighted by another tensor."""

    reason = "different tensors"

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * (w * e)[token, slot, None])
        return out


class WeightedInput(Refused):
    """The tokens are weighted, not the experts' rows."""

    reason = "loop"

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token] * w[token, slot, None]))
        return out


class Twice(Refused):
    """An expert occurs twice."""

    reason = "occurs twice"

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in zip((0, 1, 2, 1), self.experts, strict=True):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return out


class Counted(Refused):
    """How many tokens an expert got, and which, is used elsewhere."""

    reason = "is used"
    trains = False

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        load = torch.zeros(x.shape[0])
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
            load = load + torch.zeros_like(load).index_fill(0, token, float(e))
        return out, load


class RepeatedIds(Refused):
    """``+=`` adds once where a token chose an expert twice, and nothing says that it does not."""

    reason = "may be equal"

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        ids = ids // 2
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += w[token, slot, None] * expert(x[token])
        return out


class RepeatedTokens(Refused):
    """A mask of tokens marks one once where it chose an expert twice."""

    reason = "may be equal"

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        ids = ids // 2
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            out[mask] += expert(x[mask]) * gates[mask, e].unsqueeze(1)
        return out


class OtherGates(Refused):
    """Every expert is weighted with its neighbour's gate."""

    reason = "another one's column"

    def forward(self, x: Tensor) -> Any:
        gates = F.linear(x, self.gate).sigmoid()
        ids = gates.topk(K, -1).indices
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = (ids == e).any(dim=-1).nonzero().squeeze(1)
            out.index_add_(0, token, expert(x[token]) * gates[token, (e + 1) % E, None])
        return out


class Overwritten(Refused):
    """Rows are written, though a token has several experts."""

    reason = "overwrites"

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] = w[token, slot, None] * expert(x[token])
        return out


class Deep(Refused):
    """Three projections one after the other."""

    reason = "GEMMs"

    def rows(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(F.linear(x, expert.w1), expert.w2), expert.w3), expert.w2)


class SumSeen(Refused):
    """The sum is read inside the loop."""

    reason = "is used before the block ends"
    trains = False

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        norms = torch.zeros(())
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, expert(x[token]) * w[token, slot, None])
            norms = norms + out.norm()
        return out, norms


class Inactive(Refused):
    """Dropout in an expert."""

    reason = "effect"

    def rows(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return F.dropout(expert(x), 0.0)


class Mixture(Refused):
    """A dense mixture: every expert counts for every token."""

    reason = "all experts run on every token"

    def forward(self, x: Tensor) -> Any:
        gates = F.linear(x, self.gate).softmax(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + gates[:, e : e + 1] * expert(x)
        return out


class Smoothed(Refused):
    """Gates that are not zero outside of the chosen experts."""

    reason = "all experts run on every token"

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        gates = torch.full((x.shape[0], E), 0.01).scatter(1, ids, w)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + gates[:, e : e + 1] * expert(x)
        return out


class ChosenOther(Refused):
    """Expert choice in which an expert is weighted with its neighbour's column."""

    reason = "another one's column"

    def forward(self, x: Tensor) -> Any:
        g, chosen = F.linear(x, self.gate).softmax(-1).t().topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out.index_add_(0, chosen[e], expert(x[chosen[e]]) * g[(e + 1) % E][:, None])
        return out


REFUSED = [c for c in list(vars().values()) if isinstance(c, type) and issubclass(c, Refused) and c is not Refused]
