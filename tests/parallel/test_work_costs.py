"""What runs beside the experts' kernels: times by hand, what is asked of them, and what the door reads of a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from moec.cost.chunks import Calls, ChunkCosts
from moec.cost.layer import LayerShape
from moec.cost.links import Link
from moec.cost.machine import GemmCurve, defaults_for
from moec.interleaving.decide import _core, _weights
from moec.interleaving.graph import Layer
from moec.ir.core import Op
from moec.op_costs import OpCosts
from moec.parallel import costs, work_costs
from moec.parallel.costs import GroupCosts
from moec.parallel.plan import Plan
from moec.parallel.sample import sample_layer
from moec.parallel.work_costs import WorkTimes, layer_ops
from moec.passes import PassContext, PassManager
from moec.passes.interleave_layers import InterleaveLayers
from moec.passes.interleave_layers.beside import Core, Dense, Moved, work_seconds
from moec.targets import parse_target

GROUP = "ep"
CURVE = GemmCurve("f32", "torch", 1, ((1, 1.0), (16, 1.0), (64, 2.0), (256, 8.0)))
TIMES = WorkTimes((CURVE,), 1e9, (1e-4, 2e-4))


@pytest.fixture
def agreed(monkeypatch: pytest.MonkeyPatch) -> OpCosts:
    """A cost model whose group measured what is above."""
    machine = defaults_for(parse_target("cpu:avx2"))
    none = Calls(0.0)
    known = GroupCosts(machine, "avx2", 1, Link(1e-4, 1e9), ChunkCosts(none, none, none, None))
    monkeypatch.setitem(costs._COSTS, GROUP, known)
    monkeypatch.setitem(work_costs._TIMES, GROUP, TIMES)
    return OpCosts(machine, "avx2")


def test_products_follow_the_measured_curve() -> None:
    assert TIMES.product(64, 1e6, "f32") == pytest.approx(2e-3)
    assert TIMES.product(512, 1e6, "f32") == pytest.approx(16e-3), "past the last point in proportion"
    assert TIMES.product(64, 1e6, "bf16") is None and TIMES.rate("bf16") is None
    assert TIMES.rate("f32") == pytest.approx(2 * 256 / 8e-9)


def test_experts_on_aten_by_hand() -> None:
    shape = LayerShape(hidden=4, inner=8, width=4, experts=2, top_k=1, parts=1, dtype="f32")
    curve, backward = TIMES.experts(shape, False), TIMES.experts(shape, True)
    assert curve is not None and backward is not None
    products, rows = 64 * 2e-9, 64 * 4 * (2 * 4 + 3 * 8 + 2 * 4) / 1e9
    assert curve.expert_seconds(64) == pytest.approx(products + rows)
    assert backward.expert_seconds(64) == pytest.approx(2.5 * (products + rows) + 2 * 64 * 4 / 1e9)
    assert TIMES.experts(LayerShape(4, 8, 4, 2, 1, dtype="bf16"), False) is None


def spread() -> Op:
    graph = sample_layer((4, 4), 4, 2, 16, 32)
    PassManager("expert-parallel", repro=None).run(graph, PassContext())
    return graph.ops[0]


def test_a_layer_is_timed_on_the_backend_that_has_it(agreed: OpCosts) -> None:
    op = spread()
    plain = agreed.expert_times(op)
    op.attrs["backend"] = "cpu"
    assert plain is not None and agreed.expert_times(op) == plain
    op.attrs["backend"] = "aten"
    shape = LayerShape(16, 32, 16, 4, 2, dtype="f32")
    assert agreed.expert_times(op) == TIMES.experts(shape, False) != plain
    assert agreed.expert_times(op, backward=True) == TIMES.experts(shape, True)


def test_work_beside_layers(agreed: OpCosts) -> None:
    def seconds(work: Any, group: str = GROUP, backward: bool = False) -> float | None:
        return work_seconds(work, group, 256, agreed, backward)

    assert seconds(Dense(100, 50, "f32")) == pytest.approx(5000 * 8e-9)
    core = Core(width=512, kept=128, length=1024, causal=True, dtype="f32", item=4)
    flops = 256 * 1024 * 512
    assert seconds(core) == pytest.approx(flops / (64e9))
    assert seconds(core, backward=True) == pytest.approx(2.5 * flops / 64e9)
    assert seconds(Core(512, 128, 1024, False, "f32", 4)) == pytest.approx(2 * flops / 64e9)
    assert seconds(Moved(token=4.0, fixed=1e6)) == pytest.approx((1024 + 1e6) / 1e9)
    op = spread()
    assert agreed.op_seconds(op, GROUP, 1, 1e6) == pytest.approx(2e-4 + 1e-3)


def test_what_nobody_measured_counts_as_nothing(agreed: OpCosts) -> None:
    work: Any
    for work in (Core(512, 128, 1024, True, "f32", 4), Moved(fixed=1e6)):
        assert work_seconds(work, "other", 256, agreed, False) == 0.0
    assert work_seconds(Dense(4, 4, "f32"), "other", 256, agreed, False) is None
    assert agreed.op_seconds(spread(), "other", 0, 1e6) == 0.0
    assert agreed.expert_times(spread()) is not None, "the links and the processor were agreed on"


def test_ops_between_experts_and_collectives() -> None:
    names = [o.name for region in spread().regions for o in layer_ops(region)]
    assert names and not {n for n in names if n.startswith("comm.") or n in ("moe.experts", "moe.experts_backward")}


def attention(causal: bool = True) -> Node:
    graph = Graph()
    given = []
    for heads in (8, 2, 2):
        node = graph.placeholder("x")
        node.meta["example_value"] = torch.empty(3, heads, 40, 64)
        given.append(node)
    call = torch.nn.functional.scaled_dot_product_attention
    return graph.call_function(call, tuple(given), {"is_causal": causal})


def test_lengths_are_told_and_not_read() -> None:
    """Ranks have other lengths in their graphs; heads are the model's."""
    assert _core(attention(), 0) is None
    assert _core(attention(), 4096) == Core(8 * 128, 2 * 128, 4096, True, "f32", 4)
    other = _core(attention(False), 4096)
    assert other is not None and not other.causal
    assert _core(Graph().call_function(torch.relu, ()), 4096) is None


def test_weights_of_a_layer_are_known_by_their_memory() -> None:
    graph, up = Graph(), torch.nn.Parameter(torch.zeros(4, 8, 8))
    nodes = [graph.placeholder("x") for _ in range(5)]
    for node, value in zip(
        nodes, (torch.zeros(3, 8), torch.zeros(3, 2), torch.zeros(3, 2), up, torch.zeros(2)), strict=True
    ):
        node.meta["example_value"] = value
    program: Any = None
    found = _weights(Layer(nodes[0], program, tuple(nodes)))
    assert list(found.values()) == [4 * 8 * 8 * 4], "what needs no gradient has none"


def test_a_plan_hands_the_length_on() -> None:
    passes = Plan.parse("ep=2,step=64,length=16,interleave=auto").passes(0)
    assert InterleaveLayers(tokens=64, length=16) in passes
    with pytest.raises(ValueError, match="length is a number of tokens"):
        InterleaveLayers(length=-1)
