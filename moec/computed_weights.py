"""Expert weights that are no parameters but computed in every call: adapters, parametrizations, masks, casts.

Such a block is fused and right, yet every call first writes a full copy of all experts' weights, where a kernel would
otherwise read those of the chosen experts alone. PyTorch does the same; the user can end it, so the user is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from moec.backends.partition import BEGIN, SPREAD
from moec.ir.core import Graph, Value
from moec.ir.types import TensorType
from moec.passes.matching import function, peel
from moec.sizes import size_text
from moec.slicing import nodes

_VIEWS = frozenset({"view", "alias", "detach", "unsqueeze", "squeeze", "flatten", "select", "slice", "narrow"})
_VIEWS |= {"transpose", "permute", "t", "mT", "swapaxes", "view_as", *nodes.PARTS}
_CASTS = frozenset({"to", "_to_copy", "type", "type_as", "float", "half", "bfloat16", "double"})
_NAMED = 4  # tensors that a remark names; a list of experts has hundreds

HOW_TO_END_IT = (
    "make them permanent before compiling, where they are final: merge_and_unload() for adapters, "
    "remove_parametrizations() and prune.remove() for torch's own, model.to(dtype) for casts"
)


@dataclass(frozen=True)
class Computed:
    """The computed weights of one block.

    Attributes:
        bytes: Size of what is written in every call.
        sources: Names of the model's tensors that they are computed from, in order of first use.
        cast_only: They are casts of the model's own weights, as autocast makes them.
    """

    bytes: int
    sources: tuple[str, ...]
    cast_only: bool

    def __str__(self) -> str:
        named = ", ".join(self.sources[:_NAMED]) + (", ..." if len(self.sources) > _NAMED else "")
        return (
            f"expert weights are computed in every call, {size_text(self.bytes)} a block, from {named}; {HOW_TO_END_IT}"
        )


def computed_weights(graph: Graph, inputs: Sequence[Node]) -> Computed | None:
    """What the ``moe.experts`` of a block read that is not as it lies in the model; None if all of it is.

    Args:
        graph: The optimized block.
        inputs: The fx nodes that become the graph's arguments.
    """
    node_of = dict(zip(graph.args, inputs, strict=True))
    size, casts, starts = 0, True, []
    for op in graph.ops:
        if op.name not in ("moe.experts", SPREAD, BEGIN):
            continue
        for weight in dict.fromkeys((*op.group("up"), *op.group("down"))):
            source = peel(weight, _VIEWS)
            node = None if source.op is not None else nodes.peel(node_of[source], _VIEWS)
            if node is not None and node.op in ("placeholder", "get_attr"):
                continue
            size += _bytes(weight)
            casts = casts and _is_cast(source, node)
            starts += _leaves(source, node_of)
    return Computed(size, _names(starts), casts) if size else None


def _is_cast(source: Value, node: Node | None) -> bool:
    if node is not None:
        origin = nodes.peel(node, _VIEWS | _CASTS)
        return isinstance(origin, Node) and origin.op in ("placeholder", "get_attr")
    return function(source.op) in _CASTS and peel(source, _VIEWS | _CASTS).op is None


def _bytes(value: Value) -> int:
    t = value.type
    if not isinstance(t, TensorType) or not all(d.is_Integer for d in t.shape):
        return 1  # computed, of a size that is known only when it runs
    return max(1, math.prod(map(int, t.shape)) * t.dtype.bits // 8)


def _leaves(value: Value, node_of: dict[Value, Node]) -> list[Node]:
    """The fx nodes that an IR value is computed from."""
    found, seen, stack = [], set(), [value]
    while stack:
        v = stack.pop()
        if v in seen:
            continue
        seen.add(v)
        if v.op is None:
            found.append(node_of[v])
        else:
            stack.extend(v.op.operands)
    return found


def _names(starts: Sequence[Node]) -> tuple[str, ...]:
    """The model's own tensors that the nodes depend on; what is no parameter is named where there is none."""
    leaves: list[Node] = []
    seen: set[Node] = set()
    stack = list(reversed(starts))
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op in ("placeholder", "get_attr"):
            leaves.append(node)
        stack.extend(reversed(node.all_input_nodes))
    owned = [n for n in leaves if nodes.own_name(n) != n.name]
    return tuple(dict.fromkeys(_label(n) for n in owned or leaves))


def _label(node: Node) -> str:
    """The tensor's own name, or with the modules around it where it has a name that every layer has."""
    name = nodes.own_name(node)
    if name not in ("weight", "bias"):
        return name
    path = node.name.rsplit("_parameters_", 1)[0].split("_modules_")[-2:]
    return ".".join([*path, name])
