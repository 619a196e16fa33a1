"""What a layer can be cut along, and what each piece then costs.

Along its experts: a chunk is some experts of every rank, with all their rows. Weights are still read once, and an
expert's rows stay together. Along its tokens: a chunk is some of every rank's tokens, for all experts. Each expert then
has fewer rows at a time and reads its weights once a chunk; that is the only way to cut where a rank has one expert.

Both are cut at whole units, of which there are at most :data:`UNITS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from moec.ir.parallel_semantics import even_sizes
from moec.passes.overlap.costs import ExpertTimes, Transport
from moec.passes.overlap.timeline import Chunk

UNITS = 16
"""Pieces that sizes of chunks are counted in, at most."""


@dataclass(frozen=True)
class Layer:
    """One layer in one direction, on all ranks.

    Attributes:
        rows: Rows that every rank sends to every expert, [N][E]; expected or real.
        sizes: Experts of every rank.
        experts: Times of a rank's experts.
        links: Times of the group's links.
        there_bytes: Of a row on its way to the experts.
        back_bytes: Of a row on its way home.
        there_messages: Collectives on the way there.
        back_messages: Collectives on the way home.
        count_messages: Collectives that say how many rows will come: once for chunks of experts, for every chunk of
            tokens.
        joining: By what is cut along, seconds to put what the chunks brought home together again.
    """

    rows: Sequence[Sequence[float]]
    sizes: tuple[int, ...]
    experts: ExpertTimes
    links: Transport
    there_bytes: float
    back_bytes: float
    there_messages: int = 1
    back_messages: int = 1
    count_messages: int = 1
    joining: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.sizes) or any(len(r) != sum(self.sizes) for r in self.rows):
            raise ValueError(
                f"rows are a number for every one of {sum(self.sizes)} experts from {len(self.sizes)} ranks"
            )


@dataclass
class Cut:
    """A layer and what it is cut along; knows what the chunk of the units ``first`` up to ``last`` costs."""

    layer: Layer
    units: int
    _known: dict[tuple[int, int], Chunk] = field(default_factory=dict)

    def chunk(self, first: int, last: int) -> Chunk:
        key = self._key(first, last)
        if key not in self._known:
            self._known[key] = self._cost(first, last)
        return self._known[key]

    def chunks(self, sizes: Sequence[int]) -> list[Chunk]:
        """Of chunks that have ``sizes`` units."""
        return [self.chunk(a, b) for a, b in pairwise([0, *accumulate(sizes)])]

    def _key(self, first: int, last: int) -> tuple[int, int]:
        return first, last

    def _cost(self, first: int, last: int) -> Chunk:
        raise NotImplementedError


def expert_ranges(sizes: Sequence[int], units: int) -> list[tuple[int, ...]]:
    """Where every unit begins among every rank's own experts, and the end: [units + 1][N]."""
    return list(zip(*((0, *accumulate(even_sizes(own, units))) for own in sizes), strict=True))


class ByExperts(Cut):
    """Chunks of experts: the same part of every rank's."""

    def __init__(self, layer: Layer, units: int = 0) -> None:
        super().__init__(layer, units or max(1, min(UNITS, max(layer.sizes))))
        self._edges = expert_ranges(layer.sizes, self.units)
        self._first = [0, *accumulate(layer.sizes)]

    def _cost(self, first: int, last: int) -> Chunk:
        layer = self.layer
        out, came = [0.0] * len(layer.sizes), [0.0] * len(layer.sizes)
        compute = []
        for rank, base in enumerate(self._first[:-1]):
            chosen = slice(base + self._edges[first][rank], base + self._edges[last][rank])
            parts = [row[chosen] for row in layer.rows]
            loads = [sum(column) for column in zip(*parts, strict=True)]
            compute.append(layer.experts.seconds(loads))
            for source, part in enumerate(parts):
                if source != rank:
                    moved = sum(part)
                    out[source] += moved
                    came[rank] += moved
        return _chunk(layer, max((*out, *came)), tuple(compute), counted=first == 0)


class ByTokens(Cut):
    """Chunks of tokens: the same part of every rank's."""

    def __init__(self, layer: Layer, units: int = UNITS) -> None:
        super().__init__(layer, units)
        edges = [0, *accumulate(layer.sizes)]
        own = [slice(a, b) for a, b in pairwise(edges)]
        self._loads = [[sum(column) for column in zip(*(r[o] for r in layer.rows), strict=True)] for o in own]
        sent = [sum(row) - sum(row[o]) for row, o in zip(layer.rows, own, strict=True)]
        came = [sum(sum(row[o]) for s, row in enumerate(layer.rows) if s != rank) for rank, o in enumerate(own)]
        self._busiest = max((*sent, *came))

    def _key(self, first: int, last: int) -> tuple[int, int]:
        return 0, last - first

    def _cost(self, first: int, last: int) -> Chunk:
        share = (last - first) / self.units
        compute = tuple(self.layer.experts.seconds(load * share for load in loads) for loads in self._loads)
        return _chunk(self.layer, self._busiest * share, compute, counted=True)


def _chunk(layer: Layer, busiest: float, compute: tuple[float, ...], counted: bool) -> Chunk:
    """The chunk whose busiest rank sends or gets so many rows. Ranks without any take part in the collectives too."""
    if not busiest and not any(compute) and not counted:
        return Chunk(0.0, compute, 0.0)
    messages = layer.there_messages + layer.count_messages * counted
    there = layer.links.seconds(busiest * layer.there_bytes, messages)
    return Chunk(there, compute, layer.links.seconds(busiest * layer.back_bytes, layer.back_messages))
