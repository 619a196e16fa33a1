"""The best sizes of chunks for one cut of a layer: a shortest path with several costs at once.

Chunks are taken one by one. What matters of those taken so far is when their rows have arrived, when every rank's
experts are done, when their results would be home if the links were free for them, and how long the links are needed in
all. Whatever is later in all of these than another way to take the same units is dropped (labels, as for shortest paths
with resources: Desrochers, 1988). That is exact, but for :data:`_WIDEST`, which few layers of many ranks reach.

Where the first experts wait for calls that tell every chunk's rows to leave, each number of chunks is searched for by
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.passes.overlap.cuts import Cut
from moec.passes.overlap.timeline import Chunk

MOST = 8
"""Chunks at most."""
_WIDEST = 40
"""Ways to take the same units in as many chunks that are remembered at most, the soonest."""


@dataclass(frozen=True, slots=True)
class _Label:
    """Units taken so far, in ``sizes``.

    Attributes:
        arrived: When the last of their rows is there.
        done: When the last of their experts is, on every rank that counts.
        home: When the last result is home, if links are free for results whenever they are ready.
        links: How long the links are busy in all.
    """

    arrived: float
    done: tuple[float, ...]
    home: float
    links: float
    sizes: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return max(self.home, self.links)

    def no_later(self, other: _Label) -> bool:
        """In nothing; ``home`` is known to be."""
        return (
            self.links <= other.links
            and self.arrived <= other.arrived
            and all(a <= b for a, b in zip(self.done, other.done, strict=True))
        )


def _after(label: _Label, chunk: Chunk, ranks: Sequence[int], units: int) -> _Label:
    arrived = label.arrived + chunk.there
    done = tuple(max(d, arrived) + chunk.compute[r] for d, r in zip(label.done, ranks, strict=True))
    home = max(label.home, *done) + chunk.back
    return _Label(arrived, done, home, label.links + chunk.there + chunk.back, (*label.sizes, units))


def _front(labels: list[_Label]) -> list[_Label]:
    """Those that no other is at least as good as in everything."""
    kept: list[_Label] = []
    for new in sorted(labels, key=lambda label: (label.home, label.done, label.links, label.arrived)):
        if not any(old.no_later(new) for old in kept):
            kept.append(new)
            if len(kept) == _WIDEST:
                break
    return kept


def _slowest(chunks: Sequence[Chunk]) -> list[int]:
    """The ranks that can be the slowest: each is slower than every other one in some chunk."""
    kept: list[int] = []
    ranks = range(len(chunks[0].compute))
    for rank in sorted(ranks, key=lambda r: -sum(c.compute[r] for c in chunks)):
        if not any(all(c.compute[rank] <= c.compute[k] for c in chunks) for k in kept):
            kept.append(rank)
    return kept


def best_sizes(cut: Cut, first: Chunk | None = None, most: int = MOST) -> tuple[int, ...]:
    """Units of every chunk, so that the step ends soonest; arguments as for :func:`better_sizes`."""
    return better_sizes(cut, first, most)[-1]


def better_sizes(cut: Cut, first: Chunk | None = None, most: int = MOST) -> list[tuple[int, ...]]:
    """Units of every chunk, so that the step ends soonest: for one chunk, and each number that ends sooner than fewer.

    Args:
        cut: What is cut.
        first: A chunk that does not travel home and comes before, whatever the others are (a rank's own rows).
        most: Chunks at most.
    """
    units = cut.units
    table = {(a, b): cut.chunk(a, b) for a in range(units) for b in range(a + 1, units + 1)}
    several = first is not None
    first = first or Chunk(0.0, (0.0,) * len(cut.layer.sizes), 0.0)
    ranks = _slowest([first, *table.values()])
    front_s = cut.layer.front_s.get(cut.along, 0.0)
    counting = max(first.there, cut.layer.links.seconds(0.0, cut.layer.count_messages))

    def start(count: int) -> _Label:
        """Before the first of ``count`` chunks: their rows are told to leave before anything is computed."""
        calls = counting + count * front_s if front_s else 0.0
        begins = max(first.there, calls)
        return _Label(first.there, tuple(begins + first.compute[r] for r in ranks), 0.0, first.there, ())

    best = _after(start(1 if several else 0), table[0, units], ranks, units)
    found = [best.sizes]
    for counts in [(n,) for n in range(2, most + 1)] if front_s else [range(2, most + 1)]:
        fronts: dict[int, list[_Label]] = {0: [start(max(counts, default=0))]}
        for number in range(1, max(counts, default=0) + 1):
            reached: dict[int, list[_Label]] = {}
            for at, labels in fronts.items():
                for to in range(at + 1, units + 1):
                    new = (_after(label, table[at, to], ranks, to - at) for label in labels)
                    reached.setdefault(to, []).extend(n for n in new if n.seconds < best.seconds)
            whole = reached.pop(units, [])
            if number in counts:
                best = min([best, *whole], key=lambda label: (label.seconds, len(label.sizes)))
                found += [best.sizes] if best.sizes != found[-1] else []
            fronts = {at: _front(labels) for at, labels in reached.items()}
    return found
