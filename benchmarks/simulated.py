"""The simulator's step beside the clock's: two ranks that are processes, on links with injected delays.

    python benchmarks/simulated.py

Each rank has one thread. Rows travel by gloo, and come when the links would have brought them; experts compute, and
sleep as long as a curve says (moec.testing). The simulator runs the same scheduled programs, both ranks', with these
links, this curve and the rows of this step; of everything else it knows what the preset ``cpu`` assumes. Steps are the
forward of a layer, and its forward and backward: from the first rank's start to the last one's end, median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.backends.base import program_op
from moec.backends.distributed import groups
from moec.cost.curve import LayerCurve
from moec.cost.layer import LayerShape
from moec.cost.links import Link
from moec.ir.core import Graph, Op
from moec.passes import PassContext, PassManager
from moec.passes.overlap.plan import read_layer
from moec.runtime.programs import program_graph
from moec.simulate import Routing, Topology, load_topology, simulate, trace
from moec.simulate.costs import Costs
from moec.simulate.planning import MachineCosts
from moec.testing import SleepingLayer, delayed_group
from overlap_layers import ALPHA, Loads, Sizes, asleep, link_for, routes, table
from spawned import run_ranks

RANKS = 2
POLICIES = ("none", "two", "auto")
SIZES = Sizes(RANKS, 64, 16)


class Asleep(Costs):
    """Times of ops where experts sleep."""

    def curve_of(self, shape: LayerShape, backward: bool = False) -> LayerCurve:
        return asleep()[int(backward)]


@dataclass(frozen=True)
class Planned(MachineCosts):
    """What the pass is told of a machine whose experts sleep."""

    def expert_times(self, op: Op, backward: bool = False) -> LayerCurve:
        return asleep()[int(backward)]


@dataclass
class Row:
    """One line; seconds."""

    ratio: float
    routing: str
    what: str
    policy: str
    simulated: float
    step: float


def machine(link: Link) -> Topology:
    """Two ranks on such links."""
    device = replace(load_topology("cpu").device, start_s=0.0)
    return Topology("delayed", "two processes", device, 1, RANKS, link)


def scheduled(spread: Graph, policy: str, rank: int, ctx: PassContext) -> Graph:
    graph = spread.clone()
    PassManager(f"overlap{{policy={policy},rank={rank}}}", repro=None).run(graph, ctx)
    return graph


def predicted(graphs: list[Graph], made: Topology, ids: list[Tensor], training: bool) -> float:
    """The simulator's step."""
    found = trace(
        graphs, {"ep": [list(range(RANKS))]}, made, Routing(), sizes=[{"T": SIZES.tokens}] * RANKS,
        ids=[{1: i} for i in ids], training=training, costs=Asleep(made.device),
    )  # fmt: skip
    return simulate(found.programs, found.collectives, made).seconds


class Bench:
    """One rank's layer."""

    def __init__(self, rank: int, turns: int) -> None:
        self.rank, self.turns = rank, turns
        gen = torch.Generator().manual_seed(rank)
        own = SIZES.experts // RANKS
        weights = [torch.randn(own, 2 * SIZES.inner, SIZES.hidden), torch.randn(own, SIZES.hidden, SIZES.inner)]
        self.x = torch.randn(SIZES.tokens, SIZES.hidden, generator=gen)
        self.given = [torch.rand(SIZES.tokens, SIZES.top_k, generator=gen), *weights]
        self.spread = SIZES.graph()
        PassManager("expert-parallel", repro=None).run(self.spread, PassContext())

    def case(self, ratio: float, zipf: bool) -> list[Row]:
        """All policies at one ratio of the experts' time to the links', and one routing."""
        ids = routes(SIZES, zipf)
        profile = Loads(table(SIZES, ids))

        def context(link: Link) -> PassContext:
            return PassContext(cost_model=Planned(machine(link)), profile=profile)

        link = link_for(read_layer(self.spread.ops[0], 0, context(Link(ALPHA, 1e9))), ratio)
        group = delayed_group(link)
        groups.clear()
        groups.bind("ep", group)
        rows = []
        for policy in POLICIES:
            graphs = [scheduled(self.spread, policy, r, context(link)) for r in range(RANKS)]
            op = graphs[self.rank].clone().ops[0]
            op.attrs["backend"] = "aten"
            kernel = SleepingLayer(program_op(program_graph(op)), "cpu", *asleep())
            for training in (False, True):
                took = [self.step(kernel, ids[self.rank], training) for _ in range(self.turns + 1)][1:]
                what = "forward and backward" if training else "forward"
                told = predicted(graphs, machine(link), ids, training)
                rows.append(Row(ratio, "zipf" if zipf else "balanced", what, policy, told, statistics.median(took)))
        group.shutdown()
        return rows

    def step(self, kernel: SleepingLayer, ids: Tensor, training: bool) -> float:
        """Seconds of one step of all ranks."""
        inputs = [self.x, ids, *self.given]
        dist.barrier()
        start = time.monotonic()
        kernel.forward(inputs)
        if training:
            kernel.backward([self.x], inputs, [True, False, True, True, True])
        times: list[Any] = [None] * RANKS
        dist.all_gather_object(times, (start, time.monotonic()))
        return max(e for _, e in times) - min(s for s, _ in times)


def rank_main(rank: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    bench, found = Bench(rank, args.turns), list[Row]()
    for zipf in (False, True):
        for ratio in args.ratios:
            rows = bench.case(ratio, zipf)
            found += rows
            for r in rows if rank == 0 else ():
                print(
                    f"| {r.ratio:g} | {r.routing} | {r.what} | {r.policy} | {r.step * 1e3:.1f} "
                    f"| {r.simulated * 1e3:.1f} | {r.simulated / r.step - 1:+.1%} |",
                    flush=True,
                )
    if rank == 0:
        errors = sorted(abs(r.simulated / r.step - 1) for r in found)
        print(f"\n{len(errors)} steps: mean {statistics.mean(errors):.1%} off, worst {errors[-1]:.1%}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ratios", type=lambda s: [float(r) for r in s.split(",")], default=[0.25, 1.0, 4.0])
    args = parser.parse_args()
    print("| experts : links | routing | step | policy | measured, ms | simulated, ms | off |")
    print("|---|---|---|---|---|---|---|", flush=True)
    run_ranks(rank_main, RANKS, args)


if __name__ == "__main__":
    main()
