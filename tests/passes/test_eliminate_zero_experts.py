"""``eliminate-zero-experts``: layers equal a loop, and as many rows reach the experts as there are true slots."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.backends.reference.interpreter import run_graph
from moec.ir import moe_semantics
from moec.ir.core import Graph
from moec.ir.ops import moe_experts
from moec.ir.parser import parse_graph
from moec.ir.routing import equal_load_groups
from moec.ir.verifier import verify
from moec.passes import PassContext, PassManager, parse_pipeline
from moec.passes.eliminate_zero_experts.ids import HIGHEST, LOWEST, IdSet
from tests.passes.layers import TRACED_TOKENS, capture
from tests.passes.zero_layers import KINDS, MASKED, OVERWRITTEN, ZeroLayer

TOLERANCE = 1e-5
"""Largest |difference| / max(1, max |value|) from the loop, in f32."""
WITHOUT = "functionalize,canonicalize,cse,raise-moe,fuse-routing,fuse-experts,cse,dce"
few = settings(max_examples=12, phases=[Phase.generate], deadline=None, derandomize=True, database=None)

layers = st.builds(
    ZeroLayer,
    experts=st.sampled_from([1, 3]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(tuple),
    top_k=st.sampled_from([1, 2]),
    masked=st.sampled_from(sorted(MASKED)),
    overwritten=st.sampled_from(sorted(OVERWRITTEN)),
    form=st.sampled_from(["batched", "grouped"]),
    keep=st.sampled_from([0.0, 0.0, 0.9]),
)


def traced(layer: ZeroLayer) -> Graph:
    return capture(layer.forward, layer.args(TRACED_TOKENS), (0, 1))


def optimized(graph: Graph, pipeline: str = "default") -> tuple[Graph, list[str]]:
    ctx = PassContext()
    out = PassManager(parse_pipeline(pipeline), repro=None).run(graph.clone(), ctx)
    verify(out)
    return out, [str(r) for r in ctx.remarks if r.pass_name == "eliminate-zero-experts"]


def watch(patch: pytest.MonkeyPatch) -> list[int]:
    """Rows that reach the experts from now on, for each call of ``moe.experts`` in the reference."""
    found: list[int] = []

    def watched(ids: Tensor, experts: int, sentinels: bool = False) -> moe_semantics.Plan:
        plan = moe_semantics.make_plan(ids, experts, sentinels)
        found.append(sum(plan.counts))
        return plan

    patch.setattr(moe_experts, "make_plan", watched)
    return found


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watch(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().amax() <= TOLERANCE * want.abs().amax().clamp_min(1)) if want.numel() else True


def check(layer: ZeroLayer, rows: list[int]) -> None:
    graph, remarks = optimized(traced(layer))
    (fused,) = [op for op in graph.ops if op.name == "moe.experts"]
    assert fused.attrs["sentinels"] is True
    assert any("take part in no expert" in r for r in remarks)
    for tokens, all_dropped, zeros in ((0, False, False), (1, False, True), (7, False, True), (4, True, False)):
        args = layer.args(tokens, all_dropped, zeros)
        want, slots = layer.loop(*args)
        assert slots == 0 or not all_dropped or layer.top_k > len(layer.kinds)
        rows.clear()
        with torch.no_grad():
            (got,) = run_graph(graph, args)
        assert close(got, want), (layer, tokens)
        assert rows == [slots], (layer, tokens)


@given(layers)
@few
def test_any_mix_of_kinds(layer: ZeroLayer) -> None:
    with pytest.MonkeyPatch.context() as patch:
        check(layer, watch(patch))


@pytest.mark.parametrize("masked", MASKED)
def test_every_way_to_mask_a_weight(masked: str, rows: list[int]) -> None:
    check(ZeroLayer(masked=masked, kinds=("null", "identity")), rows)


@pytest.mark.parametrize("overwritten", OVERWRITTEN)
def test_ids_are_what_they_were_before_they_were_overwritten(overwritten: str, rows: list[int]) -> None:
    layer = ZeroLayer(overwritten=overwritten)
    check(layer, rows)
    graph, _ = optimized(traced(layer))
    (fused,) = [op for op in graph.ops if op.name == "moe.experts"]
    route = fused.operands[1].op
    assert route is not None and route.name == "moe.route" and not route.regions, "the router's own ids and weights"
    assert fused.operands[2].op is route


def test_without_the_pass_every_slot_is_a_row(rows: list[int]) -> None:
    """What is counted above is not always so."""
    layer = ZeroLayer()
    graph, _ = optimized(traced(layer), WITHOUT)
    args = layer.args(7)
    with torch.no_grad():
        (got,) = run_graph(graph, args)
    want, slots = layer.loop(*args)
    assert close(got, want)
    assert rows == [14] and slots < 14


def test_twice_is_once() -> None:
    layer = ZeroLayer(kinds=("null", "identity"), keep=0.5)
    graph, first = optimized(
        traced(layer), "functionalize,canonicalize,cse,raise-moe,fuse-experts,eliminate-zero-experts"
    )
    again, second = optimized(graph, "eliminate-zero-experts")
    assert first and not second
    assert str(again) == str(graph)


def test_before_and_after_fusing() -> None:
    head = "functionalize,canonicalize,cse,raise-moe"
    graph = traced(ZeroLayer(kinds=("null", "identity")))
    early, _ = optimized(graph, f"{head},eliminate-zero-experts,fuse-experts,dce")
    late, _ = optimized(graph, f"{head},fuse-experts,eliminate-zero-experts,dce")
    assert "sentinels = true" in str(early)
    assert str(early) == str(late)


def test_groups_of_equal_load_are_none_where_some_choices_need_no_expert() -> None:
    """A router may give every group of choices as many slots as another: experts with weights get fewer."""
    text = """graph @b(%x: f32[T, 4], %l: f32[T, 6], %up: f32[4, 4, 4], %down: f32[4, 4, 4]) -> f32[T, 4] {
      %w, %ids = moe.route %l {k = 2, groups = 2, per_group = 1} : f32[T, 2], i64[T, 2]
      %y = moe.experts %x, %ids, %w, [%up], [%down] {experts = 4, layout = "single", sentinels = true} {
        (%h: f32[R, 4]) -> f32[R, 4] {
          return %h
        }
      } : f32[T, 4]
      return %y
    }"""
    route, experts, _ = parse_graph(text).ops
    assert equal_load_groups(route) is not None
    assert equal_load_groups(experts) is None


def test_fuel_stops_it() -> None:
    graph = traced(ZeroLayer())
    head, _ = optimized(graph, "functionalize,canonicalize,cse,raise-moe,fuse-experts")
    before = str(head)
    ctx = PassContext()
    PassManager(parse_pipeline("eliminate-zero-experts"), repro=None, fuel=0).run(head, ctx)
    assert str(head) == before and not ctx.remarks


ranges = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), max_size=4)


@given(ranges, ranges)
@settings(few, max_examples=60)
def test_sets_of_ids_are_sets(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    def members(s: IdSet) -> set[int]:
        return {n for n in range(-12, 13) if any(a <= n <= b for a, b in s.ranges)}

    a, b = IdSet.of(*one), IdSet.of(*other)
    plain = {n for low, high in one for n in range(low, high + 1)}
    assert members(a) == plain
    assert members(~a) == set(range(-12, 13)) - plain
    assert members(a | b) == members(a) | members(b)
    assert members(a & b) == members(a) & members(b)
    assert (a <= b) == (members(a) <= members(b))
    assert ~~a == a
    assert all(x[1] + 1 < y[0] for s in (a, ~a) for x, y in zip(s.ranges, s.ranges[1:], strict=False))


def test_the_set_of_all_ids_and_of_none() -> None:
    everything, nothing = IdSet.of((LOWEST, HIGHEST)), IdSet()
    assert ~nothing == everything and ~everything == nothing
    for a, b in product((everything, nothing), repeat=2):
        assert (a <= b) == (a == nothing or b == everything)
