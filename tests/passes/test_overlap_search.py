"""Chosen chunks: against every way to cut, other systems' rules by hand, and layers that are best left whole."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.passes.overlap.costs import burden_seconds
from moec.passes.overlap.cuts import ByExperts, ByTokens, Cut, Layer, expert_ranges
from moec.passes.overlap.policies import (
    MARGIN,
    auto,
    choose,
    cut_seconds,
    fsmoe,
    own_rows,
    schedule,
    simplest,
    tutel,
    two,
    uncut,
)
from moec.passes.overlap.search import best_sizes, better_sizes
from moec.passes.overlap.timeline import makespan

CURVE = LayerCurve(0.5, ((1.0, 2.0), (8.0, 3.0), (64.0, 20.0)))
LINE = LayerCurve(1.0, ((1.0, 0.1), (1000.0, 100.0)))


def random_layer(seed: int, own: int = 6, dear: bool = False) -> Layer:
    """A layer; ``dear`` where chunks cost something beside their rows."""
    rng = random.Random(seed)
    ranks = rng.choice((2, 3))
    rows = [[rng.expovariate(0.1) for _ in range(ranks * own)] for _ in range(ranks)]
    link = Link(rng.uniform(0, 3), rng.uniform(2, 20))
    layer = Layer(rows, (own,) * ranks, CURVE, link, 1.0, rng.choice((1.0, 2.0)), rng.choice((1, 3)))
    if not dear:
        return layer
    calls = {along: rng.uniform(0, 3) for along in ("experts", "tokens")}
    return replace(layer, chunk_s=calls, burden=rng.choice((None, Link(rng.uniform(0, 1), rng.uniform(10, 100)))))


def every_way(units: int, most: int) -> Iterable[tuple[int, ...]]:
    for count in range(min(most, units)):
        for inner in itertools.combinations(range(1, units), count):
            edges = (0, *inner, units)
            yield tuple(b - a for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", [ByExperts, ByTokens])
@pytest.mark.parametrize("own_first", [False, True])
@pytest.mark.parametrize("dear", [False, True])
def test_no_other_sizes_end_sooner(seed: int, kind: type[Cut], own_first: bool, dear: bool) -> None:
    layer = random_layer(seed, dear=dear)
    own, rest = own_rows(layer)
    first = [own] if own_first else []
    cut = kind(rest if own_first else layer, 6)
    found = best_sizes(cut, *first, most=4)
    assert sum(found) == 6
    assert len(found) <= 4
    best = min(makespan([*first, *cut.chunks(sizes)]) for sizes in every_way(6, 4))
    assert makespan([*first, *cut.chunks(found)]) == pytest.approx(best)


def test_what_chunks_of_experts_cost_by_hand() -> None:
    rows = [[4.0, 6.0, 1.0, 2.0], [10.0, 20.0, 3.0, 5.0]]
    layer = Layer(rows, (2, 2), LINE, Link(0.25, 2.0), 1.0, 4.0, there_messages=3)
    cut = ByExperts(layer)
    assert cut.units == 2
    # Rank 1 sends 10 rows for expert 0, rank 0 sends 1 for expert 2.
    chunk = cut.chunk(0, 1)
    assert (chunk.there, chunk.back) == (1.0 + 5.0, 0.25 + 20.0), "rows are counted before they leave"
    assert chunk.compute == (pytest.approx(1.0 + 1.4), pytest.approx(1.0 + 0.4))
    assert cut.chunk(0, 2).there == 1.0 + 30.0 / 2
    assert cut.chunk(1, 2).there == 0.75 + 20.0 / 2, "for chunks of experts once"
    tokens = ByTokens(layer, 4).chunk(1, 2)
    assert tokens.there == 1.0 + 30.0 / 4 / 2, "for chunks of tokens every time"
    assert tokens.compute == (pytest.approx(1.0 + 1.0), pytest.approx(1.0 + 0.275))


def test_what_a_chunk_costs_beside_its_rows_by_hand() -> None:
    rows = [[4.0, 6.0, 1.0, 2.0], [10.0, 20.0, 3.0, 5.0]]
    free = Layer(rows, (2, 2), LINE, Link(0.25, 2.0), 1.0, 4.0, there_messages=3)
    dear = replace(free, chunk_s={"experts": 7.0, "tokens": 9.0}, burden=Link(0.5, 10.0), joining={"experts": 3.0})
    one, costly = ByExperts(free), ByExperts(dear)
    assert costly.chunk(0, 2) == one.chunk(0, 2), "the whole layer calls nothing more, and computes beside nothing"
    for first, rows_moved, messages in ((0, 10.0 * 4, 1), (1, 20.0, 3)):  # home of the first, there of the last
        more = 7.0 + 0.5 * messages + rows_moved / 10
        base, made = one.chunk(first, first + 1), costly.chunk(first, first + 1)
        assert (made.there, made.back) == (base.there, base.back)
        assert made.compute == pytest.approx([seconds + more for seconds in base.compute])
    middle, plain = ByTokens(dear, 3).chunk(1, 2), ByTokens(free, 3).chunk(1, 2)
    more = 9.0 + 0.5 * 4 + 10.0 / 10 + 0.5 + 40.0 / 10
    assert middle.compute == pytest.approx([seconds + more for seconds in plain.compute]), "both ways, and counts"
    cut = schedule(dear, "experts", (1, 1))
    assert cut_seconds(dear, cut) == pytest.approx(2 * 7.0 + (0.5 + 4.0) + (1.5 + 2.0) + 3.0)
    assert cut_seconds(dear, uncut(dear)) == cut_seconds(free, schedule(free, "experts", (1, 1))) == 0.0
    assert cut.seconds == makespan(cut.chunks) + 3.0
    assert uncut(dear) == uncut(free)


def test_what_sends_takes_no_more_of_the_experts_than_the_time_for_which_it_travels() -> None:
    rows = [[4.0, 6.0, 1.0, 2.0], [10.0, 20.0, 3.0, 5.0]]
    free = Layer(rows, (2, 2), LINE, Link(0.25, 2.0), 1.0, 4.0, there_messages=3)
    plain = ByExperts(free)
    greedy = ByExperts(replace(free, burden=Link(50.0, 0.01)))
    # Home of the first travels 0.25 + 10 * 4 / 2, there of the last 3 * 0.25 + 20 / 2.
    for first, travels in ((0, 20.25), (1, 10.75)):
        base, made = plain.chunk(first, first + 1), greedy.chunk(first, first + 1)
        assert made.compute == pytest.approx([seconds + travels for seconds in base.compute])
    assert burden_seconds(None, free.links, 8.0) == 0.0
    assert burden_seconds(Link(0.125, 4.0), free.links, 8.0, 2) == 2 * 0.125 + 2.0, "what is less stays"
    assert burden_seconds(Link(9.0, 4.0), free.links, 8.0, 0) == 0.0, "nothing was sent"


def test_the_first_experts_wait_until_all_rows_were_told_to_leave() -> None:
    rows = [[4.0, 6.0, 1.0, 2.0], [10.0, 20.0, 3.0, 5.0]]
    plain = Layer(rows, (2, 2), LINE, Link(0.25, 2.0), 1.0, 4.0, chunk_s={"experts": 7.0, "tokens": 9.0})
    early = replace(plain, front_s={"experts": 2.0, "tokens": 4.0})
    before, after = (schedule(layer, "experts", (1, 1)).chunks for layer in (plain, early))
    # Rows of the first are there after 0.5 + 5, counted and told to leave twice after 0.25 + 2 * 2.
    assert [c.compute[0] - e.compute[0] for c, e in zip(before, after, strict=True)] == pytest.approx([2.0, 2.0])
    before, after = (schedule(layer, "tokens", (1, 1)).chunks for layer in (plain, early))
    late = 0.25 + 2 * 4.0 - (0.5 + 15.0 / 2)
    assert [c.compute[0] - e.compute[0] for c, e in zip(before, after, strict=True)] == pytest.approx([4.0 - late, 4.0])
    own = schedule(early, "experts", (1, 1), own_first=True).chunks
    keep = LINE.seconds([4.0, 6.0])
    assert own[0].compute[0] == pytest.approx(keep + 5.0 + 2 * 2.0), "own rows are there, but others leave first"
    assert uncut(early) == uncut(plain)


def test_of_schedules_as_good_as_the_best_the_simplest_is_taken() -> None:
    layer = random_layer(1)
    one, two, three = (
        replace(schedule(layer, "experts", (1,) * n), seconds=s) for n, s in ((1, 103), (2, 100.9), (3, 100))
    )
    assert simplest([one, two, three]) is two
    assert simplest([one, replace(two, seconds=101.1), three]) is three
    assert simplest([replace(one, seconds=101.0), two, three]).seconds == 101.0, "the whole layer first of all"
    sooner = replace(two, seconds=100.5)
    assert simplest([two, three, sooner]) is sooner


def test_more_chunks_are_named_where_they_end_sooner() -> None:
    cut = ByExperts(random_layer(2), 6)
    found = better_sizes(cut, most=4)
    ends = [makespan(cut.chunks(sizes)) for sizes in found]
    assert found[0] == (6,) and ends == sorted(ends, reverse=True) and len(set(ends)) == len(ends)
    assert [len(sizes) for sizes in found] == sorted({len(sizes) for sizes in found})
    for sizes, end in zip(found, ends, strict=True):
        assert end == pytest.approx(min(makespan(cut.chunks(s)) for s in every_way(6, len(sizes))))


def test_own_rows_are_a_chunk_too_and_the_others_travel_beside_them() -> None:
    free = random_layer(3)
    dear = replace(free, chunk_s={"experts": 7.0}, burden=Link(0.5, 10.0))
    (own, rest), (plain, others) = own_rows(dear), own_rows(free)
    assert own.compute == pytest.approx([seconds + 7.0 for seconds in plain.compute])
    made, base = ByExperts(rest).chunk(0, 6), ByExperts(others).chunk(0, 6)
    sent = (base.there - free.links.seconds(0.0, free.there_messages)) * free.links.bytes_per_s
    more = 7.0 + 0.5 * free.there_messages + sent / 10
    assert made.compute == pytest.approx([seconds + more for seconds in base.compute])


def test_chunks_that_cost_more_than_they_hide_are_not_made() -> None:
    for seed in range(4):
        layer = random_layer(seed)
        found = [
            auto(replace(layer, chunk_s={"experts": s, "tokens": s}, burden=Link(s, 100.0 / (s + 1e-9))))
            for s in (0.0, 1.0, 10.0, 1000.0)
        ]
        assert found[0].seconds <= found[1].seconds <= found[2].seconds <= uncut(layer).seconds
        assert found[0].cut and len(found[0].chunks) >= len(found[2].chunks)
        assert not found[3].cut and found[3].seconds == uncut(layer).seconds


def test_uneven_experts_are_dealt_out_evenly() -> None:
    assert expert_ranges((5, 4, 0), 2) == [(0, 0, 0), (2, 2, 0), (5, 4, 0)]


def test_rows_must_fit_the_experts() -> None:
    with pytest.raises(ValueError, match="4 experts from 2 ranks"):
        Layer([[1.0, 2.0]], (2, 2), LINE, Link(0, 1), 1, 1)


def test_own_rows_and_the_others_are_all() -> None:
    layer = random_layer(3)
    own, rest = own_rows(layer)
    assert own.back == 0.0
    assert own.there == layer.links.seconds(0.0), "counts are told before anything runs"
    assert all(rest.rows[r][r * 6 + e] == 0.0 for r in range(len(rest.rows)) for e in range(6))
    moved = ByTokens(layer, 1).chunk(0, 1).there - layer.links.seconds(0.0)
    assert ByTokens(rest, 1).chunk(0, 1).there == pytest.approx(moved), "own rows never travelled"


def balanced(alpha: float, rate: float, curve: LayerCurve = LINE) -> Layer:
    return Layer([[10.0] * 4] * 2, (2, 2), curve, Link(alpha, rate), 1.0, 1.0, count_messages=0)


def test_the_rules_of_others_by_hand() -> None:
    layer = balanced(0.5, 20.0)  # 20 rows travel in 0.5 + 1; experts take 1 + 4
    assert uncut(layer).seconds == pytest.approx(1.5 + 5.0 + 1.5)
    assert two(layer).seconds == pytest.approx(1.0 + 2 * 3.0 + 1.0)
    assert [len(s.chunks) for s in (uncut(layer), two(layer))] == [1, 2]
    by_degree = {d: schedule(layer, "tokens", (1,) * d).seconds for d in (1, 2, 4, 8)}
    assert tutel(layer).seconds == min(by_degree.values())
    # FSMoE: experts bind with d = 1 (2·1.5 + 5) and 2 (2·1 + 6 = 8); links from 4 on (6·0.75 < 8, 14·0.625 < 12).
    fitted = {1: 8.0, 2: 8.0, 4: 2 * 0.75 + 8.0, 8: 2 * 0.625 + 12.0}
    assert len(fsmoe(layer).chunks) == min(fitted, key=lambda d: (fitted[d], d))


def test_latency_that_costs_more_than_it_hides_leaves_a_layer_whole() -> None:
    layer = balanced(50.0, 1e9)
    chosen = auto(layer, ("experts", "tokens"))
    assert not chosen.cut and chosen.seconds == uncut(layer).seconds
    assert two(layer).seconds > chosen.seconds, "who does not ask pays for it"


@pytest.mark.parametrize("part", [0.5, 0.99, 1.01, 2.0])
def test_what_gains_less_than_predictions_are_worth_is_not_cut(part: float) -> None:
    layer = balanced(0.01, 10.0)
    whole, best = uncut(layer).seconds, auto(layer, ("experts",))
    cost = whole - best.seconds - part * MARGIN * best.seconds  # putting together again takes all of the gain but this
    found = auto(replace(layer, joining={"experts": cost}), ("experts",))
    gain = whole / (best.seconds + cost) - 1
    assert found.cut == (gain > MARGIN)
    assert (gain > MARGIN) == (part > 1.01), "the parts lie on both sides"


def test_only_what_is_allowed_is_used() -> None:
    layer = balanced(0.01, 10.0)
    assert auto(layer, ("experts",)).along == "experts"
    assert not auto(layer, ("experts",)).own_first
    one = Layer([[100.0, 100.0]] * 2, (1, 1), LINE, Link(0.01, 10.0), 1.0, 1.0)
    assert not auto(one, ("experts",)).cut, "one expert a rank is one piece"
    assert auto(one, ("experts", "tokens")).along == "tokens"
    assert auto(one, ("experts", "own")).own_first


@pytest.mark.parametrize("policy", ["none", "two", "tutel", "fsmoe"])
def test_no_rule_does_better_than_the_model(policy: str) -> None:
    for seed in range(6):
        layer = random_layer(seed, own=3, dear=seed % 2 == 0)
        assert auto(layer).seconds <= choose(policy, layer, ()).seconds * (1 + MARGIN)
