"""Shared experts on a torch-level graph: dense MLPs whose result is added to that of a MoE block on the same tokens.

A shared expert is a slice of its own. It stands beside its block's slice, not in it: what lies between the two (shapes,
scales, casts, a projection of the block's result) stays where it is, and one of them may be refused without the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch.fx import Node

from moec.slicing import nodes
from moec.slicing.cut import NotSliced, Refused, Slice, View, ancestors, close
from moec.slicing.plain import strange_operand

_DENSE = frozenset({"linear", "matmul", "__matmul__", "mm", "addmm"})
_ADDS = frozenset({"add", "add_", "iadd", "__add__", "__iadd__", "__radd__", "sub", "__sub__", "__rsub__"})
_PRODUCTS = frozenset({"mul", "__mul__", "__rmul__", "multiply"})
_SCALES = _PRODUCTS | {"mul_", "imul", "div", "div_", "truediv", "__truediv__"}
_STEPS = nodes.VIEWS | nodes.CASTS | _SCALES | _ADDS | {"view_as", "reshape_as"}
_ONWARD = _STEPS | {"sum"}
"""What may lie between a block's slice and the sum: the rows of a token's choices may still have to be added."""
_STOPS = nodes.GEMMS | nodes.TRANSPOSES | {"softmax", "scaled_dot_product_attention", "cumsum"}
"""Behind these, rows are no longer the rows of one MLP."""


def find_shared(view: View, blocks: Sequence[Slice]) -> list[Slice | NotSliced]:
    """The shared experts of ``blocks``, in the order of the blocks."""
    taken = {node for piece in blocks for node in piece.nodes}
    found: dict[Node, Slice | NotSliced] = {}
    for block in blocks:
        before = ancestors(block.end)
        for down in _added(block.end, before):
            ups = _feeders(down, before)
            if down in found or not any(nodes.peel(_rows(up), nodes.VIEWS) in before for up in ups):
                continue
            try:
                found[down] = _cut(view, down, ups, block.anchor, taken)
            except Refused as reason:
                found[down] = NotSliced(down, str(reason), beside=block.anchor)
    return list(found.values())


def _is_dense(node: Node) -> bool:
    """A product with one matrix for all rows."""
    return nodes.name(node) in _DENSE and nodes.dims(_weight(node)) == 2 and nodes.dims(_rows(node)) >= 2


def _rows(gemm: Node) -> Node | None:
    at = 1 if nodes.name(gemm) == "addmm" else 0
    rows = nodes.argument(gemm, at, "mat1" if at else "input")
    return rows if isinstance(rows, Node) else None


def _weight(gemm: Node) -> Node | None:
    name = nodes.name(gemm)
    at = 2 if name == "addmm" else 1
    weight = nodes.argument(gemm, at, {"linear": "weight", "matmul": "other"}.get(name, "mat2"))
    return weight if isinstance(weight, Node) else None


def _added(end: Node, before: Collection[Node]) -> Iterator[Node]:
    """The dense GEMMs whose results are added to the block's: scaled, cast, viewed or projected on the way, or not."""
    seen = {end}
    stack = [(end, True)]
    while stack:
        node, may_project = stack.pop()
        for user in node.users:
            projects = may_project and _is_dense(user) and _rows(user) is node
            if user in seen or not (nodes.name(user) in _ONWARD or projects):
                continue
            if nodes.name(user) in _ADDS:
                for other in user.all_input_nodes:
                    if other is not node:
                        yield from _behind(other, before)
            seen.add(user)
            stack.append((user, may_project and not projects))


def _behind(node: Node, before: Collection[Node]) -> Iterator[Node]:
    """The dense GEMMs that ``node`` is a sum of, as far as the block does not depend on them."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node in seen or node in before:
            continue
        seen.add(node)
        if _is_dense(node):
            yield node
        elif nodes.name(node) in _STEPS:
            stack.extend(node.all_input_nodes)


def _feeders(down: Node, before: Collection[Node]) -> list[Node]:
    """The dense GEMMs whose results reach the rows of ``down`` row by row."""
    found, seen, stack = [], set(), [_rows(down)]
    while stack:
        node = stack.pop()
        if node is None or node in seen or node in before:
            continue
        seen.add(node)
        if _is_dense(node):
            found.append(node)
        elif nodes.name(node) not in _STOPS and not nodes.is_gather(node) and not nodes.is_number(node):
            stack.extend(node.all_input_nodes)
    return found


def _cut(view: View, down: Node, ups: list[Node], block: Node, taken: Collection[Node]) -> Slice:
    """The slice from the tokens to the shared expert's result.

    Raises:
        Refused: It cannot be cut, or its weights are no parameters.
    """
    gemms = sorted({*ups, down}, key=view.order.__getitem__)
    for node in gemms:
        if (strange := strange_operand(node)) is not None:
            raise Refused(strange)
        weight = nodes.peel(_weight(node), nodes.VIEWS | nodes.TRANSPOSES | nodes.CASTS | nodes.PARTS)
        if not isinstance(weight, Node) or weight.op not in ("placeholder", "get_attr"):
            raise Refused(f"a weight of the dense MLP, {weight}, is no parameter but computed in every call")
    out, factor = _result(down)
    if out in taken:
        out, factor = down, None
    given = [node for node in (*map(_rows, ups), factor) if node is not None]
    outside = {node for start in given for node in ancestors(start)}
    piece = close(view, down, out, set(gemms), outside)
    if (both := next((node for node in piece.nodes if node in taken), None)) is not None:
        raise Refused(f"{both.name} of the dense MLP is part of the block too")
    piece.beside = block
    return piece


def _result(down: Node) -> tuple[Node, Node | None]:
    """The MLP's result, and the factor of each token that it is multiplied with, if that is all that follows it."""
    node = down
    while len(node.users) == 1 and nodes.name(next(iter(node.users))) in nodes.VIEWS:
        node = next(iter(node.users))
    if len(node.users) != 1 or nodes.name(product := next(iter(node.users))) not in _PRODUCTS:
        return down, None
    other = next((a for a in product.args if a is not node), None)
    v = nodes.value(other)
    if not isinstance(other, Node) or nodes.dims(other) != nodes.dims(node) or v.shape[-1] != 1:
        return down, None
    return product, other
