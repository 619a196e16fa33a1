"""Rows of a tier: expected tokens held to all draws, busiest ranks held to the formulas that runs are held to."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir.parallel_semantics import owners
from moec.parallel.formula import layer_bytes
from moec.passes.overlap.reach import busiest_rows, chances, expected_copies
from moec.simulate.planning import RoutedRows
from moec.simulate.routing import Routing

LIKE = 0.03
"""How far the expected tokens of a node may be from those of a skewed draw, which knows no odds of its own."""


@pytest.mark.parametrize(("experts", "nodes", "top_k"), [(8, 2, 2), (12, 3, 4), (6, 3, 1), (4, 2, 4), (256, 4, 8)])
def test_even_loads_are_a_draw_without_replacement(experts: int, nodes: int, top_k: int) -> None:
    each = experts // nodes
    want = 1 - math.comb(experts - each, top_k) / math.comb(experts, top_k)
    found = chances([3.0] * experts, range(0, experts + 1, each), top_k)
    assert found == pytest.approx([want] * nodes, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.05, 20.0), min_size=6, max_size=6))
def test_it_is_every_set_of_experts_by_its_odds(odds: list[float]) -> None:
    """The law itself by all sets; from how often each expert is in one, chances come out again."""
    sets = list(itertools.combinations(range(6), 2))
    weights = [odds[a] * odds[b] for a, b in sets]
    total = sum(weights)
    loads = [sum(w for w, s in zip(weights, sets, strict=True) if e in s) / total for e in range(6)]
    want = [sum(w for w, s in zip(weights, sets, strict=True) if set(s) & n) / total for n in ({0, 1}, {2, 3}, {4, 5})]
    for got, exact in zip(chances(loads, (0, 2, 4, 6), 2), want, strict=True):
        assert got == pytest.approx(exact, abs=1e-6)
    assert sum(chances(loads, (0, 6), 2)) == pytest.approx(1.0)


@pytest.mark.parametrize("skew", ["uniform", "zipf:0.8", "zipf:1.2"])
def test_expected_tokens_are_those_of_drawn_routing(skew: str) -> None:
    rows = RoutedRows(Routing.parse(skew), 4096, 8)
    sizes, nodes = (8,) * 8, 4
    table, real = rows.rows("", 8, 64), rows.reach("", sizes, nodes)
    assert table is not None and real is not None
    for mine, drawn in zip(expected_copies(table, sizes, nodes, 8), real, strict=True):
        assert mine == pytest.approx(drawn, rel=LIKE)
    assert rows.reach("", (1, 1), 2) is None, "fewer experts than choices"


def test_no_rows_reach_nothing_and_few_experts_are_reached_for_sure() -> None:
    assert expected_copies([[0.0] * 4] * 4, (1,) * 4, 2, 2) == [[0.0, 0.0]] * 4
    assert chances([5.0, 0.0, 0.0, 0.0], (0, 2, 4), 2) == [1.0, 0.0]


def test_an_expert_that_every_token_must_have_leaves_the_others_one_choice_less() -> None:
    assert chances([9.0, 1.0, 1.0, 0.0], (0, 1, 2, 4), 2) == pytest.approx([1.0, 0.5, 0.5])
    assert chances([9.0, 3.0, 2.0, 1.0], (0, 1, 3, 4), 2) == pytest.approx([1.0, 5 / 6, 1 / 6])
    assert chances([90.0, 80.0, 1.0, 1.0], (0, 1, 2, 3, 4), 3) == pytest.approx([1.0, 1.0, 0.5, 0.5])
    assert chances([90.0, 80.0, 1.0, 1.0], (0, 1, 2, 4), 2) == pytest.approx([1.0, 80 / 82, 2 / 82])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(4, 2), (6, 3), (6, 2)]), st.integers(1, 3))
def test_busiest_rows_are_those_of_the_formulas(seed: int, machine: tuple[int, int], top_k: int) -> None:
    ranks, nodes = machine
    gen = torch.Generator().manual_seed(seed)
    sizes = tuple(torch.randint(1, 4, (ranks,), generator=gen).tolist())
    experts, each = sum(sizes), ranks // nodes
    tokens = torch.randint(0, 9, (ranks,), generator=gen).tolist()
    ids = [torch.rand(t, experts, generator=gen).argsort(dim=1)[:, :top_k] for t in tokens]
    rows = [torch.bincount(i.flatten(), minlength=experts).double().tolist() for i in ids]
    on = [owners(i, sizes) // each for i in ids]
    copies = [[float((n == node).any(dim=1).sum()) for node in range(nodes)] for n in on]
    found = busiest_rows(rows, copies, sizes, nodes)
    there = layer_bytes(ids, sizes, 1000, "hierarchical", nodes=nodes, back=0)
    both = layer_bytes(ids, sizes, 1000, "hierarchical", nodes=nodes, back=1000)
    sent = [b[".node"] - 8 * (nodes - 1) for b in there]
    assert found.copies >= max(sent) / (1000 + 4 * top_k)
    assert found.slots >= max(b[".node"] - t[".node"] for b, t in zip(both, there, strict=True)) / 1000
    made = [(b[".local"] - t[".local"]) / 1000 for b, t in zip(both, there, strict=True)]
    counts = [8 * (sum(sizes[r // each * each :][:each]) - sizes[r]) for r in range(ranks)]
    spread = [(t[".local"] - c) / 1000 for t, c in zip(there, counts, strict=True)]
    assert found.inside == max((*made, *spread)), "what one rank spreads, another gets"
    node = [r // each for r in range(ranks)]
    gone = [sum(c for n, c in enumerate(mine) if n != node[r]) for r, mine in enumerate(copies)]
    came = [sum(copies[s][node[r]] for s in range(r % each, ranks, each) if node[s] != node[r]) for r in range(ranks)]
    assert found.copies == max((*gone, *came))
