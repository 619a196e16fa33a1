"""Timelines over tiers: held to a simulation event by event, to the simulator's engine, and to the one of one tier."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.passes.overlap import timeline
from moec.passes.overlap.legs import TURNS, Ask, Journey, Leg, Turns, asks, travel
from moec.simulate.collectives import all_to_all
from moec.simulate.events import simulate
from moec.simulate.job import groups_of
from moec.simulate.planning import MachineCosts
from moec.simulate.steps import Collective, Compute, Start, Step, Wait
from moec.simulate.topology import load_topology

THERE, BACK = (0, 0, 1, 1), (1, 0)
"""Counts and rows between nodes, then inside them; and home."""
times = st.integers(1, 20).map(float)


def journeys(there: Sequence[int] = THERE, back: Sequence[int] = BACK) -> st.SearchStrategy[list[Journey]]:
    def legs(tiers: Sequence[int]) -> st.SearchStrategy[tuple[Leg, ...]]:
        return st.tuples(*(st.builds(Leg, st.just(t), times, st.integers(0, 3).map(float)) for t in tiers))

    def of(ranks: int) -> st.SearchStrategy[list[Journey]]:
        compute = st.tuples(*[st.integers(0, 20).map(float)] * ranks)
        return st.lists(st.builds(Journey, legs(there), compute, legs(back)), min_size=1, max_size=4)

    return st.integers(1, 3).flatmap(of)


def replay(chunks: Sequence[Journey], script: Sequence[Ask]) -> float:
    """Event by event: every rank does what is next in its script as soon as it may, a leg runs once all are at it."""
    ranks, experts = len(chunks[0].compute), len(chunks[0].there)
    at, busy, now = [0] * ranks, [0.0] * ranks, 0.0
    asked: dict[Ask, set[int]] = {}
    queues: dict[int, list[Ask]] = {}
    running: dict[int, tuple[float, Ask]] = {}
    ended: set[Ask] = set()
    called: set[tuple[int, Ask]] = set()

    def leg(ask: Ask) -> Leg:
        chunk, step = ask
        return chunks[chunk].there[step] if step < experts else chunks[chunk].back[step - experts - 1]

    def go() -> bool:
        moved = False
        for r in range(ranks):
            while at[r] < len(script) and busy[r] <= now:
                chunk, step = ask = script[at[r]]
                needed = (chunk, step - 1)
                if step not in (0, experts + 1) and needed not in ended:
                    break
                if step == experts:
                    busy[r] = now + chunks[chunk].compute[r]
                elif (r, ask) not in called:
                    called.add((r, ask))
                    busy[r] = now + leg(ask).calls
                    moved = True
                    continue
                else:
                    if ask not in asked:
                        queues.setdefault(leg(ask).tier, []).append(ask)
                    asked.setdefault(ask, set()).add(r)
                at[r] += 1
                moved = True
        for tier, queue in queues.items():
            if tier not in running and queue and len(asked[queue[0]]) == ranks:
                ask = queue.pop(0)
                running[tier] = now + leg(ask).seconds, ask
                moved = True
        return moved

    while True:
        while go():
            pass
        soon = [*(b for b in busy if b > now), *(end for end, _ in running.values())]
        if not soon:
            assert at == [len(script)] * ranks
            return now
        now = min(soon)
        for tier in [t for t, (end, _) in running.items() if end <= now]:
            ended.add(running.pop(tier)[1])


@settings(max_examples=150, deadline=None)
@given(journeys(), st.sampled_from(TURNS))
def test_it_is_what_happens_event_by_event(chunks: list[Journey], turns: Turns) -> None:
    script = asks(len(chunks), THERE, len(BACK), turns)
    assert travel(chunks, turns)[0] == pytest.approx(replay(chunks, script))


@settings(max_examples=100, deadline=None)
@given(journeys(there=(0,), back=(0,)), st.sampled_from(TURNS))
def test_on_one_tier_it_is_the_timeline_of_one_tier(chunks: list[Journey], turns: Turns) -> None:
    free = [Journey((Leg(0, c.there[0].seconds),), c.compute, (Leg(0, c.back[0].seconds),)) for c in chunks]
    same = [timeline.Chunk(c.there[0].seconds, c.compute, c.back[0].seconds) for c in free]
    assert travel(free, turns)[0] == pytest.approx(timeline.makespan(same))


@settings(max_examples=100, deadline=None)
@given(journeys(), st.sampled_from(TURNS))
def test_a_tier_carries_one_leg_at_a_time_and_legs_follow_each_other(chunks: list[Journey], turns: Turns) -> None:
    _, went = travel(chunks, turns)
    tiers = [*THERE, -1, *BACK]
    for tier in (0, 1):
        mine = [w for w in went if tiers[w.step] == tier]
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))
    for chunk in range(len(chunks)):
        steps = [w for w in went if w.chunk == chunk]
        assert all(a.end <= b.start for a, b in itertools.pairwise(steps))
        assert [w.step for w in steps] == [0, 1, 2, 3, 5, 6]


def test_two_chunks_by_hand() -> None:
    chunk = Journey((Leg(0, 3.0), Leg(1, 1.0)), (4.0,), (Leg(1, 1.0), Leg(0, 3.0)))
    # between nodes 0-3 and 3-6; inside 3-4, computed 4-8; the other inside 8-9 behind what goes home, 9-10
    seconds, went = travel([chunk, chunk], Turns(ahead=0, behind=1))
    assert [(w.chunk, w.step, w.start, w.end) for w in went] == [
        (0, 0, 0.0, 3.0), (1, 0, 3.0, 6.0), (0, 1, 3.0, 4.0), (0, 3, 8.0, 9.0), (1, 1, 9.0, 10.0),
        (1, 3, 14.0, 15.0), (0, 4, 14.0, 17.0), (1, 4, 17.0, 20.0),
    ]  # fmt: skip
    assert seconds == 20.0
    assert travel([chunk, chunk], Turns(ahead=1, behind=0))[0] == 19.0, "rows are spread while others are computed"
    assert travel([chunk], Turns())[0] == 12.0


def test_what_stands_beside_takes_the_thread() -> None:
    chunk = Journey((Leg(0, 3.0), Leg(1, 1.0)), (4.0,), (Leg(1, 1.0), Leg(0, 3.0)))
    assert travel([chunk], Turns(), [(0, [2.0])])[0] == 13.0, "of two, one runs while rows are spread"
    assert travel([chunk], Turns(), [(1, [2.0])])[0] == 12.0, "it runs while rows come home"
    assert travel([chunk], Turns(), [(1, [9.0])])[0] == 18.0


def test_turns_by_hand() -> None:
    first = [(0, 0), (1, 0), (2, 0)]
    assert asks(3, (0, 1), 2, Turns(0, 0)) == [*first, *[(c, s) for c in range(3) for s in (1, 2, 3, 4)]]
    assert asks(3, (0, 1), 2, Turns(1, 1)) == [
        *first, (0, 1), (1, 1), (0, 2), (0, 3), (2, 1), (1, 2), (1, 3), (0, 4), (2, 2), (2, 3), (1, 4), (2, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("late", [0.0, 40e-6])
def test_it_is_what_the_simulator_finds_on_nodes_of_gpus(turns: Turns, late: float) -> None:
    """Four nodes of eight H100. Every rank sends alike; where one computes longer, only groups with it wait for it."""
    topology, sizes = load_topology("32xh100"), (3.0, 2.0, 3.0)
    groups = groups_of(topology.ranks, topology.nodes, {"ep"})
    names = ("ep.node", "ep.local")
    bytes_of = [(1e3, 4e5, 1e3, 3e6), (3e6, 9e5)]  # of a unit and a rank, to each other one
    links = [MachineCosts(topology).transport(name, len(groups[name][0])) for name in names]
    collectives: list[Collective] = []
    programs: list[list[Step]] = [[] for _ in range(topology.ranks)]
    number: dict[tuple[int, Ask], int] = {}
    chunks = []
    for chunk, size in enumerate(sizes):
        ways: list[tuple[Leg, ...]] = []
        for tiers, each, base in ((THERE, bytes_of[0], 0), (BACK, bytes_of[1], len(THERE) + 1)):
            legs = []
            for step, (tier, sent) in enumerate(zip(tiers, each, strict=True)):
                link = links[tier]
                assert link is not None
                legs.append(Leg(tier, link.seconds(sent * size * (len(groups[names[tier]][0]) - 1))))
                for ranks in groups[names[tier]]:
                    flows = all_to_all(ranks, [[sent * size] * len(ranks)] * len(ranks))
                    number |= {(r, (chunk, base + step)): len(collectives) for r in ranks}
                    collectives.append(Collective("c", names[tier], tuple(ranks), tuple(flows)))
            ways.append(tuple(legs))
        compute = tuple(size * 60e-6 + late * (r == 5) for r in range(topology.ranks))
        chunks.append(Journey(ways[0], compute, ways[1]))
    for rank, steps in enumerate(programs):
        for ask in asks(len(sizes), THERE, len(BACK), turns):
            chunk, step = ask
            if step not in (0, len(THERE) + 1):
                steps.append(Wait(number[rank, (chunk, step - 1)]))
            steps.append(Compute("e", chunks[chunk].compute[rank]) if step == len(THERE) else Start(number[rank, ask]))
        steps += [Wait(n) for (r, (_, step)), n in number.items() if r == rank and step == len(THERE) + len(BACK)]
    found, predicted = simulate(programs, collectives, topology, grain=0.0).seconds, travel(chunks, turns)[0]
    if late:
        assert found <= predicted * (1 + 1e-6)
        assert found > travel(chunks, turns)[0] * 0.95
    else:
        assert predicted == pytest.approx(found, rel=1e-6)
