"""A block and its shared expert as one slice, so that a pass sees both, where they can stand in one place.

Passes that compute a shared expert while its block's rows travel need the two in one graph. They were cut one by one,
so each may be replaced alone. Together they stand where the second of them ends; what makes a view of the first one's
result, or scales it, goes behind that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from moec.slicing import nodes
from moec.slicing.cut import Refused, Slice, View, ancestors, check_writes

_MOVED = nodes.VIEWS | nodes.CASTS | {"mul", "__mul__", "__rmul__", "div", "truediv", "__truediv__"}


@dataclass(frozen=True)
class Joined:
    """Both as one.

    Attributes:
        piece: The slice: the block's outputs first, the shared expert's last.
        shared: The shared expert alone.
        first: Of the two, the one that ends first.
        behind: Nodes that have to go behind the end, in their order.
    """

    piece: Slice
    shared: Slice
    first: Slice
    behind: tuple[Node, ...]

    def shared_inputs(self) -> list[Node]:
        """What the first of the two is given and others read too; its gradient is a sum, taken in some order."""
        own = set(self.first.nodes)
        return [n for n in self.first.inputs if _is_float(n) and any(u not in own for u in n.users)]


def join(view: View, block: Slice, shared: Slice) -> Joined:
    """The two as one slice. The graph stays as it is.

    Raises:
        Refused: They depend on each other, or there is no place for both.
    """
    if len(shared.outputs) != 1:
        raise Refused("something inside the shared expert is used elsewhere")
    for one, other in ((block, shared), (shared, block)):
        before = {a for n in one.inputs for a in ancestors(n)}
        if before & set(other.nodes):
            raise Refused("the block and its shared expert depend on each other")
    first, last = sorted((block, shared), key=lambda piece: view.order[piece.end])
    behind = _users_before(view, first, last)
    chosen = {*block.nodes, *shared.nodes}
    ordered = sorted(chosen, key=view.order.__getitem__)
    span = view.order[ordered[0]], max(view.order[ordered[-1]], view.order[last.end])
    check_writes(view, chosen, *span)
    if any(span[0] < position < span[1] for position, _ in view.modes):
        raise Refused("grad mode or autocast changes between the block and its shared expert")
    inputs = list(dict.fromkeys([*block.inputs, *shared.inputs]))
    checks = [*block.checks, *shared.checks]
    outputs = [*block.outputs, *shared.outputs]
    piece = Slice(block.anchor, ordered, inputs, outputs, last.end, checks, joined=True)
    return Joined(piece, shared, first, tuple(behind))


def _users_before(view: View, first: Slice, last: Slice) -> list[Node]:
    """What uses the results of ``first`` and stands before the end of ``last``.

    Raises:
        Refused: It is more than a function of these results alone, so that the order of other things might change.
    """
    end, inside = view.order[last.end], {*first.nodes, *first.checks, *last.nodes, *last.checks}
    found: dict[Node, None] = {}
    stack = list(first.outputs)
    while stack:
        for user in stack.pop().users:
            if user not in inside and user not in found and view.order[user] < end:
                found[user] = None
                stack.append(user)
    made = {*first.outputs, *found}
    for node in found:
        others = [a for a in node.all_input_nodes if a not in made and not nodes.is_number(a)]
        if others or nodes.name(node) not in _MOVED or node in view.writers:
            raise Refused(f"{node.name} uses the one and stands before the other")
    return sorted(found, key=view.order.__getitem__)


def _is_float(node: Node) -> bool:
    value = nodes.value(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()
