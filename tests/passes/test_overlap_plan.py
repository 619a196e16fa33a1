"""The pass with a cost model: what it reads from a program, what it chooses, and what it says is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.ir.beside import EXPERTS
from moec.ir.core import Op
from moec.op_costs import OpCosts, op_costs
from moec.passes import PassContext, PassManager
from moec.passes.overlap import Overlap
from moec.passes.overlap.costs import OverlapCosts
from moec.passes.overlap.plan import BACKWARD, FORWARD, plan, read_layer
from moec.passes.overlap.policies import schedule, uncut
from moec.passes.overlap.traffic import Traffic, traffic
from tests.parallel.layers import Layer

LAYER = Layer(ranks=2, experts=8, hidden=16, inner=32, dtype="bf16")
LINK = Link(1e-4, 2e6)
CURVE = LayerCurve(1e-4, ((1.0, 1e-3), (64.0, 1.2e-3)))


@dataclass(frozen=True)
class Costs:
    link: Link | None = LINK
    curve: LayerCurve | None = CURVE
    copy_s: float = 0.0  # of a byte
    chunk_s: float = 0.0
    taken: Link | None = None

    def expert_times(self, op: Op, backward: bool = False) -> LayerCurve | None:
        return self.curve

    def transport(self, group: str, ranks: int) -> Link | None:
        return self.link

    def copying(self, group: str, bytes: float) -> float:
        return bytes * self.copy_s

    def chunk_seconds(self, op: Op, place: int, along: str) -> float:
        return self.chunk_s * (1 + place)

    def burden(self, group: str) -> Link | None:
        return self.taken


@dataclass(frozen=True)
class Loads:
    table: Sequence[Sequence[float]] | None

    def rows(self, module: str, ranks: int, experts: int) -> Sequence[Sequence[float]] | None:
        return self.table


def spread(pipeline: str = "expert-parallel", rank: int = 0) -> Op:
    return LAYER.spread(rank, pipeline).ops[0]


def run(pass_: Overlap, ctx: PassContext, pipeline: str = "expert-parallel") -> tuple[list[int], list[str]]:
    """How often experts run forwards and backwards, and the remarks."""
    graph = LAYER.spread(0, pipeline)
    PassManager([pass_], repro=None).run(graph, ctx)
    counts = [sum(op.name in EXPERTS for op in region.ops) for region in graph.ops[0].regions]
    return counts, [r.message for r in ctx.remarks]


def test_what_travels_is_read_from_the_program() -> None:
    forward, backward = spread().regions
    assert traffic(forward) == Traffic(32, 32, 1, 1)
    assert traffic(backward) == Traffic(32 + 32 + 4, 32 + 4, 3, 2), "rows, gradients and weights; two gradients"
    narrow = spread("expert-parallel,quantize-dispatch").regions[0]
    assert traffic(narrow) == Traffic(16 + 4, 32, 2, 1), "one byte an element and a scale a row"
    assert traffic(spread("expert-parallel{form=gather}").regions[0]) is None


def test_rows_come_from_the_profile_or_are_spread_evenly() -> None:
    ctx = PassContext(cost_model=Costs())
    even = read_layer(spread(), FORWARD, ctx, tokens=12)
    assert even.rows == [[12 * 2 / 8] * 8] * 2
    assert (even.sizes, even.there_bytes, even.there_messages) == ((4, 4), 32, 1)
    assert read_layer(spread(), BACKWARD, ctx, tokens=12).there_messages == 3
    ctx.profile = Loads([[1.0] * 8, [2.0] * 8])
    assert read_layer(spread(), FORWARD, ctx, tokens=12).rows == ctx.profile.table
    ctx.profile = Loads(None)
    assert read_layer(spread(), FORWARD, ctx, tokens=12).rows == even.rows, "a profile may not know the layer"


def test_the_cost_model_chooses_for_each_direction() -> None:
    ctx = PassContext(cost_model=Costs())
    counts, said = run(Overlap(tokens=64), ctx)
    assert counts[0] > 1 and counts[1] > 1
    assert said[0].startswith(f"the forward in {counts[0]} chunks of") and "ms instead of" in said[0]
    assert said[1].startswith(f"the backward in {counts[1]} chunks of experts")


def test_own_rows_come_first_where_that_ends_sooner_and_the_rank_is_known() -> None:
    slow = Costs(LINK, LayerCurve(1e-5, ((1.0, 2e-5), (64.0, 128e-5))))  # halves of an expert's rows take half as long
    known, said = run(Overlap(tokens=64, rank=0), PassContext(cost_model=slow))
    assert said[0].startswith("the forward in own rows first, then")
    unknown, said = run(Overlap(tokens=64), PassContext(cost_model=slow))
    assert "own rows" not in said[0]
    assert known[1] == unknown[1], "a backward adds gradients of weights up in one order"


@pytest.mark.parametrize(("policy", "forward"), [("two", 2), ("none", 1)])
def test_a_policy_is_followed(policy: str, forward: int) -> None:
    counts, said = run(Overlap(policy, tokens=64), PassContext(cost_model=Costs()))  # type: ignore[arg-type]
    assert counts == [forward, forward]
    assert ("chunks of tokens (1, 1)" in said[0]) == (policy == "two")


def test_putting_rows_together_again_is_counted() -> None:
    free, dear = (read_layer(spread(), FORWARD, PassContext(cost_model=Costs(copy_s=s)), 64) for s in (0.0, 1e-3))
    home = 64 * int(spread().operands[1].type.shape[1]) * free.back_bytes * 1e-3  # type: ignore[union-attr]
    assert dear.joining["experts"] == pytest.approx(home) and free.joining["experts"] == 0.0
    assert schedule(dear, "experts", (1, 1)).seconds == pytest.approx(schedule(free, "experts", (1, 1)).seconds + home)
    assert uncut(dear).seconds == uncut(free).seconds
    assert plan(free, FORWARD).cut and not plan(dear, FORWARD).cut


def test_gradients_of_weights_are_put_together_too() -> None:
    layer = read_layer(spread(), BACKWARD, PassContext(cost_model=Costs(copy_s=1e-9)), 64)
    weights = 4 * (64 * 16 + 16 * 32) * 2  # four experts of a rank, up and down, bf16
    assert layer.joining["experts"] == pytest.approx((64 * 2 * layer.back_bytes + weights) * 1e-9)


@dataclass(frozen=True)
class Detailed(Costs):
    """Kernels that write gradients in place, and calls whose first quarter is in front."""

    def in_place(self, op: Op) -> bool:
        return True

    def front_seconds(self, op: Op, place: int, along: str) -> float:
        return self.chunk_seconds(op, place, along) / 4


def test_gradients_that_are_written_in_place_are_not_copied() -> None:
    layer = read_layer(spread(), BACKWARD, PassContext(cost_model=Detailed(copy_s=1e-9)), 64)
    assert layer.joining["experts"] == pytest.approx(64 * 2 * layer.back_bytes * 1e-9)


def test_calls_in_front_are_asked_for_where_the_model_knows_them() -> None:
    models = (Detailed(chunk_s=1e-4), Costs(chunk_s=1e-4))
    known, unknown = (read_layer(spread(), BACKWARD, PassContext(cost_model=model), 64) for model in models)
    assert known.front_s == {"experts": 5e-5, "tokens": 5e-5} and unknown.front_s == {}


def test_what_a_chunk_costs_is_asked_for_each_direction_and_decides() -> None:
    taken = Link(1e-5, 1e9)
    ctx = PassContext(cost_model=Costs(chunk_s=1e-4, taken=taken))
    forward, backward = (read_layer(spread(), place, ctx, 64) for place in (FORWARD, BACKWARD))
    assert forward.chunk_s == {"experts": 1e-4, "tokens": 1e-4} and backward.chunk_s["experts"] == 2e-4
    assert forward.burden == backward.burden == taken
    cheap, _ = run(Overlap(tokens=64), PassContext(cost_model=Costs()))
    dear, said = run(Overlap(tokens=64), PassContext(cost_model=Costs(chunk_s=1.0)))
    assert min(cheap) > 1 and dear == [1, 1] and "in one piece it takes" in said[0]


def test_chunks_that_do_not_pay_are_not_made() -> None:
    counts, said = run(Overlap(tokens=64), PassContext(cost_model=Costs(Link(0.1, 1e12))))
    assert counts == [1, 1]
    assert "no chunks that may be cut take less" in said[0]


@pytest.mark.parametrize(
    ("costs", "tokens", "pipeline", "says"),
    [
        (None, 64, "expert-parallel", "there is no cost model"),
        (Costs(link=None), 64, "expert-parallel", "nobody measured the links of group 'ep'"),
        (Costs(curve=None), 64, "expert-parallel", "does not know its experts"),
        (Costs(), 0, "expert-parallel", "there is no routing profile"),
        (Costs(), 64, "expert-parallel{form=gather}", "what the form 'gather' sends is not predicted"),
        (Costs(), 64, "expert-parallel,overlap{chunks=2}", "it is cut already"),
    ],
)
def test_what_is_missing_is_named(costs: Costs | None, tokens: int, pipeline: str, says: str) -> None:
    before = spread(pipeline)
    counts, said = run(Overlap(tokens=tokens), PassContext(cost_model=costs), pipeline)
    assert counts == [sum(op.name in EXPERTS for op in region.ops) for region in before.regions]
    assert len(said) == 2 and all(says in message for message in said)


@pytest.mark.parametrize(("options", "says"), [({"chunks": 9}, "up to 8"), ({"tokens": -1}, "number of tokens")])
def test_options_that_say_nothing_are_refused(options: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Overlap(**options)  # type: ignore[arg-type]


def test_the_compilers_own_cost_model_has_what_the_pass_asks_for() -> None:
    costs = op_costs("cpu:avx2")
    assert isinstance(costs, OpCosts) and isinstance(costs, OverlapCosts)
    assert costs.transport("nobody", 2) is None
    assert costs.expert_times(spread()) is None, "ranks have not agreed on anything"
