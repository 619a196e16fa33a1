"""How many rows a rank sends on each tier: between nodes a token goes to each node once, inside one once a slot.

What a routing profile or even loads say is how many rows every expert has of every rank, not which experts a token has
together. A token's experts are taken for drawn one by one, given that they are k (conditional Poisson sampling: Hájek,
1964), by the odds that give every expert its rows. Where all experts are as frequent that is the draw of k of E without
replacement; of all laws with these rows it supposes least (the largest entropy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SURE = 1e-6
"""How near to certain a choice is taken for certain."""
_CLOSE, _ROUNDS = 1e-9, 200
"""How near experts' odds bring their frequencies, and how often they are mended for it at most."""
_STEP = 2 / 3
"""Less than all of it: of two experts, one of which is chosen, each would else be mended for both."""
Array = NDArray[Any]
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


def _sums(odds: Array, k: int) -> Array:
    """Of the first i of these odds, the sum over all sets of n of the product of theirs: [E + 1, k + 1]."""
    sums = np.zeros((len(odds) + 1, k + 1))
    sums[0, 0] = 1.0
    for i, odd in enumerate(odds):
        sums[i + 1] = sums[i]
        sums[i + 1, 1:] += odd * sums[i, :-1]
    return sums


def _odds(often: Array, k: int) -> Array:
    """Odds by which sets of k experts hold every expert that often, k of them in all.

    Each expert's odds are mended as if the others' were right, by :data:`_STEP` of that, until all are.
    """
    odds = want = often / (1 - often)
    for _ in range(_ROUNDS):
        odds = odds / odds.max()
        before, behind = _sums(odds, k), _sums(odds[::-1], k)[::-1]
        others = (before[:-1, :k] * behind[1:, k - 1 :: -1][:, :k]).sum(1)  # sets of k - 1 of the others
        without = (before[:-1] * behind[1:, ::-1]).sum(1)  # sets of k of them
        if np.abs(odds * others / before[-1, k] - often).max() < _CLOSE:
            break
        odds = odds * (want * without / (odds * others)) ** _STEP
    return odds


def chances(loads: Sequence[float], edges: Sequence[int], top_k: int) -> list[float]:
    """Of a token to have an expert on every node.

    Args:
        loads: Rows of every expert, [E].
        edges: Where every node's experts begin, and the end.
        top_k: Experts of a token.
    """
    rows = np.array(loads, dtype=float)
    if not rows.any():
        return [0.0] * (len(edges) - 1)
    sure, free = np.zeros(len(rows), dtype=bool), rows > 0
    while free.sum() > (left := top_k - sure.sum()) > 0:
        often = np.where(free, rows * left / rows[free].sum(), 0.0)
        if not (over := often > 1 - _SURE).any():
            break
        sure, free = sure | over, free & ~over  # no token has an expert twice: others have the rest
    if free.sum() <= left or left <= 0:  # what is left is all of them, or nothing
        held = sure | free if left > 0 else sure
        return [float(held[a:b].any()) for a, b in pairwise(edges)]
    odds = np.zeros(len(rows))
    odds[free] = _odds(often[free], left)
    everywhere = _sums(odds, left)[-1, left]
    return [
        1.0 if sure[a:b].any() else float(1 - _sums(np.delete(odds, slice(a, b)), left)[-1, left] / everywhere)
        for a, b in pairwise(edges)
    ]


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
