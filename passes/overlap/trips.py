"""What a program sends on several tiers of links, read from its dataflow.

A program of the hierarchical form sends rows to the nodes, and from there to ranks of the node; each leg begins with
counts. Rows between nodes are one a node of a token, or one a choice: those that travel by the counts that the first
rows travelled by are the former.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from moec.ir.beside import own_experts
from moec.ir.core import Graph, Op, Value
from moec.passes.overlap.order import is_start, needs, tiers_of
from moec.passes.overlap.traffic import row_bytes

Unit = Literal["", "copies", "slots", "inside"]
"""What a row stands for, as :class:`moec.passes.overlap.reach.Busiest` counts them; nothing for counts of rows."""


@dataclass(frozen=True)
class Trip:
    """Collectives of one tier that follow each other.

    Attributes:
        tier: Place of the group among ``Trips.groups``.
        unit: What a row stands for.
        messages: Collectives.
        bytes: Of a row, in all of them together.
    """

    tier: int
    unit: Unit
    messages: int
    bytes: float


@dataclass(frozen=True)
class Trips:
    """The way of a program's rows.

    Attributes:
        groups: Names of the groups, in the order of the way there.
        there: The trips to the experts.
        back: Those home.
    """

    groups: tuple[str, ...]
    there: tuple[Trip, ...]
    back: tuple[Trip, ...]


def over_tiers(region: Graph) -> bool:
    """Whether a program's rows go to their experts through several groups."""
    return len(tiers_of(region)) > 1


def trips(region: Graph) -> Trips | None:
    """The trips of a program over two tiers; None where it sends otherwise, or widths are unknown."""
    before, experts, groups = needs(region), own_experts(region), tiers_of(region)
    starts = [op for op in region.ops if is_start(op)]
    if len(experts) != 1 or len(groups) != 2 or any(op.name != "comm.all_to_all.start" for op in starts):
        return None
    if {op.attrs["group"] for op in starts} != set(groups):
        return None
    there = [op for op in starts if experts[0] not in before[op]]
    home = [op for op in starts if experts[0] in before[op]]
    first = next((op for op in there if _counts(op) and op.attrs["group"] == groups[0]), None)
    if first is None:
        return None
    by_copies = frozenset(_counts(first))

    def unit(op: Op) -> Unit:
        if not _counts(op):
            return ""
        if op.attrs["group"] == groups[1]:
            return "inside"
        return "copies" if frozenset(_counts(op)) == by_copies else "slots"

    ways = [_ordered(ops, order, groups, unit) for ops, order in ((there, (0, 1)), (home, (1, 0)))]
    if any(way is None for way in ways):
        return None
    return Trips(groups, *(tuple(way or ()) for way in ways))


def _counts(op: Op) -> tuple[Value, ...]:
    """What says how many rows travel; nothing where that is a constant, as of counts themselves."""
    return (*op.group("send"), *op.group("recv"))


def _ordered(
    ops: Sequence[Op], tiers: Sequence[int], groups: Sequence[str], unit: Callable[[Op], Unit]
) -> list[Trip] | None:
    """The trips of one way, tier after tier, counts before rows."""
    found = []
    for tier in tiers:
        mine = [op for op in ops if op.attrs["group"] == groups[tier]]
        for kind in dict.fromkeys(sorted(map(unit, mine))):
            those = [op for op in mine if unit(op) == kind]
            sizes = [row_bytes(op) if kind else 0.0 for op in those]
            if None in sizes:
                return None
            found.append(Trip(tier, kind, len(those), sum(s or 0.0 for s in sizes)))
    return found if {trip.tier for trip in found} == set(tiers) else None
