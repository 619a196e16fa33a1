"""The best chunks of a layer over two tiers of links: their number, their sizes, and when each is sent on.

For a number of chunks, sizes are found by moving a unit of tokens from one chunk to another for as long as the step
then ends sooner, from equal chunks on, for every order of :data:`moec.passes.overlap.legs.TURNS`. The tests hold what
is found to all sizes. Rules of other systems choose how many equal chunks of tokens there are, and nothing else: the
order of these is the best one, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

from moec.passes.overlap.cuts import UNITS, Layer
from moec.passes.overlap.fill import FRONT, PIECES, Beside, Places
from moec.passes.overlap.legs import TURNS, Turns, travel
from moec.passes.overlap.policies import MARGIN, fsmoe
from moec.passes.overlap.search import MOST
from moec.passes.overlap.tiers import Carried, TieredLayer


@dataclass(frozen=True)
class TieredSchedule:
    """What was chosen.

    Attributes:
        sizes: Units of tokens of every chunk.
        turns: When chunks are sent on.
        places: Where what stands beside the layer is computed.
        seconds: Predicted time, from the first row that leaves until all that came home is together.
    """

    sizes: tuple[int, ...]
    turns: Turns
    places: Places
    seconds: float

    @property
    def cut(self) -> bool:
        """Whether there is more than one chunk."""
        return len(self.sizes) > 1


class Search:
    """The schedules of one layer, and of what stands beside it.

    Of ranks whose experts are never slower than another's nothing need be known.
    """

    def __init__(self, layer: TieredLayer, beside: Beside | None = None) -> None:
        self.whole, self.beside = layer, beside
        ranks = range(len(layer.loads))
        pieces = range(1, PIECES + 1) if beside is not None else ()
        seconds = {n: beside.chunk(n).compute for n in pieces} if beside is not None else {}
        columns = [*(layer.compute(n / UNITS) for n in range(1, UNITS + 1)), *seconds.values()]
        times = [tuple(column[r] for column in columns) for r in ranks]
        kept: list[int] = []
        for rank in sorted(ranks, key=lambda r: -sum(times[r])):
            if not any(all(a <= b for a, b in zip(times[rank], times[k], strict=True)) for k in kept):
                kept.append(rank)
        self.layer = layer.of(kept)
        self._seconds = {n: [column[r] for r in kept] for n, column in seconds.items()}

    def at(self, sizes: Sequence[int], turns: Turns, places: Places = FRONT) -> TieredSchedule:
        """The schedule of given chunks in a given order."""
        beside = [(at, self._seconds[pieces]) for at, pieces in places] if self.beside is not None else []
        seconds, _ = travel(self.layer.chunks(sizes), turns, beside)
        joining = self.layer.joining if len(sizes) > 1 else 0.0
        return TieredSchedule(tuple(sizes), turns, places, seconds + joining)

    def ordered(self, sizes: Sequence[int]) -> TieredSchedule:
        """The best order of given chunks, and the best places of what stands beside them."""
        options: list[Places] = [FRONT]
        if self.beside is not None:
            options = [((at, PIECES),) for at in range(len(sizes) + 1)]
            pairs = range(1, PIECES) if not self.beside.whole else ()
            options += [((0, n), (len(sizes), PIECES - n)) for n in pairs]
        turns = TURNS if len(sizes) > 1 else TURNS[:1]
        return _soonest([self.at(sizes, t, places) for t in turns for places in options])

    def best(self, count: int) -> TieredSchedule:
        """The best sizes of so many chunks that were found."""
        equal = [UNITS // count + (i < UNITS % count) for i in range(count)]
        found = _soonest([self._climb(self.at(equal, turns)) for turns in TURNS])
        if self.beside is None:
            return found
        placed = self.ordered(found.sizes)
        return placed if placed.places == FRONT else self._climb(placed)

    def _climb(self, found: TieredSchedule) -> TieredSchedule:
        while True:
            better = found
            for source, to in permutations(range(len(found.sizes)), 2):
                sizes = list(better.sizes)
                sizes[source], sizes[to] = sizes[source] - 1, sizes[to] + 1
                if sizes[source]:
                    better = min(better, self.at(sizes, found.turns, found.places), key=lambda s: s.seconds)
            if better is found:
                return found
            found = better

    def auto(self) -> TieredSchedule:
        """Of the soonest and those that end within :data:`MARGIN` of it, one of fewest chunks."""
        found = [self.ordered((1,)), *(self.best(count) for count in range(2, MOST + 1))]
        limit = min(s.seconds for s in found) * (1 + MARGIN)
        return next(s for s in found if s.seconds <= limit)

    def equal(self, degrees: Sequence[int]) -> TieredSchedule:
        """The best of so many equal chunks."""
        return _soonest([self.ordered((1,) * degree) for degree in degrees])

    def choose(self, policy: str) -> TieredSchedule:
        """What a policy of :data:`moec.passes.overlap.policies.POLICIES` makes of the layer."""
        chosen: dict[str, Callable[[], TieredSchedule]] = {
            "auto": self.auto,
            "none": lambda: self.equal((1,)),
            "two": lambda: self.equal((2,)),
            "tutel": lambda: self.equal((1, 2, 4, 8)),
            "fsmoe": lambda: self.equal((len(fsmoe(_one_tier(self.whole)).sizes),)),
        }
        return chosen[policy]()


def _soonest(found: Sequence[TieredSchedule]) -> TieredSchedule:
    return min(found, key=lambda s: s.seconds)


def _one_tier(layer: TieredLayer) -> Layer:
    """The layer as a rule knows it that has links of one kind: those that it is longest on."""

    def seconds(trips: Sequence[Carried], tier: int) -> float:
        return sum(layer.links[tier].seconds(t.bytes, t.messages) for t in trips if t.tier == tier)

    tier = max(range(len(layer.links)), key=lambda t: seconds((*layer.there, *layer.back), t))
    ranks, own = len(layer.loads), max(map(len, layer.loads))
    total = sum(map(sum, layer.loads))
    moved = total / ranks * (ranks - 1) / ranks if ranks > 1 else total
    way = [[t for t in trips if t.tier == tier] for trips in (layer.there, layer.back)]
    there, back = (sum(t.bytes for t in trips) / moved if moved else 0.0 for trips in way)
    messages, home = (sum(t.messages for t in trips) for trips in way)
    rows = [[total / ranks / ranks / own] * (ranks * own)] * ranks
    return Layer(rows, (own,) * ranks, layer.experts, layer.links[tier], there, back, messages, home)
