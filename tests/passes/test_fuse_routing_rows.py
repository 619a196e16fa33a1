"""``fuse-routing`` on routers over tokens of two dimensions: one over rows where every step treats rows apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.backends.reference.interpreter import run_graph
from moec.ir.core import Graph
from moec.ir.opdef import op_def
from moec.passes import PassContext, PassManager, parse_pipeline
from tests.passes.layers import HIDDEN, Layer, capture
from tests.passes.test_fuse_routing import PIPELINE, E, K, Routed, Router, route_of

BATCH = 3


def _late(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1).topk(K)
    return w.view(-1, K), ids.view(-1, K)


def _renormalised_after(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = F.softmax(logits, dim=2, dtype=torch.float32).topk(K, dim=2)
    w, ids = w.flatten(0, 1), ids.flatten(0, 1)
    return w / w.sum(-1, keepdim=True), ids


def _biased(logits: Tensor, bias: Tensor) -> Routed:
    scores = logits.float().sigmoid()
    ids = (scores.detach() + bias).topk(K)[1]
    w = scores.gather(2, ids)
    return (w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5).reshape(-1, K), ids.reshape(-1, K)


def _skipping(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1).topk(K)
    skip = ids == E - 1
    return w.masked_fill(skip, 0).view(-1, K), ids.masked_fill(skip, 0).view(-1, K)


def _largest(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1).max(-1)
    return w.view(-1, 1), ids.view(-1, 1)


def _over_sequence(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(1).topk(K)
    return w.view(-1, K), ids.view(-1, K)


def _best_of_sequence(logits: Tensor, bias: Tensor) -> Routed:
    ids = logits.topk(K)[1]
    w = logits.softmax(-1).gather(-1, ids)
    return (w / w.amax(1, keepdim=True)).view(-1, K), ids.view(-1, K)


def _by_position(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = (logits + bias[: logits.shape[1], None]).softmax(-1).topk(K)
    return w.view(-1, K), ids.view(-1, K)


KNOWN: dict[str, tuple[Router, dict[str, Any]]] = {
    "flattened last": (_late, {"renormalize": False}),
    "renormalised after flattening": (_renormalised_after, {"renormalize": True}),
    "sigmoid, bias": (_biased, {"scoring": "sigmoid", "renormalize": True, "scale": 2.5}),
    "an expert that computes nothing": (_skipping, {"scoring": "softmax"}),
    "a maximum": (_largest, {"ties": "first"}),
    # What is not one of rows stays outside, and what is goes by what it gives.
    "softmax over the sequence": (_over_sequence, {"scoring": "identity"}),
    "logits by position": (_by_position, {"scoring": "softmax"}),
}


def routed(router: Router, steps: int) -> tuple[Graph, Graph, list[str]]:
    """(a layer on ``BATCH`` sequences that also returns weights and ids, the same fused, remarks)."""
    layer = Layer(experts=E, form="batched", layout="single")

    def fn(x: Tensor, logits: Tensor, bias: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, ids = router(logits, bias)
        fixed = Layer(**{**vars(layer), "top_k": ids.shape[1], "router": lambda *_: (weights, ids)})
        return fixed.forward(x, logits, *params), weights, ids

    graph = capture(fn, inputs(steps), ())
    ctx = PassContext()
    fused = PassManager(parse_pipeline(PIPELINE), repro=None).run(graph.clone(), ctx)
    return graph, fused, [r.message for r in ctx.remarks if r.pass_name == "fuse-routing"]


def inputs(steps: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(steps)
    logits = (torch.randn(BATCH, steps, E, generator=gen) * 2).round()  # with ties
    x, bias = torch.randn(BATCH * steps, HIDDEN, generator=gen), torch.randn(E, generator=gen).mul(4).round() / 8
    return [x, logits, bias, *Layer(experts=E, form="batched", layout="single").weights(1)]


def hold(graph: Graph, fused: Graph, router: Router, steps: int) -> None:
    args = inputs(steps)
    want = router(args[1], args[2])
    for g in (graph, fused):
        with torch.no_grad():
            _, weights, ids = run_graph(g, args)
        assert ids.equal(want[1]) and weights.equal(want[0])


# A maximum over one step is [B, 1] as it is [T, 1]: nothing is flattened there.
@pytest.mark.parametrize(("name", "steps"), [(n, s) for n in KNOWN for s in (1, 7) if (n, s) != ("a maximum", 1)])
def test_rows_from_the_logits_on(name: str, steps: int) -> None:
    router, want = KNOWN[name]
    graph, fused, said = routed(router, steps)
    op = route_of(fused)
    assert not op.regions, said
    assert {k: op_def("moe.route").attr(op, k) for k in want} == want
    assert len(fused.ops) <= len(graph.ops), "nothing is computed twice"
    hold(graph, fused, router, steps)


def test_what_looks_along_the_sequence_stays_as_it_was() -> None:
    graph, fused, said = routed(_best_of_sequence, 7)
    assert "moe.route" not in [op.name for op in fused.ops]
    assert any("row per token" in m for m in said)
    names = [op.attrs.get("target", op.name) for op in fused.ops]
    assert "aten.reshape.default" not in names, "what was tried is undone"
    hold(graph, fused, _best_of_sequence, 7)
