"""Graphs of layers that are made node by node."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moec.aot.region import Region
from moec.aot.regions import share_layers

WIDTH = 4


class ByHand:
    """A graph of calls on ``x [T, 4]``; it stands for an exported program.

    Args:
        caches: How many tensors [4, 4] of its caller it writes into.
        lent: Whether they are the user's inputs; else they are buffers of the model.

    Attributes:
        x: The input; its first size is symbolic.
        caches: The nodes of those tensors.
        graph_signature: As an exported program tells its user's inputs.
    """

    def __init__(self, caches: int = 0, lent: bool = True) -> None:
        self.graph, self._mode = Graph(), FakeTensorMode(shape_env=ShapeEnv())
        self.graph_module = GraphModule(torch.nn.Module(), self.graph)
        self.graph_module.register_buffer("table", torch.arange(WIDTH) * 1.0)
        self.graph = self.graph_module.graph
        self.x = self.graph.placeholder("x")
        dims = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        self.x.meta["val"] = self._mode.from_tensor(torch.ones(WIDTH, WIDTH), symbolic_context=dims)
        self.caches = [self.graph.placeholder(f"cache{i}") for i in range(caches)]
        for cache in self.caches:
            cache.meta["val"] = self._mode.from_tensor(torch.ones(WIDTH, WIDTH))
        names = (self.x.name, *(c.name for c in self.caches if lent))
        self.graph_signature = SimpleNamespace(user_inputs=names)

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
        """End the graph, share its layers, and check that it computes and writes the same bits.

        Returns:
            What is shared, and whether the graph is as it was.
        """
        self.graph.output(tuple(outputs))
        self.graph_module.recompile()
        generator, before = torch.Generator().manual_seed(0), str(self.graph)
        given = [torch.randn(rows, WIDTH, generator=generator) for rows in (3, *(WIDTH for _ in self.caches))]
        expected = [g.clone() for g in given]
        expected += self.graph_module(*expected)
        shared = share_layers(self)  # type: ignore[arg-type]
        given += _Run(self.graph_module, shared).run(*given)
        for got, wanted in zip(given, expected, strict=True):
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
