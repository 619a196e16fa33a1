"""Argument trees of fx nodes as attribute templates of ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moec.ir.attributes import ListAttr, Literal, Operand, Region
from moec.ir.core import Graph, Value
from moec.ir.torch_dtypes import FROM_TORCH

OPAQUE = "opaque"
"""Key of ``Op.meta`` under which arguments without a text form are kept; the template holds their position."""


class ArgumentEncoder:
    """Turns one node's ``args`` and ``kwargs`` into templates, collecting what the op needs.

    Values become ``Operand(i)``, nested graphs ``Region(i)``; dtypes, devices and the like become literals. A slice,
    range, torch.Size or dict with odd keys is a tuple that starts with ``Literal("py", "slice")`` and so on. Anything
    else is kept as the object itself in ``opaque`` and leaves ``Literal("opaque", "0: ScriptObject")`` in its place.
    """

    def __init__(
        self, lookup: Callable[[torch.fx.Node], Value], region: Callable[[torch.fx.Node], Graph | None]
    ) -> None:
        self._lookup = lookup
        self._region = region
        self.operands: list[Value] = []
        self.regions: list[Graph] = []
        self.opaque: list[Any] = []

    def encode(self, arg: Any) -> Any:
        """The template of one argument tree."""
        if isinstance(arg, torch.fx.Node):
            return self._node(arg)
        if arg is None or type(arg) in (bool, int, float, str):
            return arg
        if type(arg) is tuple:
            return tuple(self.encode(a) for a in arg)
        if type(arg) is list or type(arg).__name__ == "immutable_list":
            return ListAttr(tuple(self.encode(a) for a in arg))
        if isinstance(arg, dict):
            if all(type(k) is str for k in arg):
                return {k: self.encode(v) for k, v in arg.items()}
            return (Literal("py", "dict"), *((self.encode(k), self.encode(v)) for k, v in arg.items()))
        if isinstance(arg, torch.Size):
            return (Literal("py", "Size"), *(self.encode(a) for a in arg))
        if isinstance(arg, tuple):  # a named tuple
            return (self._keep(type(arg), f"tuple {type(arg).__name__}"), *(self.encode(a) for a in arg))
        if isinstance(arg, slice):
            return (Literal("py", "slice"), *(self.encode(a) for a in (arg.start, arg.stop, arg.step)))
        if isinstance(arg, range):
            return (Literal("py", "range"), arg.start, arg.stop, arg.step)
        return self._constant(arg)

    def _node(self, node: torch.fx.Node) -> Operand | Region:
        graph = self._region(node)
        if graph is not None:
            self.regions.append(graph)
            return Region(len(self.regions) - 1)
        self.operands.append(self._lookup(node))
        return Operand(len(self.operands) - 1)

    def _constant(self, arg: Any) -> Any:
        if isinstance(arg, torch.dtype):
            return FROM_TORCH.get(arg) or Literal("dtype", str(arg).removeprefix("torch."))
        if isinstance(arg, torch.device):
            return Literal("device", str(arg))
        if isinstance(arg, torch.layout):
            return Literal("layout", str(arg).removeprefix("torch."))
        if isinstance(arg, torch.memory_format):
            return Literal("memory_format", str(arg).removeprefix("torch."))
        if arg is Ellipsis:
            return Literal("py", "Ellipsis")
        if type(arg) is complex:
            return Literal("complex", repr(arg))
        if isinstance(arg, torch._ops.OpOverload):
            return Literal("op", str(arg))
        return self._keep(arg, type(arg).__name__)

    def _keep(self, thing: Any, label: str) -> Literal:
        self.opaque.append(thing)
        return Literal("opaque", f"{len(self.opaque) - 1}: {label}")
