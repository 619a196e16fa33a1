"""Layers in chunks on ranks that are threads: the bits of the whole layer, the same bytes, an order that holds."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.backends.reference import run_graph
from moec.backends.reference.world import LocalWorld, run_world
from moec.ir.beside import EXPERTS, beside_experts
from moec.ir.core import Graph, Op
from moec.ir.parser import parse_graph
from moec.ir.types import TensorType, dtype
from moec.ir.verifier import verify
from moec.passes.overlap.by_experts import cut_by_experts
from moec.passes.overlap.by_tokens import cut_by_tokens
from moec.passes.overlap.chunks import Chunks, Whole
from moec.passes.overlap.cuts import Sets, expert_ranges
from moec.passes.overlap.order import in_turn, is_start, needs, on_demand, reorder
from tests.parallel.layers import HISTOGRAMS, Layer
from tests.parallel.test_forms import REORDERED, backward, close, forward, graphs

WHOLE = "expert-parallel"
NARROW = "expert-parallel,quantize-dispatch"
FORMS = {
    "flat": "expert-parallel",
    "gather": "expert-parallel{form=gather}",
    "hierarchical": "expert-parallel{form=hierarchical,nodes=<nodes>,rank=<rank>}",
    "sums": "expert-parallel-sums",
}


def experts_of(layer: Layer, pipeline: str, direction: int, rank: int = 0) -> int:
    """How many times a rank runs experts."""
    region = graphs(layer, pipeline)[rank].ops[0].regions[direction]
    return sum(op.name in EXPERTS for op in region.ops)


@pytest.mark.parametrize("histogram", HISTOGRAMS)
@pytest.mark.parametrize("before", [WHOLE, NARROW])
def test_chunks_of_experts_have_the_bits_of_the_whole(before: str, histogram: str) -> None:
    layer = Layer(experts=11, top_k=3)
    tokens = layer.tokens(histogram)
    grads = layer.gradients(tokens)
    want, want_worlds = forward(layer, before, tokens)
    want_grads = backward(layer, before, tokens, grads)
    for chunks in (2, 3):
        after = f"{before},overlap{{chunks={chunks}}}"
        assert experts_of(layer, after, 0) == experts_of(layer, after, 1) == chunks
        got, worlds = forward(layer, after, tokens)
        assert torch.equal(got, want)
        assert [w.sent for w in worlds] == [w.sent for w in want_worlds], "no byte more travels"
        for g, w in zip(backward(layer, after, tokens, grads), want_grads, strict=True):
            assert torch.equal(g, w)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("histogram", HISTOGRAMS)
def test_chunks_of_tokens_give_what_the_whole_gives(form: str, histogram: str) -> None:
    layer = Layer(nodes=2)
    tokens = layer.tokens(histogram)
    after = f"{FORMS[form]},overlap{{chunks=3,along=tokens}}"
    assert experts_of(layer, after, 0) == 3
    close(forward(layer, after, tokens)[0], forward(layer, FORMS[form], tokens)[0], REORDERED)


def run_cut(layer: Layer, edges: list[tuple[int, ...]], place: int, inputs: list[list[Tensor]]) -> list[list[Tensor]]:
    regions = []
    for graph in graphs(layer, WHOLE):
        region = cut_by_experts(graph.ops[0].regions[place], Chunks(layer.sizes, edges))
        reorder(region)
        verify(region)
        regions.append(region)
    outs, _ = run_world(layer.ranks, layer.groups, lambda r: run_graph(regions[r], inputs[r]))
    return outs


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(HISTOGRAMS), st.integers(2, 4), st.integers(1, 9))
def test_any_edges_have_the_bits_of_the_whole(seed: int, histogram: str, ranks: int, experts: int) -> None:
    rng = random.Random(seed)
    layer = Layer(ranks, experts, min(2, experts), hidden=4, inner=4)
    chunks = rng.randint(1, 5)
    inner = [sorted(rng.randint(0, s) for _ in range(chunks - 1)) for s in sorted(set(layer.sizes))]
    by_size = dict(zip(sorted(set(layer.sizes)), inner, strict=True))  # equal ranks are cut alike
    columns = [(0, *by_size[s], s) for s in layer.sizes]
    edges = list(zip(*columns, strict=True))
    tokens, weights = layer.tokens(histogram, seed), layer.weights(seed)
    inputs = [[*tokens[r], *layer.share(r, weights)] for r in range(ranks)]
    regions = [graph.ops[0].regions for graph in graphs(layer, WHOLE)]
    want, _ = run_world(ranks, layer.groups, lambda r: run_graph(regions[r][0], inputs[r]))
    for got, w in zip(run_cut(layer, edges, 0, inputs), want, strict=True):
        assert torch.equal(got[0], w[0])
    grads = layer.gradients(tokens, seed)
    inputs = [[grads[r], *inputs[r]] for r in range(ranks)]
    want, _ = run_world(ranks, layer.groups, lambda r: run_graph(regions[r][1], inputs[r]))
    for got, w in zip(run_cut(layer, edges, 1, inputs), want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, w, strict=True))


def any_sets(rng: random.Random, sizes: tuple[int, ...]) -> Sets:
    """Every expert of every rank in some chunk."""
    chunks = rng.randint(1, 5)
    at = [[rng.randrange(chunks) for _ in range(size)] for size in sizes]
    return tuple(tuple(tuple(e for e, c in enumerate(own) if c == chunk) for own in at) for chunk in range(chunks))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9))
def test_every_expert_is_in_one_chunk_and_has_one_place(seed: int) -> None:
    rng = random.Random(seed)
    sizes = tuple(rng.randint(0, 6) for _ in range(rng.randint(1, 4)))
    sets, rank = any_sets(rng, sizes), rng.randrange(len(sizes))
    for own_first in (False, True):
        plan = Chunks.of(sizes, sets, rank, own_first)
        assert sorted(plan.order()) == list(range(sum(sizes)))
        assert sum(plan.parts()) == sum(sizes) and len(plan.parts()) == plan.count * len(sizes)
        held = [plan.held(r, plan.at(c + own_first, r)) for c in range(len(sets)) for r in range(len(sizes))]
        assert held == [experts for chunk in sets for experts in chunk], "whatever order of its own a chunk has"


def test_an_order_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="every one of them once"):
        Chunks.of((2, 2), (((0,), (0, 1)), ((0,), ())), 0)
    with pytest.raises(ValueError, match="one rank's"):
        Chunks.of((2, 2), (((1,), (0, 1)), ((0,), ())), -1)
    region = graphs(Layer(ranks=2, experts=3), WHOLE)[1].ops[0].regions[0]
    with pytest.raises(Whole, match="rank 0 holds 2 experts, the program is for 1"):
        cut_by_experts(region, Chunks.of((2, 1), (((1,), (0,)), ((0,), ())), 0))


def run_sets(
    layer: Layer, before: str, sets: Sets, place: int, inputs: list[list[Tensor]], own_first: bool = False
) -> tuple[list[list[Tensor]], list[LocalWorld]]:
    """Every rank's results of one direction in chunks of any experts."""
    regions = []
    for rank, graph in enumerate(graphs(layer, before)):
        region = cut_by_experts(graph.ops[0].regions[place], Chunks.of(layer.sizes, sets, rank, own_first))
        reorder(region)
        verify(region)
        again = parse_graph(str(region))
        verify(again)
        assert str(again) == str(region)
        regions.append(again)
    return run_world(layer.ranks, layer.groups, lambda r: run_graph(regions[r], inputs[r]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(HISTOGRAMS), st.integers(2, 4), st.integers(1, 9))
def test_any_experts_in_any_chunk_have_the_bits_of_the_whole(
    seed: int, histogram: str, ranks: int, experts: int
) -> None:
    layer = Layer(ranks, experts, min(2, experts), hidden=4, inner=4)
    sets, weights = any_sets(random.Random(seed), layer.sizes), layer.weights(seed)
    tokens = layer.tokens(histogram, seed)
    inputs = [[*tokens[r], *layer.share(r, weights)] for r in range(ranks)]
    for place, grads in enumerate((None, layer.gradients(tokens, seed))):
        given_ = inputs if grads is None else [[grads[r], *inputs[r]] for r in range(ranks)]
        regions = [graph.ops[0].regions[place] for graph in graphs(layer, WHOLE)]
        want, sent = run_world(ranks, layer.groups, lambda r: run_graph(regions[r], given_[r]))  # noqa: B023
        got, worlds = run_sets(layer, WHOLE, sets, place, given_)
        for mine, theirs in zip(got, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert [w.sent for w in worlds] == [w.sent for w in sent], "no byte more travels"


@pytest.mark.parametrize("histogram", HISTOGRAMS)
@pytest.mark.parametrize("before", [WHOLE, NARROW])
def test_rows_in_fewer_bits_and_own_rows_first_in_any_order(before: str, histogram: str) -> None:
    layer = Layer(experts=11, top_k=3)
    sets = any_sets(random.Random(5), layer.sizes)
    tokens, weights = layer.tokens(histogram), layer.weights()
    inputs = [[*tokens[r], *layer.share(r, weights)] for r in range(layer.ranks)]
    want, _ = forward(layer, before, tokens)
    outs, _ = run_sets(layer, before, sets, 0, inputs)
    assert torch.equal(torch.cat([out[0] for out in outs]), want)
    outs, worlds = run_sets(layer, before, sets, 0, inputs, own_first=True)
    close(torch.cat([out[0] for out in outs]), want, REORDERED)
    assert [w.sent for w in worlds] == [w.sent for w in forward(layer, before, tokens)[1]]


@pytest.mark.parametrize("histogram", HISTOGRAMS)
@pytest.mark.parametrize("before", [WHOLE, NARROW])
def test_own_rows_first_give_what_the_whole_gives(before: str, histogram: str) -> None:
    layer = Layer(experts=6, top_k=3)
    tokens, weights = layer.tokens(histogram), layer.weights()
    inputs = [[*tokens[r], *layer.share(r, weights)] for r in range(layer.ranks)]
    edges = expert_ranges(layer.sizes, 2)
    regions = []
    for rank, graph in enumerate(graphs(layer, before)):
        regions.append(cut_by_experts(graph.ops[0].regions[0], Chunks(layer.sizes, edges, rank)))
        reorder(regions[-1])
        verify(regions[-1])
        with pytest.raises(Whole, match="another order"):
            cut_by_experts(graph.ops[0].regions[1], Chunks(layer.sizes, edges, rank))
        assert sum(op.name in EXPERTS for op in regions[-1].ops) == 3
    outs, worlds = run_world(layer.ranks, layer.groups, lambda r: run_graph(regions[r], inputs[r]))
    want, want_worlds = forward(layer, before, tokens)
    close(torch.cat([out[0] for out in outs]), want, REORDERED)
    assert [w.sent for w in worlds] == [w.sent for w in want_worlds]
    order = [op.name for op in regions[0].ops if op.name in (*EXPERTS, "comm.wait")]
    assert order[:3] == ["comm.wait", "moe.experts", "comm.wait"], "own experts run before any row has come"


def test_unequal_shares_of_tokens() -> None:
    layer = Layer()
    tokens, weights = layer.tokens("spread"), layer.weights()
    inputs = [[*tokens[r], *layer.share(r, weights)] for r in range(layer.ranks)]
    regions = [cut_by_tokens(graph.ops[0].regions[0], (1, 5, 2)) for graph in graphs(layer, WHOLE)]
    for region in regions:
        reorder(region)
        verify(region)
    worlds: list[LocalWorld]
    outs, worlds = run_world(layer.ranks, layer.groups, lambda r: run_graph(regions[r], inputs[r]))
    close(torch.cat([out[0] for out in outs]), forward(layer, WHOLE, tokens)[0], REORDERED)
    assert worlds[0].sent["all_to_all", "ep"] > 0


def test_everything_is_on_its_way_before_the_first_experts_and_comes_home_behind_the_last() -> None:
    region = graphs(Layer(experts=12), "expert-parallel,overlap{chunks=3}")[0].ops[0].regions[0]
    kinds = [op.name for op in region.ops if is_start(op) or op.name in (*EXPERTS, "comm.wait")]
    start, wait, experts = "comm.all_to_all.start", "comm.wait", "moe.experts"
    assert kinds == [start, wait, *[start] * 3, *[wait, experts, start] * 3, *[wait] * 3]


def random_program(rng: random.Random) -> Graph:
    """Starts, waits, experts and other ops in any order that dataflow allows."""
    graph, t = Graph("any"), TensorType(dtype("f32"), ())
    values = [graph.add_arg(t, "x")]
    for _ in range(rng.randint(1, 25)):
        name = rng.choice(("comm.all_to_all.start", "comm.wait", "moe.experts", "torch.call"))
        operands = rng.choices(values, k=3 if name == "moe.experts" else rng.randint(1, 3))
        op = Op(name, operands, [t], attrs={"target": "aten.cat.default"}, groups=(len(operands),))
        graph.append(op)
        values.append(op.result)
    graph.append(Op("return", values[-3:], groups=(len(values[-3:]),)))
    return graph


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_no_order_of_asking_breaks_a_dependency(seed: int) -> None:
    rng = random.Random(seed)
    graph = random_program(rng)
    ops, before = list(graph.ops), needs(graph)
    asked = rng.sample(ops, len(ops))
    beside = {op: rng.randint(0, 3) for op in beside_experts(graph)}
    for order in (on_demand(asked), on_demand([*in_turn(graph, beside), graph.terminator])):
        place = {op: i for i, op in enumerate(order)}
        assert all(place[maker] < i for op, i in place.items() for maker in before[op])
        assert len(place) == len(order)
    assert set(on_demand(asked)) == set(ops)
    needed = before[graph.terminator]
    reorder(graph, beside)
    assert graph.ops[-1].name == "return" and needed <= set(graph.ops), "what the result needs stays"
