"""Small graphs, one awkward feature each, there and back."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from moec.capture import graph_from_fx
from moec.emit import graph_to_fx
from moec.ir.attributes import ListAttr, Literal, Operand
from moec.ir.parser import parse_graph
from moec.ir.printer import print_graph
from moec.ir.types import DTYPES, SymType, TensorType, as_dim
from tests.capture.same import assert_same

aten = torch.ops.aten


def round_trip(gm: torch.fx.GraphModule) -> Any:
    """The IR of ``gm``, after checking that it comes back the same and that its text reads back."""
    graph = graph_from_fx(gm)
    assert_same(gm, graph_to_fx(graph))
    text = print_graph(graph)
    assert print_graph(parse_graph(text)) == text
    return graph


def by_hand(build: Callable[[torch.fx.Graph], Any], root: torch.nn.Module | None = None) -> torch.fx.GraphModule:
    fx_graph = torch.fx.Graph()
    fx_graph.output(build(fx_graph))
    return torch.fx.GraphModule(root or torch.nn.Module(), fx_graph)


def targets(graph: Any) -> list[str]:
    return [op.attrs.get("target", op.name) for op in graph.ops]


def test_types_and_symbols() -> None:
    gm = make_fx(lambda x, w: (x @ w).softmax(-1, torch.float32), pre_dispatch=True, tracing_mode="symbolic")(
        torch.randn(5, 8, dtype=torch.bfloat16), torch.randn(8, 6, dtype=torch.bfloat16)
    )
    graph = round_trip(gm)
    x, w = (a.type for a in graph.args)
    assert isinstance(x, TensorType)
    assert isinstance(w, TensorType)
    assert x.dtype is DTYPES["bf16"]
    assert x.shape[1] == w.shape[0]  # one symbol
    out = graph.outputs[0].type
    assert out == TensorType(DTYPES["f32"], (x.shape[0], w.shape[1]))
    assert x.shape[0] == as_dim(str(x.shape[0]))  # the IR's own symbol, not the ShapeEnv's


def test_symbolic_arithmetic() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.new_ones(x.shape[0] * 2 + 1, x.shape[1] // 2)

    graph = round_trip(make_fx(f, pre_dispatch=True, tracing_mode="symbolic")(torch.randn(5, 8)))
    calls = targets(graph)
    assert "py._operator.mul" in calls
    assert "py._operator.floordiv" in calls
    size = next(op for op in graph.ops if op.attrs.get("target") == "py._operator.add")
    assert isinstance(size.result.type, SymType)
    out = graph.outputs[0].type
    assert isinstance(out, TensorType)
    assert out.shape[0] == size.result.type.expr


def test_tuple_results_are_values() -> None:
    def f(x: torch.Tensor) -> Any:
        a, b = x.chunk(2, -1)
        v, _ = a.topk(2)
        return v, b, x.unbind(0)[0], x.split([5], 0)[0], x.max()

    graph = round_trip(make_fx(f, pre_dispatch=True)(torch.randn(5, 8)))
    assert "py._operator.getitem" not in targets(graph)
    counts = {op.attrs["target"]: len(op.results) for op in graph.ops if op.name == "torch.call"}
    assert counts["aten.chunk.default"] == 2
    assert counts["aten.topk.default"] == 2
    assert counts["aten.unbind.int"] == 5
    assert counts["aten.split_with_sizes.default"] == 1
    assert counts["aten.max.default"] == 1


@pytest.mark.parametrize("with_values", [True, False])
def test_tuple_used_as_a_whole(with_values: bool) -> None:
    def build(g: torch.fx.Graph) -> Any:
        x = g.placeholder("x")
        parts = g.call_function(aten.chunk.default, (x, 2))
        if with_values:
            parts.meta["val"] = list(torch.randn(4, 2).chunk(2))
        first = g.call_function(operator.getitem, (parts, 0))
        again = g.call_function(operator.getitem, (parts, 0))
        return (g.call_function(aten.cat.default, (parts,)), first, again, parts)

    gm = by_hand(build)
    graph = round_trip(gm)
    x = torch.randn(4, 2)
    assert torch.equal(graph_to_fx(graph)(x)[0], x)


def test_getitem_twice_at_one_index() -> None:
    def build(g: torch.fx.Graph) -> Any:
        parts = g.call_function(aten.chunk.default, (g.placeholder("x"), 2))
        first = g.call_function(operator.getitem, (parts, 0))
        again = g.call_function(operator.getitem, (parts, 0))
        return (g.call_function(aten.mul.Tensor, (first, again)),)

    round_trip(by_hand(build))


def test_getitem_keeps_its_late_place() -> None:
    def build(g: torch.fx.Graph) -> Any:
        x = g.placeholder("x")
        parts = g.call_function(aten.topk.default, (x, 2))
        y = g.call_function(aten.relu.default, (x,))
        ids = g.call_function(operator.getitem, (parts, 1))
        z = g.call_function(aten.relu.default, (y,))
        v = g.call_function(operator.getitem, (parts, 0))
        return (v, ids, z)

    round_trip(by_hand(build))


OUTPUTS: list[Callable[[Any], Any]] = [
    lambda x: x,
    lambda x: (x,),
    lambda x: [x],
    lambda x: (),
    lambda x: None,
    lambda x: (None,),
    lambda x: (x, [x, None, 3, (2.5, "text")], {"key": x}, True),
    lambda x: 7,
]


@pytest.mark.parametrize("make", OUTPUTS)
def test_outputs(make: Callable[[Any], Any]) -> None:
    round_trip(by_hand(lambda g: make(g.placeholder("x"))))


class _Thing:
    """An argument of which nobody knows a text form. (fx puts its repr into the generated code.)"""

    def __repr__(self) -> str:
        return "thing"


ARGUMENTS = [
    None,
    True,
    -3,
    2**70,
    1.5,
    float("inf"),
    float("nan"),
    'a "quoted" \\ line\nnext ü',
    2 + 3j,
    torch.bfloat16,
    torch.quint8,
    torch.device("cpu"),
    torch.device("cuda", 1),
    torch.strided,
    torch.channels_last,
    torch.per_tensor_affine,
    Ellipsis,
    slice(None, 3, None),
    range(4),
    torch.Size([2, 3]),
    aten.relu.default,
    _Thing(),
    [None, 1],
    [],
    (),
    (None, [1, (2,)]),
    {"a": 1, "b": [None]},
    {1: "int keys"},
    {},
]


@pytest.mark.parametrize("arg", ARGUMENTS, ids=repr)
def test_arguments(arg: Any) -> None:
    def build(g: torch.fx.Graph) -> Any:
        x = g.placeholder("x")
        y = g.call_function(aten.add.Tensor, (x, arg), {"alpha": [x, arg]})
        return (g.call_function(aten.relu.default, (), {"self": y}), arg)

    round_trip(by_hand(build))


class Pair(NamedTuple):
    first: Any
    second: Any


def test_nodes_inside_odd_containers() -> None:
    def build(g: torch.fx.Graph) -> Any:
        x = g.placeholder("x")
        index = (slice(x, None, x), Ellipsis, {3: x}, Pair(x, 2))
        return g.call_function(operator.getitem, (x, index))

    graph = round_trip(by_hand(build))
    assert len(graph.ops[0].operands) == 5


def test_template_forms() -> None:
    gm = by_hand(lambda g: g.call_function(aten.cat.default, ([g.placeholder("x"), None], 0), {"d": torch.float32}))
    op = graph_from_fx(gm).ops[0]
    assert op.attrs["args"] == (ListAttr((Operand(0), None)), 0)
    assert op.attrs["kwargs"] == {"d": DTYPES["f32"]}
    opaque = graph_from_fx(by_hand(lambda g: g.call_function(aten.relu.default, (_Thing(),)))).ops[0]
    assert opaque.attrs["args"] == (Literal("opaque", "0: _Thing"),)


def test_constants_live_on_the_module() -> None:
    root = torch.nn.Module()
    root.sub = torch.nn.Linear(3, 2)
    root.table = torch.arange(3)  # type: ignore[assignment]
    root.thing = _Thing()  # type: ignore[assignment]

    def build(g: torch.fx.Graph) -> Any:
        weight, table = g.get_attr("sub.weight"), g.get_attr("table")
        g.get_attr("table")  # unused
        g.call_function(print, (g.get_attr("thing"),))
        return g.call_function(aten.add.Tensor, (weight, table))

    graph = round_trip(by_hand(build, root))
    emitted = graph_to_fx(graph)
    assert emitted.get_parameter("sub.weight") is root.sub.weight
    assert torch.equal(emitted(), root.sub.weight + root.table)


def test_symbolic_trace_with_modules_and_methods() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
            self.scale = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor, factor: float = 2.0) -> Any:
            y = self.inner(x).view(x.size(0), -1).relu_()
            return {"y": torch.nn.functional.gelu(y * self.scale, approximate="tanh"), "n": y.dim() * factor}

    gm = torch.fx.symbolic_trace(Block().eval())
    graph = round_trip(gm)
    assert all(op.name in ("torch.opaque", "torch.get_attr", "torch.call", "return") for op in graph.ops)
    x = torch.randn(2, 4)
    assert torch.equal(graph_to_fx(graph)(x)["y"], gm(x)["y"])


def test_effects_keep_their_order() -> None:
    def f(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache.copy_(x)
        torch._assert_async(x.sum() != 3, "sum")
        noise = torch.rand_like(x)
        cache.add_(noise)
        return cache.sum()

    gm = make_fx(f, pre_dispatch=True)(torch.randn(3), torch.zeros(3))
    graph = round_trip(gm)
    names = [t.split(".")[1] for t in targets(graph) if t.startswith("aten.")]
    effects = ("copy_", "_assert_async", "rand_like", "add_")
    assert [n for n in names if n in effects] == list(effects)


def test_values_can_be_given() -> None:
    gm = by_hand(lambda g: g.call_function(aten.relu.default, (g.placeholder("x"),)))
    x = torch.randn(2, 3)
    assert graph_from_fx(gm, values=[x]).args[0].type == TensorType.of("f32", 2, 3)
    relu = list(gm.graph.nodes)[1]
    assert graph_from_fx(gm, values={relu: x.half()}).outputs[0].type == TensorType.of("f16", 2, 3)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        graph_from_fx(gm, values=[x, x])


def test_a_call_that_gives_nothing() -> None:
    def build(g: torch.fx.Graph) -> Any:
        x = g.placeholder("x")
        unused = g.call_function(aten._assert_async.msg, (x, "no"))
        unused.meta["val"] = None
        used = g.call_function(aten._assert_async.msg, (x, "no"))
        used.meta["val"] = None
        return (x, used)

    graph = round_trip(by_hand(build))
    assert [len(op.results) for op in graph.ops[:2]] == [0, 1]


def test_clone_emits_the_same() -> None:
    gm = make_fx(lambda x: x.topk(2)[1] + 1, pre_dispatch=True)(torch.randn(4))
    assert_same(gm, graph_to_fx(graph_from_fx(gm).clone()))
