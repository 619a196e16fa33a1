"""One broken graph for every rule of the verifier; and what its messages show."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from moec.ir.attributes import Operand, Region
from moec.ir.core import Graph, Location, Op, Value
from moec.ir.errors import VerifyError
from moec.ir.opdef import OP_DEFS, OpDef, register_op
from moec.ir.parser import parse_graph
from moec.ir.types import PlanType, TensorType
from moec.ir.verifier import same_dim, verify

TEXT = """graph @block(%x: bf16[T, 8], %ids: i64[T, 2], %w: bf16[T, 2], %w13: bf16[4, 6, 8], %w2: bf16[4, 8, 3]) {
  %rows, %plan = moe.dispatch %x, %ids {experts = 4} : bf16[2*T, 8], !moe.plan<4>
  %h = moe.grouped_gemm %rows, [%w13], %plan : bf16[2*T, 6]
  %a = moe.activation [%h] {
    (%g: bf16[R, 3], %u: bf16[R, 3]) {
      %m = torch.call @aten.mul.Tensor(%g, %u) : bf16[R, 3]
      return %m
    }
  } : bf16[2*T, 3]
  %o = moe.grouped_gemm %a, [%w2], %plan : bf16[2*T, 8]
  %y = moe.combine %o, %w, %plan : bf16[T, 8]
  return %y
}
"""
F32 = TensorType.of("f32")


def use_before_definition(g: Graph) -> None:
    g.ops[0], g.ops[1] = g.ops[1], g.ops[0]


def foreign_value(g: Graph) -> None:
    body = g.ops[2].regions[0]
    body.ops[0].set_operand(0, g.args[0])


def own_result(g: Graph) -> None:
    g.ops[1].set_operand(0, g.ops[1].result)


def erased_maker(g: Graph) -> None:
    g.ops.pop(2)


def lost_use(g: Graph) -> None:
    g.args[0].uses.clear()


def extra_use(g: Graph) -> None:
    g.args[0].uses.append((Op("return"), 0))


def stray_use(g: Graph) -> None:
    Op("moe.activation", [g.args[0]])


def wrong_index(g: Graph) -> None:
    g.args[0].index = 3


def wrong_owner(g: Graph) -> None:
    g.ops[0].results[0].owner = g.ops[1]


def no_type(g: Graph) -> None:
    g.args[4].type = "f32"  # type: ignore[assignment]


def twice(g: Graph) -> None:
    g.ops.insert(1, g.ops[0])


def wrong_parent(g: Graph) -> None:
    g.ops[0].parent = Graph("other")


def argument_twice(g: Graph) -> None:
    g.args.append(g.args[0])


def no_return(g: Graph) -> None:
    g.ops[-1].erase()


def empty(g: Graph) -> None:
    g.erase_many(g.ops)


def early_return(g: Graph) -> None:
    g.insert(0, Op("return"))


def unknown_op(g: Graph) -> None:
    g.ops[0].name = "moe.dispach"


def group_sum(g: Graph) -> None:
    g.ops[0].groups = (1, 2)


def group_count(g: Graph) -> None:
    g.ops[1].groups = (1, 1, 1)


def group_one(g: Graph) -> None:
    g.ops[0].groups = (2, 0)


def group_optional(g: Graph) -> None:
    route = Op("moe.route", [g.args[0]] * 3, [F32, F32], attrs={"k": 1}, groups=(1, 2, 0))
    g.insert(0, route)


def missing_attribute(g: Graph) -> None:
    del g.ops[0].attrs["experts"]


def unknown_attribute(g: Graph) -> None:
    g.ops[0].attrs["sentinel"] = True


def attribute_kind(g: Graph) -> None:
    g.ops[0].attrs["experts"] = "4"


def attribute_bool(g: Graph) -> None:
    g.ops[0].attrs["experts"] = True


def attribute_choice(g: Graph) -> None:
    g.ops[1].attrs["form"] = "mn"


def attribute_text(g: Graph) -> None:
    call = g.ops[2].regions[0].ops[0]
    call.attrs["args"] = (Operand(0), Operand(1), object())


def region_missing(g: Graph) -> None:
    g.ops[2].regions.clear()


def region_excess(g: Graph) -> None:
    g.ops[0].regions.append(Graph())


def region_parent(g: Graph) -> None:
    g.ops[2].regions[0].parent_op = None


def region_arguments(g: Graph) -> None:
    g.ops[2].regions[0].add_arg(F32)


def result_count(g: Graph) -> None:
    g.ops[1].results.append(Value(F32, g.ops[1], 1))


def result_type(g: Graph) -> None:
    g.ops[0].results[1].type = PlanType(5)


def result_shape(g: Graph) -> None:
    g.ops[1].result.type = TensorType.of("bf16", 2, 6)


def own_check(g: Graph) -> None:
    g.ops[1].attrs["form"] = "kn"


def bias_count(g: Graph) -> None:
    text = TEXT.replace("[%w13], %plan", "[%w13], %plan, [%w, %w]")
    g.args, g.ops = (broken := parse_graph(text)).args, broken.ops
    for v in [*g.args, *g.ops]:
        setattr(v, "owner" if isinstance(v, Value) else "parent", g)


def rows_rank(g: Graph) -> None:
    g.ops[1].set_operand(0, g.args[3])


def template_range(g: Graph) -> None:
    g.ops[2].regions[0].ops[0].attrs["args"] = (Operand(0), Operand(1), Operand(2))


def template_region(g: Graph) -> None:
    g.ops[2].regions[0].ops[0].attrs["args"] = (Operand(0), Operand(1), Region(0))


def template_unused(g: Graph) -> None:
    g.ops[2].regions[0].ops[0].attrs["args"] = (Operand(0),)


def template_kind(g: Graph) -> None:
    g.ops[2].regions[0].ops[0].attrs["kwargs"] = ()


def return_template(g: Graph) -> None:
    g.ops[-1].attrs["template"] = (Operand(0), Operand(1))


def graph_attribute(g: Graph) -> None:
    g.attrs["x"] = object()


def deep(g: Graph) -> None:
    outer = g
    for _ in range(60):
        body = Graph()
        outer.insert(0, Op("torch.call", attrs={"target": "hop.cond"}, regions=[body]))
        body.append(Op("return"))
        outer = body


BREAKERS: list[tuple[Callable[[Graph], None], str]] = [
    (use_before_definition, "%rows is used before its definition"),
    (foreign_value, "which belongs to graph @block"),
    (own_result, "moe.grouped_gemm uses its own result %h"),
    (erased_maker, "uses %a, which belongs to"),
    (lost_use, "the use list of %x holds not all of its uses"),
    (extra_use, "the use list of %x holds a use by return that is not in the graph"),
    (stray_use, "the use list of %x holds a use by moe.activation that is not in the graph"),
    (wrong_index, "%x does not know its owner or its place (0)"),
    (wrong_owner, "%rows does not know its owner or its place (0)"),
    (no_type, "%w2 has no IR type but a str"),
    (twice, "moe.dispatch stands in the graph twice"),
    (wrong_parent, "moe.dispatch says that it belongs to another graph"),
    (argument_twice, "argument 5 (%x) is listed twice"),
    (no_return, "does not end in return"),
    (empty, "does not end in return"),
    (early_return, "return stands before the end"),
    (unknown_op, "unknown op 'moe.dispach'; did you mean 'moe.dispatch'"),
    (group_sum, "operand groups (1, 2) do not add up to 2 operands"),
    (group_count, "has 3 operand groups, its definition 5 (rows, weights, plan, bias, scales)"),
    (group_one, "moe.dispatch takes one 'x', not 2"),
    (group_optional, "moe.route takes at most one 'bias', not 2"),
    (missing_attribute, "missing its attribute 'experts' (number of experts E)"),
    (unknown_attribute, "no attribute 'sentinel'; did you mean 'sentinels'"),
    (attribute_kind, "attribute 'experts' must be a int, not str"),
    (attribute_bool, "attribute 'experts' must be a int, not bool"),
    (attribute_choice, "attribute 'form' cannot be 'mn'; did you mean"),
    (attribute_text, "is not an attribute value"),
    (region_missing, "moe.activation has 0 nested graphs, its definition 1"),
    (region_excess, "moe.dispatch has 1 nested graphs, its definition 0"),
    (region_parent, "nested graph @main says that it belongs to another op"),
    (region_arguments, "the region takes 3 arguments, layout and captures give 2"),
    (result_count, "has 2 results, its definition 1 (result)"),
    (result_type, "result %plan is !moe.plan<5>, its operands make it !moe.plan<4>"),
    (result_shape, "result %h is bf16[2, 6], its operands make it bf16[2*T, 6]"),
    (own_check, "weight %w13 reduces over 6, the rows are 8 wide"),
    (bias_count, "2 biases do not fit 1 weights"),
    (rows_rank, "rows must be a matrix [R, K]"),
    (template_range, "the template names operand 2, there are 2"),
    (template_region, "the template names region 0, there are 0"),
    (template_unused, "operand 1 has no place in the template"),
    (template_kind, "args must be a tuple and kwargs a dictionary"),
    (return_template, "the template names operand 1, there are 1"),
    (graph_attribute, "is not an attribute value"),
    (deep, "graphs are nested more than 48 deep"),
]


@pytest.mark.parametrize(("break_it", "message"), BREAKERS, ids=[b.__name__ for b, _ in BREAKERS])
def test_rule(break_it: Callable[[Graph], None], message: str) -> None:
    graph = parse_graph(TEXT)
    verify(graph)
    break_it(graph)
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    assert message in str(caught.value)
    assert "graph @" in caught.value.message


def test_message_shows_the_op_its_graph_and_the_users_line() -> None:
    graph = parse_graph(TEXT)
    own_check(graph)
    graph.ops[1].loc = Location(module="layers.0", source="model.py:12: y = experts(x)")
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("graph @block: moe.grouped_gemm: weight %w13")
    mark = next(i for i, line in enumerate(lines) if "^" in line)
    column = lines[mark].index("^")
    assert lines[mark].strip() == "^" * len("moe.grouped_gemm")
    assert lines[mark - 1][column:].startswith("moe.grouped_gemm %rows, [%w13]")
    assert lines[1].strip().startswith("graph @block(")
    assert lines[-1] == "  source: model.py:12: y = experts(x)"


def test_message_of_a_nested_graph() -> None:
    graph = parse_graph(TEXT)
    template_unused(graph)
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    text = str(caught.value)
    assert text.startswith("graph @main (nested in moe.activation): torch.call: operand 1")
    assert "torch.call" in text.split("^")[0].splitlines()[-2]


@pytest.fixture
def crashing_op() -> Iterator[str]:
    @register_op
    class Crash(OpDef):
        """Stands for a third-party definition with a bug."""

        name = "test.crash"
        results = ()

        def verify(self, op: Op) -> None:
            raise ZeroDivisionError("oops")

    yield "test.crash"
    del OP_DEFS["test.crash"]


def test_a_definition_that_crashes_is_an_error_of_its_op(crashing_op: str) -> None:
    graph = Graph()
    graph.append(Op(crashing_op))
    graph.append(Op("return"))
    with pytest.raises(VerifyError, match="definition's check failed: ZeroDivisionError: oops"):
        verify(graph)


def test_dimensions_may_differ_in_form() -> None:
    a, b = (parse_graph(f"graph @g(%x: f32[{d}]) {{ return }}").args[0].type for d in ("(a + b)*c", "b*c + c*a"))
    assert isinstance(a, TensorType)
    assert isinstance(b, TensorType)
    assert same_dim(a.shape[0], b.shape[0])
    assert not same_dim(a.shape[0], b.shape[0] + 1)
