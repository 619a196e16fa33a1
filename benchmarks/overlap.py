"""What overlap hides, measured: layers on ranks that are processes, over links with injected delays.

    python benchmarks/overlap.py --ranks 2 --compute cpu
    python benchmarks/overlap.py --ranks 4 --compute sleep

Every rank has one thread. Rows travel by gloo, and come when the links of the cost model would have brought them
(moec.testing); waiting takes no processor. Experts are the cpu backend's kernels, timed here before, or sleep as long
as a curve says, so that more ranks than cores can be measured. For several ratios of the experts' time to the links'
the table shows the step (forward or backward of one layer, slowest rank, median) without overlap, in two equal chunks,
and as the pass chooses, beside what was predicted; and the communication that was not hidden beside what no order could
hide. What a layer does beside its experts (sorting rows, adding them up, Python) is timed before, whole, and added to
what is predicted; links, and what a chunk costs, are measured as ``moec.parallelize`` does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.backends.base import program_op
from moec.backends.distributed import groups
from moec.cost.chunks import ChunkCosts
from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.ir.core import Op
from moec.parallel.chunk_costs import measure_chunks
from moec.parallel.costs import measure
from moec.passes import PassContext, PassManager
from moec.passes.overlap.plan import BACKWARD, plan, read_layer
from moec.passes.overlap.policies import Schedule
from moec.runtime.programs import program_graph
from moec.testing import delayed_group
from overlap_layers import (
    ALPHA,
    AsleepLayer,
    Clocked,
    Costs,
    Loads,
    Sizes,
    WorkingLayer,
    asleep,
    copy_rate,
    link_for,
    measured,
    routes,
    table,
)

RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
POLICIES = ("none", "two", "auto")
DIRECTIONS = ("forward", "backward")


@dataclass
class Row:
    """One line of the table; seconds."""

    ratio: float
    routing: str
    direction: str
    policy: str
    chunks: str
    predicted: float
    step: float
    compute: float
    outside: float
    floor: float

    @property
    def exposed(self) -> float:
        return self.step - self.compute - self.outside


def curves_of(sizes: Sizes, layer: Op, weights: list[Tensor], compute: str) -> tuple[LayerCurve, LayerCurve]:
    """Times of a rank's experts, forwards and backwards; all ranks have the first one's numbers."""
    if compute == "sleep":
        return asleep()
    dist.barrier()
    mine = measured(layer, sizes, weights)
    everyone: list[Any] = [None] * sizes.ranks
    dist.all_gather_object(everyone, mine)
    first: tuple[LayerCurve, LayerCurve] = everyone[0]
    return first


class Bench:
    """One rank's layer, whole and cut."""

    def __init__(self, rank: int, sizes: Sizes, compute: str) -> None:
        self.rank, self.sizes, self.compute = rank, sizes, compute
        self.group = delayed_group(Link(0.0, 1e15))
        groups.bind("ep", self.group)
        gen = torch.Generator().manual_seed(rank)
        own = sizes.experts // sizes.ranks
        self.weights = [
            torch.randn(own, 2 * sizes.inner, sizes.hidden, generator=gen) * sizes.hidden**-0.5,
            torch.randn(own, sizes.hidden, sizes.inner, generator=gen) * sizes.inner**-0.5,
        ]
        self.x = torch.randn(sizes.tokens, sizes.hidden, generator=gen)
        self.factors = torch.rand(sizes.tokens, sizes.top_k, generator=gen)
        self.spread = sizes.graph()
        PassManager("expert-parallel", repro=None).run(self.spread, PassContext())
        self.curves = curves_of(sizes, self.spread.ops[0], self.weights, compute)
        self.chunks, self.copies = self.cutting()
        self.outside = [self.beside(place) for place in range(len(DIRECTIONS))]

    def cutting(self) -> tuple[ChunkCosts, float]:
        """What chunks cost and how fast rows are copied; sleeping experts leave their cores to threads that send."""
        link, sending = measure(self.group, "cpu")
        chunks = measure_chunks("ep", self.group, "cpu", link, sending)
        rates: list[Any] = [None] * self.sizes.ranks
        dist.all_gather_object(rates, copy_rate())
        return replace(chunks, burden=None if self.compute == "sleep" else chunks.burden), min(rates)

    def beside(self, place: int) -> float:
        """Seconds of a call that are neither its experts' nor waited: sorting, adding up, Python."""
        kernel, ids = self.kernel("none", PassContext()), routes(self.sizes, False)
        inputs = [self.x, ids[self.rank], self.factors, *self.weights]
        return statistics.median([self.step(kernel, inputs, place)[2] for _ in range(6)][1:])

    def bind(self, link: Link) -> None:
        """Such links from now on, for the group that programs name; all ranks call this together."""
        dist.barrier()
        self.group.link = link
        dist.barrier()

    def case(self, ratio: float, zipf: bool, place: int, turns: int) -> list[Row]:
        """All policies at one ratio, routing and direction."""
        ids = routes(self.sizes, zipf)
        profile, op = Loads(table(self.sizes, ids)), self.spread.ops[0]
        costs = Costs(*self.curves, Link(ALPHA, 1e9), self.chunks, self.copies)
        self.bind(link_for(read_layer(op, place, PassContext(cost_model=costs, profile=profile)), ratio))
        link, _ = measure(self.group, "cpu")  # with the time that gloo takes
        ctx = PassContext(cost_model=replace(costs, link=link), profile=profile)
        layer = read_layer(op, place, ctx)
        kernels = {policy: self.kernel(policy, ctx) for policy in POLICIES}
        inputs = [self.x, ids[self.rank], self.factors, *self.weights]
        seen: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
        for turn in range(turns + 1):
            for policy, kernel in kernels.items():
                took = self.step(kernel, inputs, place)
                if turn:
                    seen[policy].append(took[:2])
        schedules = {policy: plan(layer, place, policy, own_first=True) for policy in POLICIES}
        return [
            Row(
                ratio, "zipf" if zipf else "balanced", DIRECTIONS[place], policy, told(schedules[policy]),
                schedules[policy].seconds + self.outside[place], statistics.median(s for s, _ in took),
                statistics.median(c for _, c in took), self.outside[place] + schedules[policy].beside,
                schedules[policy].floor,
            )
            for policy, took in seen.items()
        ]  # fmt: skip

    def kernel(self, policy: str, ctx: PassContext) -> Clocked:
        """The layer as a policy cuts it."""
        graph = self.spread.clone()
        PassManager(f"overlap{{policy={policy},rank={self.rank}}}", repro=None).run(graph, ctx)
        op = graph.ops[0]
        op.attrs["backend"] = "cpu" if self.compute == "cpu" else "aten"
        program = program_op(program_graph(op))
        return AsleepLayer(program, "cpu", *self.curves) if self.compute == "sleep" else WorkingLayer(program, "cpu")

    def step(self, kernel: Clocked, inputs: list[Tensor], place: int) -> tuple[float, float, float]:
        """Seconds of one call, from the first rank's start to the last one's end.

        And of the busiest rank's experts, and of a rank at most that are neither its experts' nor waited.
        """
        dist.barrier()
        start = time.monotonic()
        if place == BACKWARD:
            kernel.backward([self.x], inputs, [True, False, True, True, True])
        else:
            kernel.forward(inputs)
        facts: list[Any] = [None] * self.sizes.ranks
        dist.all_gather_object(facts, (start, time.monotonic(), kernel.computed, kernel.waited))
        whole = max(e for _, e, _, _ in facts) - min(s for s, _, _, _ in facts)
        return whole, max(c for _, _, c, _ in facts), max(e - s - c - w for s, e, c, w in facts)


def told(schedule: Schedule) -> str:
    """A schedule in few words."""
    sizes = "+".join(map(str, schedule.sizes))
    return f"{'own+' if schedule.own_first else ''}{sizes} {schedule.along}" if schedule.cut else "1"


def rank_main(rank: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks)
    small = args.compute == "sleep"
    sizes = Sizes(args.ranks, 64 if small else 512, 16 if small else 512, tokens=args.tokens)
    bench, found = Bench(rank, sizes, args.compute), list[Row]()
    for place in (DIRECTIONS.index(d) for d in args.directions):
        for zipf in (False, True):
            for ratio in args.ratios:
                found += bench.case(ratio, zipf, place, args.turns)
                if rank == 0:
                    show(found[-len(POLICIES) :])
    if rank == 0:
        verdict(found)
        if args.json:
            args.json.write_text(json.dumps([vars(r) for r in found], indent=1), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def show(rows: list[Row]) -> None:
    for r in rows:
        print(
            f"| {r.ratio:g} | {r.routing} | {r.direction} | {r.policy} | {r.chunks} | {r.step * 1e3:.1f} "
            f"| {r.predicted * 1e3:.1f} | {r.step / r.predicted - 1:+.1%} "
            f"| {r.exposed * 1e3:.1f} | {r.floor * 1e3:.1f} |",
            flush=True,
        )


def verdict(rows: list[Row]) -> None:
    """How the schedules that the pass chose hold against their promises."""
    mine = [r for r in rows if r.policy == "auto"]
    none = {(r.ratio, r.routing, r.direction): r for r in rows if r.policy == "none"}
    off = max(abs(r.step / r.predicted - 1) for r in mine)
    exposed = max((r.exposed - 1.1 * r.floor) / r.step for r in mine)
    slower = max(r.step / none[r.ratio, r.routing, r.direction].step for r in mine)
    gain = statistics.mean(none[r.ratio, r.routing, r.direction].step / r.step for r in mine)
    print(f"\nstep against prediction, worst: {off:.1%}")
    print(f"exposed beyond 1.1 times the floor, worst, of the step: {exposed:.1%}")
    print(f"step over that without overlap: worst {slower:.3f}, mean speed-up {gain:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--compute", choices=("sleep", "cpu"), default="sleep")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--ratios", type=lambda s: [float(r) for r in s.split(",")], default=list(RATIOS))
    parser.add_argument("--directions", type=lambda s: s.split(","), default=list(DIRECTIONS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    print("| experts : links | routing | | policy | chunks | step, ms | predicted | off | exposed | floor |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=rank_main, args=(r, port, args), daemon=True) for r in range(args.ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(p.exitcode or 0) for p in ranks))


if __name__ == "__main__":
    main()
