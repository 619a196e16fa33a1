"""Anchors on a torch-level graph: the calls that can only be expert GEMMs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload
from torch.fx import Graph, Node

from moec.slicing import nodes

GROUPED = frozenset({"_grouped_mm", "grouped_mm", "grouped_mm_fallback"})
OWN = frozenset({"moec::grouped_linear", "moec::scaled_linear"})


@dataclass(frozen=True)
class Anchor:
    """One expert GEMM: its node and the node of its rows."""

    node: Node
    rows: Any


def _indexed_weight(operand: Any) -> bool:
    """True for ``W[ids]`` with a 3-D ``W`` and one index per row, seen through views and transpositions."""
    picked = nodes.peel(operand, nodes.VIEWS | nodes.TRANSPOSES | nodes.CASTS)
    if not isinstance(picked, Node) or not nodes.is_gather(picked):
        return False
    if nodes.name(picked) not in ("getitem", "__getitem__", "index", "index_select"):
        return False
    by_select = nodes.name(picked) == "index_select"
    index = nodes.argument(picked, 2, "index") if by_select else nodes.argument(picked, 1, "indices")
    if isinstance(index, (tuple, list)):
        index = index[0] if len(index) == 1 else None
    return nodes.dims(nodes.argument(picked, 0, "input")) == 3 and nodes.dims(index) == 1 and nodes.is_index(index)


def _anchor(node: Node) -> Anchor | None:
    called = nodes.name(node)
    if called in GROUPED:
        return Anchor(node, nodes.argument(node, 0, "input"))
    if isinstance(node.target, OpOverload) and node.target._schema.name in OWN:
        return Anchor(node, nodes.argument(node, 0, "rows"))
    if called == "bmm":
        pair = nodes.argument(node, 0, "input"), nodes.argument(node, 1, "mat2")
        for i in (0, 1):
            if _indexed_weight(pair[i]):
                return Anchor(node, pair[1 - i])
    return None


def find_anchors(graph: Graph) -> dict[Node, Anchor]:
    """The expert GEMMs of a graph, in order."""
    found = {}
    for node in graph.nodes:
        if (anchor := _anchor(node)) is not None:
            found[node] = anchor
    return found


def feeders(anchor: Anchor, anchors: dict[Node, Anchor]) -> list[Anchor]:
    """The expert GEMMs whose results reach ``anchor``'s rows without a gather in between."""
    found, seen, stack = [], set(), [anchor.rows]
    while stack:
        node = stack.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if node in anchors:
            found.append(anchors[node])
        elif not nodes.is_gather(node) and not nodes.is_number(node):
            stack.extend(node.all_input_nodes)
    return found
