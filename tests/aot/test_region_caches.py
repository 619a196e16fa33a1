"""Layers that write into what their caller lends, such as a cache: shared where nobody else uses it, else not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Node

from moec.aot.regions import FEWEST
from tests.support.by_hand import ByHand

aten: Any = torch.ops.aten
Layer = Callable[[ByHand, Node, int], Node]


def update(g: ByHand, x: Node, i: int, cache: Node | None = None) -> None:
    """Write into a cache, that of the layer or another."""
    g.call(aten.add_.Tensor, cache or g.caches[i], g.call(aten.mean.dim, x, [0], layer=i), layer=i)


def read(g: ByHand, x: Node, cache: Node, i: int) -> Node:
    return g.call(aten.mul.Tensor, x, g.call(aten.mean.dim, cache, [0], layer=i), layer=i)


def caching(g: ByHand, x: Node, i: int) -> Node:
    update(g, x, i)
    return read(g, x, g.caches[i], i)


def through_a_view(g: ByHand, x: Node, i: int) -> Node:
    """Writes into a part of the cache, and reads the whole."""
    update(g, x, i, g.call(aten.slice.Tensor, g.caches[i], 0, 1, 3, layer=i))
    return read(g, x, g.caches[i], i)


def twice(g: ByHand, x: Node, i: int) -> Node:
    """Reads between two writes."""
    x = caching(g, x, i)
    update(g, x, i)
    return x


def first(g: ByHand, x: Node, i: int) -> Node:
    """All layers have the first one's cache."""
    update(g, x, i, g.caches[0])
    return read(g, x, g.caches[0], i)


def before(g: ByHand, x: Node, i: int) -> Node:
    """Reads the cache of the layer before, too."""
    return read(g, caching(g, x, i), g.caches[i - 1] if i else g.x, i)


def after(g: ByHand, x: Node, i: int) -> Node:
    """Reads the cache of the next layer, too, before it is written."""
    return read(g, caching(g, x, i), g.caches[(i + 1) % len(g.caches)], i)


def part(g: ByHand, x: Node, i: int) -> Node:
    """Gives a part of the cache instead of something of its own."""
    update(g, x, i)
    return g.call(aten.slice.Tensor, g.caches[i], 0, 0, 3, layer=i)


def listed(g: ByHand, x: Node, i: int) -> Node:
    """Writes into tensors of a list, one of which is everybody's."""
    g.call(aten._foreach_add_.Scalar, [g.caches[i], g.x], 1.0, layer=i)
    return read(g, x, g.caches[i], i)


def chain(g: ByHand, layer: Layer) -> list[Node]:
    x = g.call(aten.mul.Tensor, g.x, 1.5)
    return [x := layer(g, x, i) for i in range(FEWEST)]


@pytest.mark.parametrize("layer", [caching, through_a_view, twice])
def test_layers_with_a_cache_each_are_shared(layer: Layer) -> None:
    g = ByHand(FEWEST)
    ((_, op),), _ = g.share(*chain(g, layer))
    calls = g.graph.find_nodes(op="call_function", target=op)
    assert len(calls) == FEWEST
    changed = [i for i, a in enumerate(op._schema.arguments) if a.is_write]
    assert [[call.args[i] for i in changed] for call in calls] == [[c] for c in g.caches]


@pytest.mark.parametrize("layer", [first, before, after, part, listed])
def test_layers_that_see_more_than_their_own_cache_stay(layer: Layer) -> None:
    g = ByHand(FEWEST)
    assert g.share(*chain(g, layer)) == ([], True)


def test_a_size_of_a_cache_may_be_asked_outside() -> None:
    g = ByHand(FEWEST)
    g.call(aten.sym_size.int, g.caches[0], 0)
    assert len(g.share(*chain(g, caching))[0]) == 1


def test_layers_that_write_into_the_models_own_buffers_stay() -> None:
    g = ByHand(FEWEST, lent=False)
    assert g.share(*chain(g, caching)) == ([], True)


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_a_cache_that_is_read_outside_stays_where_it_is_written(early: bool) -> None:
    g = ByHand(FEWEST)
    seen = [g.call(aten.cos.default, g.caches[0])] if early else []
    outputs = chain(g, caching)
    seen = seen or [g.call(aten.cos.default, g.caches[0])]
    assert g.share(*outputs, *seen) == ([], True)


def test_a_cache_that_is_given_back_stays() -> None:
    g = ByHand(FEWEST)
    assert g.share(*chain(g, caching), g.caches[-1]) == ([], True)


def test_a_view_that_was_made_outside_is_not_the_layers_own() -> None:
    g = ByHand(FEWEST)
    parts = [g.call(aten.slice.Tensor, c, 0, 1, 3) for c in g.caches]

    def layer(g: ByHand, x: Node, i: int) -> Node:
        update(g, x, i, parts[i])
        return read(g, x, g.caches[i], i)

    assert g.share(*chain(g, layer)) == ([], True)


@pytest.mark.parametrize(("of", "moved"), [("input", True), ("cache", False), ("view", False)])
def test_what_a_layer_makes_for_others_is_moved_unless_it_reads_what_is_written(of: str, moved: bool) -> None:
    g = ByHand(1 + FEWEST)
    x, outputs = g.call(aten.mul.Tensor, g.x, 1.5), []
    common = None
    for i in range(1 + FEWEST):
        update(g, x, i)
        if common is None:
            base = g.x if of == "input" else g.caches[0]
            base = g.call(aten.slice.Tensor, base, 0, 0, 3, layer=0) if of == "view" else base
            common = g.call(aten.mean.dim, base, [0], layer=0)
        x = g.call(aten.mul.Tensor, read(g, x, g.caches[i], i), common, layer=i)
        outputs.append(x)
    ((_, op),), _ = g.share(*outputs)
    assert len(g.graph.find_nodes(op="call_function", target=op)) == FEWEST + moved
