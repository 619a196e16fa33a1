"""Emission of graphs that capture did not leave as they were: into other graphs, with moe ops, from text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moec.capture import graph_from_fx
from moec.emit import EmitError, emit_into, graph_to_fx
from moec.ir.attributes import Operand
from moec.ir.core import Graph, Op
from moec.ir.errors import MoecError
from moec.ir.parser import parse_graph

SOFTMAX_TOPK = """
graph @route(%p: f32[T, 8]) -> (f32[T, 2], i64[T, 2]) {
  %s = torch.call @aten.softmax.int(%p, -1) : f32[T, 8]
  %v, %ids = torch.call @aten.topk.default(%s, 2) : f32[T, 2], i64[T, 2]
  return %v, %ids
}
"""
MOE = """
graph @g(%x: f32[T, 8], %ids: i64[T, 2]) -> f32[2*T, 8] {
  %y = torch.call @aten.relu.default(%x) : f32[T, 8]
  %rows, %plan = moe.dispatch %y, %ids {experts = 4} : f32[2*T, 8], !moe.plan<4>
  return %rows
}
"""


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> FakeTensor:
    return FakeTensorMode().from_tensor(torch.zeros(*shape, dtype=dtype))


@pytest.mark.parametrize("key", ["val", "example_value"])
def test_values_of_new_nodes(key: str) -> None:
    gm = graph_to_fx(parse_graph(SOFTMAX_TOPK), value_key=key, values=[fake(5, 8)])
    softmax, topk, v, ids = (n for n in gm.graph.nodes if n.op == "call_function")
    assert isinstance(softmax.meta[key], FakeTensor)
    assert [tuple(t.shape) for t in topk.meta[key]] == [(5, 2), (5, 2)]
    assert v.meta[key].dtype is torch.float32
    assert ids.meta[key].dtype is torch.int64
    x = torch.randn(5, 8)
    want = x.softmax(-1).topk(2)
    for a, b in zip(gm(x), want, strict=True):
        assert torch.equal(a, b)


def test_ill_typed_calls_are_reported() -> None:
    text = SOFTMAX_TOPK.replace("aten.softmax.int(%p, -1)", "aten.mm.default(%p, %p)")
    with pytest.raises(EmitError, match="does not fit its arguments"):
        graph_to_fx(parse_graph(text), values=[fake(5, 8)])


def host() -> tuple[torch.fx.GraphModule, torch.fx.Node, torch.fx.Node]:
    """A module ``relu(x) * 2``, its ``relu`` and its ``mul`` node."""
    gm = make_fx(lambda x: x.relu() * 2, pre_dispatch=True)(torch.randn(3, 4))
    _, relu, mul, _ = gm.graph.nodes
    return gm, relu, mul


def test_emit_into_an_existing_graph() -> None:
    table = torch.arange(4.0)

    def inner(x: torch.Tensor) -> Any:
        low, _ = (x + table).chunk(2, -1)
        return low.repeat(1, 2), None

    graph = graph_from_fx(make_fx(inner, pre_dispatch=True)(torch.randn(3, 4)))
    gm, relu, mul = host()
    with gm.graph.inserting_before(mul):
        first, nothing = emit_into(graph, gm.graph, [relu])
        second, _ = emit_into(graph, gm.graph, [first])
    assert nothing is None
    mul.replace_input_with(relu, second)
    gm.graph.lint()
    gm.recompile()
    x = torch.randn(3, 4)
    assert torch.equal(gm(x), inner(inner(x.relu())[0])[0] * 2)
    constants = [n.target for n in gm.graph.nodes if n.op == "get_attr"]
    assert len(constants) == 2
    assert len(set(constants)) == 1  # one tensor, one attribute


def test_emit_into_does_not_mix_up_constants() -> None:
    def plus(constant: torch.Tensor) -> Graph:
        return graph_from_fx(make_fx(lambda x: x + constant, pre_dispatch=True)(torch.randn(3, 4)))

    graphs = [plus(torch.full((4,), value)) for value in (1.0, 2.0)]
    gm, relu, mul = host()
    node = relu
    with gm.graph.inserting_before(mul):
        for graph in graphs:
            (node,) = emit_into(graph, gm.graph, [node])
    mul.replace_input_with(relu, node)
    gm.recompile()
    x = torch.randn(3, 4)
    assert torch.equal(gm(x), (x.relu() + 1 + 2) * 2)


def test_emit_into_checks_its_inputs() -> None:
    gm, relu, _ = host()
    with pytest.raises(EmitError, match="takes 1 arguments, 2 were given"):
        emit_into(parse_graph(SOFTMAX_TOPK), gm.graph, [relu, relu])


def test_a_graph_without_a_module_holds_no_constants() -> None:
    constant = torch.ones(4)
    graph = graph_from_fx(make_fx(lambda x: x + constant, pre_dispatch=True)(torch.randn(3, 4)))
    loose = torch.fx.Graph()
    with pytest.raises(EmitError, match="belongs to no module"):
        emit_into(graph, loose, [loose.placeholder("x")])


def test_moe_ops_need_somebody_to_claim_them() -> None:
    with pytest.raises(MoecError, match=r"moe\.dispatch has no form in an fx graph: a backend must claim it"):
        graph_to_fx(parse_graph(MOE))
    with pytest.raises(MoecError, match="a backend must claim it"):
        graph_to_fx(parse_graph(MOE), lower_op=lambda op, fx_graph, args: None)


def test_lower_op() -> None:
    seen: list[str] = []

    def lower(op: Op, fx_graph: torch.fx.Graph, args: list[Any]) -> list[Any]:
        seen.append(op.name)
        repeated = fx_graph.call_function(torch.ops.aten.repeat_interleave.self_int, (args[0], 2, 0))
        return [repeated, args[1]]

    values = [fake(3, 8), fake(3, 2, dtype=torch.int64)]
    gm = graph_to_fx(parse_graph(MOE), lower_op=lower, values=values)
    assert seen == ["moe.dispatch"]
    (node,) = gm.graph.output_node().args[0]
    assert tuple(node.meta["val"].shape) == (6, 8)
    x = torch.randn(3, 8)
    assert torch.equal(gm(x, torch.zeros(3, 2))[0], x.relu().repeat_interleave(2, 0))
    with pytest.raises(EmitError, match="has 2 results, lowering gave 1"):
        graph_to_fx(parse_graph(MOE), lower_op=lambda op, g, args: args[:1])


def test_text_does_not_hold_everything() -> None:
    constant = 'graph @g() -> f32[2] {\n %c = torch.get_attr {name = "table"} : f32[2]\n return %c\n}'
    with pytest.raises(EmitError, match="'table' is not in this graph"):
        graph_to_fx(parse_graph(constant))
    root = torch.nn.Module()
    root.table = torch.ones(2)  # type: ignore[assignment]
    assert torch.equal(graph_to_fx(parse_graph(constant), root=root)()[0], torch.ones(2))
    call = Graph("g")
    op = call.append(
        Op("torch.opaque", (), [call.add_arg(parse_graph(constant).outputs[0].type).type],
           attrs={"kind": "call_function", "target": "os.system", "args": ("true",)}, groups=[0])
    )  # fmt: skip
    call.append(Op("return", [op.result], groups=[1]))
    with pytest.raises(MoecError, match=r"os\.system was read from text"):
        graph_to_fx(call)


def regions() -> tuple[Graph, list[Op]]:
    """Three calls of one nested compile region, as Dynamo captures them."""
    graphs: list[Graph] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph_from_fx(gm))
        return gm.forward

    @torch.compiler.nested_compile_region
    def layer(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    torch._dynamo.reset()
    torch.compile(lambda x: layer(layer(layer(x))), backend=backend, fullgraph=True)(torch.randn(3))
    (graph,) = graphs
    return graph, [op for op in graph.ops if op.attrs.get("target") == "hop.invoke_subgraph"]


def test_a_region_that_changed_gets_its_own_module_and_identifier() -> None:
    graph, calls = regions()
    body = calls[1].regions[0]
    sine = next(op for op in body.ops if op.attrs.get("target") == "sin")
    sine.attrs["target"] = "cos"
    gm = graph_to_fx(graph, value_key="example_value")
    nodes = [n for n in gm.graph.nodes if n.target is torch.ops.higher_order.invoke_subgraph]
    identifiers = [n.args[1] for n in nodes]
    assert identifiers[0] == identifiers[2] != identifiers[1]
    assert nodes[0].args[0].target == nodes[2].args[0].target != nodes[1].args[0].target
    x = torch.randn(3)
    assert torch.equal(gm(x)[0], x.sin().cos().sin())


def test_regions_emitted_twice_into_one_graph_share_their_module() -> None:
    graph, _ = regions()
    gm, relu, mul = host()
    node = relu
    with gm.graph.inserting_before(mul):
        for _ in range(2):
            (node,) = emit_into(graph, gm.graph, [node])
    mul.replace_input_with(relu, node)
    gm.recompile()
    assert len([m for m in gm.children() if isinstance(m, torch.fx.GraphModule)]) == 1
    x = torch.randn(3, 4).abs()
    want = x
    for _ in range(6):
        want = want.sin()
    assert torch.equal(gm(x), want * 2)


def test_operands_may_be_rewired() -> None:
    graph = graph_from_fx(make_fx(lambda x: x.topk(3)[0].relu() + 1, pre_dispatch=True)(torch.randn(5)))
    topk = next(op for op in graph.ops if op.attrs["target"] == "aten.topk.default")
    relu = next(op for op in graph.ops if op.attrs["target"] == "aten.relu.default")
    cast = Op(
        "torch.call",
        [topk.results[1]],
        [topk.results[0].type],
        attrs={"target": "aten.mul.Tensor", "args": (Operand(0), 2.0)},
        groups=[1],
    )
    graph.insert_before(relu, cast)
    relu.set_operand(0, cast.result)  # now the ids are used, which no getitem node took before
    x = torch.randn(5)
    assert torch.equal(graph_to_fx(graph)(x), (x.topk(3)[1] * 2.0).relu() + 1)
