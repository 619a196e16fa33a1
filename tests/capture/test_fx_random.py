"""Random graphs, there and back: traced programs that run, and hand-made graphs with arbitrary arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from moec.capture import graph_from_fx
from moec.emit import graph_to_fx
from moec.ir.parser import parse_graph
from moec.ir.printer import print_graph
from tests.capture.same import assert_same

aten = torch.ops.aten
ROWS, COLUMNS = 6, 4
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=25, derandomize=True)

Tensors = list[torch.Tensor]
STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor], Tensors]] = {
    "mul": lambda a, b: [a * b],
    "chunk": lambda a, b: [t.repeat(1, 2) for t in a.chunk(2, -1)],
    "split_one": lambda a, b: [a.split([a.shape[0]], 0)[0]],
    "topk_ids": lambda a, b: [a.topk(2, -1).indices.to(a.dtype).repeat(1, 2)],
    "unused_parts": lambda a, b: (a.sort(-1), [b])[1],
    "max_all": lambda a, b: [a + b.max()],
    "unbind": lambda a, b: [torch.stack(list(a.unbind(1))[::-1], 1)],
    "index": lambda a, b: [a[torch.arange(a.shape[0]).flip(0)]],
    "write": lambda a, b: [a.clone().add_(b)],
    "write_slice": lambda a, b: (lambda c: (c[1:3].mul_(2), [c])[1])(b.clone()),
    "size": lambda a, b: [a * (a.shape[0] * 2 + b.shape[1]) / max(a.shape[1], 1)],
    "new": lambda a, b: [a + a.new_full((a.shape[0], 1), 0.5)],
    "half": lambda a, b: [(a.to(torch.bfloat16) @ b.T.to(torch.bfloat16) @ b.to(torch.bfloat16)).float()],
    "where": lambda a, b: [torch.where(a > b, a, 0.25)],
    "norm": lambda a, b: [torch.nn.functional.layer_norm(a, (a.shape[1],))],
    "softmax": lambda a, b: [torch.softmax(a, -1, dtype=torch.float64).to(a.dtype)],
    "no_grad": lambda a, b: [_without_grad(a)],
}


def _without_grad(a: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return a * 2


@QUIET
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 7), st.integers(0, 7)), max_size=8),
    outputs=st.lists(st.integers(0, 7), max_size=3),
    symbolic=st.booleans(),
)
def test_traced_programs(steps: list[tuple[str, int, int]], outputs: list[int], symbolic: bool) -> None:
    def program(x: torch.Tensor, y: torch.Tensor) -> Tensors:
        pool = [x, y]
        for name, i, j in steps:
            pool += STEPS[name](pool[i % len(pool)], pool[j % len(pool)])
        return [pool[-1 - i % len(pool)] for i in outputs]

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(ROWS, COLUMNS, generator=generator) for _ in range(2)]
    gm = make_fx(program, pre_dispatch=True, tracing_mode="symbolic" if symbolic else "real")(*inputs)
    graph = graph_from_fx(gm)
    assert_same(gm, graph_to_fx(graph))
    text = print_graph(graph)
    read = parse_graph(text)
    assert print_graph(read) == text
    want = gm(*(t.clone() for t in inputs))
    got = graph_to_fx(read, root=gm)(*(t.clone() for t in inputs))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from([torch.float32, torch.strided, torch.device("cpu"), torch.preserve_format, Ellipsis, 1j]),
    st.integers(0, 9).map(lambda i: ("node", i)),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(lambda items: ("tuple", items)),
        st.tuples(inner, inner, inner).map(lambda items: ("slice", items)),
        st.dictionaries(st.text("abc_", min_size=1, max_size=3), inner, max_size=2),
    ),
    max_leaves=6,
)
CALLS = [
    aten.add.Tensor,
    aten.split.Tensor,
    aten.topk.default,
    aten._assert_async.msg,
    math.floor,
    torch.sym_max,
    torch.nn.functional.silu,
    torch.ops.higher_order.cond,
]


def _resolve(tree: Any, nodes: list[torch.fx.Node]) -> Any:
    if isinstance(tree, list):
        return [_resolve(t, nodes) for t in tree]
    if isinstance(tree, dict):
        return {k: _resolve(v, nodes) for k, v in tree.items()}
    if isinstance(tree, tuple):
        kind, inside = tree
        if kind == "node":
            return nodes[inside % len(nodes)]
        items = [_resolve(t, nodes) for t in inside]
        return tuple(items) if kind == "tuple" else slice(*items)
    return tree


@QUIET
@given(
    calls=st.lists(st.tuples(st.sampled_from(CALLS), st.lists(TREES, max_size=3), st.booleans()), max_size=8),
    output=TREES,
)
def test_arbitrary_graphs(calls: list[tuple[Any, list[Any], bool]], output: Any) -> None:
    fx_graph = torch.fx.Graph()
    nodes = [fx_graph.placeholder("x")]
    for target, args, take_apart in calls:
        resolved = tuple(_resolve(a, nodes) for a in args)
        nodes.append(fx_graph.call_function(target, resolved, {"key": resolved[:1]}))
        nodes[-1].meta["marker"] = object()
        if take_apart:
            call = nodes[-1]
            nodes += [fx_graph.call_function(operator.getitem, (call, i)) for i in (1, 0)]
    fx_graph.output(_resolve(output, nodes))
    gm = torch.fx.GraphModule(torch.nn.Module(), fx_graph)
    graph = graph_from_fx(gm)
    assert_same(gm, graph_to_fx(graph))
    text = print_graph(graph)
    assert print_graph(parse_graph(text)) == text
