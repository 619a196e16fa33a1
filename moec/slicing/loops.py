"""Anchors of MoE layers written as a Python loop over experts.

A loop shows itself by its running sum: ``out.index_add_(0, token, rows)``, ``out[token] += rows`` and their like, once
for every expert. What depends on a step's tokens is that expert's; Dynamo gives it sizes that nobody knows (``u0``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from moec.slicing import nodes

_STEPS = frozenset({"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_", "setitem"})
_COORDINATES = frozenset({"where", "nonzero", "argwhere", "nonzero_numpy"})
_PARTS = nodes.VIEWS | nodes.TRANSPOSES | {"getitem", "unbind", "select", "expand", "expand_as"}
_COMPARED = _COORDINATES | {"eq", "__eq__", "getitem"}


@dataclass
class Loop:
    """The steps of one running sum.

    Attributes:
        steps: The calls that add to it, in order.
        sums: Every node that stands for the sum.
        block: The calls that are the experts', with the steps.
        rows: The tensors whose rows they take.
        checks: Asserts about how many tokens they take, with what only those use.
    """

    steps: list[Node] = field(default_factory=list)
    sums: set[Node] = field(default_factory=set)
    block: set[Node] = field(default_factory=set)
    rows: list[Node] = field(default_factory=list)
    checks: set[Node] = field(default_factory=set)

    @property
    def last(self) -> Node:
        return self.steps[-1]


def _is_index(node: Node) -> bool:
    """True for what picks rows: integers, or a mask."""
    v = nodes.value(node)
    return isinstance(v, torch.Tensor) and not v.dtype.is_floating_point and not v.dtype.is_complex and v.dim() > 0


def _indices(step: Node) -> list[Node]:
    """The tensors that say to which rows a step adds."""
    at = 2 if nodes.name(step).startswith(("index_add", "scatter_add")) else 1
    index = nodes.argument(step, at, "index" if at == 2 else "indices")
    parts = index if isinstance(index, (tuple, list)) else (index,)
    return [p for p in parts if isinstance(p, Node) and _is_index(p)]


def _source(index: Node) -> Node:
    """The call that found the tokens of ``index``; itself if no search did."""
    node: Any = index
    while isinstance(node, Node):
        if nodes.name(node) in _COORDINATES:
            return node
        if nodes.name(node) not in _PARTS:
            break
        node = nodes.argument(node, 0, "input")
    return index


def _equals(graph: Graph) -> dict[Node, Node]:
    """For a mask, or a search in one, the first node that computes the same."""
    first: dict[Any, Node] = {}
    same: dict[Node, Node] = {}
    for node in graph.nodes:
        if nodes.name(node) in _COMPARED and not node.kwargs and all(isinstance(a, (Node, int)) for a in node.args):
            key = node.target, tuple(same.get(a, a) if isinstance(a, Node) else a for a in node.args)
            same[node] = first.setdefault(key, node)
    return same


def _find_sums(graph: Graph) -> list[Loop]:
    by_memory: dict[int, Loop] = {}
    found: dict[int, Loop] = {}
    for node in graph.nodes:
        if nodes.name(node) not in _STEPS or not _indices(node):
            continue
        target = nodes.argument(node, 0, "input")
        where = nodes.memory(target)
        if not isinstance(target, Node) or where is None or nodes.dims(target) != 2:
            continue
        loop = by_memory.setdefault(where, Loop())
        found[id(loop)] = loop
        loop.steps.append(node)
        loop.sums.add(target)
        result = nodes.memory(node)
        if result is not None:
            loop.sums.add(node)
            by_memory[result] = loop
    return [loop for loop in found.values() if len(loop.steps) > 1]


def _takes_rows(node: Node, inside: set[Node]) -> Node | None:
    """The matrix outside whose rows ``node`` picks."""
    if nodes.name(node) not in ("getitem", "__getitem__", "index", "index_select"):
        return None
    source = nodes.argument(node, 0, "input")
    return source if isinstance(source, Node) and source not in inside and nodes.dims(source) == 2 else None


def _rows(gemms: list[Node], inside: set[Node]) -> Iterator[Node]:
    """The matrices whose rows reach ``gemms``."""
    seen: set[Node] = set()
    stack = [a for g in gemms for a in g.all_input_nodes if a in inside]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        source = _takes_rows(node, inside)
        if source is not None:
            yield source
        else:
            stack.extend(a for a in node.all_input_nodes if a in inside)


def find_loops(graph: Graph) -> list[Loop]:
    """The loops over experts of a torch-level graph, in order."""
    loops = _find_sums(graph)
    if not loops:
        return []
    owner: dict[Node, Loop] = {}
    same = _equals(graph)
    sources: dict[Node, Loop] = {}
    for loop in loops:
        for step in loop.steps:
            found = map(_source, _indices(step))
            sources.update((same.get(source, source), loop) for source in found)
        loop.block.update(loop.steps)
    steps = {step for loop in loops for step in loop.steps}
    for node in graph.nodes:
        of_loop = next((owner[a] for a in node.all_input_nodes if a in owner), sources.get(same.get(node, node)))
        if of_loop is not None and node.op != "output" and node not in steps:
            owner.setdefault(node, of_loop)
    mine: dict[int, list[Node]] = {}
    for node, of in owner.items():
        mine.setdefault(id(of), []).append(node)
    for loop in loops:
        own = mine.get(id(loop), [])
        loop.block |= _reaching(loop.steps, set(own))
        loop.checks = _checks([n for n in own if n not in loop.block])
        gemms = [n for n in loop.block if nodes.name(n) in nodes.GEMMS]
        loop.rows = list(dict.fromkeys(_rows(gemms, loop.block)))
    return [loop for loop in loops if loop.rows]


def _reaching(steps: list[Node], mine: set[Node]) -> set[Node]:
    """The nodes of ``mine`` that ``steps`` depend on."""
    seen: set[Node] = set()
    stack = [a for step in steps for a in step.all_input_nodes]
    while stack:
        node = stack.pop()
        if node in mine and node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _checks(rest: list[Node]) -> set[Node]:
    """Asserts among ``rest``, which is in graph order, and what nothing but such asserts uses."""
    found: set[Node] = set()
    for node in reversed(rest):
        if _is_assert(node) or (node.users and all(u in found for u in node.users)):
            found.add(node)
    return found


def _is_assert(node: Node) -> bool:
    return nodes.name(node) in ("_assert_scalar", "_check", "sym_constrain_range", "sym_constrain_range_for_size")
