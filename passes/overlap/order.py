"""The order of a program in chunks: what others wait for as early as can be, waits as late as can be.

An op is written when something needs it, with what it needs itself right before it. What is asked for, in turn: every
start on the way to the experts, those that need the fewest waits first (counts leave before the rows that wait for
them), in order of the chunks; then, chunk after chunk, the experts and the starts of what they made; then the result.
No order of asking can break a dependency.

What is computed beside the layer is asked for where the caller says: before the experts of some chunk, or behind all
starts, where nothing but waiting is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moec.ir.beside import own_experts
from moec.ir.core import Graph, Op


def is_start(op: Op) -> bool:
    return op.dialect == "comm" and op.name.endswith(".start")


def needs(graph: Graph) -> dict[Op, set[Op]]:
    """Everything that an op's operands are made by, directly or not."""
    found: dict[Op, set[Op]] = {}
    for op in graph.ops:
        found[op] = set()
        for value in op.operands:
            if value.op is not None:
                found[op] |= {value.op} | found[value.op]
    return found


def in_turn(graph: Graph, beside: Mapping[Op, int] | None = None) -> list[Op]:
    """Starts and experts in the order in which they are asked for.

    Args:
        graph: A rank's program.
        beside: What else is asked for, and before the experts of which chunk; from their number on, behind all starts.
    """
    before = needs(graph)
    experts = own_experts(graph)
    fill = sorted((beside or {}).items(), key=lambda item: item[1])
    last_of = {op: max((i for i, e in enumerate(experts) if e in before[op]), default=-1) for op in graph.ops}
    starts = [op for op in graph.ops if is_start(op)]
    there = [op for op in starts if last_of[op] < 0]
    depth = {op: sum(b.name == "comm.wait" for b in before[op]) for op in there}
    first_of = {op: next((i for i, e in enumerate(experts) if op in before[e]), len(experts)) for op in there}
    asked = sorted(there, key=lambda op: (depth[op], first_of[op]))
    for i, op in enumerate(experts):
        asked += [op for op, at in fill if at == i]
        asked += [op, *(s for s in starts if last_of[s] == i)]
    return asked + [op for op, at in fill if at >= len(experts)]


def on_demand(asked: Sequence[Op]) -> list[Op]:
    """The ops that ``asked`` needs and these, each where it is needed first."""
    order: dict[Op, None] = {}

    def write(op: Op) -> None:
        if op in order:
            return
        for value in op.operands:
            if value.op is not None:
                write(value.op)
        order[op] = None

    for op in asked:
        write(op)
    return list(order)


def reorder(graph: Graph, beside: Mapping[Op, int] | None = None) -> None:
    """Put the ops of a program without effects in this order; ops that nothing needs go.

    Args:
        graph: A rank's program.
        beside: As in :func:`in_turn`.
    """
    order = on_demand([*in_turn(graph, beside), graph.terminator])
    graph.erase_many(set(graph.ops) - set(order))
    graph.ops = order
