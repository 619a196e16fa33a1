"""MoE layers with dense MLPs beside or around them, and whether each MLP is a shared expert that can be fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.slicing.custom_layers import INNER, Grouped, H, Moe

WIDE = 12


class WithShared(Moe):
    """Gate, up and down of a dense MLP beside the experts; the cases override what they are about.

    Attributes:
        shared: For every shared expert that the report must name: "" if it is fused, else a part of the reason.
    """

    shared: tuple[str, ...] = ("",)

    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(7)

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=gen) * 0.3).to(self.dtype))

        self.sg, self.su, self.sd = make(WIDE, H), make(WIDE, H), make(H, WIDE)
        self.both, self.factor, self.rectangle = make(2 * WIDE, H), make(1, H), make(H, WIDE)
        self.up_bias, self.down_bias, self.scale = make(WIDE), make(H), make(WIDE)

    def routed(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return self.experts(x, w, ids)

    def mlp(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.sg)) * F.linear(x, self.su), self.sd)

    def forward(self, x: Tensor) -> Any:
        return self.routed(x) + self.mlp(x)


class Plain(WithShared):
    pass


class Before(WithShared):
    def forward(self, x: Tensor) -> Any:
        shared = self.mlp(x)
        return shared + self.routed(x)


class Bf16(WithShared, Grouped):
    pass


class InBatches(WithShared):
    """The MLP sees sequences, the experts see tokens; the residual is added after both."""

    def forward(self, x: Tensor) -> Any:
        h = x[None]
        return x + (self.routed(h.flatten(0, 1)).view(h.shape) + self.mlp(h)).flatten(0, 1)


class Gated(WithShared):
    """Qwen2-MoE: a factor of each token's own."""

    def forward(self, x: Tensor) -> Any:
        return self.routed(x) + torch.sigmoid(F.linear(x, self.factor)) * self.mlp(x)


class GatedInBatches(WithShared):
    def forward(self, x: Tensor) -> Any:
        h = x.unsqueeze(0)
        shared = self.mlp(h) * F.linear(h, self.factor).sigmoid()
        return self.routed(x).view(h.shape) + shared


class OneWeight(WithShared):
    """Gate and up are halves of one weight; the sum is halved."""

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.both).chunk(2, -1)
        return F.linear(F.gelu(gate, approximate="tanh") * up, self.sd)

    def forward(self, x: Tensor) -> Any:
        return (self.routed(x) + self.mlp(x)) / 2


class NoGate(WithShared):
    """Biases, a squared activation, and a factor that is the same for all tokens."""

    def mlp(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.su, self.up_bias)).square(), self.sd, self.down_bias)

    def forward(self, x: Tensor) -> Any:
        return self.routed(x) + 0.5 * self.mlp(x)


class Products(WithShared):
    """Weights lie the other way and are multiplied without ``linear``; a vector of the activation's own."""

    def mlp(self, x: Tensor) -> Tensor:
        return (torch.tanh(x @ self.rectangle) * self.scale) @ self.sd.t()


class InPlace(WithShared):
    """Llama 4: the block's result is added to the MLP's, in place."""

    def forward(self, x: Tensor) -> Any:
        out = self.mlp(x)
        out.add_(self.routed(x))
        return out


class Several(WithShared):
    """Two shared experts, in one sum with the block."""

    shared = ("", "")

    def forward(self, x: Tensor) -> Any:
        return self.routed(x) + (self.mlp(x) + F.linear(F.relu(F.linear(x, self.both)), self.both.t()))


class Tied(WithShared):
    """Gate and up are one parameter."""

    def mlp(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.sg)) * F.linear(x, self.sg), self.sd)


class Projected(WithShared):
    """Nemotron-H: the experts work in another space, from and to which tokens are projected."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(self.routed(F.linear(x, self.seen_in)), self.seen_out) + self.mlp(x)

    def __init__(self) -> None:
        super().__init__()
        self.seen_in, self.seen_out = nn.Parameter(torch.eye(H) * 0.9), nn.Parameter(torch.eye(H) * 1.1)


class RoutedRefused(WithShared):
    """The block itself cannot be fused: each token keeps its largest row."""

    fused = 0
    reason = "not added per token"

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        g, u = torch.bmm(self.w13[flat], x.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.w2[flat], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, 2, H).amax(1)

    shared = ()


# --- dense MLPs that are no shared experts: nothing is said of them -----------------------------------------------


class DenseLayerBefore(WithShared):
    shared = ()

    def forward(self, x: Tensor) -> Any:
        h = self.mlp(x)
        return h + self.routed(h)


class DenseLayerBeforeWithResidual(WithShared):
    shared = ()

    def forward(self, x: Tensor) -> Any:
        h = x + self.mlp(x)
        return h + self.routed(h)


class DenseLayerAfter(WithShared):
    shared = ()

    def forward(self, x: Tensor) -> Any:
        h = x + self.routed(x)
        return h + self.mlp(h)


class NotAdded(WithShared):
    shared = ()

    def forward(self, x: Tensor) -> Any:
        return self.routed(x), self.mlp(x)


class OtherTokens(WithShared):
    shared = ()

    def forward(self, x: Tensor) -> Any:
        return self.routed(x) + self.mlp(x.roll(1, 0))


class LastProjectionOfAttention(WithShared):
    """Parallel attention: what is added is a GEMM, but of rows that look at each other."""

    shared = ()

    def mlp(self, x: Tensor) -> Tensor:
        q, k = F.linear(x, self.sg), F.linear(x, self.su)
        return F.linear(torch.softmax(q @ k.t(), -1) @ k, self.sd)


class OneGemm(WithShared):
    shared = ()

    def mlp(self, x: Tensor) -> Tensor:
        return F.linear(x, self.seen_in)

    def __init__(self) -> None:
        super().__init__()
        self.seen_in = nn.Parameter(torch.eye(H) * 0.9)


# --- shared experts that stay with PyTorch, and why ------------------------------------------------------------------


class SeenOutside(WithShared):
    """The activation is a result of the layer, too."""

    shared = ("also used elsewhere",)

    def forward(self, x: Tensor) -> Any:
        a = F.silu(F.linear(x, self.sg)) * F.linear(x, self.su)
        return self.routed(x) + F.linear(a, self.sd), a


class GateSeenOutside(WithShared):
    shared = ("also used elsewhere",)

    def forward(self, x: Tensor) -> Any:
        g = F.linear(x, self.sg)
        return self.routed(x) + F.linear(F.silu(g) * F.linear(x, self.su), self.sd), g.sum()


class Masked(WithShared):
    """A weight that every call computes."""

    shared = ("is no parameter but computed",)

    def mlp(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.sg)) * F.linear(x, self.su * (self.su > 0)), self.sd)


class Adapted(WithShared):
    """A low-rank term beside the gate's GEMM."""

    shared = ("4 dense GEMMs feed the last one",)

    def mlp(self, x: Tensor) -> Tensor:
        def low_rank(weight: Tensor) -> Tensor:
            return F.linear(x, weight) + F.linear(F.linear(x, self.first), self.second)

        return F.linear(F.silu(low_rank(self.sg)) * low_rank(self.su), self.sd)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(self.high.detach()[0]), nn.Parameter(torch.full((WIDE, 2), 0.1))


class AdaptedDown(WithShared):
    """A low-rank term beside the down GEMM."""

    shared = ("also used elsewhere",)

    def mlp(self, x: Tensor) -> Tensor:
        a = F.silu(F.linear(x, self.sg)) * F.linear(x, self.su)
        return F.linear(a, self.sd) + F.linear(F.linear(a, self.rectangle), self.seen_in)

    def __init__(self) -> None:
        super().__init__()
        self.seen_in = nn.Parameter(torch.eye(H) * 0.9)


class Dropped(WithShared):
    """Random numbers inside."""

    shared = ("effect that must keep its place",)

    def mlp(self, x: Tensor) -> Tensor:
        return F.linear(F.dropout(F.relu(F.linear(x, self.su)), 0.5, True), self.sd)


class MixesTokens(WithShared):
    shared = ("may mix rows",)

    def mlp(self, x: Tensor) -> Tensor:
        u = F.linear(x, self.su)
        return F.linear(u - u.mean(0, keepdim=True), self.sd)


class MixesTokensInBatches(WithShared):
    shared = ("may mix rows",)

    def mlp(self, x: Tensor) -> Tensor:
        u = F.linear(x.unsqueeze(0), self.su)
        return F.linear(u - u.amax(1, keepdim=True), self.sd).squeeze(0)


class TokensInside(WithShared):
    """The activation uses the tokens once more."""

    shared = ("a matrix besides the rows",)

    def mlp(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.sg)) * x[:, :WIDE], self.sd)


class DifferentRows(WithShared):
    shared = ("read different rows",)

    def mlp(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.sg)) * F.linear(x + 1, self.su), self.sd)


class OneBias(WithShared):
    shared = ("one of them has a bias",)

    def mlp(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.sg, self.up_bias)) * F.linear(x, self.su), self.sd)


class NoGradientsForDown(WithShared):
    """One op cannot run half of itself without gradients."""

    shared = ("different modes",)

    def mlp(self, x: Tensor) -> Tensor:
        a = F.silu(F.linear(x, self.sg)) * F.linear(x, self.su)
        with torch.no_grad():
            return F.linear(a, self.sd)


class OverwritesTokens(WithShared):
    """The tokens change while the MLP runs."""

    shared = ("overwritten while the block runs",)

    def forward(self, x: Tensor) -> Any:
        h = x * 1
        routed, gate = self.routed(h), F.linear(h, self.sg)
        up = F.linear(h.mul_(2), self.su)
        return routed + F.linear(F.silu(gate) * up, self.sd)

    trains = False


class Picked(WithShared):
    """The MLP's weights are copies of parts of the experts'."""

    shared = ("is no parameter but computed",)

    def mlp(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.w13.view(-1, H)[torch.arange(INNER)])), self.w2[0].clone())


CASES = [c for c in list(globals().values()) if isinstance(c, type) and issubclass(c, WithShared)][1:]
