"""Who chooses the chunks: the cost model alone, or the rules of other systems, for comparison.

All of them are judged by the same times (:mod:`moec.passes.overlap.timeline`), so that they differ in what they choose
and in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from moec.passes.overlap.cuts import ByExperts, ByTokens, Layer, Sets, by_sets
from moec.passes.overlap.orders import better_sets, least_seconds, worth_ordering
from moec.passes.overlap.search import MOST, better_sizes
from moec.passes.overlap.timeline import Chunk, exposed_floor, makespan

CUTS: dict[str, type[ByExperts] | type[ByTokens]] = {"experts": ByExperts, "tokens": ByTokens}
EVERYTHING = ("experts", "tokens", "own", "order")
POLICIES = ("auto", "none", "two", "tutel", "fsmoe")
MARGIN = 0.01
"""Of schedules that end within this part of the soonest's time, one of fewest chunks is taken, the whole layer first of
all: predictions are not better than that, and what they do not know of comes with every chunk."""
OWN_WORTH = 1.05
"""Chunks behind a rank's own rows that end within so many times the soonest's time are looked at in other orders."""


@dataclass(frozen=True)
class Schedule:
    """What was chosen for one layer in one direction.

    Attributes:
        along: ``"experts"`` or ``"tokens"``.
        sizes: Units of every chunk that travels; experts of all ranks, where they are not as they stand.
        own_first: The rows that a rank keeps are a chunk of their own, before all others.
        chunks: What every chunk costs, the one of own rows first.
        seconds: Predicted time, from the first row that leaves until all that came home is together.
        sets: Which experts are in every chunk that travels; empty for as they stand.
    """

    along: str
    sizes: tuple[int, ...]
    own_first: bool
    chunks: tuple[Chunk, ...]
    seconds: float
    sets: Sets = ()

    @property
    def cut(self) -> bool:
        """Whether there is more than one chunk."""
        return len(self.chunks) > 1

    @property
    def floor(self) -> float:
        """Seconds of communication that no order of the same chunks hides."""
        return exposed_floor(self.chunks)


def own_rows(layer: Layer) -> tuple[Chunk, Layer]:
    """The rows that stay on their rank as a chunk, and the layer without them. All are counted before either runs.

    While own experts run, the rows of the next chunk travel: that chunk counts it.
    """
    keep, send, at = [], [[*row] for row in layer.rows], 0
    for rank, size in enumerate(layer.sizes):
        keep.append(layer.experts.seconds(layer.rows[rank][at : at + size]))
        send[rank][at : at + size] = [0.0] * size
        at += size
    counting, calls = layer.links.seconds(0.0, layer.count_messages), layer.beside_s("experts")
    own = Chunk(counting, tuple(seconds + calls for seconds in keep), 0.0)
    return own, replace(layer, rows=send, count_messages=0, behind=True)


def schedule(layer: Layer, along: str, sizes: Sequence[int], own_first: bool = False, units: int = 0) -> Schedule:
    """The schedule of given chunks."""
    first, rest = _before(layer, own_first)
    chunks = [*first, *CUTS[along](rest, units or sum(sizes)).chunks(sizes)]
    return _timed(layer, Schedule(along, tuple(sizes), own_first, tuple(chunks), 0.0))


def of_sets(layer: Layer, sets: Sets, own_first: bool = False) -> Schedule:
    """The schedule of chunks of any experts."""
    first, rest = _before(layer, own_first)
    chunks = [*first, *by_sets(rest, sets).chunks((1,) * len(sets))]
    sizes = tuple(sum(map(len, chunk)) for chunk in sets)
    return _timed(layer, Schedule("experts", sizes, own_first, tuple(chunks), 0.0, sets))


def _before(layer: Layer, own_first: bool) -> tuple[list[Chunk], Layer]:
    """The chunk of own rows, if it is one, and the layer that is cut then."""
    if not own_first:
        return [], layer
    own, rest = own_rows(layer)
    return [own], rest


def _timed(layer: Layer, made: Schedule) -> Schedule:
    """The same with what several chunks cost beside their own, and its time."""
    if not made.cut:
        return replace(made, seconds=makespan(made.chunks))
    chunks = tuple(layer.in_front(made.chunks, made.along))
    return replace(made, chunks=chunks, seconds=makespan(chunks) + layer.joining.get(made.along, 0.0))


def cut_seconds(layer: Layer, found: Schedule) -> float:
    """Seconds of a rank's processor that nothing but the cut costs.

    That is the calls of every chunk, but those that run while the first rows travel; what collectives take of the
    experts; and putting together what came home.
    """
    free = replace(layer, chunk_s={}, front_s={}, burden=None)
    same = of_sets(free, found.sets, found.own_first) if found.sets else None
    experts = (same or schedule(free, found.along, found.sizes, found.own_first)).chunks
    joining = found.seconds - makespan(found.chunks)
    return joining + sum(c.compute[0] for c in found.chunks) - sum(c.compute[0] for c in experts)


def uncut(layer: Layer) -> Schedule:
    """Everything at once."""
    return schedule(layer, "experts", (1,))


def candidates(
    layer: Layer, allowed: Collection[str] = EVERYTHING, most: int = MOST, front: Chunk | None = None
) -> list[Schedule]:
    """The layer whole, and the best chunks that the cost model knows of every kind and number.

    Args:
        layer: The layer.
        allowed: What it may be cut along; ``"own"`` where a rank's own rows may come before chunks of experts, and
            ``"order"`` where these need not be as they stand.
        most: Chunks at most.
        front: What is computed before the first chunk of experts or of tokens, for the search alone.
    """
    found = [uncut(layer)]
    own, rest = own_rows(layer)
    for along in (a for a in CUTS if a in allowed):
        found += [schedule(layer, along, sizes) for sizes in better_sizes(CUTS[along](layer), front, most)[1:]]
    if "own" in allowed and most > 1 and front is None:
        found += [schedule(layer, "experts", s, own_first=True) for s in better_sizes(ByExperts(rest), own, most - 1)]
    if "tokens" in allowed:
        found += equal(layer, range(2, most + 1))
    if "order" in allowed and most > 1 and worth_ordering(layer):
        found += list(reordered(layer, found, most, front))
    return found


def reordered(
    layer: Layer, found: Sequence[Schedule], most: int = MOST, front: Chunk | None = None
) -> Iterator[Schedule]:
    """Chunks of any experts that end sooner than those of experts as they stand; none where they hardly could.

    Args:
        layer: The layer.
        found: What was found for experts as they stand.
        most: Chunks at most.
        front: As for :func:`candidates`.
    """
    soonest = min(s.seconds for s in found)
    if front is None and soonest <= (1 + MARGIN) * (least_seconds(layer) + layer.joining.get("experts", 0.0)):
        return
    for own_first in (False, True):
        natural = [s for s in found if s.along == "experts" and s.own_first == own_first and s.cut]
        if own_first and min((s.seconds for s in natural), default=math.inf) > OWN_WORTH * soonest:
            continue
        first, rest = _before(layer, own_first)
        sizes = [s.sizes for s in natural if len(s.sizes) > 1]
        for sets in better_sets(rest, sizes, first[0] if own_first else front, most - own_first):
            yield of_sets(layer, sets, own_first)


def auto(layer: Layer, allowed: Collection[str] = EVERYTHING, most: int = MOST) -> Schedule:
    """The simplest schedule that is as good as the best; arguments as for :func:`candidates`."""
    return simplest(candidates(layer, allowed, most))


def simplest(found: Sequence[Schedule]) -> Schedule:
    """Of the soonest and those that end within :data:`MARGIN` of it, one of fewest chunks; the soonest of these.

    Experts as they stand come first.
    """
    limit = min(s.seconds for s in found) * (1 + MARGIN)
    return min((s for s in found if s.seconds <= limit), key=lambda s: (bool(s.sets), len(s.chunks), s.seconds))


def equal(layer: Layer, degrees: Collection[int]) -> Iterator[Schedule]:
    """Chunks of equally many tokens."""
    return (schedule(layer, "tokens", (1,) * d) for d in degrees)


def two(layer: Layer) -> Schedule:
    """Exactly two equal chunks of tokens, without a cost model (torchtitan's ``ep_chunk_pass``)."""
    return next(equal(layer, (2,)))


def tutel(layer: Layer) -> Schedule:
    """The best of 1, 2, 4 and 8 equal chunks, as if measured (Tutel, arXiv:2206.03382, section 3.4)."""
    return min(equal(layer, (1, 2, 4, 8)), key=lambda s: s.seconds)


def fsmoe(layer: Layer) -> Schedule:
    """The degree of FSMoE's formulas (arXiv:2501.10714, section 4): balanced loads, and times that are lines.

    With degree d, n bytes and α + β n a collective, the GEMMs taking α' d + β' in all:
    either links bind, ``2 d α + 2 β n`` if ``2 (d - 1) (α + β n / d) ≥ α' d + β'``, or experts do,
    ``2 (α + β n / d) + α' d + β'``.
    """
    ranks = len(layer.sizes)
    total = sum(map(sum, layer.rows))
    moved = total / ranks * (ranks - 1) / ranks
    nothing = layer.links.seconds(0.0, layer.there_messages + layer.back_messages)
    alpha = nothing / 2
    n_beta = (layer.links.seconds(moved * (layer.there_bytes + layer.back_bytes)) - layer.links.seconds(0.0)) / 2
    own = max(layer.sizes)
    fixed, slope = _line(layer.experts.seconds, total / ranks / own, own)

    def seconds(d: int) -> float:
        gemms = fixed * d + slope
        if 2 * (d - 1) * (alpha + n_beta / d) >= gemms:
            return 2 * d * alpha + 2 * n_beta
        return 2 * (alpha + n_beta / d) + gemms

    return next(equal(layer, (min((1, 2, 4, 8), key=seconds),)))


def _line(seconds: Callable[[list[float]], float], rows: float, experts: int) -> tuple[float, float]:
    """Time at no row, and what all ``rows`` of each expert add: least squares over whole, half, ... eighth of them."""
    shares = (1.0, 0.5, 0.25, 0.125)
    times = [seconds([rows * s] * experts) for s in shares]
    mean_share, mean_time = sum(shares) / 4, sum(times) / 4
    spread = sum((s - mean_share) ** 2 for s in shares)
    slope = sum((s - mean_share) * (t - mean_time) for s, t in zip(shares, times, strict=True)) / spread
    return max(0.0, mean_time - slope * mean_share), slope


def choose(policy: str, layer: Layer, allowed: Collection[str]) -> Schedule:
    """What a policy makes of a layer."""
    if policy == "auto":
        return auto(layer, allowed)
    return {"none": uncut, "two": two, "tutel": tutel, "fsmoe": fsmoe}[policy](layer)
