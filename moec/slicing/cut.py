"""Anchored slicing: from an expert GEMM to the set of nodes that is one MoE block.

The contract:
1. A slice holds the nodes from router logits and token rows to the combined output. It is convex: no path leaves it
   and comes back. What it takes in are ``inputs``, what is used outside are ``outputs``.
2. Everything that writes memory of the slice is in the slice, and nothing in the slice writes memory from outside.
3. A block that cannot be cut so is a ``NotSliced`` with its reason; its nodes are left alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from torch.fx import Graph, Node

from moec.slicing import nodes
from moec.slicing.anchors import Anchor
from moec.slicing.plain import strange_operand, strange_weight


@dataclass
class Slice:
    """One block.

    Attributes:
        anchor: The down GEMM.
        nodes: The slice, in graph order.
        inputs: Nodes from outside that it uses, in order of first use.
        outputs: Nodes of it that are used outside.
        end: The node that it ends with: what replaces the slice stands behind it.
        checks: Asserts about sizes of the slice's inner tensors, with what only they use; they go with the slice.
        beside: The anchor of the block that it is a shared expert of, or None for a block.
        joined: It is a block and its shared expert.
        parts: The micro-batches' blocks that it was joined of (:mod:`moec.slicing.together`); () for one block.
    """

    anchor: Node
    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]
    end: Node
    checks: list[Node] = field(default_factory=list)
    beside: Node | None = None
    joined: bool = False
    parts: tuple[Slice, ...] = ()


@dataclass
class NotSliced:
    """A block or shared expert that stays as it is: its down (or only) GEMM, why, and ``beside`` as of a slice."""

    anchor: Node
    reason: str
    beside: Node | None = None


class Refused(Exception):
    """The block cannot be cut; ``str`` is the reason."""


class _UsedEarly(Refused):
    """A value of the block is used outside before the block ends."""

    def __init__(self, node: Node) -> None:
        super().__init__(f"{node.name}, inside the block, is used before the block ends")
        self.node = node


class _ModeChange(Refused):
    """Grad mode or autocast changes inside the block, at ``position`` of the graph."""

    def __init__(self, mode: str, position: int) -> None:
        super().__init__(f"{mode} is called inside the block: its parts run in different modes")
        self.position = position


@dataclass
class View:
    """A graph with the look-ups that slicing needs, made once."""

    graph: Graph
    order: dict[Node, int] = field(default_factory=dict)
    writers: dict[Node, list[Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, node in enumerate(self.graph.nodes):
            self.order[node] = i
            for written in nodes.mutated(node):
                self.writers.setdefault(written, []).append(node)

    @cached_property
    def modes(self) -> list[tuple[int, str]]:
        """Positions at which grad mode or autocast changes."""
        return [
            (i, nodes.name(n))
            for n, i in self.order.items()
            if nodes.name(n).startswith(("_set_grad", "_enter", "_exit"))
        ]

    @cached_property
    def spans(self) -> dict[int, tuple[int, int]]:
        """First and last position of every mode that is entered and left again, by either of them."""
        found = {}
        for n, i in self.order.items():
            if nodes.name(n).startswith("_exit") and n.args and n.args[0] in self.order:
                start = self.order[n.args[0]]  # type: ignore[index]
                found[start] = found[i] = (start, i)
        return found


def _reduction(view: View, down: Node) -> Node:
    """The combined output: the first sum per token after the down GEMM, with the cast that follows it."""
    queue, seen, sums = deque([down]), {down}, []
    while queue:
        node = queue.popleft()
        for user in node.users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            if nodes.name(user) in nodes.SUMS and nodes.dims(user) == 2:
                sums.append(user)
            elif not nodes.is_number(user) and nodes.name(user) not in nodes.GEMMS:
                queue.append(user)
    out = min(sums, key=view.order.__getitem__) if sums else _last_of_rows(down)
    users = list(out.users)
    if len(users) == 1 and nodes.name(users[0]) in nodes.CASTS:
        out = users[0]
    return out


def _last_of_rows(down: Node) -> Node:
    """Where one expert per token needs no sum: the last product or reordering of the down GEMM's rows."""
    node, out = down, None
    while len(node.users) == 1:
        (user,) = node.users
        reorders = nodes.is_gather(user) and nodes.argument(user, 0, "input") is node
        if not reorders and nodes.name(user) not in nodes.VIEWS | nodes.CASTS | {"mul"}:
            break
        node = user
        if nodes.dims(node) == 2 and (reorders or nodes.name(node) == "mul"):
            out = node
    if out is None:
        raise Refused("the expert rows are not added per token")
    return out


def _token_rows(up: Anchor) -> Node:
    """The tensor whose rows the up GEMM gathers."""
    gather = nodes.peel(up.rows, nodes.VIEWS | nodes.CASTS)
    if not isinstance(gather, Node):
        raise Refused("the rows of the up GEMM are not gathered from token rows")
    source = nodes.argument(gather, 0, "input") if nodes.is_gather(gather) else gather
    source = nodes.peel(source, frozenset({"unsqueeze"}))
    if not isinstance(source, Node):
        raise Refused("the rows of the up GEMM are not gathered from token rows")
    return source


def ancestors(start: Node) -> set[Node]:
    seen = {start}
    stack = [start]
    while stack:
        for parent in stack.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return seen


def _is_border(node: Node, block: set[Node], outside: set[Node]) -> bool:
    """True where a slice ends: at what the block is given rather than what it computes."""
    if node in block:
        return False
    if node.op in ("placeholder", "get_attr") or node in outside:
        return True
    if nodes.name(node) == "getitem" and nodes.is_bundle(node.args[0]):
        return _is_border(node.args[0], block, outside)  # type: ignore[arg-type]
    return nodes.name(node) in nodes.GEMMS or nodes.has_effect(node) or strange_operand(node) is not None


def _closure(view: View, out: Node, anchors: set[Node], outside: set[Node]) -> set[Node]:
    """Everything that ``out`` depends on up to the border, with the writers of what is read."""
    chosen: set[Node] = set()
    stack = [out]
    last = view.order[out]
    while stack:
        node = stack.pop()
        if node in chosen:
            continue
        if _is_border(node, anchors, outside):
            if any(last >= view.order[w] > view.order[node] and w in chosen for w in view.writers.get(node, ())):
                raise Refused(f"{node.name}, which comes from outside the block, is overwritten inside it")
            continue
        chosen.add(node)
        stack.extend(node.all_input_nodes)
        stack.extend(w for w in view.writers.get(node, ()) if view.order[w] <= last)
    return chosen


def _drop_numbers(view: View, chosen: set[Node]) -> None:
    """Numbers computed from what is outside come in as inputs: others may use them too."""
    for node in sorted(chosen, key=view.order.__getitem__):
        if nodes.is_number(node) and not any(a in chosen for a in node.all_input_nodes):
            chosen.discard(node)


def _check(view: View, chosen: set[Node], out: Node, checks: Collection[Node]) -> None:
    first, last = min(view.order[n] for n in chosen), view.order[out]
    for node in chosen:
        for written in nodes.mutated(node):
            if written not in chosen:
                raise Refused(f"{written.name}, which comes from outside the block, is overwritten inside it")
        if nodes.has_effect(node):
            raise Refused(f"{nodes.name(node)} inside the block has an effect that must keep its place")
        if view.order[node] > last and node.users:
            raise Refused(f"{node.name} of the block comes after its output")
        for user in node.users:
            if user in chosen or user in checks or node is out:
                continue
            if view.order[user] < last and user.op != "output":
                raise _UsedEarly(node)
            if any(view.order[w] > view.order[user] for w in view.writers.get(node, ())):
                raise Refused(f"{node.name} is read outside the block before it is overwritten inside")
    check_writes(view, chosen, first, last)
    places = [view.order[n] for n in chosen]
    for position, mode in view.modes:
        start, stop = view.spans.get(position, (first, last))
        if first < position < last and max(places) > position and any(start < place < stop for place in places):
            raise _ModeChange(mode, position)


def check_writes(view: View, chosen: set[Node], first: int, last: int, behind: Collection[Node] = ()) -> None:
    """Refuse if memory that the slice shares with the rest is written to between its first and last node.

    Nodes in ``behind`` do not count: they will have been moved behind it.

    Raises:
        Refused: It is.
    """
    made = {nodes.memory(n) for n in chosen if n.op in ("call_function", "call_method")}
    given = {nodes.memory(a) for n in chosen for a in n.all_input_nodes if a not in chosen}
    for written, writers in view.writers.items():
        where = nodes.memory(written)
        for writer in writers:
            if not first <= view.order[writer] <= last or where is None or writer in behind:
                continue
            if where in given or (writer not in chosen and where in made):
                raise Refused(f"{written.name}, whose memory the block reads, is overwritten while the block runs")


def _broken(down: Node, out: Node, block: set[Node]) -> str:
    """Why the closure of ``out`` does not hold all GEMMs: something between them stays where it is."""
    for node in ancestors(out):
        if node in block:
            continue
        if nodes.has_effect(node) and ancestors(node) & block:
            return f"{nodes.name(node)} inside the block has an effect that must keep its place"
        if (strange := strange_operand(node)) is not None and ancestors(node) & block:
            return strange
    return f"the sum per token does not depend on all of the block's expert GEMMs, such as {down.name}"


def cut(view: View, down: Anchor, ups: list[Anchor]) -> Slice:
    block = {down.node, *(u.node for u in ups)}
    for node in sorted(block, key=view.order.__getitem__):
        if (strange := strange_weight(node)) is not None:
            raise Refused(strange)
    out = _reduction(view, down.node)
    outside: set[Node] = set()
    for up in ups:
        outside |= ancestors(_token_rows(up))
    return close(view, down.node, out, block, outside)


def close(
    view: View, anchor: Node, out: Node, block: set[Node], outside: set[Node], checks: Collection[Node] = ()
) -> Slice:
    """The slice from ``out`` back to what the block is given.

    Args:
        view: The graph.
        anchor: The node that names the slice.
        out: Its last node.
        block: What must be in it.
        outside: What may not be in it; grown where a value of the router is used early.
        checks: What goes with it.

    Raises:
        Refused: There is no such slice.
    """
    while True:
        chosen = _closure(view, out, block, outside)
        if not block <= chosen:
            raise Refused(_broken(anchor, out, block))
        _drop_numbers(view, chosen)
        chosen |= {
            u for n in chosen for u in n.users if not u.users and nodes.name(u) == "getitem"
        }  # nested: dead ones
        try:
            _check(view, chosen, out, checks)
        except _UsedEarly as early:
            before = ancestors(early.node)
            if before & block:
                raise
            outside |= before  # part of the router: the block begins after it
            continue
        except _ModeChange as change:
            before = {n for n in chosen if view.order[n] < change.position}
            if before & block:
                raise
            outside |= before  # part of the router, such as a choice of experts without gradients
            continue
        break
    ordered = sorted(chosen, key=view.order.__getitem__)
    inputs = list(dict.fromkeys(a for n in ordered for a in n.all_input_nodes if a not in chosen))
    bundle = next((n for n in inputs if nodes.is_bundle(n)), None)
    if bundle is not None:
        raise Refused(f"{bundle.name}, a tuple of tensors, enters the block as a whole")
    gone = {*chosen, *checks}
    used = [n for n in ordered if any(u not in gone for u in n.users)]
    outputs = sorted(used, key=lambda n: n is not out)  # the combined output first
    return Slice(anchor, ordered, inputs, outputs, out, sorted(checks, key=view.order.__getitem__))
