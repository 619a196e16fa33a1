"""``fuse-experts`` on raised layers: one op that is bit for bit the chain it replaces, or the chain as it was."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moec.backends.reference.interpreter import run_graph
from moec.ir.core import Graph, Op
from moec.ir.verifier import verify
from moec.passes import PassContext, PassManager, parse_pipeline
from moec.passes.calls import call_op
from tests.passes.layers import HIDDEN, TRACED_TOKENS, Layer, capture, loop

TOLERANCE = 1e-5
"""Largest |difference| / max(1, max |value|) from the loop, in f32."""

layers = st.builds(
    Layer,
    form=st.sampled_from(["grouped", "batched"]),
    layout=st.sampled_from(["concat", "interleaved", "separate", "single"]),
    transposed=st.booleans(),
    bias=st.booleans(),
    norm=st.booleans(),
    top_k=st.sampled_from([1, 2, 4]),
)
few = settings(max_examples=5, phases=[Phase.generate], deadline=None, derandomize=True, database=None)


def args_of(layer: Layer, tokens: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(tokens)
    x, logits = torch.randn(tokens, HIDDEN, generator=gen), torch.randn(tokens, layer.experts, generator=gen)
    return [x, logits, *layer.weights(1)]


def raised(layer: Layer) -> Graph:
    graph = capture(layer.forward, args_of(layer, TRACED_TOKENS), (0, 1))
    return PassManager(parse_pipeline("functionalize,canonicalize,raise-moe,dce"), repro=None).run(graph, PassContext())


@cache
def _plain() -> Graph:
    return raised(Layer(bias=True))


def fuse(graph: Graph) -> tuple[Graph, list[str]]:
    ctx = PassContext()
    out = PassManager(parse_pipeline("fuse-experts"), repro=None).run(graph.clone(), ctx)
    verify(out)
    return out, [r.message for r in ctx.remarks if r.kind == "missed"]


def moe_ops(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops if op.dialect == "moe"]


@given(layers)
@few
def test_one_op_is_the_chain_bit_for_bit(layer: Layer) -> None:
    graph = raised(layer)
    fused, missed = fuse(graph)
    assert moe_ops(fused) == ["moe.experts"] and not missed
    for tokens in (0, 9):
        args = args_of(layer, tokens)
        with torch.no_grad():
            (want,), (got,) = run_graph(graph, args), run_graph(fused, args)
        assert got.equal(want)
        if tokens:
            truth = loop(layer, args[0], args[1], args[2:])
            assert (got - truth).abs().max() <= TOLERANCE * truth.abs().max().clamp_min(1)


def _seen(graph: Graph, name: str) -> None:
    """Let the first result of the first op ``name`` leave the graph too."""
    op = next(op for op in graph.ops if op.name == name)
    old = graph.terminator
    new = Op("return", [*old.operands, op.results[0]], groups=[len(old.operands) + 1])
    old.erase()
    graph.append(new)


def _between(graph: Graph, name: str) -> None:
    """Put a flip of the rows behind the first op ``name``."""
    op = next(op for op in graph.ops if op.name == name)
    users = [(u, i) for u, i in op.results[0].uses]
    flip = call_op("aten.flip.default", (op.results[0], [0]), {}, [op.results[0].type])
    graph.insert_after(op, flip)
    for user, index in users:
        user.set_operand(index, flip.result)


def _overwritten(graph: Graph, name: str) -> None:
    """Overwrite the tokens behind the first op ``name``."""
    op = next(op for op in graph.ops if op.name == name)
    graph.insert_after(op, call_op("aten.zero_.default", (graph.args[0],), {}, [graph.args[0].type]))


@pytest.mark.parametrize("name", ["moe.dispatch", "moe.grouped_gemm", "moe.activation"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(_seen, "also used elsewhere"), (_between, ""), (_overwritten, "aten.zero_.default writes to memory")],
)
def test_a_chain_that_is_not_closed_stays(spoil: object, reason: str, name: str) -> None:
    graph = _plain().clone()
    spoil(graph, name)  # type: ignore[operator]
    before = str(graph)
    fused, missed = fuse(graph)
    assert str(fused) == before
    assert missed and reason in missed[0]


def test_an_overwritten_token_after_the_combine_is_no_obstacle() -> None:
    graph = _plain().clone()
    _overwritten(graph, "moe.combine")
    fused, missed = fuse(graph)
    assert moe_ops(fused) == ["moe.experts"] and not missed
