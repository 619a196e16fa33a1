"""What equal layers of a program share: one op, whose code is made once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from moec.aot.memory import origin, written

Node = torch.fx.Node


@dataclass(frozen=True)
class Region:
    """What equal layers share.

    Attributes:
        name: Of the op and of its C function; it depends on the content alone.
        module: One of the layers: its placeholders are the op's arguments, and it returns a tuple.
    """

    name: str
    module: torch.fx.GraphModule

    @property
    def arguments(self) -> list[Node]:
        """The nodes that stand for them."""
        return list(self.module.graph.find_nodes(op="placeholder"))

    @property
    def results(self) -> list[Node]:
        """The nodes that are returned."""
        return list(self.module.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def schema(self) -> str:
        """As torch writes it, after the name."""
        changed = {origin(w) for n in self.module.graph.nodes for w in written(n)}
        types = (f"Tensor(a{i}!)" if a in changed else "Tensor" for i, a in enumerate(self.arguments))
        given = ", ".join(f"{type} a{i}" for i, type in enumerate(types))
        made = ", ".join("Tensor" for _ in self.results)
        return f"({given}) -> {made if len(self.results) == 1 else f'({made})'}"

    @property
    def declaration(self) -> str:
        """Of the C function."""
        given = [f"AtenTensorHandle a{i}" for i in range(len(self.arguments))]
        made = [f"AtenTensorHandle* r{i}" for i in range(len(self.results))]
        return f"AOTITorchError aoti_torch_cpu_{self.name}({', '.join([*given, *made])})"

    def fake(self, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The results as empty tensors; their sizes follow from those of the arguments."""
        known: dict[Any, Any] = {}
        for node, tensor in zip(self.arguments, given, strict=True):
            known |= {expr_of(s): have for s, have in zip(node.meta["val"].shape, tensor.shape, strict=True)}
        values = [r.meta["val"] for r in self.results]
        made = [given[0].new_empty([_size(s, known) for s in v.shape], dtype=v.dtype) for v in values]
        return made[0] if len(made) == 1 else tuple(made)


def expr_of(size: int | torch.SymInt) -> Any:
    """The number, or sympy's expression of it."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _size(size: int | torch.SymInt, known: Mapping[Any, Any]) -> Any:
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return known[expr] if expr in known else sympy_interp(PythonReferenceAnalysis, dict(known), expr)
