"""What chunks of whole experts do in one case of ``overlap.py``: cut anywhere, in any order, and as the pass chooses.

    python benchmarks/overlap_orders.py --ratio 1

By the cost model of the sleeping experts, forwards, Zipf's law, and as if cutting cost nothing. First the soonest of
all ways to cut a rank's experts as they stand, every rank where it likes; then the soonest of orders of experts and
cuts drawn at random; then what the pass chooses of experts as they stand, and of all. Communication that is exposed
stands beside what 1.1 times the floor and 5 % of the step allow.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import replace

from moec.cost.chunks import Calls, ChunkCosts
from moec.cost.links import Link
from moec.passes.base import PassContext
from moec.passes.manager import PassManager
from moec.passes.overlap.cuts import ByExperts, Layer
from moec.passes.overlap.plan import FORWARD, read_layer
from moec.passes.overlap.policies import auto, uncut
from moec.passes.overlap.timeline import Chunk, exposed_floor, makespan
from overlap_layers import ALPHA, Costs, Loads, Sizes, asleep, link_for, routes, table

SIZES = Sizes(2, 64, 16, tokens=1024)
Edges = tuple[int, ...]


def layer_at(ratio: float) -> Layer:
    """The layer whose experts take ``ratio`` times as long as its links."""
    graph = SIZES.graph()
    PassManager("expert-parallel", repro=None).run(graph, PassContext())
    profile = Loads(table(SIZES, routes(SIZES, True)))
    nothing = ChunkCosts(Calls(0.0), Calls(0.0), Calls(0.0), None)
    costs = Costs(*asleep(), Link(ALPHA, 1e9), nothing, 1e15)
    first = read_layer(graph.ops[0], FORWARD, PassContext(cost_model=costs, profile=profile))
    costs = replace(costs, link=link_for(first, ratio))
    return read_layer(graph.ops[0], FORWARD, PassContext(cost_model=costs, profile=profile))


def cuts(experts: int, chunks: int) -> list[Edges]:
    """All ways to cut so many experts into so many chunks."""
    return [(0, *inner, experts) for inner in itertools.combinations(range(1, experts), chunks - 1)]


def chunks_of(layer: Layer, edges: Sequence[Edges]) -> list[Chunk]:
    """The chunks that begin at these of every rank's experts."""
    cut = ByExperts(layer, edges=list(zip(*edges, strict=True)))
    return cut.chunks((1,) * cut.units)


def tell(what: str, layer: Layer, chunks: Sequence[Chunk]) -> None:
    step = makespan(chunks)
    exposed = step - max(uncut(layer).chunks[0].compute)
    allowed = 1.1 * exposed_floor(chunks) + 0.05 * step
    print(f"{what}: step {step * 1e3:.1f} ms, exposed {exposed * 1e3:.1f} ms, allowed {allowed * 1e3:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=1.0, help="time of the experts over that of the links")
    parser.add_argument("--most", type=int, default=7, help="chunks")
    parser.add_argument("--orders", type=int, default=5000, help="of experts, with 20 cuts into every number")
    args = parser.parse_args()
    layer, own = layer_at(args.ratio), SIZES.experts // SIZES.ranks
    numbers = range(2, min(args.most, own) + 1)
    anywhere = (
        chunks_of(layer, edges) for n in numbers for edges in itertools.product(cuts(own, n), repeat=SIZES.ranks)
    )
    tell("experts as they stand, cut anywhere", layer, min(anywhere, key=makespan))
    draw = random.Random(0)
    best: list[Chunk] = []
    for _ in range(args.orders):
        order = [rank * own + e for rank in range(SIZES.ranks) for e in draw.sample(range(own), own)]
        mixed = replace(layer, rows=[[row[e] for e in order] for row in layer.rows])
        for n in numbers:
            ways = cuts(own, n)
            tried = [chunks_of(mixed, (e,) * SIZES.ranks) for e in draw.sample(ways, min(20, len(ways)))]
            best = min([*tried, *([best] if best else [])], key=makespan)
    tell("experts in any order, drawn at random", layer, best)
    tell("the pass, experts as they stand", layer, auto(layer, ("experts",)).chunks)
    before = time.perf_counter()
    chosen = auto(layer, ("experts", "order"))
    took = time.perf_counter() - before
    tell("the pass", layer, chosen.chunks)
    for rank in range(SIZES.ranks):
        print(f"  rank {rank}: {' | '.join(' '.join(map(str, chunk[rank])) for chunk in chosen.sets)}")
    print(f"  planned in {took * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
