"""When everything happens in a layer that is cut into chunks.

A chunk's rows travel there (D), go through the experts (C, on every rank its own time) and travel home (B). Links carry
one collective at a time, in the order in which they were started; a rank computes one chunk at a time. A collective
begins when the last rank is ready for it and ends on all of them together.

All rows leave before any comes home. No other order ends sooner: let a B stand right before a D on the links.
Exchanged, both have ended when both had before, D sooner, and nothing but the end of the step waits for B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations


@dataclass(frozen=True)
class Chunk:
    """Seconds of one chunk.

    Attributes:
        there: On the links, to the experts; 0 where nothing travels.
        compute: Of the experts of every rank, [N].
        back: On the links, home.
    """

    there: float
    compute: tuple[float, ...]
    back: float


@dataclass(frozen=True)
class Span:
    """One piece of work.

    Attributes:
        what: ``"there"``, ``"compute"`` or ``"back"``.
        chunk: Number of the chunk.
        rank: The rank that computes; -1 for the links.
        start: Seconds from the start of the layer.
        end: The same.
    """

    what: str
    chunk: int
    rank: int
    start: float
    end: float


def timeline(chunks: Sequence[Chunk]) -> list[Span]:
    """Every piece of work of the chunks, in the order in which it is started."""
    ranks = len(chunks[0].compute) if chunks else 0
    spans: list[Span] = []
    links, free = 0.0, [0.0] * ranks
    ready: list[float] = []
    for i, chunk in enumerate(chunks):
        if chunk.there > 0:
            spans.append(Span("there", i, -1, links, links + chunk.there))
            links += chunk.there
        ready.append(links if chunk.there > 0 else 0.0)
    done: list[float] = []
    for i, chunk in enumerate(chunks):
        for rank, seconds in enumerate(chunk.compute):
            start = max(free[rank], ready[i])
            free[rank] = start + seconds
            if seconds > 0:
                spans.append(Span("compute", i, rank, start, free[rank]))
        done.append(max((*free, ready[i])))
    for i, chunk in enumerate(chunks):
        if chunk.back > 0:
            start = max(links, done[i])
            links = start + chunk.back
            spans.append(Span("back", i, -1, start, links))
    return spans


def makespan(chunks: Sequence[Chunk]) -> float:
    """Seconds until all rows are home."""
    return max((span.end for span in timeline(chunks)), default=0.0)


def compute_seconds(chunks: Sequence[Chunk]) -> float:
    """The experts' time on the rank that has most of it."""
    return max(map(sum, zip(*(c.compute for c in chunks), strict=True)), default=0.0)


def two_machines(times: Sequence[tuple[float, float]]) -> float:
    """When jobs that take these times on one machine and then on another are done at best (Johnson, 1954)."""
    first = sorted((t for t in times if t[0] < t[1]), key=lambda t: t[0])
    last = sorted((t for t in times if t[0] >= t[1]), key=lambda t: -t[1])
    a = b = 0.0
    for one, two in (*first, *last):
        a += one
        b = max(a, b) + two
    return b


def lower_bound(chunks: Sequence[Chunk]) -> float:
    """No order of these chunks on one compute and one link resource ends sooner.

    Either the links are never idle; or, on every rank, the best order of what comes there and is computed is followed
    by one way home, or one way there by the best order of what is computed and travels home; and the chunk that is
    computed first is not the one that is computed last.
    """
    if not chunks:
        return 0.0
    bound = sum(c.there + c.back for c in chunks)
    there, back = min(c.there for c in chunks), min(c.back for c in chunks)
    ends = min((a.there + b.back for a, b in permutations(chunks, 2)), default=there + back)
    for rank in range(len(chunks[0].compute)):
        coming = two_machines([(c.there, c.compute[rank]) for c in chunks])
        going = two_machines([(c.compute[rank], c.back) for c in chunks])
        bound = max(bound, coming + back, there + going, ends + sum(c.compute[rank] for c in chunks))
    return bound


def exposed_floor(chunks: Sequence[Chunk]) -> float:
    """Seconds of communication that no order of these chunks can hide."""
    return lower_bound(chunks) - compute_seconds(chunks)
