"""From a loop over experts to the set of nodes that is one MoE block."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from moec.slicing import nodes
from moec.slicing.cut import Refused, Slice, View, ancestors, close
from moec.slicing.loops import Loop
from moec.slicing.plain import strange_operand


def _only(users: Iterable[Node]) -> Node | None:
    found = list(users)
    return found[0] if len(found) == 1 else None


def _end(view: View, loop: Loop) -> Node:
    """The last step, or what is all that follows it: a cast, or a weighted sum of the rows of each token's choices."""
    last = view.order[loop.last]
    end = loop.last
    node = follower = _only({u for total in loop.sums for u in total.users if view.order[u] > last})
    while node is not None and nodes.name(node) in nodes.VIEWS | {"mul"}:
        node = _only(node.users)
    if node is not None and nodes.name(node) == "sum" and nodes.dims(node) == 2:
        end, follower = node, _only(node.users)
    return follower if follower is not None and nodes.name(follower) in nodes.CASTS else end


def cut_loop(view: View, loop: Loop) -> Slice:
    """The slice of ``loop``: from the router's scores and the token rows to the sum.

    Raises:
        Refused: It cannot be cut, or something of one expert is used elsewhere.
    """
    for node in sorted(loop.block, key=view.order.__getitem__):
        if (strange := strange_operand(node)) is not None:
            raise Refused(strange)
    repeats = frozenset({"repeat_interleave"})  # of every token for each of its choices
    outside = {node for rows in loop.rows for node in ancestors(nodes.peel(rows, repeats))}
    piece = close(view, loop.last, _end(view, loop), loop.block, outside, loop.checks)
    leak = next((n for n in piece.outputs if n in loop.block and n not in loop.sums), None)
    if leak is not None:
        raise Refused(f"{leak.name}, computed for one expert of the loop, is used after it")
    return piece
