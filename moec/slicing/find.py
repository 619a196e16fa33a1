"""All slices of a graph: blocks with grouped GEMMs, loops over experts, and the shared experts beside them."""

from __future__ import annotations

from torch.fx import Graph, Node

from moec.passes.raise_moe.refusal import LONE
from moec.slicing.anchors import feeders, find_anchors
from moec.slicing.cut import NotSliced, Refused, Slice, View, cut
from moec.slicing.cut_loop import cut_loop
from moec.slicing.dense import find_dense
from moec.slicing.loops import find_loops
from moec.slicing.shared import find_shared


def find_slices(graph: Graph) -> list[Slice | NotSliced]:
    """The MoE blocks of a torch-level fx graph, in order; behind them their shared experts."""
    anchors, loops = find_anchors(graph), [*find_loops(graph), *find_dense(graph)]
    if not anchors and not loops:
        return []
    view = View(graph)
    found: list[Slice | NotSliced] = []
    told: set[Node] = set()
    for anchor in anchors.values():
        ups = feeders(anchor, anchors)
        if not ups:
            continue
        told |= {anchor.node, *(u.node for u in ups)}
        try:
            found.append(cut(view, anchor, ups))
        except Refused as reason:
            found.append(NotSliced(anchor.node, str(reason)))
    for loop in loops:
        try:
            found.append(cut_loop(view, loop))
        except Refused as reason:
            found.append(NotSliced(loop.last, str(reason)))
    found.sort(key=lambda piece: view.order[piece.anchor])
    lone = [NotSliced(node, LONE) for node in anchors if node not in told]
    return [*found, *lone, *find_shared(view, [piece for piece in found if isinstance(piece, Slice)])]
