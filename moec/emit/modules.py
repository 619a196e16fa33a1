"""Where the attributes live that ``get_attr`` nodes name: constants, modules and nested graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moec.emit.errors import EmitError
from moec.ir.core import Op

_MISSING = object()


class ModuleStore:
    """Puts objects on a module under a wanted name, or under a fresh one if that is taken by another object.

    Args:
        module: Where objects are put; None if there is no such place, and then nothing may need one.
        root: Where constants are looked up that an op names but does not hold.
    """

    def __init__(self, module: torch.nn.Module | None, root: torch.nn.Module | None) -> None:
        self.module = module
        self.root = root

    def put(self, name: str, value: Any) -> str:
        """The dotted path under which ``value`` now is on the module."""
        return self._place(name, value, lambda held: held is value)

    def put_graph(self, name: str, gm: torch.fx.GraphModule) -> str:
        """As :meth:`put`; a nested graph that is there already and equal, node by node, is taken instead."""
        shape = fingerprint(gm)
        return self._place(name, gm, lambda held: isinstance(held, torch.fx.GraphModule) and fingerprint(held) == shape)

    def find(self, name: str, op: Op) -> Any:
        """The constant ``name`` of the root module.

        Raises:
            EmitError: There is no root, or it has no such attribute.
        """
        found = _lookup(self.root, name) if self.root is not None else _MISSING
        if found is _MISSING:
            raise EmitError(
                f"the constant {name!r} is not in this graph",
                op=repr(op),
                hint="text does not hold constants; give the module that has them as root",
            )
        return found

    def _place(self, name: str, value: Any, same: Callable[[Any], bool]) -> str:
        if self.module is None:
            raise EmitError(
                f"the graph needs the attribute {name!r}, and the fx graph belongs to no module that could hold it",
                hint="give the GraphModule as root, or emit into the graph of a GraphModule",
            )
        path, count = name, 0
        while (held := _lookup(self.module, path)) is not _MISSING:
            if same(held):
                return path
            count += 1
            path = f"{name}_{count}"
        *parents, last = path.split(".")
        owner: Any = self.module
        for part in parents:
            if not hasattr(owner, part):
                setattr(owner, part, torch.nn.Module())
            owner = getattr(owner, part)
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            owner.register_buffer(last, value)
        else:
            setattr(owner, last, value)
        return path


def _lookup(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, _MISSING)
        if module is _MISSING:
            return _MISSING
    return module


def fingerprint(gm: torch.fx.GraphModule) -> list[Any]:
    """What two graph modules must agree on to be the same code on the same constants."""
    index = {node: i for i, node in enumerate(gm.graph.nodes)}
    out: list[Any] = []
    for node in gm.graph.nodes:
        args = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{index[n]}")
        target: Any = node.target
        if node.op in ("get_attr", "call_module"):
            held = _lookup(gm, str(target))
            target = fingerprint(held) if isinstance(held, torch.fx.GraphModule) else id(held)
        elif node.op == "placeholder":
            target = None
        out.append((node.op, target, repr(args)))
    return out
