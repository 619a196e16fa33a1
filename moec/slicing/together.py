"""Micro-batches of one layer: blocks on the same weights, brought together so that one graph shows them all.

A step that runs a model on several micro-batches (``model(a), model(b)``) is one graph in which all of the first comes
before all of the second. Blocks of one layer can become one slice, if what follows from the first ones may wait until
the last one has run.

The contract:
1. What is moved keeps its order, and so do all reads and writes of the same memory.
2. Nothing is moved into or out of a change of grad mode or autocast. What such a change spans moves as one.
3. Nothing that draws random numbers, or calls a nested graph, is moved: a ``Refused`` says what stands in the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from moec.slicing import nodes
from moec.slicing.cut import NotSliced, Refused, Slice, View, check_writes

_HANDED = nodes.PARTS | nodes.VIEWS | nodes.TRANSPOSES
_MODES = ("_set_grad", "_enter", "_exit")


def same_weights(pieces: Sequence[Slice | NotSliced]) -> list[list[Slice]]:
    """Blocks that read the same parameters, in order; a block that shares none is left out."""
    read: dict[Node, frozenset[Node]] = {}
    blocks = {piece.anchor: piece for piece in pieces if isinstance(piece, Slice) and piece.beside is None}
    for anchor, piece in blocks.items():
        read[anchor] = frozenset(filter(None, map(_parameter, piece.inputs)))
    often = Counter(p for found in read.values() for p in found)
    groups: dict[frozenset[Node], list[Slice]] = {}
    for anchor, piece in blocks.items():
        if shared := frozenset(p for p in read[anchor] if often[p] > 1):
            groups.setdefault(shared, []).append(piece)
    return [group for group in groups.values() if len(group) > 1]


def _parameter(node: Node) -> Node | None:
    """The matrix or stack of matrices that the graph is given and ``node`` hands on, or None."""
    origin = nodes.peel(node, _HANDED)
    value = nodes.value(origin)
    given = isinstance(origin, Node) and origin.op in ("placeholder", "get_attr")
    return (
        origin if given and isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1 else None
    )


def waiting(view: View, parts: Sequence[Slice]) -> list[Node]:
    """What has to wait until the last of ``parts`` has run, in order.

    Args:
        view: The graph.
        parts: Blocks, in order.

    Raises:
        Refused: One depends on another, or something cannot be moved.
    """
    part_of = {node: i for i, part in enumerate(parts) for node in (*part.nodes, *part.checks)}
    ends = [view.order[part.end] for part in parts]
    state = _states(view)
    base = state[ends[0]]
    if any(state[end] != base for end in ends):
        raise Refused("the micro-batches run in different grad modes or under different autocasts")
    late: set[Node] = set(parts[0].outputs)
    moved: list[Node] = []
    touched = {m for node in parts[0].nodes for m in _memories((node, *node.all_input_nodes))}
    written: set[int] = set()
    for unit in _units(view, state, ends[0] + 1, max(ends), base):
        if any(node in part_of for node in unit):
            for node in unit:
                if len(unit) > 1 or any(a in late and part_of.get(a) != part_of[node] for a in node.all_input_nodes):
                    raise Refused("one micro-batch depends on another's result: these are layers of the same weights")
                if written & (memory := _memories((node, *node.all_input_nodes))):
                    raise Refused(f"{node.name} of one micro-batch reads what another's result was written to")
                touched |= memory
                if node in parts[part_of[node]].outputs:
                    late.add(node)
            continue
        reads = _memories(a for node in unit for a in (node, *node.all_input_nodes))
        writes = _memories(a for node in unit for a in nodes.mutated(node))
        if not (reads & written or writes & touched or any(a in late for n in unit for a in n.all_input_nodes)):
            continue
        for node in unit:
            if (why := _stays(node)) is not None:
                raise Refused(f"{why} between the micro-batches and must stay where it is")
        moved += unit
        late.update(unit)
        touched, written = touched | reads, written | writes
    return moved


def join(view: View, parts: Sequence[Slice], waits: Collection[Node] = ()) -> Slice:
    """One slice of several: it takes in what they take in, and stands where the last one ends.

    Args:
        view: The graph.
        parts: Blocks, in order.
        waits: What still is to be moved behind it.

    Raises:
        Refused: A result is used before that, or memory is written to in between.
    """
    for node, first in _twins(view, parts).items():
        node.replace_all_uses_with(first, lambda user: any(user in part.nodes for part in parts))
    chosen = {node for part in parts for node in part.nodes}
    ordered = sorted(chosen, key=view.order.__getitem__)
    end = max((part.end for part in parts), key=view.order.__getitem__)
    checks = sorted({c for part in parts for c in part.checks}, key=view.order.__getitem__)
    gone = {*chosen, *checks, *waits}
    for part in parts:
        for node in part.outputs:
            if any(user not in gone and view.order[user] < view.order[end] for user in node.users):
                raise Refused(f"{node.name}, of one micro-batch, is used before the last one has run")
    check_writes(view, chosen, view.order[ordered[0]], view.order[end], waits)
    inputs = list(dict.fromkeys(a for n in ordered for a in n.all_input_nodes if a not in chosen))
    outputs = [node for part in parts for node in part.outputs]
    return Slice(parts[0].anchor, ordered, inputs, outputs, end, checks, parts=tuple(parts))


def _twins(view: View, parts: Sequence[Slice]) -> dict[Node, Node]:
    """Inputs that hand on the same parameter in the same way as an earlier one, and that one."""
    first: dict[Any, Node] = {}
    found = {}
    for node in dict.fromkeys(node for part in parts for node in part.inputs):
        origin = _parameter(node)
        if origin is not None and origin not in view.writers and first.setdefault(_handed(node), node) is not node:
            found[node] = first[_handed(node)]
    return found


def _handed(node: Any) -> Any:
    """What names the value of a parameter that was handed on."""
    if isinstance(node, Node) and nodes.name(node) in _HANDED:
        return node.target, tuple(map(_handed, node.args)), tuple((k, _handed(v)) for k, v in node.kwargs.items())
    return node if isinstance(node, Node) else repr(node)


def _states(view: View) -> list[Any]:
    """Grad mode and the autocasts entered, behind every node."""
    found: list[Any] = []
    grad: Any = torch.is_grad_enabled()
    entered: tuple[Node, ...] = ()
    for node in view.order:
        name = nodes.name(node)
        if name.startswith("_set_grad"):
            grad = node.args[0]
        elif name.startswith("_enter"):
            entered = (*entered, node)
        elif name.startswith("_exit"):
            entered = tuple(e for e in entered if e not in node.args)
        found.append((grad, entered))
    return found


def _units(view: View, state: list[Any], first: int, last: int, base: Any) -> Iterator[list[Node]]:
    """What moves or stays as one, in order: a node, or all from where the mode changes until it is ``base`` again."""
    unit: list[Node] = []
    for node, i in view.order.items():
        if first <= i <= last:
            unit.append(node)
            if state[i] == base:
                yield unit
                unit = []


def _stays(node: Node) -> str | None:
    """What a node does besides its result that has to keep its place, or None."""
    name = nodes.name(node)
    if name.startswith((*_MODES, "_assert")):
        return None
    if name == "scaled_dot_product_attention":
        draws = not nodes.is_zero(nodes.argument(node, 4, "dropout_p", 0.0))
    else:
        draws = nodes.has_effect(node) and not (
            name.endswith("dropout") and nodes.is_zero(nodes.argument(node, 1, "p"))
        )
    return f"{name} has an effect" if draws else None


def _memories(found: Any) -> set[int]:
    """The memory that values of nodes lie in."""
    values: list[Any] = []
    for node in found:
        value = nodes.value(node)
        values += value if isinstance(value, (tuple, list)) else [value]
    return {m for v in values if (m := nodes.memory_of(v)) is not None}
