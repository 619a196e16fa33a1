"""Programs of real layers: bytes by the formula in every form, what runs depends on the routing, errors are told."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir.comm_semantics import CommError
from moec.ir.core import Graph
from moec.ir.parser import parse_graph
from moec.parallel.formula import layer_bytes
from moec.simulate.errors import SimulationError
from moec.simulate.events import simulate
from moec.simulate.report import make_report
from moec.simulate.routing import Routing
from moec.simulate.steps import Compute, Start, Wait
from moec.simulate.trace import Trace, trace
from tests.parallel.layers import HISTOGRAMS, Layer
from tests.simulate.machines import ALPHA, BANDWIDTH, machine

FORMS = {
    "flat": "expert-parallel",
    "hierarchical": "expert-parallel{form=hierarchical,nodes=<nodes>,rank=<rank>}",
    "gather": "expert-parallel{form=gather}",
}
SUMS_OF_NODES = "expert-parallel-sums{form=hierarchical,nodes=<nodes>,rank=<rank>}"


@functools.cache
def graphs(layer: Layer, pipeline: str) -> list[Graph]:
    return [layer.spread(rank, pipeline) for rank in range(layer.ranks)]


def traced(layer: Layer, pipeline: str, ids: list[torch.Tensor], training: bool = False) -> Trace:
    return trace(
        graphs(layer, pipeline), layer.groups, machine(layer.ranks // layer.nodes, layer.nodes), Routing(),
        sizes=[{"T": len(i)} for i in ids], ids=[{1: i} for i in ids], training=training,
    )  # fmt: skip


def by_group(sent: dict[tuple[str, str], int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for (_, group), count in sent.items():
        found[group.removeprefix("ep")] += count
    return +found


def check(layer: Layer, form: str, ids: list[torch.Tensor]) -> Trace:
    found = traced(layer, FORMS[form], ids)
    want = layer_bytes(ids, layer.sizes, layer.hidden * 4, form, nodes=layer.nodes)
    assert [by_group(s) for s in found.sent] == [+w for w in want]
    for c in found.collectives:
        assert sum(f.bytes for f in c.flows) == pytest.approx(sum(c.sent.values()))
        if c.label.startswith("all_to_all"):  # and from the right ranks
            assert {r: sum(f.bytes for f in c.flows if f.source == r) for r in c.ranks} == c.sent
    return found


@pytest.mark.parametrize("histogram", HISTOGRAMS)
@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_those_of_the_formula(form: str, histogram: str) -> None:
    layer = Layer(nodes=2)
    ids = [t[1] for t in layer.tokens(histogram)]
    found = check(layer, form, ids)
    live = sum(int(((i >= 0) & (i < layer.experts)).sum()) for i in ids)
    assert sum(found.rows) == live
    assert simulate(found.programs, found.collectives, machine(2, 2)).seconds > 0


LAYERS = (Layer(4, 6, 2, nodes=2), Layer(4, 4, 1, nodes=2), Layer(3, 5, 2), Layer(3, 3, 3), Layer(2, 7, 2))


@given(st.sampled_from(LAYERS), st.sampled_from(sorted(FORMS)), st.data())
@settings(max_examples=40, deadline=None)
def test_bytes_of_any_routing(layer: Layer, form: str, data: st.DataObject) -> None:
    """Ranks without tokens, experts without rows, ids of nobody, one expert for all; one tier and two, three ranks."""
    if form == "hierarchical" and layer.nodes == 1:
        form = "flat"
    expert = st.one_of(st.integers(-1, layer.experts), st.just(0))
    rows = st.lists(st.lists(expert, min_size=layer.top_k, max_size=layer.top_k), max_size=5)
    ids = [torch.tensor(data.draw(rows), dtype=torch.int64).view(-1, layer.top_k) for _ in range(layer.ranks)]
    found = check(layer, form, ids)
    made = machine(layer.ranks // layer.nodes, layer.nodes)
    assert simulate(found.programs, found.collectives, made).seconds >= 0


def test_no_tokens_at_all() -> None:
    """Counts are still exchanged; no row travels, and no expert runs."""
    layer = Layer(3, 5, 2)
    found = check(layer, "flat", [torch.zeros(0, 2, dtype=torch.int64)] * 3)
    assert found.rows == [0, 0, 0]
    assert [sum(f.bytes for f in c.flows) for c in found.collectives] == [pytest.approx(2 * 5 * 8), 0, 0]


def test_a_skewed_layer_takes_what_its_fullest_rank_receives() -> None:
    """All tokens of three ranks choose the first rank's experts: two ranks' rows come in through its one link."""
    layer = Layer(3, 3, 1, hidden=64)
    tokens, row = 500, 64 * 4
    found = traced(layer, FORMS["flat"], [torch.zeros(tokens, 1, dtype=torch.int64)] * 3)
    timeline = simulate(found.programs, found.collectives, machine(3))
    there, back = [[s for s in timeline.spans if s.rank == 0 and s.kind == "comm"][i] for i in (1, 2)]
    wanted = ALPHA + 2 * tokens * row / BANDWIDTH
    assert there.end - there.begin == pytest.approx(wanted, rel=1e-2)  # others begin a little later
    assert back.end - back.begin == pytest.approx(wanted)
    report = make_report(found, timeline)
    assert report.imbalance == 3.0
    assert [r.rows for r in report.ranks] == [3 * tokens, 0, 0]


def total(found: Trace) -> int:
    return sum(sum(s.values()) for s in found.sent)


def test_other_passes_run_too() -> None:
    layer = Layer(4, 8, nodes=2, hidden=64)
    ids = [t[1] for t in layer.tokens("spread")]
    tokens, row, ids_and_weights = sum(map(len, ids)), 64 * 4, 4 * 2 + 4 * 2
    gathered = 4 * 3 * 8 + 3 * tokens * (row + ids_and_weights)
    assert total(traced(layer, "expert-parallel-sums", ids)) == gathered + 3 * tokens * row  # and a reduce-scatter
    assert total(traced(layer, SUMS_OF_NODES, ids)) < total(traced(layer, FORMS["hierarchical"], ids))
    assert total(traced(layer, "expert-parallel,quantize-dispatch", ids)) < total(traced(layer, FORMS["flat"], ids))


@pytest.mark.parametrize("chunks", [2, 3])
def test_a_skewed_layer_in_chunks_of_experts(chunks: int) -> None:
    """Experts are numbered anew by chunk, and counts told by their own numbers; the bytes are the whole layer's."""
    layer = Layer(2, 7, 2)
    gen = torch.Generator().manual_seed(0)
    odds = torch.tensor([9.0, 1, 4, 0.1, 7, 2, 1])
    ids = [torch.multinomial(odds.expand(40, -1), 2, generator=gen) for _ in range(2)]
    whole, cut = (
        traced(layer, f"expert-parallel{more}", ids, training=True) for more in ("", f",overlap{{chunks={chunks}}}")
    )
    assert cut.sent == whole.sent
    assert cut.rows == whole.rows
    assert len(cut.collectives) > len(whole.collectives)


def test_weights_that_are_gathered() -> None:
    """The graph before the pass moves weights instead of tokens."""
    layer = Layer(4, 8)
    made = [layer.gathered(r) for r in range(4)]
    found = trace(made, layer.groups, machine(4), Routing(), sizes=[{"T": 3}] * 4)
    share = (2 * layer.inner * layer.hidden + layer.hidden * layer.inner) * 2 * 4
    assert [sum(s.values()) for s in found.sent] == [3 * share] * 4
    assert found.rows == [6] * 4


@pytest.mark.parametrize("form", FORMS)
def test_training_sends_rows_again(form: str) -> None:
    layer = Layer(4, 8, nodes=2)
    ids = [t[1] for t in layer.tokens("spread")]
    once, both = (traced(layer, FORMS[form], ids, training) for training in (False, True))
    assert sum(both.rows) == 2 * sum(once.rows)
    assert total(both) > 2 * total(once)
    for short, long in zip(once.programs, both.programs, strict=True):
        assert list(map(type, long[: len(short)])) == list(map(type, short))
    names = [s.label for s in both.programs[0] if isinstance(s, Compute)]
    assert names.index("moe.experts") < names.index("moe.experts_backward")


def test_steps_are_in_the_graphs_order() -> None:
    layer = Layer(4, 8)
    found = traced(layer, FORMS["flat"], [t[1] for t in layer.tokens("spread")])
    for steps in found.programs:
        kinds = [s.label if isinstance(s, Compute) else type(s).__name__ for s in steps]
        starts = [s.collective for s in steps if isinstance(s, Start)]
        assert starts == [s.collective for s in steps if isinstance(s, Wait)] == [0, 1, 2]
        assert kinds.index("moe.experts") > kinds.index("moe.arrivals") > kinds.index("Wait")
        assert kinds[-1] == "moe.combine"


def test_a_hot_expert_makes_its_rank_the_slowest() -> None:
    layer = Layer(4, 8, 1, hidden=64, inner=256)
    hot = [torch.zeros(4096, 1, dtype=torch.int64)] * 4
    even = [torch.arange(4096)[:, None] % 8] * 4
    reports = []
    for ids in (hot, even):
        found = traced(layer, FORMS["flat"], ids)
        reports.append(make_report(found, simulate(found.programs, found.collectives, machine(4))))
    assert reports[0].imbalance == 4.0
    assert reports[1].imbalance == 1.0
    assert reports[0].seconds > 2 * reports[1].seconds
    assert max(reports[0].ranks, key=lambda r: r.compute_s) is reports[0].ranks[0]
    for report in reports:
        for rank in report.ranks:
            assert rank.compute_s + rank.exposed_s <= report.seconds * (1 + 1e-9)
            assert 0 <= rank.hidden <= 1


def test_ids_come_from_the_routing_where_nobody_gives_them() -> None:
    layer = Layer(4, 8)
    made = graphs(layer, FORMS["flat"])
    for text in ("balanced", "zipf:2"):
        routing = Routing.parse(text)
        found = trace(made, layer.groups, machine(4), routing, sizes=[{"T": 64}] * 4)
        ids = [routing.ids(r, 64, 2, 8) for r in range(4)]
        want = layer_bytes(ids, layer.sizes, layer.hidden * 4)
        assert [by_group(s) for s in found.sent] == [+w for w in want]


SWAP = """
graph @swap(%x: f32[T, 3]) -> f32[T, 3] {
  %t = comm.all_to_all.start %x {group = "ep", ranks = 2, send_sizes = (1, 1), recv_sizes = (1, <n>)} : !comm.token
  %y = comm.wait %t : f32[T, 3]
  return %y
}
"""


def swap(first: str, second: str, **options: Any) -> Trace:
    made = [parse_graph(SWAP.replace("<n>", n)) for n in (first, second)]
    return trace(made, {"ep": [[0, 1]]}, machine(2), Routing(), sizes=[{"T": 2}] * 2, **options)


def test_ranks_that_do_not_agree() -> None:
    assert swap("1", "1").sent[0] == {("all_to_all", "ep"): 12}
    with pytest.raises(CommError, match="rank 0 of it expects 2 rows from rank 1, 1 came"):
        swap("2", "1")


def test_a_size_that_nobody_gives() -> None:
    made = [parse_graph(SWAP.replace("<n>", "1"))] * 2
    with pytest.raises(SimulationError, match="has the size T, and T is not given"):
        trace(made, {"ep": [[0, 1]]}, machine(2), Routing(), sizes=[{}] * 2)


def test_a_rank_that_never_comes() -> None:
    idle = parse_graph("graph @idle(%x: f32[T, 3]) -> f32[T, 3] { return %x }")
    made = [parse_graph(SWAP.replace("<n>", "1")), idle]
    with pytest.raises(SimulationError, match="ranks 0 wait for collectives that others never start"):
        trace(made, {"ep": [[0, 1]]}, machine(2), Routing(), sizes=[{"T": 2}] * 2)


def test_an_op_that_needs_numbers() -> None:
    text = """
graph @nonzero(%x: f32[T, 3]) -> i64[R, 2] {
  %y = torch.call @aten.nonzero.default(%x) : i64[R, 2]
  return %y
}
"""
    with pytest.raises(SimulationError, match="depends on numbers that a simulation does not have"):
        trace([parse_graph(text)], {}, machine(1), Routing(), sizes=[{"T": 2}])
