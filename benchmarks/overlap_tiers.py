"""A layer over two tiers of links, whole and in chunks: four ranks as two nodes, on links and experts that sleep.

    python benchmarks/overlap_tiers.py [--ratios 0.5,1,2] [--turns 5]

Rows travel through memory that ranks share, by the times of given links: between nodes three quarters of all
communication, inside them the rest. Experts compute, then sleep until a curve's time. Ranks measure links and calls
together, as ``moec.parallelize`` has them do, and the pass chooses by these. A ratio is that of the experts' time to
all communication of the layer whole. What a whole layer does beside both (sorting, adding up, Python) is measured on
links that take nothing, and added to what is predicted.

With ``--search N`` nothing is measured: what the search finds is held to every way to cut N random layers into up to
four chunks.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.backends.base import program_op
from moec.backends.distributed import groups
from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.ir.core import Graph, Op
from moec.ir.parallel_semantics import owners
from moec.op_costs import OpCosts, op_costs
from moec.parallel.costs import agree
from moec.parallel.plan import Plan
from moec.parallel.sample import sample_layer
from moec.parallel.tier_costs import PARTS, agree_tiers
from moec.passes import PassContext, PassManager
from moec.passes.overlap.cuts import UNITS
from moec.passes.overlap.legs import TURNS
from moec.passes.overlap.tier_plan import plan_tiers, read_tiers
from moec.passes.overlap.tier_search import Search
from moec.runtime.programs import program_graph
from moec.testing import delayed_group
from overlap_cases import draw_tiers
from overlap_layers import ALPHA, AsleepLayer, asleep
from spawned import run_ranks

RANKS, NODES, OWN, TOP_K, TOKENS, HIDDEN, INNER = 4, 2, 4, 4, 1024, 32, 8
POLICIES = ("none", "two", "tutel", "fsmoe", "auto")
BETWEEN = 0.75
"""Part of all communication that is between nodes."""
CURVE = asleep()[0]


@dataclass(frozen=True)
class Costs(OpCosts):
    """What the ranks measured, and experts that sleep."""

    def expert_times(self, op: Op, backward: bool = False) -> LayerCurve:
        return CURVE


@dataclass(frozen=True)
class Loads:
    """The very rows of the step."""

    ids: list[Tensor]

    def rows(self, module: str, ranks: int, experts: int) -> list[list[float]]:
        return [torch.bincount(i.flatten(), minlength=experts).double().tolist() for i in self.ids]

    def reach(self, module: str, sizes: tuple[int, ...], nodes: int) -> list[list[float]]:
        on = [owners(i, sizes) // (len(sizes) // nodes) for i in self.ids]
        return [[float((n == node).any(dim=1).sum()) for node in range(nodes)] for n in on]


class Rank:
    """One of the four."""

    def __init__(self, rank: int) -> None:
        self.rank, self.plan = rank, Plan.parse(f"ep={RANKS},nodes={NODES},form=hierarchical")
        self.whole = delayed_group(Link(0.0, 1e15), carrier="memory")
        self.parts: dict[str, Any] = {}
        each = RANKS // NODES
        instances = {
            ".node": [[n * each + p for n in range(NODES)] for p in range(each)],
            ".local": [[n * each + p for p in range(each)] for n in range(NODES)],
        }
        for part in PARTS:
            made = [delayed_group(Link(0.0, 1e15), ranks, carrier="memory") for ranks in instances[part]]
            self.parts[part] = next(g for g, ranks in zip(made, instances[part], strict=True) if rank in ranks)
            groups.bind(f"ep{part}", self.parts[part])
        groups.bind("ep", self.whole)
        experts = RANKS * OWN
        draws = [torch.rand(TOKENS, experts, generator=torch.Generator().manual_seed(r)) for r in range(RANKS)]
        self.loads = Loads([d.argsort(dim=1)[:, :TOP_K] for d in draws])
        gen = torch.Generator().manual_seed(100 + rank)
        x, weights = torch.randn(TOKENS, HIDDEN, generator=gen), torch.rand(TOKENS, TOP_K, generator=gen)
        up, down = torch.randn(OWN, 2 * INNER, HIDDEN, generator=gen), torch.randn(OWN, HIDDEN, INNER, generator=gen)
        self.inputs = [x, self.loads.ids[rank], weights, up, down]

        self.outside = self.beside()

    def layer(self) -> Graph:
        graph = sample_layer((OWN,) * RANKS, OWN, TOP_K, HIDDEN, INNER)
        PassManager(self.plan.passes(self.rank), repro=None).run(graph, PassContext())
        return graph

    def beside(self) -> float:
        """Seconds of a whole layer that are neither its experts' nor the links': sorting, adding up, Python."""
        kernel = self.kernel(self.layer())
        took = [self.once(kernel) for _ in range(7)][1:]
        return statistics.median([seconds - computed for seconds, computed in took])

    def bind(self, ratio: float) -> PassContext:
        """Give both tiers the links of a ratio, and measure them."""
        own = op_costs("cpu")
        assert own is not None
        ctx = PassContext(cost_model=Costs(own.machine, own.isa), profile=self.loads)
        for group in (self.whole, *self.parts.values()):
            group.link = Link(ALPHA, 1e9)
        self._agree(own)
        rows = self.loads.rows("", RANKS, RANKS * OWN)
        layer = read_tiers(self.layer().ops[0], ctx, rows)
        all_of = max(layer.compute(1.0)) / ratio
        for tier, part in enumerate(PARTS):
            trips = [t for t in (*layer.there, *layer.back) if t.tier == tier]
            wire = all_of * (BETWEEN if tier == 0 else 1 - BETWEEN) - ALPHA * sum(t.messages for t in trips)
            self.parts[part].link = Link(ALPHA, sum(t.bytes for t in trips) / wire)
        self._agree(own)
        return ctx

    def _agree(self, own: OpCosts) -> None:
        agree("ep", self.whole, "cpu", lambda: (own.machine, own.isa))
        agree_tiers("ep", self.parts, self.whole, "cpu", self.plan, self.rank)

    def kernel(self, graph: Graph) -> AsleepLayer:
        op = graph.ops[0]
        op.attrs["backend"] = "aten"
        return AsleepLayer(program_op(program_graph(op)), "cpu", CURVE)

    def once(self, kernel: AsleepLayer) -> tuple[float, float]:
        """Seconds of the slowest rank, and of the experts of the one that computes longest."""
        dist.barrier()
        start = time.monotonic()
        kernel.forward(self.inputs)
        seconds = torch.tensor([time.monotonic() - start, kernel.computed], dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds[0]), float(seconds[1])

    def case(self, ratio: float, turns: int) -> list[tuple[str, str, float, float]]:
        """Of every policy, what it does, and its predicted and its measured seconds; policies take turns."""
        ctx, made = self.bind(ratio), []
        for policy in POLICIES:
            graph = self.layer()
            chosen, _ = plan_tiers(graph.ops[0], ctx, policy, TOKENS)
            PassManager(f"overlap{{policy={policy},tokens={TOKENS}}}", repro=None).run(graph, ctx)
            told = f"{chosen.sizes}, ahead {chosen.turns.ahead}, behind {chosen.turns.behind}"
            made.append((policy, told if chosen.cut else "whole", chosen.seconds + self.outside, self.kernel(graph)))
        took = [[self.once(kernel)[0] for *_, kernel in made] for _ in range(turns + 1)][1:]
        middle = [statistics.median(column) for column in zip(*took, strict=True)]
        return [(policy, told, seconds, m) for (policy, told, seconds, _), m in zip(made, middle, strict=True)]


def rank_main(rank: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    mine = Rank(rank)
    if rank == 0:
        print("| ratio | policy | chunks | predicted ms | measured ms | error | over none |")
        print("|---|---|---|---|---|---|---|")
    for ratio in args.ratios:
        found = mine.case(ratio, args.turns)
        for policy, told, predicted, measured in found if rank == 0 else []:
            print(
                f"| {ratio:g} | {policy} | {told} | {predicted * 1e3:.1f} | {measured * 1e3:.1f} "
                f"| {measured / predicted - 1:+.1%} | {found[0][3] / measured:.2f} x |",
                flush=True,
            )
    dist.barrier()
    dist.destroy_process_group()


def searched(layers: int) -> None:
    """Print how much later what is found ends than the best of every way to cut, and the comparators beside it."""
    over: dict[str, list[float]] = {"auto": [], "two": [], "tutel": [], "fsmoe": [], "none": []}
    for seed in range(layers):
        search = Search(draw_tiers(random.Random(seed)))
        ways = [
            tuple(b - a for a, b in itertools.pairwise((0, *edges, UNITS)))
            for count in range(1, 5)
            for edges in itertools.combinations(range(1, UNITS), count - 1)
        ]
        best = min(search.at(sizes, turns).seconds for sizes in ways for turns in TURNS)
        for policy, found in over.items():
            found.append(search.choose(policy).seconds / best - 1)
    for policy, found in over.items():
        print(f"{policy}: {statistics.mean(found):+.2%} on average, {max(found):+.2%} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", type=lambda s: [float(r) for r in s.split(",")], default=[0.5, 1.0, 2.0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--search", type=int, default=0)
    args = parser.parse_args()
    if args.search:
        searched(args.search)
        return
    run_ranks(rank_main, RANKS, args)


if __name__ == "__main__":
    main()
