"""``raise-moe`` on layers as users write them: what is one is raised and right, what only looks like one is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from moec.backends.reference.interpreter import run_graph
from moec.ir.core import Graph
from moec.passes import PassContext, PassManager, parse_pipeline
from tests.passes.layers import HIDDEN, ONLY_GROUPED, SPOILS, TRACED_TOKENS, Layer, capture, loop

RAISE = "functionalize,canonicalize,raise-moe,cse,dce"
FUSE = "functionalize,canonicalize,raise-moe,fuse-routing,fuse-experts,cse,dce"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest |difference| / max(1, max |value|)."""
TOKENS = (0, 1, 2, 7, 33)
MOE = ("moe.dispatch", "moe.grouped_gemm", "moe.activation", "moe.combine")


def _late_softmax(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    top, ids = logits.topk(k, -1)
    return top.softmax(-1), ids


def _renormalised_sigmoid(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.float().sigmoid()
    ids = scores.topk(k, -1, sorted=False)[1]
    w = scores.gather(1, ids)
    return (w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5).to(logits.dtype), ids


def _odd(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = logits.argsort(-1, descending=True)[:, :k]
    return logits.tanh().gather(1, ids) * 0.5 + 1, ids


ROUTERS = [Layer().router, _late_softmax, _renormalised_sigmoid, _odd]

layers = st.builds(
    Layer,
    form=st.sampled_from(["grouped", "batched", "batched-left"]),
    layout=st.sampled_from(["concat", "chunk", "interleaved", "separate", "single"]),
    transposed=st.booleans(),
    bias=st.booleans(),
    norm=st.booleans(),
    late=st.booleans(),
    inverse=st.sampled_from(["argsort", "put", "scatter"]),
    top_k=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    router=st.sampled_from(ROUTERS),
)
quick = settings(
    max_examples=9,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def make(layer: Layer, tokens: int, seed: int, crowded: bool) -> list[torch.Tensor]:
    """(x, logits, *parameters); ``crowded``: all tokens prefer the same experts."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=gen).to(layer.dtype)
    logits = torch.randn(tokens, layer.experts, generator=gen)
    if crowded:
        logits = logits + torch.arange(layer.experts) * 100
    return [x, logits.to(layer.dtype), *layer.weights(seed)]


def rewritten(graph: Graph, pipeline: str) -> tuple[Graph, list[Any]]:
    """A rewritten copy, and the remarks."""
    ctx = PassContext()
    return PassManager(parse_pipeline(pipeline), repro=None).run(graph.clone(), ctx), ctx.remarks


def near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    assert got.shape == want.shape and got.dtype == dtype, f"{what}: {got.dtype} {list(got.shape)}"
    if want.numel():
        error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1)
        assert error <= TOLERANCE[dtype], f"{what}: error {error:.3g}"


def run(graph: Graph, args: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return run_graph(graph, [a.clone() for a in args])[0]


@given(layers, st.integers(0, 9), st.booleans())
@quick
def test_a_layer_is_raised_and_fused_and_right(layer: Layer, seed: int, crowded: bool) -> None:
    graph = capture(layer.forward, make(layer, TRACED_TOKENS, 0, False), (0, 1))
    raised, remarks = rewritten(graph, RAISE)
    fused, _ = rewritten(graph, FUSE)
    names = [op.name for op in raised.ops]
    assert all(n in names for n in MOE), [str(r) for r in remarks]
    assert [op.name for op in fused.ops if op.dialect == "moe"] == ["moe.route", "moe.experts"], str(fused)
    assert not [op for op in raised.ops if op.name == "torch.call" and "mm" in op.attrs["target"]]
    for tokens in TOKENS:
        args = make(layer, tokens, seed, crowded)
        want = loop(layer, args[0], args[1], args[2:])
        for form, g in (("raw", graph), ("raised", raised), ("fused", fused)):
            near(run(g, args), want, layer.dtype, f"{form}, {tokens} tokens")


@given(layers, st.sampled_from(sorted(SPOILS)), st.integers(0, 9))
@quick
def test_what_only_looks_like_a_layer_is_left(layer: Layer, spoil: str, seed: int) -> None:
    spoilt = Layer(**{**vars(layer), "spoil": spoil})
    assume(layer.form == "grouped" or spoil not in ONLY_GROUPED)
    assume(not (spoil == "other permutation of the weights" and layer.late))
    assume(not (spoil == "not brought back" and layer.late))
    graph = capture(spoilt.forward, make(layer, TRACED_TOKENS, 0, False), (0, 1))
    raised, remarks = rewritten(graph, RAISE)
    assert not [op.name for op in raised.ops if op.dialect == "moe"], str(raised)
    said = [r.message for r in remarks if r.kind == "missed" and r.pass_name == "raise-moe"]
    assert any(SPOILS[spoil] in message for message in said), said
    args = make(layer, 7, seed, False)
    assert run(raised, args).equal(run(graph, args))


@pytest.mark.parametrize("spoil", sorted(SPOILS))
def test_every_spoil_is_refused_for_its_reason(spoil: str) -> None:
    layer = Layer(spoil=spoil, bias=True, layout="chunk")
    _, remarks = rewritten(capture(layer.forward, make(layer, TRACED_TOKENS, 0, False), (0, 1)), RAISE)
    assert [r.message for r in remarks if r.pass_name == "raise-moe"] != []
    assert any(SPOILS[spoil] in r.message for r in remarks), [str(r) for r in remarks]


@pytest.mark.parametrize("static", [1, 4, 8], ids=lambda t: f"{t} tokens")
def test_static_sizes_that_meet_by_chance(static: int) -> None:
    """With 4 tokens and k = 2 there are as many rows as columns; what a size is must not decide what it means."""
    layer = Layer(bias=True, norm=True)
    args = make(layer, static, 0, False)
    graph = capture(layer.forward, args, ())
    fused, _ = rewritten(graph, FUSE)
    assert [op.name for op in fused.ops if op.dialect == "moe"] == ["moe.route", "moe.experts"]
    near(run(fused, args), loop(layer, args[0], args[1], args[2:]), torch.float32, "fused")


def _beside(h: torch.Tensor) -> torch.Tensor:
    return (h.unsqueeze(0) - h.unsqueeze(1)).sum(-1)


def _everything(h: torch.Tensor) -> torch.Tensor:
    return h[:, :8] / torch.var(h, True)


def _across(h: torch.Tensor) -> torch.Tensor:
    return h[:, :8] + h.sum(-1)


def _both(h: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(h[:, :8], (8, 8))


def _place(h: torch.Tensor) -> torch.Tensor:
    return h[:, :8] * torch.arange(8.0).unsqueeze(1)


def _turned(h: torch.Tensor) -> torch.Tensor:
    return h[:, :8].t() * 1


@pytest.mark.parametrize("mix", [_beside, _everything, _across, _both, _place, _turned])
def test_rows_mixed_where_rows_are_as_many_as_columns(mix: Any) -> None:
    layer = Layer()

    class Mixing(Layer):
        def activate(self, hidden: Any) -> torch.Tensor:
            return mix(hidden[0])

    args = make(layer, 4, 0, False)
    graph = capture(Mixing().forward, args, ())
    raised, remarks = rewritten(graph, RAISE)
    assert not [op.name for op in raised.ops if op.dialect == "moe"], str(raised)
    assert any("between the expert GEMMs" in r.message for r in remarks)


def test_two_layers_in_one_graph() -> None:
    one, two = Layer(), Layer(form="batched", layout="interleaved")
    args, more = make(one, TRACED_TOKENS, 0, False), two.weights(5)

    def both(x: torch.Tensor, logits: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        y = one.forward(x, logits, *params[:2])
        return two.forward(y, logits, *params[2:]) + y

    graph = capture(both, [*args, *more], (0, 1))
    fused, _ = rewritten(graph, FUSE)
    assert [op.name for op in fused.ops].count("moe.experts") == 2
    y = loop(one, args[0], args[1], args[2:])
    near(run(fused, [*args, *more]), loop(two, y.float(), args[1], more) + y, torch.float32, "fused")


def test_one_slot_in_all() -> None:
    """One token with one expert: torch stores a number without dimensions in the inverse permutation."""
    layer = Layer(inverse="put", top_k=1)
    args = make(layer, 1, 0, False)
    fused, remarks = rewritten(capture(layer.forward, args, ()), FUSE)
    assert [op.name for op in fused.ops].count("moe.experts") == 1, [r.message for r in remarks]
    near(run(fused, args), loop(layer, args[0], args[1], args[2:]), torch.float32, "fused")
