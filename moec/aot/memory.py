"""Whose memory the nodes of a graph write into."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch

Node = torch.fx.Node


def written(node: Node) -> list[Node]:
    """What a node writes into."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    given = {a.name: value for a, value in zip(arguments, node.args, strict=False)} | node.kwargs
    found: list[Node] = []
    torch.fx.map_arg([given[a.name] for a in arguments if a.is_write and a.name in given], found.append)
    return found


def origin(node: Node) -> Node:
    """The node that made the memory of a tensor: views and writes only pass it on."""
    while node.args and isinstance(node.args[0], Node) and shares(node):
        node = node.args[0]
    return node


def shares(node: Node) -> bool:
    """Whether the result of a node may be its first argument's memory."""
    made = node.args[0] if node.target is operator.getitem else node
    schema = getattr(made.target, "_schema", None) if isinstance(made, Node) else None
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def acts_outside(node: Node, inside: Collection[Node], lent: Collection[str]) -> bool:
    """Whether a node is no call of an op, or writes into memory that others see while the program runs.

    Args:
        node: One of ``inside``.
        inside: Nodes that stand together.
        lent: Names of placeholders for memory that the caller lends, each of its own.
    """
    known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    return not known or not all(_seen_inside(origin(n), inside, lent) for n in written(node))


def _seen_inside(node: Node, inside: Collection[Node], lent: Collection[str]) -> bool:
    """Whether only nodes inside read or write the memory that a node made; sizes are no part of it."""
    if node.op != "placeholder":
        return node in inside
    size = torch.ops.aten.sym_size.int
    return node.name in lent and all(u in inside or u.target is size for u in node.users)
