"""The expert layer of a model, by its sizes alone, as a graph for each rank: router, and experts gathered from shards;
beside them a shared expert, where the model has one.

What simulates a ``config.json``: the model is on the meta device, its weights are never made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy

from moec.ir.builder import Builder
from moec.ir.core import Graph, Value
from moec.ir.parallel_semantics import chunk_sizes
from moec.ir.types import TensorType, TokenType
from moec.simulate.errors import SimulationError

if TYPE_CHECKING:
    from moec.parallel.planner import ModelFacts

NAMES = {1: "f8e4m3fn", 2: "bf16", 4: "f32"}
"""Element types by their bytes."""


def layer_graphs(m: ModelFacts, ranks: int, group: str = "ep") -> list[Graph]:
    """A graph for every rank; where all hold equally many experts it is one graph, several times.

    Raises:
        SimulationError: A rank would hold no expert.
    """
    sizes = chunk_sizes(m.experts, ranks)
    if min(sizes) == 0:
        raise SimulationError(f"{m.experts} experts on {ranks} ranks leave {sizes.count(0)} ranks without one")
    made = {own: _graph(m, sizes, own, group) for own in set(sizes)}
    return [made[own] for own in sizes]


def _graph(m: ModelFacts, sizes: tuple[int, ...], own: int, group: str) -> Graph:
    kind = NAMES.get(m.element, "bf16")
    graph = Graph("layer")
    b = Builder(graph)
    x = graph.add_arg(TensorType.of(kind, "T", m.hidden), "x")
    gate = graph.add_arg(TensorType.of(kind, m.experts, m.hidden), "gate")
    shares = [
        graph.add_arg(TensorType.of(kind, own, 2 * m.inner, m.hidden), "up"),
        graph.add_arg(TensorType.of(kind, own, m.hidden, m.inner), "down"),
    ]
    logits = b.call("aten.linear.default", [x, gate], result_types=[TensorType.of(kind, "T", m.experts)]).result
    route_types = [TensorType.of("f32", "T", m.top_k), TensorType.of("i64", "T", m.top_k)]
    weights, ids = b.op("moe.route", logits, attrs={"k": m.top_k}, result_types=route_types).results
    whole = [_gathered(b, share, sizes, group) for share in shares]
    activation = _swiglu(kind, m.inner)
    y = b.op(
        "moe.experts", x, ids, weights, [whole[0]], [whole[1]], [], [], [], [], [], [], attrs={"experts": m.experts},
        regions=[activation], result_types=[x.type],
    ).result  # fmt: skip
    b.ret(_with_shared(b, graph, m, kind, x, y) if m.shared else y)
    return graph


def _with_shared(b: Builder, graph: Graph, m: ModelFacts, kind: str, x: Value, y: Value) -> Value:
    """``y`` and the shared expert's result."""
    up = graph.add_arg(TensorType.of(kind, 1, 2 * m.shared, m.hidden), "shared_up")
    down = graph.add_arg(TensorType.of(kind, 1, m.hidden, m.shared), "shared_down")
    column = b.call("aten.slice.Tensor", [x, 1, 0, 1], result_types=[TensorType.of(kind, "T", 1)]).result
    one, choice = TensorType.of(kind, "T", 1), TensorType.of("i64", "T", 1)
    ids = b.call("aten.zeros_like.default", [column], {"dtype": choice.dtype}, result_types=[choice]).result
    ones = b.call("aten.ones_like.default", [column], result_types=[one]).result
    z = b.op(
        "moe.experts", x, ids, ones, [up], [down], [], [], [], [], attrs={"experts": 1, "sentinels": True},
        regions=[_swiglu(kind, m.shared)], result_types=[x.type],
    ).result  # fmt: skip
    return b.call("aten.add.Tensor", [y, z], result_types=[x.type]).result


def _gathered(b: Builder, share: Value, sizes: tuple[int, ...], group: str) -> Value:
    assert isinstance(share.type, TensorType)
    attrs = {"group": group, "ranks": len(sizes), "sizes": sizes}
    token = b.op("comm.all_gather.start", share, None, attrs=attrs, result_types=[TokenType()]).result
    type = share.type.with_(shape=(sympy.Integer(sum(sizes)), *share.type.shape[1:]))
    return b.op("comm.wait", token, result_types=[type]).result


def _swiglu(kind: str, inner: int) -> Graph:
    graph = Graph("activation")
    type = TensorType.of(kind, "R", inner)
    b = Builder(graph)
    gate, up = graph.add_arg(type, "g"), graph.add_arg(type, "u")
    silu = b.call("aten.silu.default", [gate], result_types=[type]).result
    b.ret(b.call("aten.mul.Tensor", [silu, up], result_types=[type]).result)
    return graph
