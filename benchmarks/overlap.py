"""What overlap hides, measured: layers on ranks that are processes, over links with injected delays.

    python benchmarks/overlap.py --ranks 2 --compute cpu
    python benchmarks/overlap.py --ranks 4 --compute sleep

Every rank has one thread. Rows travel through memory that ranks share, or by gloo (``--carrier``), and come when the
links of the cost model would have brought them (moec.testing); waiting takes no processor. Experts are the cpu
backend's kernels, or sleep as long as a curve says, so that more ranks than cores can be measured. For several ratios
of the experts' time to the links' the table shows the step (forward or backward of one layer, all ranks begin at one
time, slowest rank, median) without overlap, in two equal chunks, and as the pass chooses, beside what was predicted;
and the communication that was not hidden beside what no order could hide. Right before each case the experts are
timed, the links and what a chunk costs as ``moec.parallelize`` does, and what a whole layer does beside them (sorting
rows, adding them up, Python), which is added to what is predicted. A case during which the machine was not steady is
taken again (``steady.py``), and the table says how often it was taken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.backends.base import program_op
from moec.backends.distributed import groups
from moec.cost.chunks import ChunkCosts
from moec.cost.links import Link
from moec.parallel.chunk_costs import measure_chunks
from moec.parallel.costs import measure
from moec.passes import PassContext, PassManager
from moec.passes.overlap.cuts import Layer
from moec.passes.overlap.plan import BACKWARD, plan, read_layer
from moec.passes.overlap.policies import Schedule, cut_seconds
from moec.runtime.programs import program_graph
from moec.testing import delayed_group
from moec.testing.delay import Carrier
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
    curve_of,
    link_for,
    measured,
    routes,
    table,
    way,
)
from overlap_table import Row, show, told, verdict
from spawned import run_ranks
from steady import TRIES, Look, look, own, unsteady

RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
POLICIES = ("none", "two", "auto")
DIRECTIONS = ("forward", "backward")
ROUTINGS = ("balanced", "zipf")
HEAD_START = 0.003
"""Seconds that ranks agree on a start before it; they share a clock."""


PACE = (128,)
"""Rows of every expert, in the work that is timed before and behind a case."""


@dataclass
class Case:
    """One ratio, routing and direction: what runs, what it does beside its experts, and what was seen so far.

    That is, seconds of steps and of experts.
    """

    ratio: float
    zipf: bool
    place: int
    inputs: list[Tensor]
    kernels: dict[str, Clocked]
    layer: Layer
    schedules: dict[str, Schedule]
    outside: float
    seen: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {p: [] for p in POLICIES})


class Bench:
    """One rank's layer, whole and cut."""

    def __init__(self, rank: int, sizes: Sizes, compute: str, carrier: Carrier) -> None:
        self.rank, self.sizes, self.compute = rank, sizes, compute
        self.group = delayed_group(Link(0.0, 1e15), carrier=carrier)
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

    def cutting(self) -> tuple[ChunkCosts, float]:
        """What chunks cost and how fast rows are copied; sleeping experts leave their cores to threads that send."""
        self.bind(Link(0.0, 1e15))
        link, sending = measure(self.group, "cpu")
        chunks = measure_chunks("ep", self.group, "cpu", link, sending)
        rates: list[Any] = [None] * self.sizes.ranks
        dist.all_gather_object(rates, copy_rate())
        return replace(chunks, burden=None if self.compute == "sleep" else chunks.burden), min(rates)

    def beside(self, place: int) -> float:
        """Seconds of a call that are neither its experts' nor the links': sorting, adding up, Python."""
        kernel, ids = self.kernel("none", PassContext()), routes(self.sizes, False)
        inputs = [self.x, ids[self.rank], self.factors, *self.weights]
        return statistics.median([self.step(kernel, inputs, place)[2] for _ in range(9)][1:])

    def bind(self, link: Link) -> None:
        """Such links from now on, for the group that programs name; all ranks call this together."""
        dist.barrier()
        self.group.link = link
        dist.barrier()

    def case(self, ratio: float, zipf: bool, place: int) -> Case:
        """All policies' layers at one ratio, routing and direction."""
        ids = routes(self.sizes, zipf)
        profile, op = Loads(table(self.sizes, ids)), self.spread.ops[0]
        chunks, copies = self.cutting()
        curve = curve_of(self.sizes, op, self.weights, self.compute, place)
        costs = Costs(curve, curve, Link(ALPHA, 1e9), chunks, copies, self.compute == "cpu")
        self.bind(link_for(read_layer(op, place, PassContext(cost_model=costs, profile=profile)), ratio))
        link, _ = measure(self.group, "cpu")  # with the time that gloo takes
        ctx = PassContext(cost_model=replace(costs, link=link), profile=profile)
        layer = read_layer(op, place, ctx)
        return Case(
            ratio, zipf, place, [self.x, ids[self.rank], self.factors, *self.weights],
            {policy: self.kernel(policy, ctx) for policy in POLICIES},
            layer,
            {policy: plan(layer, place, policy, rank_known=True) for policy in POLICIES},
            self.beside(place),
        )  # fmt: skip

    def turns(self, case: Case, turns: int) -> None:
        """Run the case's layers some times, in turn; the first of each is not counted."""
        for turn in range(turns + 1):
            for policy, kernel in case.kernels.items():
                took = self.step(kernel, case.inputs, case.place)
                if turn:
                    case.seen[policy].append(took[:2])

    def look(self) -> Look:
        """The machine now, with what all ranks have worked."""
        everyone: list[Any] = [None] * self.sizes.ranks
        dist.all_gather_object(everyone, own())
        return look(sum(everyone))

    def pace(self, place: int) -> float:
        """Seconds that experts of this rank take now; those that sleep always take the same."""
        dist.barrier()
        op, backward = self.spread.ops[0], place == BACKWARD
        asleep = self.compute == "sleep"
        return 1.0 if asleep else measured(op, self.sizes, self.weights, backward, PACE, 0.5).points[0][1]

    def steadily(self, ratio: float, zipf: bool, place: int, turns: int) -> list[Row]:
        """One case, again if the machine was not steady meanwhile."""
        for times in range(1, TRIES + 1):
            before, pace = self.look(), self.pace(place)
            case = self.case(ratio, zipf, place)
            self.turns(case, turns)
            links = replace(case.layer, links=measure(self.group, "cpu")[0])
            work = {"the same experts": (pace, self.pace(place)), "the same rows": (way(case.layer), way(links))}
            why = [unsteady(before, self.look(), work)]
            dist.broadcast_object_list(why, 0)
            if not why[0]:
                break
            if not self.rank:
                again = "once more" if times < TRIES else "it counts all the same"
                told = f"{ratio:g} {ROUTINGS[zipf]} {DIRECTIONS[place]}, taken {times}: {why[0]}; {again}"
                print(told, file=sys.stderr, flush=True)
        return self.rows(case, times)

    def rows(self, case: Case, times: int) -> list[Row]:
        """What was seen, a row a policy; ``times`` is how often the case was taken."""
        return [
            Row(
                case.ratio, ROUTINGS[case.zipf], DIRECTIONS[case.place], policy, told(s),
                s.seconds + case.outside, statistics.median(step for step, _ in case.seen[policy]),
                statistics.median(computed for _, computed in case.seen[policy]),
                case.outside + cut_seconds(case.layer, s), s.floor, times,
            )
            for policy, s in case.schedules.items()
        ]  # fmt: skip

    def kernel(self, policy: str, ctx: PassContext) -> Clocked:
        """The layer as a policy cuts it."""
        graph = self.spread.clone()
        PassManager(f"overlap{{policy={policy},rank={self.rank}}}", repro=None).run(graph, ctx)
        op = graph.ops[0]
        op.attrs["backend"] = "cpu" if self.compute == "cpu" else "aten"
        program = program_op(program_graph(op))
        return AsleepLayer(program, "cpu", *asleep()) if self.compute == "sleep" else WorkingLayer(program, "cpu")

    def step(self, kernel: Clocked, inputs: list[Tensor], place: int) -> tuple[float, float, float]:
        """Seconds of one call, from the start of all ranks to the last one's end.

        And of the busiest rank's experts, and what is neither theirs nor the links' in a layer that is not cut.
        """
        before, start = len(self.group.log), self.together()
        if place == BACKWARD:
            kernel.backward([self.x], inputs, [True, False, True, True, True])
        else:
            kernel.forward(inputs)
        facts: list[Any] = [None] * self.sizes.ranks
        dist.all_gather_object(facts, (time.monotonic(), kernel.computed))
        step, computed = (max(seconds) for seconds in zip(*facts, strict=True))
        links, free = 0.0, start
        for arrival in self.group.log[before:]:
            links += arrival.end - max(arrival.ready, free)
            free = arrival.end
        return step - start, computed, step - start - computed - links

    def together(self) -> float:
        """Wait until all ranks may begin, and nobody's threads still work on what was before; that time."""
        dist.barrier()
        at = torch.tensor([time.monotonic() + HEAD_START], dtype=torch.float64)
        dist.broadcast(at, 0)
        time.sleep(max(0.0, float(at) - time.monotonic() - HEAD_START / 6))
        while time.monotonic() < float(at):  # who sleeps until then wakes later
            pass
        return float(at)


def rank_main(rank: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks)
    small = args.compute == "sleep"
    sizes = Sizes(args.ranks, 64 if small else 512, 16 if small else 512, tokens=args.tokens)
    bench, found = Bench(rank, sizes, args.compute, args.carrier), list[Row]()
    for direction, routing, ratio in itertools.product(args.directions, args.routings, args.ratios):
        found += bench.steadily(ratio, routing == "zipf", DIRECTIONS.index(direction), args.turns)
        if rank == 0:
            show(found[-len(POLICIES) :])
    if rank == 0:
        verdict(found)
        if args.json:
            args.json.write_text(json.dumps([vars(r) for r in found], indent=1), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--compute", choices=("sleep", "cpu"), default="sleep")
    parser.add_argument("--carrier", choices=("memory", "gloo"), default="memory", help="who brings rows")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=7, help="calls of every layer, behind one that is not counted")
    parser.add_argument("--ratios", type=lambda s: [float(r) for r in s.split(",")], default=list(RATIOS))
    parser.add_argument("--routings", type=lambda s: s.split(","), default=list(ROUTINGS))
    parser.add_argument("--directions", type=lambda s: s.split(","), default=list(DIRECTIONS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("| experts : links | routing | | policy | chunks | step, ms | predicted | off | exposed | floor | taken |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    run_ranks(rank_main, args.ranks, args)


if __name__ == "__main__":
    main()
