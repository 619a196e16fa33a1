"""Timelines of chunks: by hand, and held to a simulation of every order in which links could be used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.passes.overlap.timeline import (
    Chunk,
    Span,
    compute_seconds,
    exposed_floor,
    lower_bound,
    makespan,
    timeline,
    two_machines,
)

times = st.integers(1, 20).map(float)


@st.composite
def chunk_lists(draw: st.DrawFn, most: int = 5) -> list[Chunk]:
    ranks = draw(st.integers(1, 3))
    one = st.builds(Chunk, times, st.tuples(*[st.integers(0, 20).map(float)] * ranks), times)
    chunks = draw(st.lists(one, min_size=1, max_size=most))
    own = draw(st.booleans())
    return [Chunk(0.0, draw(st.tuples(*[times] * ranks)), 0.0), *chunks] if own else chunks


def simulate(chunks: Sequence[Chunk], order: Sequence[tuple[str, int]]) -> float:
    """Step by step: one collective at a time in the given order, every rank one chunk after the other."""
    ends: dict[tuple[str, int], float] = {("there", i): 0.0 for i, c in enumerate(chunks) if not c.there}
    clock, busy, computed = 0.0, [0.0] * len(chunks[0].compute), 0
    for what, i in order:
        if what == "back":
            while computed <= i:
                arrived = ends["there", computed]
                busy = [max(b, arrived) + c for b, c in zip(busy, chunks[computed].compute, strict=True)]
                ends["done", computed] = max(*busy, arrived)
                computed += 1
            clock = max(clock, ends["done", i])
        clock += chunks[i].there if what == "there" else chunks[i].back
        ends[what, i] = clock
    for chunk in chunks[computed:]:
        busy = [b + c for b, c in zip(busy, chunk.compute, strict=True)]
    return max(clock, *busy)


def orders(chunks: Sequence[Chunk]) -> list[list[tuple[str, int]]]:
    """All in which a chunk's rows go there before they come back, both in order of the chunks."""
    there = [("there", i) for i, c in enumerate(chunks) if c.there]
    back = [("back", i) for i, c in enumerate(chunks) if c.back]
    found = []
    for places in itertools.combinations(range(len(there) + len(back)), len(there)):
        ts, bs = iter(there), iter(back)
        order = [next(ts) if at in places else next(bs) for at in range(len(there) + len(back))]
        sent: set[int] = {i for i, c in enumerate(chunks) if not c.there}
        for what, i in order:
            if what == "there":
                sent.add(i)
            elif not sent.issuperset(range(i + 1)):
                break
        else:
            found.append(order)
    return found


def test_two_chunks_by_hand() -> None:
    chunks = [Chunk(2.0, (3.0, 1.0), 2.0), Chunk(2.0, (1.0, 4.0), 2.0)]
    assert timeline(chunks) == [
        Span("there", 0, -1, 0.0, 2.0),
        Span("there", 1, -1, 2.0, 4.0),
        Span("compute", 0, 0, 2.0, 5.0),
        Span("compute", 0, 1, 2.0, 3.0),
        Span("compute", 1, 0, 5.0, 6.0),
        Span("compute", 1, 1, 4.0, 8.0),
        Span("back", 0, -1, 5.0, 7.0),
        Span("back", 1, -1, 8.0, 10.0),
    ]
    assert makespan(chunks) == 10.0
    assert compute_seconds(chunks) == 5.0
    assert lower_bound(chunks) == 9.0 == 2.0 + 5.0 + 2.0
    assert exposed_floor(chunks) == 4.0


def test_own_rows_need_no_links() -> None:
    own, sent = Chunk(0.0, (4.0,), 0.0), Chunk(3.0, (1.0,), 3.0)
    assert makespan([own, sent]) == 8.0
    assert makespan([own]) == 4.0
    assert makespan([]) == 0.0


@settings(max_examples=200, deadline=None)
@given(chunk_lists())
def test_nothing_begins_before_what_it_needs_or_while_its_resource_is_taken(chunks: list[Chunk]) -> None:
    spans = timeline(chunks)
    at = {(s.what, s.chunk, s.rank): s for s in spans}
    for s in spans:
        if s.what == "compute" and ("there", s.chunk, -1) in at:
            assert s.start >= at["there", s.chunk, -1].end
        if s.what == "back":
            assert all(s.start >= c.end for c in spans if c.what == "compute" and c.chunk == s.chunk)
    for rank in {s.rank for s in spans}:
        mine = sorted((s.start, s.end) for s in spans if s.rank == rank)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(mine))
    assert makespan(chunks) >= lower_bound([c for c in chunks if c.there]) if all(c.there for c in chunks) else True
    assert sum(s.end - s.start for s in spans if s.rank == -1) == pytest.approx(sum(c.there + c.back for c in chunks))


@settings(max_examples=100, deadline=None)
@given(chunk_lists(most=4))
def test_no_order_of_the_chunks_ends_before_the_bound(chunks: list[Chunk]) -> None:
    best = min(makespan(order) for order in itertools.permutations(chunks))
    assert lower_bound(chunks) <= best + 1e-9
    weaker = min(c.there for c in chunks) + compute_seconds(chunks) + min(c.back for c in chunks)
    assert lower_bound(chunks) >= max(weaker, sum(c.there + c.back for c in chunks)) - 1e-9


def test_bounds_by_hand() -> None:
    assert two_machines([(3.0, 2.0), (1.0, 4.0)]) == 7.0, "the short one first"
    own, sent = Chunk(1.0, (4.0,), 0.0), Chunk(3.0, (1.0,), 3.0)
    assert lower_bound([own, sent]) == 8.0 == makespan([sent, own]), "neither is first and last"
    assert lower_bound([Chunk(1.0, (2.0,), 3.0)]) == 6.0


@settings(max_examples=100, deadline=None)
@given(chunk_lists(most=4))
def test_no_order_of_the_links_ends_sooner_than_all_rows_there_first(chunks: list[Chunk]) -> None:
    assert makespan(chunks) == pytest.approx(min(simulate(chunks, order) for order in orders(chunks)))
