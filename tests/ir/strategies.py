"""Hypothesis strategies for dimensions, types, attributes and whole graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
from hypothesis import strategies as st
from torch.utils._sympy import functions as tf

from moec.ir.attributes import ListAttr, Literal, Operand, Region
from moec.ir.core import Graph, Op, Value
from moec.ir.types import (
    DTYPES,
    NoneType,
    OpaqueType,
    PlanType,
    SymType,
    TensorType,
    TokenType,
    Type,
)

# Torch's own symbols are positive; the parser's are only integers. Both must print and compare alike.
SYMBOLS = [sympy.Symbol(n, integer=True, positive=True) for n in ("s0", "s77", "T")] + [
    sympy.Symbol("u0", integer=True)
]
TEXT = st.text(max_size=8)  # any character, lone surrogates excepted; they are added where they matter
WILD_TEXT = st.one_of(
    TEXT, st.text(st.characters(), max_size=4), st.sampled_from(["\ud800", "\0", '"', "\\", "é\n", ""])
)
NAMES = st.one_of(st.sampled_from(["x", "x_1", "0", "", "a b", "%", "self", "f32", "return"]), TEXT)


def _binary(fn: Callable[[Any, Any], Any]) -> Callable[[tuple[Any, Any]], Any]:
    return lambda pair: fn(*pair)


def _grow(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
    pairs = st.tuples(inner, inner)
    by_number = st.tuples(inner, st.integers(2, 9).map(sympy.Integer))
    return st.one_of(
        pairs.map(_binary(lambda a, b: a + b)),
        pairs.map(_binary(lambda a, b: a - b)),
        pairs.map(_binary(lambda a, b: a * b)),
        pairs.map(_binary(tf.Max)),
        pairs.map(_binary(tf.Min)),
        by_number.map(_binary(tf.FloorDiv)),
        by_number.map(_binary(tf.PythonMod)),
        st.tuples(st.sampled_from(SYMBOLS[:3]), st.integers(2, 9).map(sympy.Integer)).map(_binary(tf.Mod)),
        by_number.map(_binary(tf.CleanDiv)),
        by_number.map(_binary(tf.IntTrueDiv)).map(tf.CeilToInt),
        by_number.map(_binary(lambda a, n: tf.ModularIndexing(a, sympy.Integer(2), n))),
        inner.map(lambda a: a**2),
    )


LEAVES = st.one_of(st.sampled_from(SYMBOLS), st.integers(0, 5000).map(sympy.Integer))
DIMS: st.SearchStrategy[sympy.Expr] = st.recursive(LEAVES, _grow, max_leaves=4)
RELATIONS = st.tuples(
    st.sampled_from([sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne]),
    st.sampled_from(SYMBOLS[:2]),
    st.integers(5, 99).map(sympy.Integer),
).map(lambda t: t[0](t[1], t[2]))

DTYPE = st.sampled_from(list(DTYPES.values()))
DEVICES = st.sampled_from(["cpu", "cuda:0", "cuda", "meta", "npu:12", "my device:x", "cuda:00"])
SIMPLE_TENSORS = st.builds(lambda d, s: TensorType(d, tuple(s)), DTYPE, st.lists(LEAVES, max_size=3))
TENSORS = st.builds(TensorType, DTYPE, st.lists(DIMS, max_size=3).map(tuple), DEVICES)
TYPES: st.SearchStrategy[Type] = st.one_of(
    TENSORS,
    DIMS.map(lambda e: SymType("int", e)),
    st.sampled_from(["zf0", "zf1"]).map(lambda n: SymType("float", 1.5 * sympy.Symbol(n, real=True))),
    RELATIONS.map(lambda e: SymType("bool", e)),
    st.integers(0, 512).map(PlanType),
    st.just(TokenType()),
    st.just(NoneType()),
    WILD_TEXT.map(OpaqueType),
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([float("inf"), float("-inf"), float("nan"), -0.0, 1e-320, 0.1, 1e22]),
    WILD_TEXT,
    DTYPE,
    TYPES,
    DIMS,
    WILD_TEXT.map(lambda t: Literal("device", t)),
    st.sampled_from([Literal("layout", "strided"), Literal("memory_format", "contiguous_format")]),
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(inner, max_size=3)
    return st.one_of(
        items.map(tuple), items.map(lambda v: ListAttr(tuple(v))), st.dictionaries(NAMES, inner, max_size=2)
    )


ATTRS = st.recursive(SCALARS, _containers, max_leaves=5)


@st.composite
def templates(draw: st.DrawFn, count: int, shuffled: bool, regions: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) that name ``count`` operands and ``regions`` nested graphs, in order or not."""
    places: list[Any] = [Operand(i) for i in (draw(st.permutations(range(count))) if shuffled else range(count))]
    for i in range(regions):
        places.insert(draw(st.integers(0, len(places))), Region(i))
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for place in places:
        match draw(st.integers(0, 4)):
            case 0:
                args.append(draw(SCALARS))
                args.append(place)
            case 1:
                args.append(ListAttr((place, None)))
            case 2:
                args.append((place,))
            case _:
                args.append(place)
    if draw(st.booleans()):
        kwargs = draw(st.dictionaries(NAMES, SCALARS, max_size=2))
    return tuple(args), kwargs


@st.composite
def graphs(draw: st.DrawFn, depth: int = 2, name: str | None = None) -> Graph:
    """A valid graph of calls, dispatches and activations, with nested graphs up to ``depth``."""
    graph = Graph(name if name is not None else draw(st.one_of(st.just("main"), st.just("a.b.c"), WILD_TEXT)))
    if draw(st.integers(0, 4)) == 0:
        graph.attrs = draw(st.dictionaries(NAMES, ATTRS, max_size=2))
    for t in draw(st.lists(TYPES, max_size=2)):
        graph.add_arg(t, draw(NAMES))
    tokens, experts = draw(st.sampled_from(SYMBOLS)), draw(st.integers(1, 9))
    x = graph.add_arg(TensorType.of("bf16", tokens, 8), draw(NAMES))
    ids = graph.add_arg(TensorType.of("i64", tokens, 2), draw(NAMES))
    values: list[Value] = list(graph.args)
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["call", "call", "dispatch", "activation", "hop"]))
        if kind == "dispatch":
            types = [TensorType.of("bf16", tokens * 2, 8), PlanType(experts)]
            op = Op("moe.dispatch", [x, ids], types, attrs={"experts": experts, "sentinels": draw(st.booleans())})
        elif kind == "activation":
            op = _activation(draw, x, values, depth)
        else:
            op = _call(draw, values, depth if kind == "hop" else 0)
        for r in op.results:
            r.name = draw(NAMES)
        values += graph.append(op).results
    outputs = draw(st.lists(st.sampled_from(values), max_size=3))
    attrs = {}
    if draw(st.booleans()):
        args, kwargs = draw(templates(len(outputs), draw(st.booleans()), 0))
        attrs = {"template": (args, kwargs)}
    graph.append(Op("return", outputs, attrs=attrs))
    return graph


def _activation(draw: st.DrawFn, x: Value, values: list[Value], depth: int) -> Op:
    captures = draw(st.lists(st.sampled_from(values), max_size=2))
    body = Graph(draw(st.sampled_from(["main", "activation", "a b"])))
    args = [body.add_arg(TensorType.of("bf16", "R", 8), draw(NAMES))]
    args += [body.add_arg(c.type, draw(NAMES)) for c in captures]
    body.append(Op("return", [draw(st.sampled_from(args))]))
    groups = (1, len(captures))
    return Op("moe.activation", [x, *captures], [x.type], attrs={"layout": "single"}, regions=[body], groups=groups)


def _call(draw: st.DrawFn, values: list[Value], depth: int) -> Op:
    operands = draw(st.lists(st.sampled_from(values), max_size=3))
    regions = [draw(graphs(depth - 1, "main")) for _ in range(draw(st.integers(1, 2)))] if depth else []
    args, kwargs = draw(templates(len(operands), draw(st.integers(0, 5)) == 0, len(regions)))
    target = draw(st.sampled_from(["aten.add.Tensor", "py._operator.mul", "hop.cond", "my ns.weird-op", "é"]))
    attrs: dict[str, Any] = {"target": target, "args": args}
    if kwargs:
        attrs["kwargs"] = kwargs
    return Op("torch.call", operands, draw(st.lists(TYPES, max_size=2)), attrs=attrs, regions=regions)
