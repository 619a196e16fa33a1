"""Chunks of any experts of every rank: which of them to compute together, so that the step ends soonest.

Cut as they stand, a rank's experts may put the one with most of its rows into a chunk in which other ranks have little
to do, and all wait for it. Here the experts of good chunks change places: one goes to another chunk, or two of a rank
change theirs, or two chunks do, as long as the step ends sooner (local search; of all such steps the best each time).
It begins where experts as they stand are cut best, and where every rank's largest stand in the middle. The steps of a
round are timed at once. Nothing is drawn at random, so that all ranks that know the same rows find the same chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.passes.overlap.cuts import ByExperts, Layer, Sets, expert_ranges
from moec.passes.overlap.timeline import Chunk

ROUNDS = 40
"""Steps of a search at most."""
WIDEST = 2048
"""Steps that are timed in a round at most; of more, equally many of every part."""
LEAST = 1e-4
"""Part of the step's time that a round must win."""

Array = NDArray[Any]


def worth_ordering(layer: Layer) -> bool:
    """Whether some rank's experts differ in their rows; in any order the others cost the same."""
    first = [0, *accumulate(layer.sizes)]
    return any(len({tuple(row[e] for row in layer.rows) for e in range(a, b)}) > 1 for a, b in pairwise(first))


def least_seconds(layer: Layer) -> float:
    """No chunks of experts, whichever they hold, end sooner: links are never idle, or the busiest rank's experts.

    Before these at least a message comes, and behind them one leaves.
    """
    whole, links = ByExperts(layer, 1).chunk(0, 1), layer.links
    again = links.seconds(0.0, layer.there_messages) + links.seconds(0.0, layer.back_messages)
    busy = max(whole.compute) + 2 * layer.beside_s("experts")
    return max(whole.there + whole.back + again, again + links.seconds(0.0, layer.count_messages) + busy)


@dataclass(frozen=True)
class _Ways:
    """Many ways to put experts into chunks, by their sums; [ways, chunks, ranks].

    Attributes:
        seconds: Of the experts.
        out: Rows that a rank sends.
        came: Rows that it gets.
    """

    seconds: Array
    out: Array
    came: Array


class _Timing:
    """What a layer's experts cost one by one, and when chunks of them end.

    Args:
        layer: The layer.
        first: A chunk that comes before, as a rank's own rows do.
    """

    def __init__(self, layer: Layer, first: Chunk | None) -> None:
        self.layer, self.first = layer, first
        rows = np.array(layer.rows, dtype=float)
        ranks = len(rows)
        self.rank = np.repeat(np.arange(ranks), layer.sizes)
        loads = rows.sum(0)
        some = float(loads.max()) or 1.0
        one, two = (layer.experts.seconds([some] * n) for n in (1, 2))
        self.launch = max(0.0, 2 * one - two)
        alone = np.array([layer.experts.seconds([load]) for load in loads])
        self.seconds = np.where(loads > 0, alone - self.launch, 0.0)
        self.sent = rows * (np.arange(ranks)[:, None] != self.rank)  # [N, E], what stays on its rank aside
        size = float(rows.sum()) * max(layer.there_bytes, layer.back_bytes) or 1.0
        self.rate = (layer.links.seconds(size) - layer.links.seconds(0.0)) / size
        self.taken = 0.0
        if layer.burden is not None:
            self.taken = (layer.burden.seconds(size) - layer.burden.seconds(0.0)) / size

    def ways(self, chunk: Array, chunks: int) -> _Ways:
        """One way: of every expert the number of its chunk."""
        ranks, experts = self.sent.shape
        held = np.zeros((chunks, experts))
        held[chunk, np.arange(experts)] = 1.0
        own = np.zeros((experts, ranks))
        own[np.arange(experts), self.rank] = 1.0
        return _Ways(
            ((held * self.seconds) @ own)[None], (held @ self.sent.T)[None], ((held * self.sent.sum(0)) @ own)[None]
        )

    def ends(self, w: _Ways) -> Array:
        """When the step of every way ends."""
        layer, ways, chunks = self.layer, len(w.seconds), w.seconds.shape[1]
        first = self.first or Chunk(0.0, (0.0,) * len(layer.sizes), 0.0)
        rows = np.maximum(w.out.max(2), w.came.max(2))
        there_messages = np.full(chunks, layer.there_messages)
        there_messages[0] += layer.count_messages
        there = rows * layer.there_bytes * self.rate + [layer.links.seconds(0.0, int(m)) for m in there_messages]
        back = rows * layer.back_bytes * self.rate + layer.links.seconds(0.0, layer.back_messages)
        compute = w.seconds + self.launch * (w.seconds > 0)
        several = chunks > 1 or self.first is not None
        front = calls = 0.0
        if several:
            compute += layer.beside_s("experts")
            front = layer.front_s.get("experts", 0.0)
            counting = max(first.there, layer.links.seconds(0.0, layer.count_messages))
            calls = counting + chunks * front if front else 0.0
        if layer.burden is not None:
            begins = np.arange(chunks) + layer.behind > 0
            ends = np.arange(chunks) < chunks - 1
            more = begins * (rows * layer.there_bytes * self.taken + layer.burden.seconds(0.0, layer.there_messages))
            more += ends * (rows * layer.back_bytes * self.taken + layer.burden.seconds(0.0, layer.back_messages))
            compute += more[:, :, None]
        arrived = first.there + there.cumsum(1)
        busy = np.full((ways, len(layer.sizes)), max(first.there, calls)) + first.compute
        links = arrived[:, -1]
        done = []
        for i in range(chunks):
            busy = np.maximum(busy, arrived[:, i, None]) + compute[:, i]
            done.append(busy.max(1))
        for i in range(chunks):
            links = np.maximum(links, done[i]) + back[:, i]
        return links

    def moved(self, w: _Ways, steps: Array, chunk: Array) -> _Ways:
        """What every step of [M, 3] leads to: an expert goes to a chunk, another comes from there, or none (-1)."""
        expert, to, other = steps.T
        at, count = np.arange(len(steps)), len(steps)
        seconds, out, came = (np.repeat(a, count, axis=0) for a in (w.seconds, w.out, w.came))
        for experts, sign in ((expert, np.ones(count)), (other, -1.0 * (other >= 0))):
            rank = self.rank[experts]
            for place, more in ((chunk[expert], -sign), (to, sign)):
                seconds[at, place, rank] += more * self.seconds[experts]
                came[at, place, rank] += more * self.sent[:, experts].sum(0)
                out[at, place] += more[:, None] * self.sent[:, experts].T
        return _Ways(seconds, out, came)


def _steps(chunk: Array, chunks: int, rank: Array) -> Array:
    """Every expert to every other chunk, and every two of a rank that are in different ones: [M, 3]."""
    experts, to = np.meshgrid(np.arange(len(chunk)), np.arange(chunks), indexing="ij")
    other = to != chunk[:, None]
    moves = np.stack([experts[other], to[other], np.full(other.sum(), -1)], axis=1)
    a, b = np.triu_indices(len(chunk), 1)
    change = (rank[a] == rank[b]) & (chunk[a] != chunk[b])
    a, b = a[change], b[change]
    found = np.concatenate([moves, np.stack([a, chunk[b], b], axis=1)])
    return found[:: -(-len(found) // WIDEST)]


def _improve(timing: _Timing, chunk: Array, chunks: int) -> tuple[float, Array]:
    """Step by step to a way that no step makes better: when it ends, and of every expert the number of its chunk."""
    chunk, now = chunk.copy(), float(timing.ends(timing.ways(chunk, chunks))[0])
    turns = np.array([_exchanged(chunks, a, b) for a, b in combinations(range(chunks), 2)])
    for _ in range(ROUNDS):
        w, steps = timing.ways(chunk, chunks), _steps(chunk, chunks, timing.rank)
        ends = timing.ends(timing.moved(w, steps, chunk))
        turned = timing.ends(_Ways(*(a[0][turns] for a in (w.seconds, w.out, w.came))))
        least = float(min(ends.min(), turned.min()))
        if least > now * (1 - LEAST):
            break
        now = least
        if turned.min() < ends.min():
            chunk = turns[turned.argmin()][chunk]
            continue
        expert, to, other = steps[ends.argmin()]
        if other >= 0:
            chunk[other] = chunk[expert]
        chunk[expert] = to
    return now, chunk


def _exchanged(count: int, a: int, b: int) -> list[int]:
    """The numbers up to ``count``, two of them in each other's place."""
    return [b if i == a else a if i == b else i for i in range(count)]


def better_sets(layer: Layer, sizes: Sequence[Sequence[int]], first: Chunk | None, most: int) -> Iterator[Sets]:
    """Chunks of any experts: the best that is found of every number of chunks.

    Args:
        layer: The layer.
        sizes: Units of good chunks of experts as they stand.
        first: A chunk that comes before; of own rows, ``layer`` has the others.
        most: Chunks at most.
    """
    timing, found = _Timing(layer, first), dict[int, tuple[float, Array]]()

    def tried(start: Array, chunks: int) -> None:
        end, chunk = _improve(timing, start, chunks)
        if chunks not in found or end < found[chunks][0]:
            found[chunks] = end, chunk

    for each in sizes:
        tried(_as_they_stand(layer, each), len(each))
    few = min(found, key=lambda n: found[n][0], default=1)
    for chunks in range(max(2, few - 1), min(few + 2, most, max(layer.sizes)) + 1):
        tried(_largest_inside(layer, timing, chunks), chunks)
    for chunks in sorted(found):
        yield _sets(layer, found[chunks][1], chunks)


def _own(layer: Layer) -> list[tuple[int, int]]:
    """First and past-last expert of every rank."""
    return list(pairwise([0, *accumulate(layer.sizes)]))


def _as_they_stand(layer: Layer, sizes: Sequence[int]) -> Array:
    """Of every expert the number of its chunk, where chunks have ``sizes`` units of a rank's experts in turn."""
    edges, chunk = expert_ranges(layer.sizes, sum(sizes)), np.zeros(sum(layer.sizes), dtype=int)
    for number, (a, b) in enumerate(pairwise([0, *accumulate(sizes)])):
        for (start, _), low, high in zip(_own(layer), edges[a], edges[b], strict=True):
            chunk[start + low : start + high] = number
    return chunk


def _largest_inside(layer: Layer, timing: _Timing, chunks: int) -> Array:
    """The same of equally many experts each, every rank's slowest in the middle and its fastest at both ends."""
    chunk = np.zeros(sum(layer.sizes), dtype=int)
    outwards = np.array(sorted(range(chunks), key=lambda i: (abs(2 * i - chunks + 1), i)))
    for start, end in _own(layer):
        order = start + np.argsort(-timing.seconds[start:end], kind="stable")
        chunk[order] = outwards[np.arange(end - start) * chunks // max(1, end - start)]
    return chunk


def _sets(layer: Layer, chunk: Array, chunks: int) -> Sets:
    """What every chunk holds; one that holds nothing is none."""
    made = [
        tuple(tuple(int(e) for e in np.flatnonzero(chunk[start:end] == n)) for start, end in _own(layer))
        for n in range(chunks)
    ]
    return tuple(held for held in made if any(held))
