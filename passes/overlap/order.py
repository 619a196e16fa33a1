"""The order of a program in chunks: what others wait for as early as can be, waits as late as can be.

An op is written when something needs it, with what it needs itself right before it. What is asked for, in turn: every
start on the way to the experts, those that need the fewest waits first (counts leave before the rows that wait for
them), in order of the chunks; then, chunk after chunk, the experts and the starts of what they made; then the result.
No order of asking can break a dependency.

Where rows go to their experts through several groups, between nodes and then inside a node, a chunk is sent on when
its turn comes (:class:`moec.passes.overlap.legs.Turns`): asking for it makes the thread wait for the leg before.

What is computed beside the layer is asked for where the caller says: before the experts of some chunk, or behind all
starts, where nothing but waiting is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moec.ir.beside import own_experts
from moec.ir.core import Graph, Op
from moec.passes.overlap.legs import Turns


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


def tiers_of(graph: Graph) -> tuple[str, ...]:
    """Groups that rows go to the experts through, in turn."""
    before, experts = needs(graph), own_experts(graph)
    there = [op for op in graph.ops if is_start(op) and any(op in before[e] for e in experts)]
    return tuple(dict.fromkeys(str(op.attrs.get("group", "")) for op in there))


def in_turn(graph: Graph, beside: Mapping[Op, int] | None = None, turns: Turns | None = None) -> list[Op]:
    """Starts and experts in the order in which they are asked for.

    Args:
        graph: A rank's program.
        beside: What else is asked for, and before the experts of which chunk; from their number on, behind all starts.
        turns: When chunks are sent on, where there are several tiers.
    """
    before = needs(graph)
    experts, turns = own_experts(graph), turns or Turns()
    fill = sorted((beside or {}).items(), key=lambda item: item[1])
    last_of = {op: max((i for i, e in enumerate(experts) if e in before[op]), default=-1) for op in graph.ops}
    starts = [op for op in graph.ops if is_start(op)]
    there = [op for op in starts if last_of[op] < 0]
    depth = {op: sum(b.name == "comm.wait" for b in before[op]) for op in there}
    first_of = {op: next((i for i, e in enumerate(experts) if op in before[e]), len(experts)) for op in there}
    there.sort(key=lambda op: (depth[op], first_of[op]))
    later = tiers_of(graph)[1:]
    onward = [op for op in there if first_of[op] < len(experts) and op.attrs.get("group", "") in later]
    onward.sort(key=lambda op: first_of[op])
    homeward = {op for op in starts if any(b in before[op] for b in starts if last_of[b] == last_of[op] >= 0)}
    asked = [op for op in there if op not in onward]
    for i, op in enumerate(experts):
        asked += [s for s in onward if i + turns.ahead * (i > 0) <= first_of[s] <= i + turns.ahead]
        asked += [op for op, at in fill if at == i]
        asked += [op, *(s for s in starts if last_of[s] == i and s not in homeward)]
        asked += [s for s in starts if last_of[s] == i - turns.behind and s in homeward]
    late = range(len(experts) - turns.behind, len(experts))
    asked += [s for i in late for s in starts if last_of[s] == i and s in homeward]
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


def reorder(graph: Graph, beside: Mapping[Op, int] | None = None, turns: Turns | None = None) -> None:
    """Put the ops of a program without effects in this order; ops that nothing needs go.

    Args:
        graph: A rank's program.
        beside: As in :func:`in_turn`.
        turns: The same.
    """
    order = on_demand([*in_turn(graph, beside, turns), graph.terminator])
    graph.erase_many(set(graph.ops) - set(order))
    graph.ops = order
