"""Graphs that autograd made, put in order: any graph keeps its dependencies, and small ops move no collective."""

from __future__ import annotations

import operator
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from moec.interleaving.graph import interleave, layers_of
from moec.runtime import beside, staged  # noqa: F401  (registers ops of torch.ops.moec)
from moec.runtime.programs import register
from tests.parallel.layers import Layer

LAYER = Layer(ranks=2, experts=4, hidden=4, inner=8)
ATEN, MOEC = torch.ops.aten, torch.ops.moec
PIECES = ("begin_layer", "begin_gradients", "resume_layer", "end_layer", "end_gradients")


@pytest.fixture(scope="module")
def key() -> str:
    op = LAYER.spread(0, "expert-parallel,overlap{chunks=2}").ops[0]
    op.attrs["backend"] = "aten"
    return register(op.parent, "distributed").key if op.parent is not None else ""


class Made:
    """A graph under construction, with fake values, and two versions of it: with and without small ops."""

    def __init__(self, rng: random.Random, noise: bool) -> None:
        self.rng, self.noise, self.mode = rng, random.Random(7) if noise else None, FakeTensorMode()
        self.graph = Graph()
        with self.mode:
            shapes = {"x": (5, 4), "ids": (5, 2), "w": (5, 2), "up": (2, 16, 4), "down": (2, 4, 8), "m": (4, 4)}
            values = {n: torch.empty(s, dtype=torch.int64 if n == "ids" else torch.float32) for n, s in shapes.items()}
        self.given = {}
        for name, value in values.items():
            self.given[name] = self.graph.placeholder(name)
            self.given[name].meta["val"] = value
        self.rows = [self.given["x"]]

    def call(self, op: Any, *args: Any) -> Node:
        node = self.graph.call_function(op, args)
        with self.mode:
            values = torch.utils._pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, Node) else a, args)
            node.meta["val"] = op(*values)
        return node

    def pick(self) -> Node:
        found = self.rng.choice(self.rows)
        if self.noise is not None and self.noise.random() < 0.5:  # a rank with other sizes has other small ops
            found = self.call(ATEN.neg.default, self.call(ATEN.neg.default, found))
        return found

    def layer(self, key: str) -> None:
        g = self.given
        params = [g["up"], g["down"]]
        if self.rng.random() < 0.5:
            self.rows.append(self.call(MOEC.experts.default, self.pick(), g["ids"], g["w"], params, key))
            return
        needs = [True, False, self.rng.random() < 0.5, True, True]
        args = (self.pick(), self.pick(), g["ids"], g["w"], params, needs, key)
        back = self.call(MOEC.experts_backward.default, *args)
        part = self.graph.call_function(operator.getitem, (back, 0))
        part.meta["val"] = back.meta["val"][0]
        self.rows.append(part)


def random_graph(seed: int, key: str, noise: bool = False) -> Graph:
    made, rng = Made(random.Random(seed), noise), random.Random(seed + 1)
    for _ in range(rng.randint(2, 14)):
        what = rng.random()
        if what < 0.4:
            made.layer(key)
        elif what < 0.8:
            made.rows.append(made.call(ATEN.mm.default, made.pick(), made.given["m"]))
        elif what < 0.9:
            made.rows.append(made.call(ATEN.add.Tensor, made.pick(), made.pick()))
        else:
            made.rows.append(made.call(ATEN.bernoulli.default, made.pick()))
    made.graph.output(tuple(made.rows[-3:]))
    return made.graph


def short(node: Node) -> str:
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""


def pieces(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if short(n) in PIECES]


def lineage(graph: Graph) -> list[tuple[str, int]]:
    """The pieces in their order, each with the number of the layer that it is of."""
    layer: dict[Node, int] = {}
    found = []
    for node in pieces(graph):
        begun = node.args[0] if short(node) in PIECES[2:] else None
        layer[node] = layer[begun] if isinstance(begun, Node) else len({*layer.values()})
        found.append((short(node), layer[node]))
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_any_graph_keeps_its_dependencies_and_its_fences(key: str, seed: int) -> None:
    graph = random_graph(seed, key)
    plain = [n.name for n in graph.nodes]
    before = {n.name: {m.name for m in plain_before(graph, n)} for n in graph.nodes if short(n) == "bernoulli"}
    layers = len(layers_of(graph.nodes))
    count = interleave(graph)
    assert count == (layers if layers > 1 else 0)
    if not count:
        assert [n.name for n in graph.nodes] == plain
        return
    graph.lint()  # every operand is made before
    assert not layers_of(graph.nodes)
    for fence, earlier in before.items():
        node = next(n for n in graph.nodes if n.name == fence)
        now = {m.name for m in plain_before(graph, node)}
        assert earlier & {n.name for n in graph.nodes} <= now, "what stood before it does"
        assert not (set(plain) - earlier) & now - {fence}, "what stood behind it does"
    ordered = pieces(graph)
    assert "after" not in ordered[0].kwargs
    for one, two in pairwise(ordered):
        after = two.kwargs["after"]
        assert isinstance(after, Node) and (after is one or after.args[0] is one), "each takes a result of the last"


def plain_before(graph: Graph, node: Node) -> list[Node]:
    nodes = list(graph.nodes)
    return nodes[: nodes.index(node)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_small_ops_move_no_collective(key: str, seed: int) -> None:
    one, two = random_graph(seed, key), random_graph(seed, key, noise=True)
    assert interleave(one) == interleave(two)
    assert lineage(one) == lineage(two)


def test_two_batches_take_turns_and_operands_live_to_the_end(key: str) -> None:
    made = Made(random.Random(0), False)
    g = made.given
    params = [g["up"], g["down"]]
    a = made.call(MOEC.experts.default, made.call(ATEN.mm.default, g["x"], g["m"]), g["ids"], g["w"], params, key)
    b = made.call(MOEC.experts.default, made.call(ATEN.mm.default, g["x"], g["m"]), g["ids"], g["w"], params, key)
    made.graph.output((a, b))
    assert interleave(made.graph) == 2
    names = [n for n, _ in lineage(made.graph)]
    assert names[:2] == ["begin_layer"] * 2 and names[-2:] == ["end_layer"] * 2
    assert len({layer for _, layer in lineage(made.graph)[:2]}) == 2
    begin, end = pieces(made.graph)[0], pieces(made.graph)[-2]
    assert begin.args[0] == end.args[1] and begin.args[1] == end.args[2]


def test_one_layer_stays(key: str) -> None:
    made = Made(random.Random(0), False)
    g = made.given
    a = made.call(MOEC.experts.default, g["x"], g["ids"], g["w"], [g["up"], g["down"]], key)
    made.graph.output((a,))
    assert interleave(made.graph) == 0 and layers_of(made.graph.nodes)


def test_a_dropout_of_nothing_is_no_fence() -> None:
    from moec.interleaving.graph import _kind

    made = Made(random.Random(0), False)
    x = made.call(ATEN.unsqueeze.default, made.call(ATEN.unsqueeze.default, made.given["x"], 0), 0)
    attention = ATEN._scaled_dot_product_flash_attention_for_cpu.default
    kinds = [_kind(made.call(attention, x, x, x, p)) for p in (0.0, 0.5)]
    assert kinds == ["op", "fence"]
    assert _kind(made.call(ATEN.copy_.default, x, x)) == "fence"
