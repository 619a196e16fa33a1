"""Blocks whose shared experts are computed inside them: which, and how their gradients keep their sums' order.

Where experts are spread over ranks and rows travel while something is computed, a shared expert is compiled with its
block (:mod:`moec.slicing.join`), so that ``carry-shared-experts`` sees both. If that comes to nothing, each is compiled
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from moec.ir.core import Graph
from moec.options import CompileOptions
from moec.pipeline import carries
from moec.slicing import NotSliced, Slice
from moec.slicing import nodes as fx_nodes
from moec.slicing.cut import Refused, View
from moec.slicing.join import Joined, join

_UNSHARD = "unshard"
_SPREAD = "moe.parallel_experts"


def find_joined(
    gm: GraphModule, pieces: Sequence[Slice | NotSliced], options: CompileOptions
) -> dict[Node, Joined | Refused]:
    """Blocks that should be compiled with their shared expert, by their anchors; or why they cannot.

    Args:
        gm: The graph that ``pieces`` were found in, as it was then.
        pieces: Its slices.
        options: The caller's.
    """
    found: dict[Node, Joined | Refused] = {}
    blocks = {p.anchor: p for p in pieces if isinstance(p, Slice) and p.beside is None and _may(p, options)}
    view = View(gm.graph) if blocks else None
    for piece in pieces:
        if view is None or not isinstance(piece, Slice) or piece.beside not in blocks or piece.beside in found:
            continue
        try:
            found[piece.beside] = join(view, blocks[piece.beside], piece)
        except Refused as reason:
            found[piece.beside] = reason
    return found


def _may(piece: Slice, options: CompileOptions) -> bool:
    """Whether a pass would compute something while the block's rows travel."""
    groups = dict.fromkeys(str(n.args[2]) for n in piece.nodes if fx_nodes.name(n) == _UNSHARD and len(n.args) > 2)
    return bool(groups) and carries(options, list(groups))


def carried(graph: Graph) -> bool:
    """Whether the shared expert is inside the block, in the optimized graph of both."""
    return any(op.name == _SPREAD and len(op.results) > 1 for op in graph.ops)


def lend(gm: GraphModule, joined: Joined) -> list[Node]:
    """Let what the first of the two is given come from where that stands: aliases there, and nothing else changes.

    A gradient that several users of a tensor contribute to is added up in the order of these users. As one op the two
    would stand in one place.
    """
    piece, made = joined.piece, []
    with gm.graph.inserting_before(joined.first.end.next):
        for node in joined.shared_inputs():
            alias = gm.graph.call_function(torch.ops.aten.alias.default, (node,))
            alias.meta = {
                k: node.meta[k] for k in ("example_value", "nn_module_stack", "stack_trace") if k in node.meta
            }
            for inside in joined.first.nodes:
                inside.replace_input_with(node, alias)
            made.append(alias)
    own = set(piece.nodes)
    piece.inputs[:] = list(dict.fromkeys(a for n in piece.nodes for a in n.all_input_nodes if a not in own))
    return made


def take_back(gm: GraphModule, aliases: Sequence[Node]) -> None:
    """Undo :func:`lend`."""
    for alias in aliases:
        alias.replace_all_uses_with(alias.all_input_nodes[0])
        gm.graph.erase_node(alias)


def make_way(joined: Joined) -> None:
    """Move behind both what has to be there."""
    place = joined.piece.end
    for node in joined.behind:
        place.append(node)
        place = node
