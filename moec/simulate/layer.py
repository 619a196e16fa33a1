"""The expert layer of a model, by its sizes alone, as a graph for each rank: router, and experts gathered from shards;
beside them a shared expert, where the model has one.

What simulates a ``config.json``: the model is on the meta device, its weights are never made.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer of one rank, arguments of its graph.

    Attributes:
        gate: Of the router.
        up, down: Of this rank's experts.
        shared: Of the shared expert, up and down; () without one.
    """

    gate: Value
    up: Value
    down: Value
    shared: tuple[Value, ...] = ()


def shares(m: ModelFacts, ranks: int) -> tuple[int, ...]:
    """Experts of every rank.

    Raises:
        SimulationError: A rank would hold no expert.
    """
    sizes = chunk_sizes(m.experts, ranks)
    if min(sizes) == 0:
        raise SimulationError(f"{m.experts} experts on {ranks} ranks leave {sizes.count(0)} ranks without one")
    return sizes


def layer_graphs(m: ModelFacts, ranks: int, group: str = "ep") -> list[Graph]:
    """A graph for every rank; where all hold equally many experts it is one graph, several times.

    Raises:
        SimulationError: A rank would hold no expert.
    """
    sizes = shares(m, ranks)
    made = {own: _graph(m, sizes, own, group) for own in set(sizes)}
    return [made[own] for own in sizes]


def element_type(m: ModelFacts) -> str:
    """Of tokens and weights."""
    return NAMES.get(m.element, "bf16")


def _graph(m: ModelFacts, sizes: tuple[int, ...], own: int, group: str) -> Graph:
    graph = Graph("layer")
    b = Builder(graph)
    x = graph.add_arg(TensorType.of(element_type(m), "T", m.hidden), "x")
    b.ret(expert_layer(b, m, add_weights(graph, m, own), sizes, x, group))
    return graph


def add_weights(graph: Graph, m: ModelFacts, own: int) -> LayerWeights:
    """Arguments for a layer of a rank that holds ``own`` experts."""
    kind = element_type(m)
    gate = graph.add_arg(TensorType.of(kind, m.experts, m.hidden), "gate")
    up = graph.add_arg(TensorType.of(kind, own, 2 * m.inner, m.hidden), "up")
    down = graph.add_arg(TensorType.of(kind, own, m.hidden, m.inner), "down")
    if not m.shared:
        return LayerWeights(gate, up, down)
    beside = (
        graph.add_arg(TensorType.of(kind, 1, 2 * m.shared, m.hidden), "shared_up"),
        graph.add_arg(TensorType.of(kind, 1, m.hidden, m.shared), "shared_down"),
    )
    return LayerWeights(gate, up, down, beside)


def expert_layer(
    b: Builder, m: ModelFacts, weights: LayerWeights, sizes: tuple[int, ...], x: Value, group: str = "ep"
) -> Value:
    """What router, experts and shared expert make of tokens ``x[T, H]``."""
    kind = element_type(m)
    logits = b.call("aten.linear.default", [x, weights.gate], result_types=[TensorType.of(kind, "T", m.experts)]).result
    route_types = [TensorType.of("f32", "T", m.top_k), TensorType.of("i64", "T", m.top_k)]
    chosen, ids = b.op("moe.route", logits, attrs={"k": m.top_k}, result_types=route_types).results
    whole = [_gathered(b, share, sizes, group) for share in (weights.up, weights.down)]
    y = b.op(
        "moe.experts", x, ids, chosen, [whole[0]], [whole[1]], [], [], [], [], [], [], attrs={"experts": m.experts},
        regions=[_swiglu(kind, m.inner)], result_types=[x.type],
    ).result  # fmt: skip
    return _with_shared(b, m, weights.shared, x, y) if weights.shared else y


def _with_shared(b: Builder, m: ModelFacts, shared: tuple[Value, ...], x: Value, y: Value) -> Value:
    """``y`` and the shared expert's result."""
    kind = element_type(m)
    column = b.call("aten.slice.Tensor", [x, 1, 0, 1], result_types=[TensorType.of(kind, "T", 1)]).result
    one, choice = TensorType.of(kind, "T", 1), TensorType.of("i64", "T", 1)
    ids = b.call("aten.zeros_like.default", [column], {"dtype": choice.dtype}, result_types=[choice]).result
    ones = b.call("aten.ones_like.default", [column], result_types=[one]).result
    z = b.op(
        "moe.experts", x, ids, ones, [shared[0]], [shared[1]], [], [], [], [], attrs={"experts": 1, "sentinels": True},
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
