"""From a loop over experts to the set of nodes that is one MoE block."""

from __future__ import annotations

from torch.fx import Node

from moec.slicing import nodes
from moec.slicing.cut import Refused, Slice, View, ancestors, close
from moec.slicing.loops import Loop
from moec.slicing.plain import strange_operand


def _end(view: View, loop: Loop) -> Node:
    """The last step, or the cast that is all that follows it."""
    last = view.order[loop.last]
    after = {u for total in loop.sums for u in total.users if view.order[u] > last}
    user = after.pop() if len(after) == 1 else None
    return user if user is not None and nodes.name(user) in nodes.CASTS else loop.last


def cut_loop(view: View, loop: Loop) -> Slice:
    """The slice of ``loop``: from the router's scores and the token rows to the sum.

    Raises:
        Refused: It cannot be cut, or something of one expert is used elsewhere.
    """
    for node in sorted(loop.block, key=view.order.__getitem__):
        if (strange := strange_operand(node)) is not None:
            raise Refused(strange)
    outside = {node for rows in loop.rows for node in ancestors(rows)}
    piece = close(view, loop.last, _end(view, loop), loop.block, outside, loop.checks)
    leak = next((n for n in piece.outputs if n in loop.block and n not in loop.sums), None)
    if leak is not None:
        raise Refused(f"{leak.name}, computed for one expert of the loop, is used after it")
    return piece
