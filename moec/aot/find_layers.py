"""Which nodes of a program are a layer: what lies between the first and the last node of a numbered module."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

import torch

from moec.aot.memory import acts_outside, origin, written

Node = torch.fx.Node


def find_layers(graph: torch.fx.Graph) -> list[list[Node]]:
    """The nodes of every layer; whatever stands between them is its own."""
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    ends: dict[str, list[int]] = {}
    for at, node in enumerate(nodes):
        name = _layer_name(node)
        if name is not None:
            ends.setdefault(name, [at, at])[1] = at
    spans = [*sorted(ends.values()), [len(nodes), len(nodes)]]
    # Of layers whose nodes are mixed, those that end before the next one begins: no node is in two of them.
    return [nodes[first : last + 1] for (first, last), (after, _) in pairwise(spans) if last < after]


def _layer_name(node: Node) -> str | None:
    """The outermost module around a node whose name ends in a number."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if str(path).rpartition(".")[2].isdecimal():
            return str(path)
    return None


def hoist(layers: list[list[Node]], lent: Collection[str]) -> None:
    """Move out what one layer makes for several others, such as a form of the rotary embedding's cosines."""
    owner = {node: i for i, nodes in enumerate(layers) for node in nodes}
    for i, nodes in enumerate(layers):
        wanted = [n for n in nodes if len({owner.get(u) for u in n.users} - {i, None}) > 1]
        moved: set[Node] = set()
        while wanted:
            node = wanted.pop()
            if node not in moved:
                moved.add(node)
                wanted += [n for n in node.all_input_nodes if owner.get(n) == i]
        inside = set(nodes)
        changed = {origin(w) for n in nodes for w in written(n)}
        read = {origin(given) for n in moved for given in (n, *n.all_input_nodes)}
        if not moved or moved == inside or read & changed or any(acts_outside(n, inside, lent) for n in nodes):
            continue
        rest = [n for n in nodes if n not in moved]
        for node in nodes:
            if node in moved:
                rest[0].prepend(node)
        nodes[:] = rest
