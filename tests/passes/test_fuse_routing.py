"""``fuse-routing`` on routers as users write them: attributes where they say it exactly, else a region; bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.backends.reference.interpreter import run_graph
from moec.ir.core import Graph, Op
from moec.ir.opdef import op_def
from moec.passes import PassContext, PassManager, parse_pipeline
from tests.passes.layers import HIDDEN, Layer, capture

E, K, GROUPS = 8, 2, 4
TOKENS = (0, 1, 33)
PIPELINE = "functionalize,canonicalize,raise-moe,fuse-routing,dce"
Routed = tuple[Tensor, Tensor]
Router = Callable[[Tensor, Tensor], Routed]


def _softmax(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1).topk(K)
    return w, ids


def _softmax_f32(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = F.softmax(logits, dim=1, dtype=torch.float32).topk(K, -1)
    return (w / w.sum(-1, keepdim=True)).to(logits.dtype), ids


def _sigmoid_bias_eps_scale(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.to(torch.float32).sigmoid()
    ids = (scores + bias).topk(K, -1, sorted=False)[1]
    w = scores.gather(1, ids)
    return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def _sqrtsoftplus(logits: Tensor, bias: Tensor) -> Routed:
    scores = F.softplus(logits.float()).sqrt()
    ids = torch.topk(scores + bias, K, dim=-1)[1]
    return scores.gather(1, ids) * 1.5, ids


def _topk_first(logits: Tensor, bias: Tensor) -> Routed:
    top, ids = logits.topk(K, -1)
    return top.softmax(-1), ids


def _topk_first_wide(logits: Tensor, bias: Tensor) -> Routed:
    top, ids = logits.topk(K, -1)
    return top.softmax(-1, dtype=torch.float32).to(logits.dtype), ids


def _topk_first_sigmoid(logits: Tensor, bias: Tensor) -> Routed:
    top, ids = logits.topk(K, -1)
    return top.float().sigmoid() if top.dtype == torch.float32 else top.sigmoid(), ids


def _identity(logits: Tensor, bias: Tensor) -> Routed:
    return logits.topk(K, -1)


def _grouped(
    fill: float, worth: str, *, turn: bool = True, near: bool = True, largest: bool = True, best: bool = True
) -> Router:
    def router(logits: Tensor, bias: Tensor) -> Routed:
        scores = logits.float().sigmoid()
        choice = scores + bias
        by = choice.view(-1, GROUPS, E // GROUPS)
        value = by.topk(2, dim=-1, largest=best)[0].sum(-1) if worth == "top2_sum" else by.max(-1).values
        kept = value.topk(2, dim=-1, sorted=False, largest=largest)[1]
        mask = torch.zeros_like(value).scatter_(1, kept, 1)
        if near:
            wide = mask.unsqueeze(-1).expand(-1, GROUPS, E // GROUPS).reshape(-1, E)
        else:
            wide = mask.unsqueeze(1).expand(-1, E // GROUPS, GROUPS).reshape(-1, E)
        choice = choice.masked_fill(~wide.bool() if turn else wide.bool(), fill)
        ids = choice.topk(K, dim=-1, sorted=False)[1]
        w = scores.gather(1, ids)
        return w / (w.sum(-1, keepdim=True) + 1e-20), ids

    return router


def _masked_weights(logits: Tensor, bias: Tensor) -> Routed:
    p = logits.float().softmax(-1)
    value = p.view(-1, GROUPS, 2).amax(-1)
    mask = torch.zeros_like(value).scatter(1, value.topk(1)[1], 1)
    wide = mask.unsqueeze(-1).expand(-1, GROUPS, 2).reshape(-1, E)
    return p.masked_fill(~wide.bool(), 0.0).topk(3)


ATTRIBUTES: dict[str, tuple[Router, dict[str, Any]]] = {
    "softmax": (_softmax, {"scoring": "softmax", "renormalize": False, "sorted": True}),
    "softmax in f32": (
        _softmax_f32,
        {"scoring": "softmax", "renormalize": True, "renorm_eps": 0.0, "score_dtype": "f32"},
    ),
    "sigmoid, bias, eps, scale": (
        _sigmoid_bias_eps_scale,
        {"scoring": "sigmoid", "renormalize": True, "renorm_eps": 1e-20, "scale": 2.5, "sorted": False, "bias": True},
    ),
    "sqrtsoftplus, bias": (_sqrtsoftplus, {"scoring": "sqrtsoftplus", "scale": 1.5, "bias": True}),
    "top-k first": (_topk_first, {"order": "topk_first", "scoring": "softmax"}),
    "top-k first, wide": (_topk_first_wide, {"order": "topk_first", "scoring": "softmax", "score_dtype": "f32"}),
    "identity": (_identity, {"scoring": "identity"}),
    "masked scores as weights": (_masked_weights, {"masked_weights": True, "group_fill": 0.0, "top_groups": 1}),
    **{
        f"groups by {how} filled with {fill}": (
            _grouped(fill, how),
            {"groups": 4, "top_groups": 2, "group_score": how, "group_fill": fill, "sorted": False, "bias": True},
        )
        for how in ("max", "top2_sum")
        for fill in (0.0, float("-inf"))
    },
}


def _biased_weights(logits: Tensor, bias: Tensor) -> Routed:
    return (logits.float().sigmoid() + bias).topk(K, -1)


def _sum_of_all(logits: Tensor, bias: Tensor) -> Routed:
    p = logits.sigmoid()
    w, ids = p.topk(K)
    return w / p.sum(-1, keepdim=True), ids


def _smallest(logits: Tensor, bias: Tensor) -> Routed:
    return logits.softmax(-1).topk(K, -1, largest=False)


def _other_scores(logits: Tensor, bias: Tensor) -> Routed:
    ids = logits.softmax(-1).topk(K)[1]
    return logits.sigmoid().gather(1, ids), ids


def _other_ids(logits: Tensor, bias: Tensor) -> Routed:
    p = logits.softmax(-1)
    ids = p.topk(K)[1]
    return p.gather(1, (ids + 1) % E), ids


def _over_tokens(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(0).topk(K)
    return w, ids


def _sharper(logits: Tensor, bias: Tensor) -> Routed:
    scores = F.softplus(logits.float(), beta=2).sqrt()
    return scores.topk(K)


def _sorted(logits: Tensor, bias: Tensor) -> Routed:
    values, ids = logits.float().sort(-1, descending=True)
    return values[:, :K].exp(), ids[:, :K]


REGIONS: dict[str, tuple[Router, str]] = {
    "weights from biased scores": (_biased_weights, "contain the selection bias"),
    "divided by the sum of all scores": (_sum_of_all, "something else than their sum"),
    "the smallest": (_smallest, "does not take the largest"),
    "weights of other scores": (_other_scores, "come from other scores"),
    "weights of other experts": (_other_ids, "other indices than the chosen"),
    "softmax over tokens": (_over_tokens, "does not run over the experts"),
    "a softplus of another slope": (_sharper, "not of a softplus"),
    "a sort": (_sorted, "not the indices of a top-k"),
    "groups that are not neighbours": (_grouped(0.0, "max", near=False), "not spread over neighbouring experts"),
    "the mask not turned round": (_grouped(0.0, "max", turn=False), "not those outside the kept groups"),
    "the worst groups": (_grouped(0.0, "max", largest=False), "not the top groups"),
    "groups by their worst": (_grouped(0.0, "top2_sum", best=False), "not the sum of its best two"),
}


def routed(router: Router, dtype: torch.dtype) -> tuple[Graph, Graph, list[str]]:
    """(graph of a layer with this router that also returns weights and ids, the same fused, remarks)."""
    layer = Layer(experts=E, form="batched", layout="single")

    def fn(x: Tensor, logits: Tensor, bias: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, ids = router(logits, bias)
        fixed = Layer(**{**vars(layer), "top_k": ids.shape[1], "router": lambda *_: (weights, ids)})
        return fixed.forward(x, logits, *params), weights, ids

    args = [torch.zeros(5, HIDDEN), torch.zeros(5, E, dtype=dtype), torch.zeros(E), *layer.weights(0)]
    graph = capture(fn, args, (0, 1))
    ctx = PassContext()
    fused = PassManager(parse_pipeline(PIPELINE), repro=None).run(graph.clone(), ctx)
    return graph, fused, [r.message for r in ctx.remarks if r.pass_name == "fuse-routing"]


def hold(router: Router, graph: Graph, fused: Graph, dtype: torch.dtype) -> None:
    """Weights and ids are bit for bit those of the router as written, with logits apart and with ties."""
    for tokens, ties in ((t, tied) for t in TOKENS for tied in (False, True)):
        gen = torch.Generator().manual_seed(tokens)
        logits = torch.randn(tokens, E, generator=gen) * 2
        logits = (logits.round() if ties else logits).to(dtype)
        bias = torch.randn(E, generator=gen).mul(4).round() / 8
        x = torch.randn(tokens, HIDDEN, generator=gen)
        args = [x, logits, bias, *Layer(experts=E, form="batched", layout="single").weights(1)]
        want_w, want_ids = router(logits, bias)
        for g in (graph, fused):
            with torch.no_grad():
                _, weights, ids = run_graph(g, args)
            assert ids.equal(want_ids), f"{tokens} tokens: other experts"
            assert weights.dtype == want_w.dtype and weights.equal(want_w), f"{tokens} tokens: other weights"


def route_of(graph: Graph) -> Op:
    found = [op for op in graph.ops if op.name == "moe.route"]
    assert len(found) == 1, str(graph)
    return found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_known_router_becomes_attributes(name: str, dtype: torch.dtype) -> None:
    router, want = ATTRIBUTES[name]
    graph, fused, _ = routed(router, dtype)
    op = route_of(fused)
    assert not op.regions
    got = {k: op_def("moe.route").attr(op, k) for k in want if k != "bias"}
    got = {k: v.name if k == "score_dtype" else v for k, v in got.items()}
    assert got == {k: v for k, v in want.items() if k != "bias"}
    assert (op.operand("bias") is not None) == want.get("bias", False)
    hold(router, graph, fused, dtype)


@pytest.mark.parametrize("name", REGIONS)
def test_any_other_router_becomes_a_region(name: str) -> None:
    router, reason = REGIONS[name]
    graph, fused, said = routed(router, torch.float32)
    op = route_of(fused)
    assert op.regions, f"{name} was taken for {op.attrs}"
    assert any(reason in message for message in said), said
    hold(router, graph, fused, torch.float32)


def _from_noise(logits: Tensor, bias: Tensor) -> Routed:
    ids = (logits + torch.rand_like(logits)).topk(K)[1]
    return logits.softmax(-1).gather(1, ids), ids


def _dropped(logits: Tensor, bias: Tensor) -> Routed:
    ids = logits.topk(K)[1]
    return F.dropout(logits.softmax(-1), 0.5, True).gather(1, ids), ids


@pytest.mark.parametrize("router", [_from_noise, _dropped])
def test_a_router_that_draws_numbers_stays(router: Router) -> None:
    _, fused, said = routed(router, torch.float32)
    assert "moe.route" not in [op.name for op in fused.ops]
    assert any("draws numbers" in message for message in said), said


@st.composite
def routers(draw: Any) -> Router:
    scoring = draw(st.sampled_from(["softmax", "sigmoid", "tanh", "identity"]))
    bias, gather, renorm, late = (draw(st.booleans()) for _ in range(4))
    eps, scale, cast = draw(st.sampled_from([0, 1e-20, 0.5])), draw(st.sampled_from([1, 2.5])), draw(st.booleans())
    k, dim = draw(st.sampled_from([1, 2, E])), draw(st.sampled_from([-1, -1, 0]))

    def score(t: Tensor) -> Tensor:
        if scoring == "softmax":
            return t.softmax(dim)
        return t if scoring == "identity" else getattr(torch, scoring)(t)

    def router(logits: Tensor, b: Tensor) -> Routed:
        scores = logits.float() if late else score(logits.float())
        top, ids = (scores + b if bias else scores).topk(k, -1)
        w = scores.gather(1, ids) if gather else top
        w = score(w) if late else w
        if renorm:
            total = w.sum(-1, keepdim=True)
            w = w / (total + eps if eps else total)
        return (w * scale).to(logits.dtype) if cast else w * scale, ids

    return router


@given(routers(), st.booleans(), st.booleans())
@settings(max_examples=8, phases=[Phase.generate], deadline=None, derandomize=True, database=None)
def test_whatever_it_becomes_it_is_the_same(router: Router, narrow: bool, ties: bool) -> None:
    dtype = torch.bfloat16 if narrow else torch.float32
    graph, fused, _ = routed(router, dtype)
    route_of(fused)
    for tokens in (0, 1, 9):
        gen = torch.Generator().manual_seed(tokens)
        logits = torch.randn(tokens, E, generator=gen) * 2
        args = [torch.randn(tokens, HIDDEN, generator=gen), (logits.round() if ties else logits).to(dtype)]
        args += [torch.randn(E, generator=gen), *Layer(experts=E, form="batched", layout="single").weights(1)]
        with torch.no_grad():
            want, got = run_graph(graph, args), run_graph(fused, args)
        for a, b in zip(want[1:], got[1:], strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
