"""parse∘print is the identity, and print∘parse∘print is print."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moec.ir.attributes import Operand
from moec.ir.compare import structurally_equal
from moec.ir.core import Graph, Op
from moec.ir.errors import IRError
from moec.ir.lexer import MAX_NESTING, Lexer
from moec.ir.parse_atoms import parse_attr, parse_type
from moec.ir.parser import parse, parse_graph
from moec.ir.printer import print_attr, print_graph, print_op, print_type
from moec.ir.types import DTYPES, SymType, TensorType, Type
from moec.ir.verifier import verify
from tests.ir.strategies import ATTRS, TYPES, graphs

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def reread_type(text: str) -> Type:
    lx = Lexer(text)
    found = parse_type(lx)
    assert lx.kind == "", "something is left over"
    return found


def reread_attr(text: str) -> Any:
    lx = Lexer(text)
    found = parse_attr(lx)
    assert lx.kind == "", "something is left over"
    return found


@QUICK
@given(TYPES)
def test_types(t: Type) -> None:
    assert print_type(reread_type(print_type(t))) == print_type(t)


@QUICK
@given(ATTRS)
def test_attributes(value: Any) -> None:
    text = print_attr(value)
    again = reread_attr(text)
    assert print_attr(again) == text
    assert type(again) is type(value) or isinstance(value, (Type, sympy.Basic))


@settings(QUICK, max_examples=200)
@given(graphs())
def test_graphs(graph: Graph) -> None:
    verify(graph)
    text = print_graph(graph)
    again = parse_graph(text)
    assert structurally_equal(graph, again) is None
    assert structurally_equal(again, graph) is None
    assert print_graph(again) == text
    verify(again)


@settings(QUICK, max_examples=40)
@given(st.lists(graphs(depth=1), min_size=2, max_size=3, unique_by=lambda g: g.name))
def test_files_of_several_graphs(several: list[Graph]) -> None:
    again = parse("".join(print_graph(g) for g in several))
    assert [structurally_equal(a, b) for a, b in zip(several, again, strict=True)] == [None] * len(several)


@settings(QUICK, max_examples=40)
@given(graphs())
def test_clones(graph: Graph) -> None:
    copy = graph.clone()
    verify(copy)
    assert structurally_equal(graph, copy) is None


@pytest.mark.parametrize(
    ("t", "text"),
    [
        (TensorType.of("f32"), "f32[]"),
        (TensorType.of("bf16", "T", 4, device="cuda:0"), "bf16[T, 4]@cuda:0"),
        (SymType("int", sympy.Symbol("s0", integer=True) * 4), "sym_int<4*s0>"),
        (SymType("bool", sympy.Symbol("s0", integer=True) < 4), "sym_bool<s0 < 4>"),
        (SymType("bool", sympy.Symbol("s0", integer=True) >= 4), "sym_bool<4 <= s0>"),
    ],
)
def test_text_of_types(t: Type, text: str) -> None:
    assert print_type(t) == text
    assert reread_type(text) == t or "<=" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"), (1, "1"), (1.0, "1.0"), (-0.0, "-0.0"), (float("nan"), "nan"), (float("-inf"), "-inf"),
        (0.1 + 0.2, "0.30000000000000004"), (5e-324, "5e-324"), ("a\"b\\\n\0\ud800é", '"a\\"b\\\\\\n\\x00\\ud800é"'),
        ((), "()"), ((1,), "(1,)"), (DTYPES["f32"], "f32"), (TensorType.of("f32"), "f32[]"), (Operand(3), "$3"),
        ({"a": 1, "b c": None}, '{a = 1, "b c" = None}'),
    ],
)  # fmt: skip
def test_text_of_attributes(value: Any, text: str) -> None:
    assert print_attr(value) == text
    assert print_attr(reread_attr(text)) == text


def test_names_are_kept_made_plain_and_made_unique() -> None:
    graph = Graph()
    for name in ("x", "x", "a.b", "", "0", "", "x_1"):
        graph.add_arg(TensorType.of("f32"), name)
    graph.append(Op("return"))
    head = print_graph(graph).split("\n")[0]
    assert head.startswith("graph @main(%x: f32[], %x_1: f32[], %a_b: f32[], %0: f32[], %0_1: f32[], %1: f32[], %x_1_1")


def test_nested_text_does_not_depend_on_what_surrounds_it() -> None:
    text = print_graph(parse_graph(
        "graph @g(%x: f32[T, 8]) { %x_1 = moe.activation [%x] {layout = \"single\"} { (%x: f32[R, 8]) { return %x } }"
        " : f32[T, 8] return %x_1 }"
    ))  # fmt: skip
    assert "(%x: f32[R, 8]) -> f32[R, 8] {\n      return %x\n" in text


def test_operand_groups_in_text() -> None:
    body = "return %w }"
    for call in ("moe.route %l {k = 2}", "moe.route %l, bias = %b {k = 2}", "moe.route %l, [%b, %b] {k = 2}",
                 "moe.route %l, bias = %b, [%b] {k = 2}"):  # fmt: skip
        g = parse_graph(f"graph @g(%l: f32[T, 8], %b: f32[8]) {{ %w, %i = {call} : f32[T, 2], i64[T, 2] {body}")
        assert call in print_op(g.ops[0])
    g = parse_graph(
        "graph @g(%x: f32[2, 4], %p: !moe.plan<0>) { %y = moe.grouped_gemm %x, [], %p, [%x] : f32[2, 4] return }"
    )
    assert g.ops[0].groups == (1, 0, 1, 1, 0)
    assert print_op(g.ops[0]).startswith("%y = moe.grouped_gemm %x, [], %p, [%x_1]".replace("%x_1", "%x"))


def test_comments_and_space_do_not_count() -> None:
    loose = "// head\ngraph  @g ( %x : f32[ T // 2 ,\n 4 ] )->f32[T//2,4]{ // body\n return %x // end\n}//eof"
    tight = "graph @g(%x: f32[T//2, 4]) -> f32[T//2, 4] { return %x }"
    assert structurally_equal(parse_graph(loose), parse_graph(tight)) is None


def test_too_deep_to_print() -> None:
    deep: Any = 1
    for _ in range(MAX_NESTING + 2):
        deep = (deep,)
    with pytest.raises(IRError, match="nested more than"):
        print_attr(deep)


@pytest.mark.parametrize("value", [object(), 1j, {1: 2}, 10**2000])
def test_what_is_no_attribute(value: Any) -> None:
    with pytest.raises(IRError):
        print_attr(value)


def test_differences_are_found() -> None:
    text = (
        "graph @g(%x: f32[T, 8], %y: f32[T, 8]) -> f32[T, 8] {\n"
        "  %a = torch.call @aten.add.Tensor(%x, %y, alpha = 2) : f32[T, 8]\n"
        '  %b = moe.activation [%a] {layout = "single"} {\n    (%h: f32[R, 8]) -> f32[R, 8] {\n      return %h\n    }\n'
        "  } : f32[T, 8]\n  return %b\n}\n"
    )
    for old, new, word in [
        ("@g", "@h", "called"), ("alpha = 2", "alpha = 2.0", "kwargs"), ("(%x, %y, a", "(%y, %x, a", "operand 0"),
        ("add", "sub", "target"), ("R, 8", "R, 9", "argument 0"), ("return %b", "return %a", "returns|operand"),
        (" : f32[T, 8]\n  %b", " : f32[T, 9]\n  %b", "result 0"), ('"single"', '"rows"', "layout"),
        ("return %b", "%c = torch.call @z() : none\n  return %b", "torch.call"),
        ("%y: f32[T, 8]", "%y: f64[T, 8]", "argument 1"),
    ]:  # fmt: skip
        assert old in text
        difference = structurally_equal(parse_graph(text), parse_graph(text.replace(old, new)))
        assert difference is not None, (old, new)
        assert any(w in difference for w in word.split("|")), difference
    assert structurally_equal(parse_graph(text), parse_graph(text.replace("%a", "%other"))) is None
