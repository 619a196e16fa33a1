"""When everything happens in a layer whose rows travel over several tiers of links: between nodes, then inside a node.

A chunk's way to its experts is a sequence of legs, each on one tier, and so is its way home. A rank has one thread that
does what it is asked in order: it waits for the leg before, starts the next one, or computes. A tier carries one
collective at a time, in the order of their starts; tiers carry theirs side by side. So while the rows of one chunk are
spread over the ranks of a node, those of the next may be between nodes, if the thread is asked in such an order
(:func:`asks`); the program is written in the same one (:mod:`moec.passes.overlap.order`).

With one tier this is :mod:`moec.passes.overlap.timeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Ask = tuple[int, int]
"""A chunk, and which of its steps: its legs there, its experts, its legs home, counted through."""
Beside = Sequence[tuple[int, Sequence[float]]]
"""What is computed before the experts of a chunk, or behind all that is asked: the chunk, seconds of every rank."""


@dataclass(frozen=True)
class Turns:
    """Which chunks take turns on a rank's thread.

    Attributes:
        ahead: Before a chunk's experts run, so many of the next chunks are sent on inside their node: their rows then
            travel there meanwhile, and the experts wait until they have come between nodes.
        behind: So many chunks' experts run before a chunk that came home inside its node is sent on between nodes.
    """

    ahead: int = 1
    behind: int = 0


TURNS = tuple(Turns(ahead, behind) for ahead in (1, 0) for behind in (0, 1))
"""Those that are chosen from."""


@dataclass(frozen=True)
class Leg:
    """A collective of a chunk, or several that follow each other.

    Attributes:
        tier: Which links.
        seconds: On them.
        calls: Of every rank's thread, right before it starts.
    """

    tier: int
    seconds: float
    calls: float = 0.0


@dataclass(frozen=True)
class Journey:
    """Seconds of one chunk.

    Attributes:
        there: The way to the experts.
        compute: Of the experts of every rank, [N].
        back: The way home.
    """

    there: tuple[Leg, ...]
    compute: tuple[float, ...]
    back: tuple[Leg, ...]


@dataclass(frozen=True)
class Travelled:
    """One leg as it went, in seconds from the start of the layer."""

    chunk: int
    step: int
    start: float
    end: float


def asks(chunks: int, there: Sequence[int], back: int, turns: Turns) -> list[Ask]:
    """What a rank's thread is asked, in turn.

    All rows leave on the first tier before anything else: no other order of that tier ends sooner, as nothing but the
    end of the step waits for what comes home on it.

    Args:
        chunks: How many.
        there: The tier of every leg to the experts.
        back: Legs home.
        turns: When rows are sent on.
    """
    experts = len(there)
    first = [leg for leg, tier in enumerate(there) if tier == there[0]]
    onward = [leg for leg in range(experts) if leg not in first]
    homeward = range(experts + 2, experts + 1 + back)
    found = [(chunk, leg) for leg in first for chunk in range(chunks)]
    sent_on = 0
    for chunk in range(chunks):
        until = min(chunks, chunk + turns.ahead + 1)
        found += [(c, leg) for c in range(sent_on, until) for leg in onward]
        sent_on = until
        found += [(chunk, experts), (chunk, experts + 1)] if back else [(chunk, experts)]
        if chunk >= turns.behind:
            found += [(chunk - turns.behind, leg) for leg in homeward]
    late = range(max(0, chunks - turns.behind), chunks)
    return found + [(chunk, leg) for chunk in late for leg in homeward]


def travel(chunks: Sequence[Journey], turns: Turns, beside: Beside = ()) -> tuple[float, list[Travelled]]:
    """Seconds until all rows are home, and every leg of the chunks, in the order of their starts.

    Args:
        chunks: All with the same legs.
        turns: The order of what the thread is asked.
        beside: What else is computed, and where.
    """
    legs_there, legs_back = chunks[0].there, chunks[0].back
    experts = len(legs_there)
    threads = [0.0] * len(chunks[0].compute)
    free = [0.0] * (1 + max((leg.tier for leg in (*legs_there, *legs_back)), default=0))
    arrived = [0.0] * len(chunks)
    went: list[Travelled] = []
    for chunk, step in asks(len(chunks), [leg.tier for leg in legs_there], len(legs_back), turns):
        if step == experts:
            for _, seconds in (b for b in beside if b[0] == chunk):
                threads = [t + s for t, s in zip(threads, seconds, strict=True)]
            here = arrived[chunk]
            threads = [max(t, here) + s for t, s in zip(threads, chunks[chunk].compute, strict=True)]
            arrived[chunk] = 0.0
            continue
        leg = chunks[chunk].there[step] if step < experts else chunks[chunk].back[step - experts - 1]
        ready = arrived[chunk]
        threads = [max(t, ready) + leg.calls for t in threads]
        start = max(free[leg.tier], *threads)
        arrived[chunk] = free[leg.tier] = start + leg.seconds
        went.append(Travelled(chunk, step, start, arrived[chunk]))
    for _, seconds in (b for b in beside if b[0] >= len(chunks)):
        threads = [t + s for t, s in zip(threads, seconds, strict=True)]
    return max((*threads, *free)), went
