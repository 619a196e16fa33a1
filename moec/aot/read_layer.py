"""A layer's nodes as a module of their own, which is the same for layers that are alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import is_contiguous_or_false

from moec.aot.memory import acts_outside, shares
from moec.aot.region import expr_of

Node = torch.fx.Node


@dataclass
class Layer:
    """One layer: its nodes, what crosses its border, and itself as a module; ``text`` is equal for equal layers."""

    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]
    module: torch.fx.GraphModule
    text: str


class _Copy:
    """A layer's nodes in a graph of their own, where names depend on positions alone."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.graph = torch.fx.Graph()
        self.inputs: list[Node] = []
        self.env: dict[Node, Node] = {}
        self._inside = set(nodes)
        self._sizes: dict[Any, Node] = {}

    def tensors(self, nodes: Iterable[Node]) -> None:
        """Make a placeholder for every tensor from outside, in the order of their use."""
        for node in nodes:
            for given in node.all_input_nodes:
                if given not in self._inside and given not in self.env and isinstance(given.meta.get("val"), Tensor):
                    self.env[given] = self._add("placeholder", f"a{len(self.inputs)}", given)
                    self.inputs.append(given)

    def add(self, node: Node) -> None:
        """Copy a node."""
        self.env[node] = self._add("call_function", node.target, node)

    def _add(self, op: str, target: Any, node: Node) -> Node:
        args = torch.fx.map_arg(node.args, self._get) if op != "placeholder" else ()
        kwargs = torch.fx.map_arg(node.kwargs, self._get) if op != "placeholder" else {}
        name = target if op == "placeholder" else f"n{len(self.env)}"
        made = self.graph.create_node(op, target, args, kwargs, name)
        made.meta["val"] = node.meta["val"]
        return made

    def _get(self, node: Node) -> Node:
        """The copy of a node; a size from outside is asked of a tensor that comes in."""
        if node not in self.env:
            self.env[node] = self._size(node)
        return self.env[node]

    def _size(self, node: Node) -> Node:
        expr = expr_of(node.meta["val"])
        for given in self.inputs:
            for dim, size in enumerate(given.meta["val"].shape):
                if expr_of(size) == expr:
                    name = f"n{len(self.env)}"
                    target = torch.ops.aten.sym_size.int
                    made = self.graph.create_node("call_function", target, (self.env[given], dim), {}, name)
                    made.meta["val"] = node.meta["val"]
                    return made
        return self._add("call_function", node.target, node)


def read_layer(nodes: list[Node], lent: Collection[str]) -> Layer | None:
    """The layer of these nodes; None where it cannot be an op."""
    inside = set(nodes)
    outputs = [n for n in nodes if not inside.issuperset(n.users)]
    if any(acts_outside(n, inside, lent) for n in nodes) or not all(map(_own, outputs)):
        return None
    copy = _Copy(nodes)
    copy.tensors(nodes)
    symbols = {expr_of(s) for n in copy.inputs for s in n.meta["val"].shape}
    if not all(symbols.issuperset(_symbols(n)) for n in (*nodes, *copy.inputs)):
        return None
    for node in nodes:
        copy.add(node)
    copy.graph.output(tuple(copy.env[n] for n in outputs))
    module = torch.fx.GraphModule(torch.nn.Module(), copy.graph)
    text = [str(copy.graph)]
    for node in copy.inputs:
        value = node.meta["val"]
        text.append(f"{value.dtype} {tuple(value.shape)} {tuple(value.stride())}")
    return Layer(nodes, copy.inputs, outputs, module, "\n".join(text))


def _own(node: Node) -> bool:
    """Whether a result is a tensor of its own memory, row by row: an op's results may be nothing else here."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not is_contiguous_or_false(value):
        return False
    return not shares(node)


def _symbols(node: Node) -> set[Any]:
    value = node.meta.get("val")
    found: set[Any] = set()
    for one in value if isinstance(value, tuple | list) else (value,):
        sizes = (*one.shape, *one.stride()) if isinstance(one, Tensor) else (one,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                found |= size.node.expr.free_symbols
    return found
