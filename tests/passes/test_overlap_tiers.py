"""Layers over two tiers: what is read of their programs, what is chosen and said, and the order that is written."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.ir.beside import EXPERTS, own_experts
from moec.ir.core import Graph, Op
from moec.passes import PassContext, PassManager
from moec.passes.overlap import Overlap
from moec.passes.overlap.by_tokens import cut_by_tokens
from moec.passes.overlap.cuts import UNITS
from moec.passes.overlap.fill import PIECES, Beside
from moec.passes.overlap.legs import TURNS, Turns, asks
from moec.passes.overlap.order import is_start, needs, reorder, tiers_of
from moec.passes.overlap.policies import MARGIN, POLICIES
from moec.passes.overlap.reach import busiest_rows, expected_copies
from moec.passes.overlap.tier_plan import read_tiers
from moec.passes.overlap.tier_search import Search
from moec.passes.overlap.tiers import Carried, TieredLayer
from moec.passes.overlap.trips import Trip, Trips, over_tiers, trips
from tests.parallel.layers import Layer

LAYER = Layer(ranks=4, experts=8, nodes=2, hidden=16, inner=32, dtype="bf16")
FORM = "expert-parallel{form=hierarchical,nodes=<nodes>,rank=<rank>}"
SUMS = "expert-parallel-sums{form=hierarchical,nodes=<nodes>,rank=<rank>}"
LINKS = {"ep.node": Link(1e-4, 1e6), "ep.local": Link(1e-5, 1e7)}
CURVE = LayerCurve(1e-5, ((1.0, 3e-5), (64.0, 192e-5)))
NEAR = 1.01
"""How much longer than the best of all sizes what is found may take."""


def drawn(rng: random.Random) -> TieredLayer:
    """A layer as the benchmark of the search draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        layer: TieredLayer = importlib.import_module("overlap_cases").draw_tiers(rng)
    return layer


@dataclass(frozen=True)
class Costs:
    links: dict[str, Link] = field(default_factory=lambda: LINKS)
    curve: LayerCurve | None = CURVE
    chunk_s: float = 0.0
    taken: Link | None = None

    def expert_times(self, op: Op, backward: bool = False) -> LayerCurve | None:
        return self.curve

    def transport(self, group: str, ranks: int) -> Link | None:
        assert ranks == 2, "the members of a part, not of the axis"
        return self.links.get(group)

    def copying(self, group: str, bytes: float) -> float:
        return 0.0

    def chunk_seconds(self, op: Op, place: int, along: str) -> float:
        return self.chunk_s

    def burden(self, group: str) -> Link | None:
        return self.taken


@dataclass(frozen=True)
class Loads:
    """A profile that knows which tokens reach a node."""

    table: Sequence[Sequence[float]]
    reached: Sequence[Sequence[float]]

    def rows(self, module: str, ranks: int, experts: int) -> Sequence[Sequence[float]] | None:
        return self.table

    def reach(self, module: str, sizes: Sequence[int], nodes: int) -> Sequence[Sequence[float]] | None:
        return self.reached


def spread(pipeline: str = FORM) -> Op:
    return LAYER.spread(0, pipeline).ops[0]


def run(pass_: Overlap, costs: object, pipeline: str = FORM) -> tuple[Op, list[str]]:
    """The layer after the pass, and the remarks."""
    graph, ctx = LAYER.spread(0, pipeline), PassContext(cost_model=costs)
    PassManager([pass_], repro=None).run(graph, ctx)
    return graph.ops[0], [r.message for r in ctx.remarks]


def test_what_travels_on_each_tier_is_read_from_the_program() -> None:
    groups = ("ep.node", "ep.local")
    rows, ids = 16 * 2, 2 * 4
    there = (Trip(0, "", 1, 0.0), Trip(0, "copies", 2, rows + ids), Trip(1, "", 1, 0.0), Trip(1, "inside", 1, rows))
    home = (Trip(1, "inside", 1, rows), Trip(0, "slots", 1, rows))
    assert trips(spread().regions[0]) == Trips(groups, there, home)
    sums = trips(spread(SUMS).regions[0])
    assert sums is not None
    assert sums.there[1] == Trip(0, "copies", 3, rows + ids + 2 * 4), "and router weights, which a node adds up with"
    assert sums.back == (Trip(1, "inside", 1, rows), Trip(0, "copies", 1, rows)), "one row a node comes home"
    narrow = trips(spread(f"{FORM},quantize-dispatch").regions[0])
    assert narrow is not None and sum(t.bytes for t in narrow.there) < rows + ids + rows


@pytest.mark.parametrize("pipeline", ["expert-parallel", "expert-parallel{form=gather}"])
def test_other_forms_have_one_tier(pipeline: str) -> None:
    region = spread(pipeline).regions[0]
    assert not over_tiers(region) and trips(region) is None and len(tiers_of(region)) == 1


def test_bytes_are_those_of_the_busiest_rank() -> None:
    rows = [[float(r + e) for e in range(8)] for r in range(4)]
    layer = read_tiers(spread(), PassContext(cost_model=Costs()), rows)
    most = busiest_rows(rows, expected_copies(rows, (2,) * 4, 2, 2), (2,) * 4, 2)
    assert layer.there[1] == Carried(0, 2, most.copies * (32 + 8)) and layer.back[1] == Carried(0, 1, most.slots * 32)
    assert layer.there[3].bytes == layer.back[0].bytes == most.inside * 32
    assert layer.loads[1] == (sum(r[2] for r in rows), sum(r[3] for r in rows))
    told = read_tiers(spread(), PassContext(cost_model=Costs(), profile=Loads(rows, [[5.0, 7.0]] * 4)), rows)
    assert told.there[1].bytes == 7.0 * 40, "a profile that knows which tokens reach a node is asked"


def all_sizes(count: int) -> Iterator[tuple[int, ...]]:
    for edges in itertools.combinations(range(1, UNITS), count - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *edges, UNITS)))


@pytest.mark.parametrize("seed", range(6))
def test_sizes_are_nearly_the_best_of_all(seed: int) -> None:
    search = Search(drawn(random.Random(seed)))
    for count in (2, 3):
        best = min(search.at(sizes, turns).seconds for sizes in all_sizes(count) for turns in TURNS)
        assert best <= search.best(count).seconds <= best * NEAR


@pytest.mark.parametrize("seed", range(10, 20))
def test_no_rule_ends_sooner_than_what_the_cost_model_chooses(seed: int) -> None:
    layer = drawn(random.Random(seed))
    search = Search(layer)
    found = {policy: search.choose(policy) for policy in POLICIES}
    assert found["auto"].seconds <= min(s.seconds for s in found.values()) * (1 + MARGIN)
    assert (found["two"].sizes, found["none"].sizes) == ((1, 1), (1,))
    assert len(found["tutel"].sizes) in (1, 2, 4, 8) and len(found["fsmoe"].sizes) in (1, 2, 4, 8)
    assert search.at((16,), Turns()).seconds == pytest.approx(found["none"].seconds)


def test_what_stands_beside_is_computed_while_rows_travel() -> None:
    layer = drawn(random.Random(3))
    ranks = len(layer.loads)
    spare = LayerCurve(0.0, ((1.0, 1e-6), (1000.0, 1e-3)))
    beside = Beside((spare,), (500.0,) * ranks)
    alone, both = Search(layer).choose("none").seconds, Search(layer, beside).choose("none")
    assert alone <= both.seconds < alone + spare.seconds([500.0])
    assert sum(pieces for _, pieces in both.places) == PIECES
    assert Search(layer, beside).choose("auto").seconds <= both.seconds


def test_the_cost_model_chooses_for_the_forward_and_says_why_not_for_the_backward() -> None:
    op, said = run(Overlap(tokens=64), Costs())
    chunks = sum(o.name in EXPERTS for o in op.regions[0].ops)
    assert chunks > 1 and sum(o.name in EXPERTS for o in op.regions[1].ops) == 1
    assert said[0].startswith(f"the forward in {chunks} chunks of tokens (") and "ms instead of" in said[0]
    assert said[1].startswith("the backward stays whole: a token goes to a node once for all its experts there")
    assert "gradients of weights would be added up in another order" in said[1]


@pytest.mark.parametrize(("policy", "chunks"), [("none", 1), ("two", 2)])
def test_a_policy_is_followed(policy: str, chunks: int) -> None:
    op, _ = run(Overlap(policy, tokens=64), Costs())  # type: ignore[arg-type]
    assert sum(o.name in EXPERTS for o in op.regions[0].ops) == chunks


@pytest.mark.parametrize(
    ("costs", "tokens", "says"),
    [
        (None, 64, "there is no cost model"),
        (Costs({"ep.node": LINKS["ep.node"]}), 64, "nobody measured the links of group 'ep.local'"),
        (Costs(curve=None), 64, "does not know its experts"),
        (Costs(), 0, "there is no routing profile"),
        (Costs(chunk_s=1.0), 64, "and no chunks of tokens take less"),
    ],
)
def test_a_layer_stays_whole_and_what_is_missing_is_named(costs: Costs | None, tokens: int, says: str) -> None:
    op, said = run(Overlap(tokens=tokens), costs)
    assert [sum(o.name in EXPERTS for o in region.ops) for region in op.regions] == [1, 1]
    assert says in said[0] and "the backward stays whole" in said[1]


def written(region: Graph) -> list[tuple[int, int]]:
    """Starts and experts of a program in chunks as they stand, each with its chunk and its step."""
    before, experts = needs(region), own_experts(region)
    found: list[tuple[int, int]] = []
    for op in (op for op in region.ops if is_start(op) or op in experts):
        local, counts = op.attrs.get("group") == "ep.local", not op.group("send") if is_start(op) else False
        behind = [i for i, e in enumerate(experts) if e in before[op]]
        if op in experts:
            ask = experts.index(op), 4
        elif behind:
            ask = behind[0], 5 if local else 6
        else:
            ask = next(i for i, e in enumerate(experts) if op in before[e]), 2 * local + (not counts)
        found += [ask] if ask not in found[-1:] else []  # ids and rows are one leg
    return found


@pytest.mark.parametrize("turns", [*TURNS, Turns(2, 2)])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_a_program_starts_what_the_timeline_assumes_in_that_order(turns: Turns, chunks: int) -> None:
    region = cut_by_tokens(spread().regions[0], (1,) * chunks)
    reorder(region, turns=turns)
    assert written(region) == asks(chunks, (0, 0, 1, 1), 2, turns)


def test_the_chosen_order_is_the_one_that_is_written() -> None:
    layer = read_tiers(spread(), PassContext(cost_model=Costs()), [[16.0] * 8] * 4)
    chosen = Search(layer).choose("auto")
    op, _ = run(Overlap(tokens=64), Costs())
    assert written(op.regions[0]) == asks(len(chosen.sizes), (0, 0, 1, 1), 2, chosen.turns)


@pytest.mark.parametrize(("rate", "counted"), [(1e2, 500 / 1e3), (1e4, 500 / 1e4)])
def test_collectives_burden_experts_no_longer_than_they_travel(rate: float, counted: float) -> None:
    """Links bring 1000 bytes a second; of three chunks the middle one has half of the tokens, and travels both ways."""
    trip, burdens = (Carried(0, 1, 1000.0),), (Link(0.0, rate), None)
    links = (Link(0.0, 1e3), Link(0.0, 1e9))
    first, middle, last = TieredLayer(((0.0,),), CURVE, links, trip, trip, burdens=burdens).chunks((1, 2, 1))
    assert middle.compute == pytest.approx((2 * counted,))
    assert (*first.compute, *last.compute) == pytest.approx((counted / 2,) * 2)
