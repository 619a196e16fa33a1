"""What keeps nodes from becoming part of a shared layer, or from being moved: each on a graph made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from moec.aot.region import Region
from moec.aot.regions import FEWEST
from tests.support.by_hand import WIDTH, ByHand

aten: Any = torch.ops.aten

Layer = Callable[[ByHand, Node, int], Node]


def plain(g: ByHand, x: Node, i: int) -> Node:
    return g.call(aten.relu.default, g.call(aten.mul.Tensor, x, 2.0, layer=i), layer=i)


def constant(g: ByHand, x: Node, i: int) -> Node:
    """Holds a node that calls no op."""
    return g.call(aten.mul.Tensor, x, g.table(i), layer=i)


def turned(g: ByHand, x: Node, i: int) -> Node:
    """Gives memory of its own, column by column."""
    t = g.call(aten.permute.default, g.x, [1, 0], layer=i)
    return g.call(aten.mul.Tensor, t, 2.0, layer=i)


def overwriting(g: ByHand, x: Node, i: int) -> Node:
    """Writes into the graph's input, and gives memory of its own."""
    g.call(aten.add_.Tensor, g.x, 1.0, layer=i)
    return g.call(aten.mul.Tensor, x, 2.0, layer=i)


def sized(g: ByHand, x: Node, i: int) -> Node:
    """Takes a size that none of its tensors has."""
    rows = next((n for n in g.graph.nodes if n.target is aten.sym_size.int), None)
    assert rows is not None
    return g.call(aten.sum.default, g.call(aten.full.default, [rows, 2], 1.0, layer=i), layer=i)


def strided(g: ByHand, x: Node, i: int) -> Node:
    """Takes a tensor whose sizes do not say how far apart its rows are."""
    rows = next((n for n in g.graph.nodes if n.target is aten.select.int), None)
    if rows is None:
        stacked = g.call(aten.stack.default, [g.x, g.x])
        rows = g.call(aten.select.int, stacked, 1, 0)
    return g.call(aten.mul.Tensor, rows, 2.0, layer=i)


def counted(g: ByHand, x: Node, i: int) -> Node:
    """Has a size inside that depends on data."""
    found = g.call(aten.nonzero.default, x, layer=i)
    return g.call(aten.mul.Tensor, x, g.call(aten.sum.default, found, layer=i), layer=i)


def chain(layer: Layer, count: int = FEWEST) -> tuple[list[tuple[Region, Any]], bool]:
    g = ByHand()
    g.call(aten.sym_size.int, g.x, 0)
    x, outputs = g.call(aten.mul.Tensor, g.x, 1.5), []
    for i in range(count):
        made = layer(g, x, i)
        outputs.append(made)
        x = made if layer not in (turned, sized, strided) else x
    return g.share(*outputs)


def test_what_is_shared() -> None:
    ((region, _),), same = chain(plain)
    assert not same and len(region.arguments) == len(region.results) == 1


@pytest.mark.parametrize("layer", [constant, turned, overwriting, sized, counted, strided])
def test_what_stays(layer: Layer) -> None:
    assert chain(layer) == ([], True)


def test_layers_that_run_into_each_other_stay() -> None:
    """The second half of each comes after the first half of the next, so that all hold the same calls."""
    g = ByHand()
    halves, outputs = [g.call(aten.mul.Tensor, g.x, 2.0, layer=0)], []
    for i in range(1 + FEWEST):
        halves.append(g.call(aten.mul.Tensor, g.x, 2.0, layer=i + 1))
        outputs.append(g.call(aten.relu.default, halves[i], layer=i))
    assert g.share(*outputs, halves[-1]) == ([], True)


def test_layers_whose_nodes_are_mixed_stay() -> None:
    """The first two run side by side; those behind them are shared."""
    g = ByHand()
    first, second = (g.call(aten.mul.Tensor, g.x, 2.0, layer=i) for i in (0, 1))
    outputs = [g.call(aten.relu.default, n, layer=i) for i, n in enumerate((first, second))]
    for i in range(2, 2 + FEWEST):
        outputs.append(plain(g, outputs[-1], i))
    ((_, op),), _ = g.share(*outputs)
    assert len(g.graph.find_nodes(op="call_function", target=op)) == FEWEST
    assert len(g.graph.find_nodes(op="call_function", target=aten.relu.default)) == 2


def made_for_others(before: Callable[[ByHand], Node]) -> tuple[list[tuple[Region, Any]], Graph]:
    """What is shared where ``before`` makes, in the first layer, something that all use; and the graph."""
    g = ByHand()
    x = g.call(aten.mul.Tensor, g.x, 1.5)
    common = before(g)
    outputs = []
    for i in range(1 + FEWEST):
        x = g.call(aten.mul.Tensor, plain(g, x, i), common, layer=i)
        outputs.append(x)
    return g.share(*outputs)[0], g.graph


def test_what_one_layer_makes_for_others_is_moved_out() -> None:
    ((_, op),), graph = made_for_others(lambda g: g.call(aten.cos.default, g.x, layer=0))
    calls = graph.find_nodes(op="call_function", target=op)
    (kept,) = graph.find_nodes(op="call_function", target=torch.ops.prims.inductor_force_stride_order.default)
    assert len(calls) == 1 + FEWEST and all(kept in c.args for c in calls)


def test_what_is_read_after_a_write_inside_is_not_moved_before_it() -> None:
    def written(g: ByHand) -> Node:
        own = g.call(aten.cos.default, g.x, layer=0)
        g.call(aten.add_.Tensor, own, 1.0, layer=0)
        return g.call(aten.relu.default, own, layer=0)

    shared, _ = made_for_others(written)
    assert len(shared) == 1  # those behind the first


def test_what_is_read_after_a_write_outside_is_not_moved_before_it() -> None:
    def written(g: ByHand) -> Node:
        g.call(aten.add_.Tensor, g.x, 1.0, layer=0)
        return g.call(aten.cos.default, g.x, layer=0)

    shared, _ = made_for_others(written)
    assert len(shared) == 1


def test_a_layer_that_makes_nothing_of_its_own_is_not_moved() -> None:
    """All of the first layer is for others: there would be no layer left."""
    g = ByHand()
    common = g.call(aten.cos.default, g.x, layer=0)
    x, outputs = g.call(aten.mul.Tensor, g.x, 1.5), []
    for i in range(1, 1 + FEWEST):
        x = g.call(aten.mul.Tensor, plain(g, x, i), common, layer=i)
        outputs.append(x)
    shared, _ = g.share(*outputs)
    assert len(shared) == 1


def test_results_are_as_large_as_the_arguments_say() -> None:
    ((region, _),), _ = chain(plain)
    made = region.fake(torch.empty(7, WIDTH))
    assert isinstance(made, Tensor) and made.shape == (7, WIDTH)
