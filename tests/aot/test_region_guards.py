"""What keeps nodes from becoming part of a shared layer, or from being moved: each on a graph made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moec.aot.regions import FEWEST, Region, share_layers

aten: Any = torch.ops.aten
WIDTH = 4


class ByHand:
    """A graph of calls on ``x [T, 4]``; it stands for an exported program.

    Attributes:
        x: The input; its first size is symbolic.
    """

    def __init__(self) -> None:
        self.graph, self._mode = Graph(), FakeTensorMode(shape_env=ShapeEnv())
        self.graph_module = GraphModule(torch.nn.Module(), self.graph)
        self.graph_module.register_buffer("table", torch.arange(WIDTH) * 1.0)
        self.graph = self.graph_module.graph
        self.x = self.graph.placeholder("x")
        dims = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        self.x.meta["val"] = self._mode.from_tensor(torch.ones(WIDTH, WIDTH), symbolic_context=dims)

    def call(self, target: Any, *args: Any, layer: int | None = None) -> Node:
        """A node of a layer, or of none."""
        return self._of(self.graph.call_function(target, args), layer, lambda: target(*_values(args)))

    def table(self, layer: int) -> Node:
        """A node that reads a constant."""
        return self._of(self.graph.get_attr("table"), layer, lambda: self._mode.from_tensor(self.graph_module.table))

    def _of(self, node: Node, layer: int | None, value: Callable[[], Any]) -> Node:
        with self._mode:
            node.meta["val"] = value()
        if layer is not None:
            node.meta["nn_module_stack"] = {"layer": (f"layers.{layer}", "Layer")}
        return node

    def share(self, *outputs: Node) -> tuple[list[tuple[Region, Any]], bool]:
        """End the graph, share its layers, and check that it computes the same bits.

        Returns:
            What is shared, and whether the graph is as it was.
        """
        self.graph.output(tuple(outputs))
        self.graph_module.recompile()
        x, before = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)), str(self.graph)
        want = self.graph_module(x.clone())
        shared = share_layers(self)  # type: ignore[arg-type]
        for got, wanted in zip(_Run(self.graph_module, shared).run(x.clone()), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        return shared, str(self.graph) == before


class _Run(torch.fx.Interpreter):
    """Runs the layers' own graphs where their ops are called."""

    def __init__(self, module: GraphModule, shared: list[tuple[Region, Any]]) -> None:
        super().__init__(module)
        self._layers = {op: region.module for region, op in shared}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target not in self._layers:
            return super().call_function(target, args, kwargs)
        made = self._layers[target](*args)
        return made[0] if len(made) == 1 else made


def _values(args: Any) -> Any:
    return torch.fx.map_arg(args, lambda n: n.meta["val"])


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
    assert len(graph.find_nodes(op="call_function", target=op)) == 1 + FEWEST


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
