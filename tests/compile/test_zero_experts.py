"""Layers with zero-compute experts through the ``torch.compile`` door: slots are sentinels, numbers are eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.backends.aten import forward as aten_forward
from moec.runtime.programs import lookup
from tests.prepare import undecorated

H, INNER, E, Z, K = 16, 8, 4, 4, 3
TOLERANCE = 2e-5
"""Largest |difference| / max(1, max |value|) from eager, in f32."""
OPTIONS = {"inner": "eager", "backends": ["aten"]}


class Layer(nn.Module):
    """Experts with weights from 0, others from E on; every slot goes through a GEMM, as static shapes ask for."""

    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=gen) * 0.3)

        self.gate, self.w13, self.w2 = make(E + Z, H), make(E, 2 * INNER, H), make(E, H, INNER)
        self.mixer, self.vector, self.residual = make(2, H), make(H), make(E + Z, E + Z)
        self.register_buffer("bias", torch.randn(E + Z, generator=gen) * 0.1)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.gate).softmax(-1).topk(K, -1)

    def experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        k, flat = ids.shape[-1], ids.reshape(-1)
        rows = x.repeat_interleave(k, 0)
        g, u = torch.bmm(self.w13[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.w2[flat], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, k, H).sum(1)


class Identity(Layer):
    """LongCat-Flash: chosen with a bias, weighted without it, scaled; ids from E on are the token itself."""

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.gate).softmax(-1)
        ids = (scores + self.bias).topk(K, -1)[1]
        return scores.gather(1, ids) * 2.5, ids

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.choose(x)
        zero = ids >= E
        y = self.experts(x, torch.where(zero, 0, ids), torch.where(zero, 0, w))
        return y + (w * zero).sum(-1, keepdim=True) * x


class IdentityFirst(Identity):
    """The same, with the tokens' own part computed before the experts run, and ids overwritten in place."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.choose(x)
        zero = ids >= E
        own = x * w.masked_fill(~zero, 0).sum(-1, keepdim=True)
        ids = ids.clone()
        ids[zero] = 0
        w = w.masked_fill(zero, 0.0)
        return self.experts(x, ids, w) + own


class Nulls(Layer):
    """AdaMoE: weights are renormalised over the true experts; a token may have none."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.choose(x)
        true = ids < E
        w = w * true
        w = w / w.sum(-1, keepdim=True).clamp_min(1e-6)
        return self.experts(x, ids.clamp(max=E - 1), w)


class Assigned(Layer):
    """Weights are set to 0 by assignment, and renormalised."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.choose(x)
        w = w.clone()
        w[ids >= E] = 0
        return self.experts(x, ids % E, w / (w.sum(-1, keepdim=True) + 1e-6))


class Residuals(Layer):
    """MoE++: zero, copy and constant experts, the zero expert's gate dropped, logits carried on to the next layer."""

    def one(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, self.gate)
        if before is not None:
            logits = logits + F.linear(before, self.residual)
        w, ids = logits.softmax(-1).topk(2, -1)
        w = torch.where(ids == E + Z - 1, 0.0, w)
        w = w / (w.sum(-1, keepdim=True) + 1e-9)
        ffn = ids < E
        y = self.experts(x, ids * ffn, w * ffn)
        a, b = F.linear(x, self.mixer).softmax(-1).split(1, -1)
        y = y + torch.where(ids == E, w, 0).sum(-1, keepdim=True) * x
        for constant in (E + 1, E + 2):
            y = y + (w * (ids == constant)).sum(-1, keepdim=True) * (a * x + b * self.vector)
        return y, logits

    def forward(self, x: Tensor) -> Tensor:
        y, logits = self.one(x, None)
        x = F.layer_norm(x + y, (H,))
        return x + self.one(x, logits)[0]


class TopP(Layer):
    """As many experts as it takes to collect a share of the probability, at most K."""

    def forward(self, x: Tensor) -> Tensor:
        p = F.linear(x, self.gate[:E]).softmax(-1)
        w, ids = p.topk(K, -1)
        keep = w.cumsum(-1) - w < 0.5
        w = w * keep.to(w.dtype)
        return self.experts(x, ids, w / w.sum(-1, keepdim=True))


class StraightThrough(Layer):
    """The mask lets gradients pass: every slot must be computed."""

    def forward(self, x: Tensor) -> Tensor:
        p = F.linear(x, self.gate[:E]).softmax(-1)
        w, ids = p.topk(K, -1)
        hard = (w > 0.3).to(w.dtype)
        return self.experts(x, ids, w * (hard + w - w.detach()))


class Tiny(Layer):
    """Dropped slots keep a small weight."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.choose(x)
        zero = ids >= E
        return self.experts(x, torch.where(zero, 0, ids), torch.where(zero, 1e-3, w))


class IdsAlone(Layer):
    """Only ids are masked: expert 0 stands in for the others, with their weights."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.choose(x)
        return self.experts(x, torch.where(ids >= E, 0, ids), w)


def near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    if want.numel():
        error = (got - want).abs().max() / want.abs().max().clamp_min(1)
        assert error <= TOLERANCE, f"off by {error:.3g}"


def compared(case: type[Layer]) -> Any:
    """Outputs and all gradients of the compiled layer are eager's; the report."""
    eager, compiled = case(), case()
    run = torch.compile(compiled, backend="moec", dynamic=True, options=OPTIONS)
    with moec.recording() as report:
        for tokens in (9, 3):
            x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens))
            x[-1] = 0
            mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            got, want = run(mine), eager(theirs)
            near(got, want)
            got.square().sum().backward()
            want.square().sum().backward()
            assert mine.grad is not None and theirs.grad is not None
            near(mine.grad, theirs.grad)
    for (name, a), (_, b) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            near(a.grad, b.grad)
    assert report.layers and report.all_fused, report
    return report


@pytest.mark.parametrize("case", [Identity, IdentityFirst, Nulls, Assigned, Residuals, TopP], ids=lambda c: c.__name__)
def test_slots_without_an_expert_are_sentinels(case: type[Layer], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, int]] = []

    def watched(ids: Tensor, experts: int) -> Any:
        slots = sort_slots(ids, experts)
        rows.append((slots.live, slots.total))
        return slots

    sort_slots = aten_forward.sort_slots
    monkeypatch.setattr(aten_forward, "sort_slots", watched)
    report = compared(case)
    for block in report.layers:
        assert "sentinels = true" in block.ir_after
        assert any("take part in no expert" in r for r in block.remarks)
        assert "take part in no expert" in str(report)
    assert rows and all(live < total for live, total in rows)


@pytest.mark.parametrize("case", [StraightThrough, Tiny, IdsAlone], ids=lambda c: c.__name__)
def test_slots_that_count_stay(case: type[Layer]) -> None:
    for block in compared(case).layers:
        assert "sentinels" not in block.ir_after


def test_the_router_of_identity_experts_is_one_of_moe_routes() -> None:
    (block, *_) = compared(Identity).layers
    assert "softmax+bias top-3 x2.5" in str(block.router)


def test_longcat_flash_of_transformers() -> None:
    """Rewritten by ``prepare``: its router is one of ``moe.route``'s, identity experts among the choices."""
    block, x = undecorated.block("longcat_flash"), undecorated.tokens()
    with torch.no_grad():
        want = block(x)
        moec.prepare(block)
        with moec.recording() as report:
            got = torch.compile(block, backend="moec", options=OPTIONS)(x)
    near(got, want)
    (found,) = report.layers
    assert found.fused and "sentinels = true" in found.ir_after
    assert "region" not in str(found.router) and "bias" in str(found.router)


def test_a_token_without_experts_is_zero() -> None:
    layer = Nulls()
    with torch.no_grad():
        layer.gate[:E] = 0
        layer.gate[E:] = 0
        layer.gate[E:, 0] = 5
        x = torch.randn(4, H)
        x[:, 0] = 10
        got = torch.compile(layer, backend="moec", options=OPTIONS)(x)
    assert got.equal(torch.zeros(4, H))


@pytest.mark.parametrize("case", [Identity, Assigned], ids=lambda c: c.__name__)
@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_programs(case: type[Layer], decomposed: bool) -> None:
    layer, x = case(), torch.randn(7, H, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        if decomposed:
            program = program.run_decompositions()
        optimized = moec.optimize(program, backends=["aten"])
        (node,) = [n for n in optimized.graph.nodes if n.target is torch.ops.moec.experts.default]
        assert lookup(node.args[-1]).op.attrs["sentinels"] is True
        near(optimized.module()(x), layer(x))
