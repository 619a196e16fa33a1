"""Which experts of every rank are in every chunk of a layer that is cut along its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from moec.passes.overlap.cuts import Sets


class Whole(Exception):
    """The program is not cut; ``str`` is the reason."""


Range = tuple[int, int]
"""First and past-last of a rank's experts in their order; as they stand, counted from its first."""


@dataclass(frozen=True)
class Chunks:
    """Which experts are in every chunk.

    Attributes:
        sizes: Experts of every rank.
        edges: Where every chunk begins among every rank's own experts, and the end: [K + 1][N].
        own_first: The rank that the program is for, where its own rows are a chunk before these; else -1.
        orders: The order in which edges count every rank's own experts; empty for as they stand.
        rank: The rank that the program is for; needed where experts are not as they stand.
    """

    sizes: tuple[int, ...]
    edges: Sequence[Sequence[int]]
    own_first: int = -1
    orders: Sequence[Sequence[int]] = ()
    rank: int = -1

    def __post_init__(self) -> None:
        if self.orders and [sorted(order) for order in self.orders] != [[*range(size)] for size in self.sizes]:
            raise ValueError("the order of a rank's experts holds every one of them once")
        if self.orders and self.rank < 0:
            raise ValueError("with experts in an order of their own a program is one rank's")

    @staticmethod
    def of(sizes: tuple[int, ...], sets: Sets, rank: int, own_first: bool = False) -> Chunks:
        """Those that hold these sets of every rank's experts, in the program for ``rank``."""
        ranks = range(len(sizes))
        edges = [tuple(sum(len(chunk[r]) for chunk in sets[:k]) for r in ranks) for k in range(len(sets) + 1)]
        orders = [tuple(e for chunk in sets for e in chunk[r]) for r in ranks]
        return Chunks(sizes, edges, rank if own_first else -1, orders, rank)

    @property
    def count(self) -> int:
        """Chunks, that of own rows among them."""
        return len(self.edges) - 1 + (self.own_first >= 0)

    def to(self, chunk: int, rank: int) -> Range:
        """The experts of ``rank`` that rows of the chunk are sent to."""
        if self.own_first < 0:
            return self.edges[chunk][rank], self.edges[chunk + 1][rank]
        if chunk == 0:
            return (0, self.sizes[rank]) if rank == self.own_first else (0, 0)
        return (0, 0) if rank == self.own_first else (self.edges[chunk - 1][rank], self.edges[chunk][rank])

    def at(self, chunk: int, rank: int) -> Range:
        """The experts of ``rank`` that run for the chunk."""
        if self.own_first >= 0 and chunk == 0:
            return 0, self.sizes[rank]
        chunk -= self.own_first >= 0
        return self.edges[chunk][rank], self.edges[chunk + 1][rank]

    def parts(self) -> tuple[int, ...]:
        """How many experts of every rank rows are sent to, chunk after chunk: [K * N]."""
        pairs = (self.to(c, r) for c in range(self.count) for r in range(len(self.sizes)))
        return tuple(last - first for first, last in pairs)

    def order(self) -> tuple[int, ...]:
        """All experts: chunk after chunk, in a chunk rank after rank."""
        first = [0, *accumulate(self.sizes)]
        return tuple(
            first[rank] + own
            for chunk in range(self.count)
            for rank in range(len(self.sizes))
            for own in self.held(rank, self.to(chunk, rank))
        )

    def held(self, rank: int, part: Range) -> tuple[int, ...]:
        """The experts in a part of a rank's order, counted from its first; their rows come in this order."""
        return tuple(sorted(self.orders[rank][slice(*part)]) if self.orders else range(*part))
