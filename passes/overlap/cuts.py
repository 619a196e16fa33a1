"""What a layer can be cut along, and what each piece then costs.

Along its experts: a chunk is some experts of every rank, with all their rows. Weights are still read once, and an
expert's rows stay together. Along its tokens: a chunk is some of every rank's tokens, for all experts. Each expert then
has fewer rows at a time and reads its weights once a chunk; that is the only way to cut where a rank has one expert.

Both are cut at whole units, of which there are at most :data:`UNITS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import ClassVar

from moec.ir.parallel_semantics import even_sizes
from moec.passes.overlap.costs import ExpertTimes, Transport, burden_seconds
from moec.passes.overlap.timeline import Chunk

UNITS = 16
"""Pieces that sizes of chunks are counted in, at most."""


Sets = tuple[tuple[tuple[int, ...], ...], ...]
"""Of every chunk the experts of every rank, counted from the rank's first: [K][N][...]."""


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
        chunk_s: By what is cut along, seconds of every rank's processor for each chunk of a layer that is cut, beside
            rows and experts.
        front_s: Of them, those before the first chunk's experts, as all chunks' rows leave before any are computed.
        burden: What a collective takes of the processor whose experts run meanwhile; None for nothing.
        behind: Whether another chunk comes before these.
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
    chunk_s: Mapping[str, float] = field(default_factory=dict)
    front_s: Mapping[str, float] = field(default_factory=dict)
    burden: Transport | None = None
    behind: bool = False

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.sizes) or any(len(r) != sum(self.sizes) for r in self.rows):
            raise ValueError(
                f"rows are a number for every one of {sum(self.sizes)} experts from {len(self.sizes)} ranks"
            )

    def beside_s(self, along: str) -> float:
        """Seconds of every chunk's calls right before its own experts and behind them."""
        return self.chunk_s.get(along, 0.0) - self.front_s.get(along, 0.0)

    def in_front(self, chunks: Sequence[Chunk], along: str) -> list[Chunk]:
        """The chunks of a layer that is cut, the first one's experts behind the calls that all chunks' rows leave by.

        They run while the first rows travel, behind the counts; those of own rows leave by none.
        """
        travelling = sum(c.back > 0 for c in chunks)
        calls = self.links.seconds(0.0, self.count_messages) + travelling * self.front_s.get(along, 0.0)
        late = max(0.0, calls - chunks[0].there) if self.front_s else 0.0
        first = replace(chunks[0], compute=tuple(seconds + late for seconds in chunks[0].compute))
        return [first, *chunks[1:]]


@dataclass
class Cut:
    """A layer and what it is cut along; knows what the chunk of the units ``first`` up to ``last`` costs."""

    layer: Layer
    units: int
    _known: dict[tuple[int, ...], Chunk] = field(default_factory=dict)
    along: ClassVar[str] = ""

    def chunk(self, first: int, last: int) -> Chunk:
        key = self._key(first, last)
        if key not in self._known:
            self._known[key] = self._cost(first, last)
        return self._known[key]

    def chunks(self, sizes: Sequence[int]) -> list[Chunk]:
        """Of chunks that have ``sizes`` units."""
        return [self.chunk(a, b) for a, b in pairwise([0, *accumulate(sizes)])]

    def _key(self, first: int, last: int) -> tuple[int, ...]:
        return first, last

    def _cost(self, first: int, last: int) -> Chunk:
        raise NotImplementedError

    def _chunk(self, first: int, last: int, busiest: float, compute: Sequence[float], counted: bool) -> Chunk:
        """The chunk whose busiest rank sends or gets so many rows. Ranks without any take part in the collectives too.

        A chunk's own ops run before its experts. What brings its rows there runs beside other experts unless it is the
        first, what brings them home unless it is the last; either is counted where the chunk's own experts run.
        """
        layer = self.layer
        messages = layer.there_messages + layer.count_messages * counted
        there_bytes, back_bytes = busiest * layer.there_bytes, busiest * layer.back_bytes
        begins, ends = first == 0 and not layer.behind, last == self.units
        more = 0.0 if begins and ends else layer.beside_s(self.along)
        more += 0.0 if begins else burden_seconds(layer.burden, layer.links, there_bytes, messages)
        more += 0.0 if ends else burden_seconds(layer.burden, layer.links, back_bytes, layer.back_messages)
        return Chunk(
            layer.links.seconds(there_bytes, messages),
            tuple(seconds + more for seconds in compute),
            layer.links.seconds(back_bytes, layer.back_messages),
        )


def expert_ranges(sizes: Sequence[int], units: int) -> list[tuple[int, ...]]:
    """Where every unit begins among every rank's own experts, and the end: [units + 1][N]."""
    return list(zip(*((0, *accumulate(even_sizes(own, units))) for own in sizes), strict=True))


class ByExperts(Cut):
    """Chunks of experts: the same part of every rank's, or what lies between ``edges``, [units + 1][N]."""

    along = "experts"

    def __init__(self, layer: Layer, units: int = 0, edges: Sequence[Sequence[int]] = ()) -> None:
        super().__init__(layer, units or len(edges[1:]) or max(1, min(UNITS, max(layer.sizes))))
        self._edges = edges or expert_ranges(layer.sizes, self.units)
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
        return self._chunk(first, last, max((*out, *came)), compute, counted=first == 0)


def by_sets(layer: Layer, sets: Sets) -> ByExperts:
    """Chunks of any experts of every rank, one a unit."""
    first, ranks = [0, *accumulate(layer.sizes)], range(len(layer.sizes))
    order = [first[r] + e for r in ranks for chunk in sets for e in chunk[r]]
    edges = [[sum(len(chunk[r]) for chunk in sets[:k]) for r in ranks] for k in range(len(sets) + 1)]
    return ByExperts(replace(layer, rows=[[row[e] for e in order] for row in layer.rows]), edges=edges)


class ByTokens(Cut):
    """Chunks of tokens: the same part of every rank's."""

    along = "tokens"

    def __init__(self, layer: Layer, units: int = UNITS) -> None:
        super().__init__(layer, units)
        edges = [0, *accumulate(layer.sizes)]
        own = [slice(a, b) for a, b in pairwise(edges)]
        self._loads = [[sum(column) for column in zip(*(r[o] for r in layer.rows), strict=True)] for o in own]
        sent = [sum(row) - sum(row[o]) for row, o in zip(layer.rows, own, strict=True)]
        came = [sum(sum(row[o]) for s, row in enumerate(layer.rows) if s != rank) for rank, o in enumerate(own)]
        self._busiest = max((*sent, *came))

    def _key(self, first: int, last: int) -> tuple[int, ...]:
        return last - first, first == 0, last == self.units

    def _cost(self, first: int, last: int) -> Chunk:
        share = (last - first) / self.units
        compute = [self.layer.experts.seconds(load * share for load in loads) for loads in self._loads]
        return self._chunk(first, last, self._busiest * share, compute, counted=True)
