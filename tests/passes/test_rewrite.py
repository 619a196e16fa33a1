"""The rewrite engine: matching, refusing, fixed points, fuel, nested graphs."""

from __future__ import annotations

from typing import ClassVar

import pytest

from moec.ir.attributes import ListAttr, Operand
from moec.ir.core import Graph, Location, Op
from moec.ir.errors import MoecError
from moec.ir.parser import parse_graph
from moec.ir.types import TensorType
from moec.ir.verifier import verify
from moec.passes import PassContext, Rewrite, Rewriter, apply_rewrites
from moec.passes.base import Fuel
from moec.passes.calls import bound_args, call_args, call_op, is_call, packet

NEGS = """graph @g(%x: f32[T, 4]) -> f32[T, 4] {
  %a = torch.call @aten.neg.default(%x) : f32[T, 4]
  %b = torch.call @aten.neg.default(%a) : f32[T, 4]
  %c = torch.call @aten.neg.default(%b) : f32[T, 4]
  %d = torch.call @aten.neg.default(%c) : f32[T, 4]
  return %d
}"""


class DoubleNeg(Rewrite[tuple[Op, Op]]):
    """-(-x) is x."""

    name = "double-neg"

    def pattern(self, op: Op) -> tuple[Op, Op] | None:
        inner = op.operands[0].op if is_call(op, "aten.neg.default") else None
        return (op, inner) if inner is not None and is_call(inner, "aten.neg.default") else None

    def rewrite(self, match: tuple[Op, Op], rewriter: Rewriter) -> None:
        outer, inner = match
        rewriter.replace(outer, [inner.operands[0]])
        rewriter.erase_unused(inner)


class To(Rewrite[Op]):
    """One target for another."""

    source: ClassVar[str] = "aten.neg.default"
    target: ClassVar[str] = "aten.relu.default"
    name = "to-relu"

    def pattern(self, op: Op) -> Op | None:
        return op if is_call(op, self.source) else None

    def rewrite(self, match: Op, rewriter: Rewriter) -> None:
        made = rewriter.call(self.target, match.operands, result_types=[match.result.type])
        rewriter.replace(match, [made.result])


class Back(To):
    """The way back."""

    source, target, name = "aten.relu.default", "aten.neg.default", "to-neg"


class Never(To):
    """Always refused."""

    name = "never"

    def check(self, match: Op) -> str | None:
        return "it is never right"


def targets(graph: Graph) -> list[str]:
    return [op.attrs["target"].split(".")[1] for op in graph.walk() if op.name == "torch.call"]


def test_applies_until_nothing_matches() -> None:
    graph, ctx = parse_graph(NEGS), PassContext()
    result = apply_rewrites(graph, [DoubleNeg()], ctx, "p")
    assert targets(graph) == []
    assert result.modified
    assert result.stats == {"double-neg": 2}
    assert [r.message for r in ctx.remarks] == ["double-neg"] * 2
    verify(graph)


def test_nothing_to_do() -> None:
    graph, ctx = parse_graph(NEGS), PassContext()
    result = apply_rewrites(graph, [Back()], ctx, "p")
    assert (result.modified, result.stats, ctx.remarks) == (False, {}, [])


def test_names_and_locations_are_handed_on() -> None:
    graph = parse_graph(NEGS)
    graph.ops[1].loc = Location("m", "f.py:1: x")
    apply_rewrites(graph, [To()], PassContext(), "p")
    assert [op.results[0].name for op in graph.ops[:-1]] == ["a", "b", "c", "d"]
    assert graph.ops[1].loc == Location("m", "f.py:1: x")


def test_a_refusal_is_told_once_with_its_op_and_reason() -> None:
    graph, ctx = parse_graph(NEGS), PassContext()
    assert not apply_rewrites(graph, [Never()], ctx, "p").modified
    assert [str(r) for r in ctx.remarks] == ["missed: p: never: it is never right"] * 4
    assert "%d = torch.call @aten.neg.default" in ctx.remarks[3].op_text


def test_a_refusal_is_forgotten_when_the_op_goes() -> None:
    graph, ctx = parse_graph(NEGS), PassContext()
    apply_rewrites(graph, [Never(), DoubleNeg()], ctx, "p")
    assert {r.kind for r in ctx.remarks} == {"applied"}


def test_earlier_rewrites_come_first() -> None:
    graph = parse_graph(NEGS)
    assert apply_rewrites(graph, [To(), DoubleNeg()], PassContext(), "p").stats == {"to-relu": 4}


def test_rewrites_that_undo_each_other_are_stopped() -> None:
    with pytest.raises(MoecError, match=r"pass 'p': rewrites do not come to rest.*the last was 'to-") as info:
        apply_rewrites(parse_graph(NEGS), [To(), Back()], PassContext(), "p", remark_applied=False)
    assert "to-relu, to-neg" in str(info.value)


@pytest.mark.parametrize("fuel", [0, 1, 3])
def test_fuel_stops_after_so_many(fuel: int) -> None:
    graph, ctx = parse_graph(NEGS), PassContext(fuel=Fuel(fuel))
    result = apply_rewrites(graph, [To()], ctx, "p")
    assert targets(graph) == ["relu"] * fuel + ["neg"] * (4 - fuel)
    assert result.modified == (fuel > 0)
    assert ctx.fuel.spent == fuel
    if fuel:
        assert ctx.fuel.last is not None
        assert ctx.fuel.last[:2] == ("p", "to-relu")
        assert f"%{'abcd'[fuel - 1]} =" in ctx.fuel.last[2]


REGION = """graph @r(%x: f32[T, 4]) -> f32[T, 4] {
  %a = moe.activation [%x] {layout = "single"} {
    (%h: f32[R, 4]) -> f32[R, 4] {
      %u = torch.call @aten.neg.default(%h) : f32[R, 4]
      return %u
    }
  } : f32[T, 4]
  return %a
}"""


def test_nested_graphs_are_rewritten_unless_asked_not_to() -> None:
    graph = parse_graph(REGION)
    assert not apply_rewrites(graph, [To()], PassContext(), "p", recursive=False).modified
    assert apply_rewrites(graph, [To()], PassContext(), "p").modified
    assert targets(graph) == ["relu"]
    verify(graph)


class DropActivation(Rewrite[Op]):
    """Erases the op whose region the engine still has on its list."""

    name = "drop"

    def pattern(self, op: Op) -> Op | None:
        return op if op.name == "moe.activation" else None

    def rewrite(self, match: Op, rewriter: Rewriter) -> None:
        rewriter.replace(match, match.operands)


def test_ops_of_an_erased_region_are_not_visited() -> None:
    result = apply_rewrites(parse_graph(REGION), [DropActivation(), To()], PassContext(), "p")
    assert result.stats == {"drop": 1}


def test_the_rewriter_refuses_misuse() -> None:
    graph = parse_graph(NEGS)
    rewriter = Rewriter(graph.ops[1])
    with pytest.raises(MoecError, match="has 1 results, 2 values were given"):
        rewriter.replace(graph.ops[1], [graph.args[0]] * 2)
    with pytest.raises(MoecError, match="result types cannot be inferred"):
        rewriter.op("torch.call", [], attrs={"target": "aten.neg.default"})
    with pytest.raises(MoecError, match="is used by"):
        rewriter.erase(graph.ops[0])
    rewriter.replace(graph.ops[1], [graph.args[0]])
    with pytest.raises(MoecError, match="is gone"):
        _ = rewriter.graph
    assert graph.args[0].uses, "a failed inference leaves no use behind"
    verify(graph)


def test_the_rewriter_infers_types() -> None:
    graph = parse_graph("graph @d(%x: f32[T, 4], %ids: i64[T, 2]) -> f32[T, 4] {\n  return %x\n}")
    made = Rewriter(graph.terminator).op("moe.dispatch", graph.args, attrs={"experts": 3})
    assert str(made.results[0].type.shape[0]) == "2*T"  # type: ignore[attr-defined]
    assert graph.ops[0] is made
    verify(graph)


def test_set_attr_revisits_the_op() -> None:
    class Count(Rewrite[Op]):
        name = "count"

        def pattern(self, op: Op) -> Op | None:
            return op if is_call(op, "aten.neg.default") and len(op.attrs.get("kwargs", {})) < 3 else None

        def rewrite(self, match: Op, rewriter: Rewriter) -> None:
            n = len(match.attrs.get("kwargs", {}))
            rewriter.set_attr(match, "kwargs", {f"k{i}": i for i in range(n + 1)})

    assert apply_rewrites(parse_graph(NEGS), [Count()], PassContext(), "p").stats == {"count": 12}


def test_values_in_arguments_become_operands() -> None:
    graph = parse_graph(NEGS)
    x = graph.args[0]
    op = call_op("aten.cat.default", ([x, x],), {"dim": 1}, [TensorType.of("f32", "T", 8)])
    assert op.operands == (x, x)
    assert op.attrs["args"] == (ListAttr((Operand(0), Operand(1))),)
    assert call_args(op) == ((ListAttr((x, x)),), {"dim": 1})
    assert bound_args(op) == {"tensors": ListAttr((x, x)), "dim": 1}
    assert packet(op) == "aten.cat"
    op.drop_operands()


def test_bound_arguments_have_their_defaults() -> None:
    graph = parse_graph(
        "graph @s(%x: f32[T, 4]) -> f32[T, 2] {\n  %a = torch.call @aten.slice.Tensor(%x, 1, end = 2) : f32[T, 2]\n"
        "  return %a\n}"
    )
    assert bound_args(graph.ops[0]) == {"self": graph.args[0], "dim": 1, "start": None, "end": 2, "step": 1}
