"""Chunks of any experts: against every way to put few experts into chunks, and where experts stay as they are."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.passes import PassContext, PassManager
from moec.passes.overlap import Overlap
from moec.passes.overlap.cuts import ByExperts, Layer, Sets, by_sets
from moec.passes.overlap.fill import Beside, auto_filled
from moec.passes.overlap.orders import _as_they_stand, _Timing, better_sets, least_seconds, worth_ordering
from moec.passes.overlap.plan import BACKWARD, FORWARD, allowed, plan
from moec.passes.overlap.policies import MARGIN, auto, cut_seconds, of_sets, own_rows, schedule, simplest, uncut
from tests.parallel.layers import Layer as Spread
from tests.passes.test_overlap_plan import Costs, Loads
from tests.passes.test_overlap_search import CURVE, random_layer

ANY = ("experts", "order")
HEAVY = [90.0, 5.0, 4.0, 6.0, 5.0, 6.0, 4.0, 90.0]
"""Rows for experts of two ranks; where either has most of its rows, the other has few."""


def heavy(alpha: float = 0.5, rate: float = 10.0) -> Layer:
    return Layer([HEAVY, HEAVY], (4, 4), CURVE, Link(alpha, rate), 1.0, 1.0)


def every_sets(sizes: tuple[int, ...], chunks: int) -> Iterator[Sets]:
    for at in itertools.product(range(chunks), repeat=sum(sizes)):
        held = [[[e for e in range(a, b) if at[e] == c] for a, b in ranges(sizes)] for c in range(chunks)]
        made = tuple(
            tuple(tuple(e - a for e in own) for own, (a, _) in zip(chunk, ranges(sizes), strict=True)) for chunk in held
        )
        yield tuple(chunk for chunk in made if any(chunk))


def ranges(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    ends = [0, *itertools.accumulate(sizes)]
    return list(itertools.pairwise(ends))


def holds_all_once(sets: Sets, sizes: tuple[int, ...]) -> bool:
    return all(sorted(e for chunk in sets for e in chunk[r]) == list(range(n)) for r, n in enumerate(sizes))


@pytest.mark.parametrize("dear", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_few_experts_are_put_into_chunks_nearly_as_well_as_can_be(seed: int, dear: bool) -> None:
    layer = random_layer(seed, own=3, dear=dear)
    layer = Layer([row[:6] for row in layer.rows[:2]], (3, 3), *(getattr(layer, n) for n in FIELDS))
    best = min(of_sets(layer, sets).seconds for sets in every_sets(layer.sizes, 3))
    natural, found = auto(layer, ("experts",)), auto(layer, ANY)
    assert found.seconds <= min(natural.seconds, best * 1.02) * (1 + MARGIN)
    assert not found.sets or holds_all_once(found.sets, layer.sizes)


FIELDS = ("experts", "links", "there_bytes", "back_bytes", "there_messages", "back_messages", "count_messages")


@pytest.mark.parametrize("own_first", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_ways_that_are_timed_at_once_end_as_one_by_one(seed: int, own_first: bool) -> None:
    layer = replace(random_layer(seed, dear=True), front_s={"experts": 0.2})
    own, rest = own_rows(layer)
    timing, rng = _Timing(rest if own_first else layer, own if own_first else None), random.Random(seed)
    for sizes in ((1, 2, 3), (2, 4), (3, 1, 1, 1)):
        at = _as_they_stand(layer, sizes)
        rng.shuffle(at)
        sets = tuple(
            tuple(tuple(e - a for e in range(a, b) if at[e] == c) for a, b in ranges(layer.sizes))
            for c in range(len(sizes))
        )
        want = of_sets(layer, sets, own_first)
        assert timing.ends(timing.ways(at, len(sizes)))[0] == pytest.approx(want.seconds)
        assert want.seconds >= least_seconds(layer) * (1 - 1e-9) or own_first


def test_experts_as_they_stand_are_one_of_all_sets() -> None:
    layer = random_layer(3, dear=True)
    sets = tuple(tuple(tuple(range(a, b)) for _ in layer.sizes) for a, b in ((0, 2), (2, 3), (3, 6)))
    for own_first in (False, True):
        want, got = schedule(layer, "experts", (2, 1, 3), own_first), of_sets(layer, sets, own_first)
        assert got.chunks == want.chunks and got.seconds == want.seconds
        assert cut_seconds(layer, got) == cut_seconds(layer, want)
    assert by_sets(layer, sets).chunks((1, 1, 1)) == ByExperts(layer, 6).chunks((2, 1, 3))


def test_an_expert_with_most_rows_is_computed_while_others_have_enough_to_do() -> None:
    natural, found = auto(heavy(), ("experts",)), auto(heavy(), ANY)
    assert found.sets and found.seconds < natural.seconds / (1 + MARGIN)
    assert holds_all_once(found.sets, (4, 4))
    assert auto(heavy(), ANY) == found, "the same on every rank"
    assert found.seconds >= least_seconds(heavy())


@pytest.mark.parametrize("seed", range(12))
def test_an_order_is_never_worse_than_none(seed: int) -> None:
    layer = random_layer(seed, own=5, dear=seed % 2 == 0)
    natural = auto(layer, ("experts", "tokens", "own"))
    found = auto(layer)
    assert found.seconds <= natural.seconds * (1 + MARGIN)
    assert not found.sets or found.seconds < natural.seconds / (1 + MARGIN) * (1 + MARGIN)


def test_no_gain_leaves_experts_as_they_stand() -> None:
    layer = random_layer(1)
    stands, sooner = (replace(schedule(layer, "experts", (2,) * n), seconds=s) for n, s in ((3, 100.9), (3, 100.0)))
    other = replace(sooner, sets=(((0,),),), chunks=sooner.chunks[:2])
    assert simplest([stands, other]) is stands, "even where another order needs fewer chunks"
    assert simplest([replace(stands, seconds=101.1), other]) is other
    assert not uncut(layer).sets


def test_equal_experts_are_not_looked_at_in_other_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    even = Layer([[10.0] * 8] * 2, (4, 4), CURVE, Link(0.5, 10.0), 1.0, 1.0)
    assert not worth_ordering(even) and worth_ordering(heavy())
    assert not worth_ordering(Layer([[1.0, 2.0], [3.0, 1.0]], (1, 1), CURVE, Link(0.5, 10.0), 1.0, 1.0))
    looked: list[Layer] = []
    monkeypatch.setattr("moec.passes.overlap.policies.better_sets", lambda layer, *_: looked.append(layer) or ())
    assert not auto(even).sets and not looked
    assert auto(heavy()).chunks and looked


def test_where_links_are_never_idle_no_order_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.passes.overlap.policies.better_sets", lambda *_: pytest.fail("it was"))
    free = LayerCurve(0.0, ((1.0, 1e-6), (100.0, 1e-4)))
    found = auto(replace(heavy(0.0, 1.0), experts=free), ANY)
    assert found.seconds == pytest.approx(least_seconds(replace(heavy(0.0, 1.0), experts=free)), rel=0.01)


def test_chunks_without_experts_are_none() -> None:
    layer = replace(heavy(alpha=20.0), sizes=(4, 4))
    for sets in better_sets(layer, [(1, 1, 1, 1)], None, 8):
        assert all(any(chunk) for chunk in sets) and holds_all_once(sets, layer.sizes)
    assert [len(sets) for sets in better_sets(layer, [], None, 8)] == [2, 3], "where nothing else was found, few"


def test_who_does_not_know_the_rank_keeps_experts_as_they_stand() -> None:
    assert "order" not in allowed(FORWARD) and "order" not in allowed(BACKWARD)
    assert not plan(heavy(), BACKWARD).sets and plan(heavy(), BACKWARD, rank_known=True).sets
    assert not plan(heavy(), BACKWARD, "two", rank_known=True).sets
    assert not plan(heavy(), BACKWARD, rank_known=True).own_first


def test_with_something_beside_an_order_is_looked_for_too() -> None:
    beside = Beside((LayerCurve(0.0, ((1.0, 0.5),)),), (4.0, 4.0))
    stands = auto_filled(heavy(), ("experts",), beside)
    found = auto_filled(heavy(), ANY, beside)
    assert found.schedule.seconds <= stands.schedule.seconds * (1 + MARGIN)
    assert found.schedule.sets


LAYER = Spread(ranks=2, experts=8, hidden=16, inner=32)
PROFILE = Loads([HEAVY, HEAVY])
COSTS = Costs(Link(0.5, 320.0), CURVE)


def optimized(pass_: Overlap, profile: Loads | None, rank: int = 0) -> tuple[str, list[str]]:
    """The program, and what was said."""
    ctx = PassContext(cost_model=COSTS, profile=profile)
    graph = LAYER.spread(rank, "expert-parallel")
    PassManager([pass_], repro=None).run(graph, ctx)
    return str(graph), [r.message for r in ctx.remarks]


def test_the_program_says_which_experts_a_chunk_holds_and_so_does_the_remark() -> None:
    (mine, said), (theirs, said_there) = (optimized(Overlap(rank=r), PROFILE, r) for r in (0, 1))
    for text in (mine, theirs):
        assert "among = (" in text and "only = (" in text and "moe.join_experts" in text
    assert "aten.slice.Tensor(%w13" not in mine, "no weights are cut out"
    assert said[1].startswith("the backward in 2 chunks of experts in another order (this rank's: 0 3 | 1 2): ")
    assert "(this rank's: 1 3 | 0 2): " in said_there[1]
    orders = [text.split("moe.renumber %ids {order = (")[-1].split(")")[0] for text in (mine, theirs)]
    assert orders[0] == orders[1], "where own rows do not come first, all sort their rows in one order"


@pytest.mark.parametrize(
    ("pass_", "profile"),
    [
        (Overlap(), PROFILE),  # nobody says which rank it is
        (Overlap(tokens=64, rank=0), None),  # nobody knows the rows
        (Overlap(tokens=64, rank=0), Loads(None)),
        (Overlap("two", rank=0), PROFILE),
        (Overlap(chunks=3, rank=0), PROFILE),
    ],
)
def test_otherwise_experts_stay_as_they_stand(pass_: Overlap, profile: Loads | None) -> None:
    text, said = optimized(pass_, profile)
    assert "another order" not in "".join(said)
    assert "among" not in text and "join_experts" not in text
    assert any(m.startswith("the forward in") for m in said), "it is cut all the same"
