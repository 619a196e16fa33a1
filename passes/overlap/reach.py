"""How many rows a rank sends on each tier: between nodes a token goes to each node once, inside one once a slot.

What a routing profile or even loads say is how many rows every expert has of every rank, not which experts a token has
together. A token's experts are taken for drawn one by one with these frequencies, given that they are k (conditional
Poisson sampling: Hájek, 1964). Where all experts are as frequent that is the draw of k of E without replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

_SURE = 1e-6
"""How far from certain a choice is at least."""
Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Busiest:
    """Rows of the rank that sends or gets most of them.

    Attributes:
        copies: Between nodes, one of a token for every other node that it has an expert on.
        slots: Between nodes, one for every choice of an expert on another node.
        inside: From where a token came into a node to its experts' ranks there, one for every choice.
    """

    copies: float
    slots: float
    inside: float


def _drawn(odds: Sequence[float], k: int) -> float:
    """The sum over all sets of k experts of the product of their odds."""
    sums = [1.0, *[0.0] * k]
    for odd in odds:
        for n in range(k, 0, -1):
            sums[n] += odd * sums[n - 1]
    return sums[k]


def chances(loads: Sequence[float], edges: Sequence[int], top_k: int) -> list[float]:
    """Of a token to have an expert on every node.

    Args:
        loads: Rows of every expert, [E].
        edges: Where every node's experts begin, and the end.
        top_k: Experts of a token.
    """
    tokens = sum(loads) / top_k
    if not tokens:
        return [0.0] * (len(edges) - 1)
    often = [min(1 - _SURE, load / tokens) for load in loads]
    odds = [p / (1 - p) for p in often]
    everywhere = _drawn(odds, top_k)
    if not everywhere:  # fewer experts have rows than a token has choices
        return [float(any(loads[a:b])) for a, b in pairwise(edges)]
    return [1 - _drawn(odds[:a] + odds[b:], top_k) / everywhere for a, b in pairwise(edges)]


def expected_copies(rows: Rows, sizes: Sequence[int], nodes: int, top_k: int) -> list[list[float]]:
    """Tokens of every rank that have experts on every node, [N][G], expected.

    Args:
        rows: Rows that every rank sends to every expert, [N][E].
        sizes: Experts of every rank.
        nodes: G; each has N / G neighbouring ranks.
        top_k: Experts of a token.
    """
    each = len(sizes) // nodes
    ends = [0, *accumulate(sum(sizes[n * each : (n + 1) * each]) for n in range(nodes))]
    found = chances([sum(column) for column in zip(*rows, strict=True)], ends, top_k)
    return [[sum(row) / top_k * chance for chance in found] for row in rows]


def busiest_rows(rows: Rows, copies: Rows, sizes: Sequence[int], nodes: int) -> Busiest:
    """Rows of the busiest rank on every tier.

    A rank's rows for another node go to the rank of its own place there, which spreads them.

    Args:
        rows: As above.
        copies: As above.
        sizes: As above.
        nodes: As above.
    """
    ranks, each = len(sizes), len(sizes) // nodes
    edges = [0, *accumulate(sizes)]
    to = [[sum(row[a:b]) for a, b in pairwise(edges)] for row in rows]  # [N][N], slots from rank to rank
    sent = {"copies": [0.0] * ranks, "slots": [0.0] * ranks, "inside": [0.0] * ranks}
    came = {"copies": [0.0] * ranks, "slots": [0.0] * ranks, "inside": [0.0] * ranks}
    for source in range(ranks):
        home, place = divmod(source, each)
        for node in range(nodes):
            relay = node * each + place
            here = to[source][node * each : (node + 1) * each]
            if node != home:
                sent["copies"][source] += copies[source][node]
                came["copies"][relay] += copies[source][node]
                sent["slots"][source] += sum(here)
                came["slots"][relay] += sum(here)
            sent["inside"][relay] += sum(here) - here[place]
            for other, count in enumerate(here):
                came["inside"][node * each + other] += count * (other != place)
    return Busiest(*(max((*sent[unit], *came[unit])) for unit in ("copies", "slots", "inside")))
