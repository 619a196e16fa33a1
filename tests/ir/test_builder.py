"""The builder: places, groups, inference, templates; and what it refuses."""

from __future__ import annotations

import pytest

from moec.ir.attributes import ListAttr, Operand, Region
from moec.ir.builder import Builder
from moec.ir.core import Graph, Location, Op, Value
from moec.ir.errors import IRError
from moec.ir.printer import print_graph
from moec.ir.types import PlanType, TensorType
from moec.ir.verifier import verify

X = TensorType.of("bf16", "T", 8)


def start() -> tuple[Graph, Builder, Value, Value]:
    graph = Graph("g")
    x, ids = graph.add_arg(X, "x"), graph.add_arg(TensorType.of("i64", "T", 2), "ids")
    return graph, Builder(graph), x, ids


def test_infers_types_and_groups() -> None:
    graph, b, x, ids = start()
    w = graph.add_arg(TensorType.of("bf16", 4, 6, 8), "w")
    rows, plan = b.op("moe.dispatch", x, ids, attrs={"experts": 4}, names=("rows", "plan")).results
    h = b.op("moe.grouped_gemm", rows, [w], plan)
    b.ret(h.result)
    verify(graph)
    assert h.groups == (1, 1, 1, 0, 0)
    assert plan.type == PlanType(4)
    assert "%rows, %plan = moe.dispatch %x, %ids {experts = 4} : bf16[2*T, 8], !moe.plan<4>" in print_graph(graph)


def test_places() -> None:
    graph, b, x, _ = start()

    def call(name: str) -> Op:
        return b.call(name, [x], None, [X])

    first, last = call("f.first.x"), b.ret(x)
    call("f.end.x")
    b.insert_before(first)
    call("f.a.x"), call("f.b.x")
    b.insert_after(first)
    call("f.c.x"), call("f.d.x")
    b.at_end()
    call("f.e.x")
    order = [op.attrs["target"].split(".")[1] for op in graph.ops[:-1]]
    assert order == ["a", "b", "first", "c", "d", "end", "e"]
    assert graph.ops[-1] is last
    verify(graph)


def test_call_templates() -> None:
    graph, b, x, ids = start()
    body = Graph()
    Builder(body).ret()
    op = b.call("hop.f", [x, [x, 1], (ids,), body], {"k": ids, "d": {"a": x}}, [X], loc=Location(module="m"))
    assert op.attrs["args"] == (Operand(0), ListAttr((Operand(1), 1)), (Operand(2),), Region(0))
    assert op.attrs["kwargs"] == {"k": Operand(3), "d": {"a": Operand(4)}}
    assert op.operands == (x, x, ids, ids, x)
    assert op.regions == [body]
    assert op.loc.module == "m"
    b.ret()
    verify(graph)


def test_optional_and_absent_groups() -> None:
    graph, b, x, _ = start()
    bias = graph.add_arg(TensorType.of("f32", 8), "bias")
    types = [TensorType.of("f32", "T", 2), TensorType.of("i64", "T", 2)]
    assert b.op("moe.route", x, attrs={"k": 2}, result_types=types).groups == (1, 0, 0)
    assert b.op("moe.route", x, bias, attrs={"k": 2}, result_types=types).groups == (1, 1, 0)
    assert b.op("moe.route", x, None, [bias], attrs={"k": 2}, result_types=types).groups == (1, 0, 1)
    flat = b.op("moe.route", x, bias, attrs={"k": 2}, result_types=types, groups=(1, 0, 1))
    assert flat.operand("bias") is None
    assert b.op("return", x, bias).groups == (2,)


def test_plain_ops_get_their_groups() -> None:
    _, _, x, _ = start()
    assert Op("return", [x, x, x]).groups == (3,)
    assert Op("torch.call", [x, x]).groups == (2,)
    assert Op("torch.call").groups == (0,)
    assert Op("moe.route", [x]).groups == (1, 0, 0)
    assert Op("no.such.op", [x, x]).groups == (1, 1)


def test_refusals_leave_no_uses_behind() -> None:
    graph, b, x, ids = start()
    with pytest.raises(IRError, match="cannot infer its result types; give result_types"):
        b.op("moe.combine", x, ids, x)
    with pytest.raises(IRError, match="takes one 'ids', not 0"):
        b.op("moe.dispatch", x)
    with pytest.raises(IRError, match="takes 2 operand groups"):
        b.op("moe.dispatch", x, ids, x)
    with pytest.raises(IRError, match="cannot infer the result types: KeyError"):
        b.op("moe.dispatch", x, ids)
    with pytest.raises(IRError, match="unknown op"):
        b.op("moe.dispach", x, ids)
    with pytest.raises(IRError, match="is not an op of graph @g"):
        b.insert_before(Op("return"))
    assert x.uses == []
    assert graph.ops == []
