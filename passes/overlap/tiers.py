"""A layer whose rows travel over two tiers of links: what its chunks cost.

It is cut along tokens: a token goes to a node once for all its experts there, so that experts cannot be sent for apart.
A chunk is the same part of every rank's tokens, and costs that part of the layer's bytes and rows, on each tier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moec.passes.overlap.costs import ExpertTimes, Transport, burden_seconds
from moec.passes.overlap.legs import Journey, Leg


@dataclass(frozen=True)
class Carried:
    """What one trip carries, of the whole layer.

    Attributes:
        tier: Which links.
        messages: Collectives, one after the other.
        bytes: Of the busiest rank.
    """

    tier: int
    messages: int
    bytes: float


@dataclass(frozen=True)
class TieredLayer:
    """One layer's forward, on all ranks.

    Attributes:
        loads: Rows of every rank's experts, of each rank a number for each of its own.
        experts: Times of a rank's experts.
        links: Of every tier.
        there: The trips to the experts.
        back: The trips home.
        joining: Seconds to put what the chunks brought home together again.
        chunk_s: Seconds of every rank's processor for each chunk of a layer that is cut, beside rows and experts.
        front_s: Of them, those by which its rows leave their rank.
        burdens: Of every tier, what a collective takes of the processor whose experts run meanwhile; None for nothing.
    """

    loads: tuple[tuple[float, ...], ...]
    experts: ExpertTimes
    links: tuple[Transport, ...]
    there: tuple[Carried, ...]
    back: tuple[Carried, ...]
    joining: float = 0.0
    chunk_s: float = 0.0
    front_s: float = 0.0
    burdens: tuple[Transport | None, ...] = (None, None)
    _known: dict[tuple[float, bool, bool], Journey] = field(default_factory=dict, init=False, compare=False, repr=False)

    def chunks(self, sizes: Sequence[int]) -> tuple[Journey, ...]:
        """The chunks that have ``sizes`` units of the tokens."""
        last, units = len(sizes) - 1, sum(sizes)
        return tuple(self._part(size / units, i == 0, i == last) for i, size in enumerate(sizes))

    def compute(self, share: float) -> list[float]:
        """Seconds of every rank's experts for this share of all tokens."""
        return [self.experts.seconds([n * share for n in loads]) for loads in self.loads]

    def of(self, ranks: Sequence[int]) -> TieredLayer:
        """The same, told of these ranks' experts alone."""
        return replace(self, loads=tuple(self.loads[r] for r in ranks))

    def _part(self, share: float, first: bool, last: bool) -> Journey:
        """A chunk. Its collectives are a burden for others' experts, but for the first way there and the last home."""
        key = share, first, last
        if key not in self._known:
            cut = not (first and last)
            more = (self.chunk_s - self.front_s) * cut
            more += 0.0 if first else self._burden(self.there, share)
            more += 0.0 if last else self._burden(self.back, share)
            there = [self._leg(trip, share) for trip in self.there]
            there[0] = replace(there[0], calls=self.front_s * cut)
            compute = tuple(seconds + more for seconds in self.compute(share))
            self._known[key] = Journey(tuple(there), compute, tuple(self._leg(trip, share) for trip in self.back))
        return self._known[key]

    def _leg(self, trip: Carried, share: float) -> Leg:
        return Leg(trip.tier, self.links[trip.tier].seconds(trip.bytes * share, trip.messages))

    def _burden(self, trips: Sequence[Carried], share: float) -> float:
        return sum(burden_seconds(self.burdens[t.tier], self.links[t.tier], t.bytes * share, t.messages) for t in trips)
