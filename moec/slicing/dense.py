"""Anchors of loops that run every expert on every token: ``out = out + gates[:, e:e+1] * expert(x)``."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from moec.slicing import nodes
from moec.slicing.loops import Loop

_ADDS = frozenset({"add", "add_", "iadd", "__add__", "__iadd__", "__radd__"})
_PRODUCTS = frozenset({"mul", "__mul__", "__rmul__", "multiply"})
_COLUMNS = frozenset({"getitem", "__getitem__", "select", "narrow", "unbind", "split", "chunk"})


def _is_column(node: Any) -> bool:
    """True for ``[T, 1]`` cut out of a matrix."""
    v = nodes.value(node)
    if not isinstance(v, torch.Tensor) or v.dim() != 2 or not isinstance(v.shape[1], int) or v.shape[1] != 1:
        return False
    picked = nodes.peel(node, nodes.VIEWS | nodes.CASTS)
    while isinstance(picked, Node) and nodes.name(picked) in _COLUMNS and not nodes.is_gather(picked):
        picked = picked.args[0]
        if nodes.dims(picked) == 2:
            return nodes.value(picked).dtype.is_floating_point
    return False


def _is_term(node: Any) -> bool:
    """True for a product with one expert's column of gates."""
    product = nodes.peel(node, nodes.CASTS)
    if not isinstance(product, Node) or nodes.name(product) not in _PRODUCTS or nodes.dims(product) != 2:
        return False
    return any(_is_column(a) for a in product.args[:2])


def _sums(graph: Graph) -> list[tuple[Loop, list[Node]]]:
    """The running sums with their terms."""
    by_memory: dict[int, tuple[Loop, list[Node]]] = {}
    found: dict[int, tuple[Loop, list[Node]]] = {}
    for node in graph.nodes:
        if nodes.name(node) not in _ADDS or len(node.args) < 2:
            continue
        for before, added in (node.args[:2], node.args[1::-1]):
            if not _is_term(added):
                continue
            begun = nodes.memory(before)
            entry = by_memory.get(begun) if begun is not None else None
            if entry is None:
                entry = Loop(), [before] if _is_term(before) else []
            loop, terms = entry
            loop.steps.append(node)
            terms.append(added)
            loop.sums.update(n for n in (before, node) if isinstance(n, Node) and n not in terms)
            for where in (begun, nodes.memory(node)):
                if where is not None:
                    by_memory[where] = entry
            found[id(loop)] = entry
            break
    return [(loop, terms) for loop, terms in found.values() if len(terms) > 1]


def find_dense(graph: Graph) -> list[Loop]:
    """The loops of a torch-level graph that run every expert on every token, in order."""
    loops = _sums(graph)
    owner = {term: (i, j) for i, (_, terms) in enumerate(loops) for j, term in enumerate(terms)}
    if not owner:
        return []
    for node in reversed(graph.nodes):
        of = {owner.get(user) for user in node.users}
        if node not in owner and len(of) == 1 and (mine := of.pop()) is not None:
            owner[node] = mine  # what only one term uses is that term's
    for node, (i, _) in owner.items():
        loop = loops[i][0]
        loop.block.add(node)
        if nodes.name(node) in nodes.GEMMS:
            rows = nodes.argument(node, 0, "input")
            if isinstance(rows, Node) and rows not in owner and rows not in loop.rows:
                loop.rows.append(rows)
    for loop, _ in loops:
        loop.block = {n for n in loop.block if n.op in ("call_function", "call_method")} | set(loop.steps)
    return [loop for loop, _ in loops if loop.rows]
