"""The engine against closed forms, lower bounds and the rules that no schedule may break."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.simulate.collectives import all_gather, all_reduce, all_to_all, hierarchical, reduce_scatter
from moec.simulate.errors import SimulationError
from moec.simulate.events import simulate
from moec.simulate.report import union
from moec.simulate.steps import Collective, Compute, Flow, Start, Step, Timeline, Wait
from tests.simulate.machines import ALPHA, BANDWIDTH, machine
from tests.simulate.strategies import Job, jobs

CLOSE = 1e-9


def one(flows: list[Flow], ranks: int, group: str = "ep") -> Collective:
    return Collective("c", group, tuple(range(ranks)), tuple(flows))


def alone(flows: list[Flow], ranks: int = 4, nodes: int = 1, **options: float) -> Timeline:
    made = machine(ranks // nodes, nodes, **options)
    return simulate([[Start(0), Wait(0)]] * ranks, [one(flows, ranks)], made, watch=True)


def test_one_transfer_takes_its_latency_and_its_bytes() -> None:
    assert alone([Flow(0, 1, 5000.0)]).seconds == pytest.approx(ALPHA + 5000 / BANDWIDTH, rel=CLOSE)
    assert alone([Flow(0, 1, 5000.0)], start_s=0.5).seconds == pytest.approx(0.5 + ALPHA + 5000 / BANDWIDTH, rel=CLOSE)
    across = alone([Flow(0, 3, 5000.0)], nodes=2).seconds
    assert across == pytest.approx(2 * ALPHA + 5000 / (BANDWIDTH / 4), rel=CLOSE)


def test_a_balanced_all_to_all_is_bound_by_one_rank() -> None:
    each = 3000.0
    assert alone(all_to_all(range(4), [[each] * 4] * 4)).seconds == pytest.approx(
        ALPHA + 3 * each / BANDWIDTH, rel=CLOSE
    )


def test_links_are_full_duplex() -> None:
    both = alone([Flow(0, 1, 5000.0), Flow(1, 0, 5000.0)]).seconds
    assert both == pytest.approx(ALPHA + 5000 / BANDWIDTH, rel=CLOSE)


def test_two_senders_share_a_receiver() -> None:
    both = alone([Flow(0, 2, 5000.0), Flow(1, 2, 5000.0)]).seconds
    assert both == pytest.approx(ALPHA + 10_000 / BANDWIDTH, rel=CLOSE)


def test_collectives_by_their_formulas() -> None:
    made = machine(4)
    size = 4000.0
    for flows in (all_gather(range(4), [size] * 4, made), reduce_scatter(range(4), [size] * 4, made)):
        assert sum(f.bytes for f in flows) == 4 * 3 * size
        assert alone(flows).seconds == pytest.approx(ALPHA + 3 * size / BANDWIDTH, rel=CLOSE)
    assert sum(f.bytes for f in all_reduce(range(4), 4 * size, made)) == 2 * 3 * 4 * size


def test_rings_over_nodes_use_every_nic_once() -> None:
    made = machine(2, 2)
    flows = all_gather(range(4), [1000.0] * 4, made)
    assert sum(f.bytes for f in flows) == pytest.approx(4 * 3 * 1000)
    across = [f for f in flows if made.node_of(f.source) != made.node_of(f.to)]
    assert sorted(f.source for f in across) == [0, 1, 2, 3]
    assert {f.bytes for f in across} == {1500.0}  # 3000 bytes round each ring's half


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_an_all_to_all_in_two_steps_brings_the_same(data: st.DataObject) -> None:
    made = machine(2, 3)
    matrix = [[data.draw(st.integers(0, 9)) for _ in range(6)] for _ in range(6)]
    first, then = hierarchical(range(6), matrix, made)
    assert all(made.node_of(f.source) != made.node_of(f.to) and f.source % 2 == f.to % 2 for f in first)
    assert all(made.node_of(f.source) == made.node_of(f.to) for f in then)
    for d in range(6):
        came = sum(f.bytes for f in then if f.to == d)
        straight = sum(matrix[s][d] for s in range(6) if s % 2 == d % 2)  # relayed by d itself, or kept
        assert came + straight == sum(row[d] for row in matrix)


def test_two_chunks_are_a_pipeline() -> None:
    """Two ranks, two chunks: D0 D1 on the links, C0 C1 behind them, B0 B1 behind those."""
    there, back, compute = 8000.0, 4000.0, 0.006
    flows = [[Flow(0, 1, n), Flow(1, 0, n)] for n in (there, there, back, back)]
    collectives = [one(f, 2) for f in flows]
    c = [Compute("c", compute)]
    steps: list[Step] = [Start(0), Start(1), Wait(0), *c, Start(2), Wait(1), *c, Start(3), Wait(2), Wait(3)]
    found = simulate([steps] * 2, collectives, machine(2)).seconds
    d, b = ALPHA + there / BANDWIDTH, ALPHA + back / BANDWIDTH
    done = max(d + compute, 2 * d) + compute
    assert found == pytest.approx(max(done, 2 * d + b) + b, rel=CLOSE)


chunks = st.lists(st.tuples(st.floats(0.0, 9e3), st.floats(0.0, 0.02), st.floats(0.0, 9e3)), min_size=1, max_size=5)


@given(chunks, st.floats(0.0, 0.01))
@settings(max_examples=80, deadline=None)
def test_no_schedule_beats_the_lower_bound(found: list[tuple[float, float, float]], start: float) -> None:
    """G5: no less than all communication, nor than the first chunk's way there, all compute, and the least way back."""
    flows = [[Flow(0, 1, n), Flow(1, 0, n)] for n in [c[0] for c in found] + [c[2] for c in found]]
    n = len(found)
    steps: list[Step] = [Start(i) for i in range(n)]
    for i, (_, compute, _) in enumerate(found):
        steps += [Wait(i), Compute("c", compute), Start(n + i)]
    steps += [Wait(n + i) for i in range(n)]
    made = machine(2, start_s=start)
    seconds = simulate([steps] * 2, [one(f, 2) for f in flows], made).seconds

    def cost(bytes: float) -> float:
        return start + (ALPHA + bytes / BANDWIDTH if bytes else 0.0)

    there, back = [cost(c[0]) for c in found], [cost(c[2]) for c in found]
    bound = max(sum(there) + sum(back), min(there) + sum(c[1] for c in found) + min(back))
    assert seconds >= bound * (1 - 1e-6)
    assert seconds <= sum(there) + sum(back) + sum(c[1] for c in found) + 1e-9


@given(jobs())
@settings(max_examples=80, deadline=None)
def test_no_rule_is_ever_broken(job: Job) -> None:
    """No dependency, no stream: ops in order, parts of a group one by one, waits end after their part."""
    found = simulate(job.programs, job.collectives, job.machine)
    for rank, program in enumerate(job.programs):
        spans = [s for s in found.spans if s.rank == rank]
        for stream in {s.stream for s in spans}:
            on = [s for s in spans if s.stream == stream]
            assert all(a.end <= b.begin + 1e-12 for a, b in itertools.pairwise(on)), stream
        compute = [s for s in program if isinstance(s, Compute)]
        assert found.total(rank, "compute") == pytest.approx(sum(c.seconds for c in compute))
        assert found.ends[rank] == pytest.approx(found.total(rank, "compute") + found.total(rank, "wait"))
        done = {s.label: s.end for s in spans if s.kind == "comm"}
        assert sorted(done) == sorted(c.label for c in job.collectives)
        assert all(done[s.label] == pytest.approx(s.end) for s in spans if s.kind == "wait")


@given(jobs())
@settings(max_examples=80, deadline=None)
def test_links_carry_all_bytes_and_never_more_than_they_can(job: Job) -> None:
    """On one tier and on two: each message crosses the links of its way, and no link is ever faster than it is."""
    made = job.machine
    found = simulate(job.programs, job.collectives, made, watch=True)
    flows = [f for c in job.collectives for f in c.flows if f.bytes > 0]
    limit = np.array([made.graph.edges[e]["bytes_per_s"] for e in made.links])
    carried, wanted = np.zeros(len(limit)), np.zeros(len(limit))
    for begin, end, rates in found.network.segments or []:
        assert (rates <= limit * (1 + 1e-9)).all()
        carried += rates * (end - begin)
    for f in flows:
        wanted[list(made.way(f.source, f.to).links)] += f.bytes
    assert carried == pytest.approx(wanted, rel=1e-6)
    assert found.seconds >= (wanted / limit).max(initial=0.0) * (1 - 1e-6)
    slowest = [min(limit[list(made.way(f.source, f.to).links)]) for f in flows]
    least = [f.bytes / rate * (1 - 1e-6) for f, rate in zip(flows, slowest, strict=True)]
    assert (found.network.ended - found.network.begun >= least).all()


@given(jobs(slowed=1.5))
@settings(max_examples=80, deadline=None)
def test_an_op_beside_a_collective_is_slower_for_as_long(job: Job) -> None:
    """What an op does in its span, at one pace beside parts of collectives and at another without, is the whole op."""
    found = simulate(job.programs, job.collectives, job.machine)
    for rank, program in enumerate(job.programs):
        spans = [s for s in found.spans if s.rank == rank]
        under_way = [(s.begin, s.end) for s in spans if s.kind == "comm"]
        ran = [s for s in spans if s.kind == "compute"]
        ops = [s for s in program if isinstance(s, Compute) and s.seconds]
        for op, span in zip(ops, ran, strict=True):
            clipped = [(max(b, span.begin), min(e, span.end)) for b, e in under_way if e > span.begin and b < span.end]
            beside = union(clipped)
            assert op.beside is not None
            alone = span.end - span.begin - beside
            assert beside / op.beside + alone / op.seconds == pytest.approx(1.0, abs=1e-6)


def test_units_that_a_collective_holds_by_hand() -> None:
    """An op of 10 s, 20 s where a collective holds half of the units, which it does for the first 4 s: 12 s."""
    made = machine(2)
    steps: list[Step] = [Start(0), Compute("x", 10.0, 20.0), Wait(0)]
    flows = [Flow(0, 1, (4.0 - ALPHA) * BANDWIDTH), Flow(1, 0, 1.0)]
    found = simulate([steps] * 2, [one(flows, 2)], made)
    assert found.total(0, "comm") == pytest.approx(4.0)
    assert found.total(0, "compute") == pytest.approx(12.0)
    late = simulate([[Compute("y", 1.0), *steps], steps], [one(flows, 2)], made)
    assert late.total(1, "comm") == pytest.approx(5.0), "rank 1 waits for rank 0's part"
    assert late.total(1, "compute") == pytest.approx(12.5), "and holds its units meanwhile"


def test_a_stream_for_each_group() -> None:
    """Two groups run side by side where one group's collectives wait for each other."""
    flows = [[Flow(0, 1, 5000.0)], [Flow(2, 3, 5000.0)]]
    steps: list[Step] = [Start(0), Start(1), Wait(0), Wait(1)]
    both = [
        simulate([steps] * 4, [one(flows[0], 4, "a"), one(flows[1], 4, second)], machine(4)).seconds
        for second in ("a", "b")
    ]
    once = ALPHA + 5000 / BANDWIDTH
    assert both == [pytest.approx(once), pytest.approx(once)]  # ranks without a part in a message do not wait for it
    shared = [[Flow(0, 1, 5000.0)], [Flow(0, 1, 5000.0)]]
    seconds = [
        simulate([steps] * 2, [one(shared[0], 2, "a"), one(shared[1], 2, second)], machine(2)).seconds
        for second in ("a", "b")
    ]
    assert seconds == [pytest.approx(2 * once), pytest.approx(ALPHA + 10_000 / BANDWIDTH)]


def test_a_part_waits_for_what_it_sends_and_the_ops_do_not() -> None:
    """What one group brings another hands on: the second begins behind the first, beside a third of its group."""
    flows = [[Flow(0, 1, 5000.0), Flow(1, 0, 5000.0)] for _ in range(3)]
    collectives = [one(f, 2, group) for f, group in zip(flows, "aba", strict=True)]
    chained: list[Step] = [Start(0), Start(1, after=(0,)), Start(2), Compute("x", 0.001), Wait(1), Wait(2)]
    found = simulate([chained] * 2, collectives, machine(2))
    once, both = ALPHA + 5000 / BANDWIDTH, ALPHA + 10_000 / BANDWIDTH  # two at a time share the link
    assert [s.begin for s in found.spans if s.rank == 0 and s.kind == "comm"] == pytest.approx([0.0, once, once])
    assert found.seconds == pytest.approx(once + both)
    assert found.total(0, "compute") == 0.001
    with pytest.raises(SimulationError, match="wait without end"):
        simulate([[Start(0, after=(1,)), Start(1, after=(0,))]] * 2, collectives, machine(2))


def test_a_late_rank_makes_others_wait() -> None:
    late: list[Step] = [Compute("x", 1.0), Start(0), Wait(0)]
    found = simulate([[Start(0), Wait(0)], late], [one([Flow(0, 1, 1.0)], 2)], machine(2))
    assert found.total(0, "wait") == pytest.approx(1.0 + ALPHA + 1 / BANDWIDTH)
    assert found.total(1, "wait") == pytest.approx(ALPHA + 1 / BANDWIDTH)


def test_ranks_that_wait_for_each_other_are_an_error() -> None:
    made = [one([Flow(0, 1, 1.0), Flow(1, 0, 1.0)], 2) for _ in range(2)]
    with pytest.raises(SimulationError, match="wait without end: rank 0 for c"):
        simulate([[Start(0), Start(1), Wait(0)], [Start(1), Start(0), Wait(1)]], made, machine(2))


def test_too_many_ranks() -> None:
    with pytest.raises(SimulationError, match="9 ranks do not fit topology 'small', which has 4"):
        simulate([[]] * 9, [], machine(4))
