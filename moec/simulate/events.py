"""The event-driven engine: what every rank does, in its order, on links that are shared.

A rank has one stream for its ops, and one for each group that it communicates in (as torch.distributed has). Ops run in
program order. ``Start`` puts the rank's part of a collective on the group's stream, where parts go one after the other;
``Wait`` holds the ops up until that part is done. A message moves when both its ends have come so far, after the time
that a collective takes to begin and the latency of its way. A part is done when all messages of its rank are. Links are
shared max-min fairly (:mod:`moec.simulate.network`). While a part is under way, from the head of its stream on, it
holds some of the rank's compute units, whether its messages move or wait for others' parts: ops then go on more slowly.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

from moec.simulate.errors import SimulationError
from moec.simulate.network import Network
from moec.simulate.steps import Collective, Compute, Span, Start, Step, Timeline
from moec.simulate.topology import Topology


class _Rank:
    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps, self.at = steps, 0
        self.waits: int | None = None
        self.since = self.end = 0.0
        self.op: Compute | None = None  # what it computes, since when, how much is left, and at which planned end
        self.op_begin = self.op_since = 0.0
        self.op_left, self.planned = 0.0, 0
        self.parts = 0  # under way
        self.queues: dict[str, list[int]] = defaultdict(list)  # parts of a stream, the first is under way
        self.after: dict[int, tuple[int, ...]] = {}
        self.begun: dict[int, float] = {}
        self.done: set[int] = set()


class Engine:
    """One run. Make one and call :meth:`run`."""

    def __init__(
        self,
        programs: Sequence[Sequence[Step]],
        collectives: Sequence[Collective],
        topology: Topology,
        grain: float | None = None,
        watch: bool = False,
    ) -> None:
        self.topology, self.collectives = topology, collectives
        self.ranks = [_Rank(steps) for steps in programs]
        self.flows = [(c, f) for c, each in enumerate(collectives) for f in each.flows if f.bytes > 0]
        ways = [topology.way(f.source, f.to) for _, f in self.flows]
        self.alphas = [way.alpha_s * f.hops for way, (_, f) in zip(ways, self.flows, strict=True)]
        bandwidth = [topology.graph.edges[e]["bytes_per_s"] for e in topology.links]
        self.network = Network(bandwidth, [w.links for w in ways], [f.bytes for _, f in self.flows], grain, watch)
        self.missing: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))  # messages of each part
        self.of_part: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, (c, f) in enumerate(self.flows):
            for rank in {f.source, f.to}:
                self.missing[c][rank] += 1
                self.of_part[c, rank].append(i)
        self.spans: list[Span] = []
        self.events: list[tuple[float, int, str, int, int]] = []
        self.number = 0

    def run(self) -> Timeline:
        """Simulate.

        Raises:
            SimulationError: Ranks wait for each other without end.
        """
        for rank in range(len(self.ranks)):
            self._go(rank, 0.0)
        while True:
            heap = self.events[0][0] if self.events else float("inf")
            time = min(heap, self.network.next_end())
            if time == float("inf"):
                break
            for flow in self.network.run_to(time):
                self._arrived(flow)
            starting: list[int] = []
            while self.events and self.events[0][0] <= time:
                _, _, what, a, b = heapq.heappop(self.events)
                if what == "op":
                    self._ended(a, time, b)
                elif what == "flow":
                    starting.append(a)
                else:
                    self._finish(a, b, time)
            if starting:
                self.network.begin(starting)
        self._check_all_done()
        ends = [r.end for r in self.ranks]
        spans = sorted(self.spans, key=lambda s: (s.begin, s.rank, s.stream))
        return Timeline(max(ends, default=0.0), ends, spans, self.network)

    def _at(self, time: float, what: str, a: int, b: int = 0) -> None:
        self.number += 1
        heapq.heappush(self.events, (time, self.number, what, a, b))

    def _go(self, number: int, now: float) -> None:
        """Run a rank's steps from where it stands to its next op or wait."""
        rank = self.ranks[number]
        rank.end = now
        while rank.at < len(rank.steps):
            step = rank.steps[rank.at]
            if isinstance(step, Compute):
                rank.at += 1
                if step.seconds > 0:
                    rank.op, rank.op_left, rank.op_begin, rank.op_since = step, 1.0, now, now
                    self._plan(number, now)
                    return
            elif isinstance(step, Start):
                rank.at += 1
                queue = rank.queues[self.collectives[step.collective].group]
                queue.append(step.collective)
                rank.after[step.collective] = step.after
                if len(queue) == 1:
                    self._begin(number, step.collective, now)
            elif step.collective in rank.done:
                rank.at += 1
            else:
                rank.waits, rank.since = step.collective, now
                return

    def _plan(self, number: int, now: float) -> None:
        """When the op that a rank computes will end, if no other part begins or ends before."""
        rank = self.ranks[number]
        assert rank.op is not None
        rank.planned = self.number + 1
        self._at(now + rank.op_left * _seconds(rank.op, rank.parts), "op", number, rank.planned)

    def _take_units(self, number: int, parts: int, now: float) -> None:
        """So many parts more are under way; what the rank computes goes on at the new pace."""
        rank = self.ranks[number]
        before, rank.parts = rank.parts, rank.parts + parts
        if rank.op is None or _seconds(rank.op, before) == _seconds(rank.op, rank.parts):
            return
        rank.op_left = max(0.0, rank.op_left - (now - rank.op_since) / _seconds(rank.op, before))
        rank.op_since = now
        self._plan(number, now)

    def _ended(self, number: int, now: float, planned: int) -> None:
        """The op of a rank is done, unless that was planned before its pace changed."""
        rank = self.ranks[number]
        if rank.op is None or rank.planned != planned:
            return
        self.spans.append(Span(number, "ops", "compute", rank.op.label, rank.op_begin, now))
        rank.op = None
        self._go(number, now)

    def _begin(self, number: int, collective: int, now: float) -> None:
        """A part is at the head of its stream; it is under way once what it needs is there."""
        rank = self.ranks[number]
        if not rank.done.issuperset(rank.after[collective]):
            return
        rank.begun[collective] = now
        self._take_units(number, 1, now)
        if not self.missing[collective][number]:
            self._at(now + self.topology.device.start_s, "part", collective, number)
        for i in self.of_part[collective, number]:
            flow = self.flows[i][1]
            other = flow.to if flow.source == number else flow.source
            if collective in self.ranks[other].begun:
                self._at(now + self.topology.device.start_s + self.alphas[i], "flow", i)

    def _arrived(self, i: int) -> None:
        collective, flow = self.flows[i]
        for number in {flow.source, flow.to}:
            self.missing[collective][number] -= 1
            if not self.missing[collective][number]:
                self._finish(collective, number, self.network.now)

    def _finish(self, collective: int, number: int, now: float) -> None:
        """A part is done: the next one of its stream begins, and who waits for it goes on."""
        rank, about = self.ranks[number], self.collectives[collective]
        rank.done.add(collective)
        self.spans.append(Span(number, about.group, "comm", about.label, rank.begun[collective], now))
        rank.queues[about.group].pop(0)
        for queue in list(rank.queues.values()):
            if queue and queue[0] not in rank.begun:
                self._begin(number, queue[0], now)
        self._take_units(number, -1, now)
        if rank.waits == collective:
            rank.waits = None
            if now > rank.since:
                self.spans.append(Span(number, "ops", "wait", about.label, rank.since, now))
            self._go(number, now)

    def _check_all_done(self) -> None:
        stuck = {n: r.waits for n, r in enumerate(self.ranks) if r.waits is not None}
        stuck |= {n: q[0] for n, r in enumerate(self.ranks) for q in r.queues.values() if q and n not in stuck}
        if stuck:
            which = "; ".join(f"rank {n} for {self.collectives[c].label}" for n, c in list(stuck.items())[:4])
            raise SimulationError(
                f"{len(stuck)} ranks wait without end: {which}",
                hint="all ranks of a group must begin the same collectives in the same order",
            )


def _seconds(op: Compute, parts: int) -> float:
    """Of a whole op while so many parts are under way."""
    return op.seconds if op.beside is None or not parts else op.beside


def simulate(
    programs: Sequence[Sequence[Step]],
    collectives: Sequence[Collective],
    topology: Topology,
    *,
    grain: float | None = None,
    watch: bool = False,
) -> Timeline:
    """Run the programs of all ranks.

    Args:
        programs: The steps of every rank, rank 0 first.
        collectives: What ``Start`` and ``Wait`` speak of.
        topology: With at least so many ranks.
        grain: See :mod:`moec.simulate.network`.
        watch: Record what every link carries over time.

    Raises:
        SimulationError: Too many ranks for the topology, or ranks that wait for each other without end.
    """
    if len(programs) > topology.ranks:
        topology.first(len(programs))  # raises, with what to do
    return Engine(programs, collectives, topology, grain, watch).run()
