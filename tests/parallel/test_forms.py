"""Every form on ranks that are threads: the bits of one process, exact gradients, and bytes by the formula."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.backends.reference import run_graph
from moec.backends.reference.world import LocalWorld, run_world
from moec.parallel.formula import layer_bytes
from tests.parallel.layers import HISTOGRAMS, Layer

EXACT = {
    "flat": "expert-parallel",
    "hierarchical": "expert-parallel{form=hierarchical,nodes=<nodes>,rank=<rank>}",
    "gather": "expert-parallel{form=gather}",
}
SUMS = {
    "gather": "expert-parallel-sums",
    "hierarchical": "expert-parallel-sums{form=hierarchical,nodes=<nodes>,rank=<rank>}",
}
REORDERED = 1e-5  # f32 sums in another order, relative to the largest element
NARROW = {"i8": 2e-2, "f8e4m3fn": 1e-1}  # of the largest element: rows in 8 bits, through two products


@functools.cache
def graphs(layer: Layer, pipeline: str) -> list:  # type: ignore[type-arg]
    return [layer.spread(rank, pipeline) for rank in range(layer.ranks)]


def forward(layer: Layer, pipeline: str, tokens: list[list[Tensor]]) -> tuple[Tensor, list[LocalWorld]]:
    made, weights = graphs(layer, pipeline), layer.weights()
    inputs = [[*tokens[r], *layer.share(r, weights)] for r in range(layer.ranks)]
    outs, worlds = run_world(layer.ranks, layer.groups, lambda r: run_graph(made[r], inputs[r])[0])
    return torch.cat(outs), worlds


def backward(layer: Layer, pipeline: str, tokens: list[list[Tensor]], grads: list[Tensor]) -> list[Tensor]:
    """Gradients by the programs that the pass wrote: x and weights of all ranks, up and down of all experts."""
    made, weights = graphs(layer, pipeline), layer.weights()
    inputs = [[grads[r], *tokens[r], *layer.share(r, weights)] for r in range(layer.ranks)]
    regions = [graph.ops[0].regions[1] for graph in made]
    outs, _ = run_world(layer.ranks, layer.groups, lambda r: run_graph(regions[r], inputs[r]))
    return [torch.cat([out[i] for out in outs]) for i in range(4)]


def alone(layer: Layer, tokens: list[list[Tensor]], grads: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """One process by definition, differentiated by torch."""
    inputs = [torch.cat([t[i] for t in tokens]) for i in range(3)] + list(layer.weights())
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    (out,) = run_graph(layer.alone(), leaves)
    if grads is None:
        return out.detach(), []
    wanted = [t for t in leaves if t.requires_grad]
    return out.detach(), list(
        torch.autograd.grad(out, wanted, torch.cat(grads), allow_unused=True, materialize_grads=True)
    )


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    if want.numel():
        error = (got.double() - want.double()).abs().max()
        assert error <= tolerance * want.double().abs().max().clamp_min(1e-6), f"off by {error}"


def check_gradients(layer: Layer, pipeline: str, tokens: list[list[Tensor]], tolerance: float = REORDERED) -> None:
    grads = layer.gradients(tokens)
    want = alone(layer, tokens, grads)[1]
    for got, expected in zip(backward(layer, pipeline, tokens, grads), want, strict=True):
        close(got, expected, tolerance)


@pytest.mark.parametrize("histogram", HISTOGRAMS)
@pytest.mark.parametrize("form", EXACT)
def test_a_layer_has_the_bits_of_one_process(form: str, histogram: str) -> None:
    layer = Layer(nodes=2)
    tokens = layer.tokens(histogram)
    got, _ = forward(layer, EXACT[form], tokens)
    assert torch.equal(got, alone(layer, tokens, None)[0])
    check_gradients(layer, EXACT[form], tokens)


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize(
    "layer", [Layer(2, 4), Layer(4, 3, 3, nodes=2), Layer(4, 8, 8, nodes=2), Layer(4, 8, dtype="bf16", nodes=2)]
)
def test_ranks_k_of_all_experts_and_bf16(form: str, layer: Layer) -> None:
    if form == "hierarchical" and layer.nodes == 1:
        pytest.skip("one node")
    tokens = layer.tokens("spread", seed=1)
    assert torch.equal(forward(layer, EXACT[form], tokens)[0], alone(layer, tokens, None)[0])


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("histogram", HISTOGRAMS)
def test_bytes_are_those_of_the_formula(form: str, histogram: str) -> None:
    layer = Layer(nodes=2)
    tokens = layer.tokens(histogram)
    check_bytes(layer, form, tokens)


def check_bytes(layer: Layer, form: str, tokens: list[list[Tensor]]) -> None:
    _, worlds = forward(layer, EXACT[form], tokens)
    row = layer.hidden * (2 if layer.dtype == "bf16" else 4)
    want = layer_bytes([t[1] for t in tokens], layer.sizes, row, form, nodes=layer.nodes)
    for rank, world in enumerate(worlds):
        sent: Counter[str] = Counter()
        for (_, group), count in world.sent.items():
            sent[group.removeprefix("ep")] += count
        assert +sent == +want[rank], f"rank {rank}"


def test_slots_of_no_expert_cost_nothing() -> None:
    """Half of the slots are sent nowhere: bytes of rows fall by exactly what those slots would have been."""
    layer = Layer(4, 8)
    tokens = layer.tokens("spread", seed=3)
    fewer = [[x, torch.where(torch.arange(layer.top_k) == 0, ids, -1), w] for x, ids, w in tokens]
    sent = [forward(layer, EXACT["flat"], t)[1] for t in (tokens, fewer)]
    total = [sum(w.sent["all_to_all", "ep"] for w in worlds) for worlds in sent]
    elsewhere = sum(int((t[1][:, 1] // 2 != rank).sum()) for rank, t in enumerate(tokens))
    assert total[0] - total[1] == 2 * elsewhere * layer.hidden * 4


def test_a_token_crosses_to_a_node_once() -> None:
    """All of a token's experts on the other node: k rows there in the flat form, one in the hierarchical."""
    layer = Layer(4, 8, 4, nodes=2)
    tokens = layer.tokens("one_token")
    for t in tokens[:2]:
        t[1] = torch.tensor([[4, 5, 6, 7]])
    for t in tokens[2:]:
        t[1] = torch.tensor([[0, 1, 2, 3]])
    _, worlds = forward(layer, EXACT["hierarchical"], tokens)
    row = layer.hidden * 4
    for world in worlds:
        assert world.sent["all_to_all", "ep.node"] == 8 + (row + 4 * 4) + 4 * row  # counts, one copy, four rows home


@pytest.mark.parametrize("form", SUMS)
@pytest.mark.parametrize("histogram", HISTOGRAMS)
def test_sums_on_the_way_are_the_same_up_to_rounding_and_send_less(form: str, histogram: str) -> None:
    layer = Layer(4, 8, 4, nodes=2)
    tokens = layer.tokens(histogram)
    got, fewer = forward(layer, SUMS[form], tokens)
    close(got, alone(layer, tokens, None)[0], REORDERED)
    check_gradients(layer, SUMS[form], tokens)
    if histogram == "spread" and form == "hierarchical":
        _, more = forward(layer, EXACT[form], tokens)
        assert sum(w.sent["all_to_all", "ep.node"] for w in fewer) < sum(w.sent["all_to_all", "ep.node"] for w in more)


@pytest.mark.parametrize("to", NARROW)
@pytest.mark.parametrize("form", EXACT)
def test_rows_in_eight_bits(form: str, to: str) -> None:
    layer = Layer(4, 8, nodes=2, hidden=64)
    tokens = layer.tokens("spread")
    pipeline = f"{EXACT[form]},quantize-dispatch{{to={to}}}"
    got, worlds = forward(layer, pipeline, tokens)
    want, _ = alone(layer, tokens, None)
    close(got, want, NARROW[to])
    assert not torch.equal(got, want)
    _, whole = forward(layer, EXACT[form], tokens)
    saved = sum(sum(a.sent.values()) - sum(b.sent.values()) for a, b in zip(whole, worlds, strict=True))
    assert saved > 0
    grads = layer.gradients(tokens)
    for g, w in zip(backward(layer, pipeline, tokens, grads), alone(layer, tokens, grads)[1], strict=True):
        close(g, w, 2 * NARROW[to])


def test_a_group_of_equal_loads_exchanges_no_counts() -> None:
    """A router that takes one expert of each of four groups: rows for every rank are known when compiling."""
    text = ROUTED.replace("<equal>", "")
    from moec.ir.parser import parse_graph
    from tests.parallel.layers import run

    graph = run("expert-parallel{equal_tokens=true}", parse_graph(text))
    spread = next(op for op in graph.ops if op.name == "moe.parallel_experts")
    starts = [op for op in spread.regions[0].ops if op.name.endswith(".start")]
    assert spread.attrs["form"] == "fixed"
    assert len(starts) == 3  # rows, ids, rows back
    assert not any(op.group("send") or op.attrs.get("send_sizes") for op in starts)
    plain = parse_graph(text)
    gen = torch.Generator().manual_seed(0)
    inputs = [[torch.randn(5, 8, generator=gen), torch.randn(5, 8, generator=gen)] for _ in range(4)]
    up, down = torch.randn(8, 6, 8, generator=gen), torch.randn(8, 8, 6, generator=gen)
    for rank, each in enumerate(inputs):
        each += [up[2 * rank : 2 * rank + 2], down[2 * rank : 2 * rank + 2]]
    groups = {"ep": [[0, 1, 2, 3]]}
    got, worlds = run_world(4, groups, lambda r: run_graph(graph, inputs[r])[0])
    want, _ = run_world(4, groups, lambda r: run_graph(plain, inputs[r])[0])
    for g, w in zip(got, want, strict=True):
        close(g, w, REORDERED)
    for world in worlds:  # 5 tokens, 3 slots elsewhere of each: rows there with their ids, rows back
        assert world.sent["all_to_all", "ep"] == 15 * (8 * 4 + 4) + 15 * 8 * 4
    without = run("expert-parallel", parse_graph(text))
    assert next(op for op in without.ops if op.name == "moe.parallel_experts").attrs["form"] == "flat"


ROUTED = """
graph @moge(%x: f32[T, 8], %l: f32[T, 8], %up: f32[2, 6, 8], %down: f32[2, 8, 6]) -> f32[T, 8] {
  %w, %ids = moe.route %l {k = 4, groups = 4, per_group = 1, by_group = true} : f32[T, 4], i64[T, 4]
  %a = comm.all_gather.start %up {group = "ep", ranks = 4, sizes = (2, 2, 2, 2)} : !comm.token
  %ups = comm.wait %a : f32[8, 6, 8]
  %b = comm.all_gather.start %down {group = "ep", ranks = 4, sizes = (2, 2, 2, 2)} : !comm.token
  %downs = comm.wait %b : f32[8, 8, 6]
  %y = moe.experts %x, %ids, %w, [%ups], [%downs] {experts = 8, layout = "single"} {
    @activation(%h: f32[R, 6]) -> f32[R, 6] {
      %s = torch.call @aten.silu.default(%h) : f32[R, 6]
      return %s
    }
  } : f32[T, 8]
  return %y
}
"""


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Layer, str, list[list[Tensor]]]:
    ranks, nodes = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (4, 2)]))
    experts = draw(st.integers(1, 9))
    layer = Layer(ranks, experts, draw(st.integers(1, experts)), nodes=nodes)
    forms = ["flat", "gather"] + (["hierarchical"] if nodes > 1 else [])
    form = draw(st.sampled_from(forms))
    tokens = []
    for rank in range(ranks):
        count = draw(st.integers(0, 6))
        rows = st.lists(st.integers(-1, experts), min_size=layer.top_k, max_size=layer.top_k)
        ids = torch.tensor(draw(st.lists(rows, min_size=count, max_size=count)), dtype=torch.int64)
        gen = torch.Generator().manual_seed(rank)
        x, w = torch.randn(count, layer.hidden, generator=gen), torch.randn(count, layer.top_k, generator=gen)
        tokens.append([x, ids.view(count, layer.top_k), w])
    return layer, form, tokens


@settings(max_examples=40, deadline=None)
@given(worlds())
def test_any_histogram_on_any_mesh(case: tuple[Layer, str, list[list[Tensor]]]) -> None:
    layer, form, tokens = case
    got, _ = forward(layer, EXACT[form], tokens)
    assert torch.equal(got, alone(layer, tokens, None)[0])
    if layer.ranks > 1:
        check_gradients(layer, EXACT[form], tokens)
        check_bytes(layer, form, tokens)
