"""The two programs of a rank: forward and backward of a layer whose experts are spread, along a route.

The backward pairs each communication of the forward: what went out by a route comes back by it, and the other way
round. Rows are sent again rather than kept, so nothing whose size depends on the routing outlives the forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.ir.builder import Builder
from moec.ir.core import Graph, Op, Value
from moec.ir.opdef import op_def
from moec.ir.types import TensorType
from moec.passes.expert_parallel.route import Route, Writer, symbol, tensor_type
from moec.passes.expert_parallel.site import Site

_LAYOUT = ("layout", "up_form", "down_form", "stacked")


def _argument_names(op: Op) -> list[str]:
    names = []
    for definition, size in zip(op_def(op.name).operands, op.groups, strict=True):
        names += [definition.name if size == 1 else f"{definition.name}{i}" for i in range(size)]
    return names


def _start(site: Site, name: str, *first: tuple[str, TensorType]) -> tuple[Graph, list[Value], list[Value], Writer]:
    """A new region: the graph, its first arguments, those of the layer's operands, and a writer."""
    graph = Graph(name)
    given = [graph.add_arg(type, arg) for arg, type in first]
    pairs = zip(site.operands, _argument_names(site.op), strict=True)
    args = [graph.add_arg(value.type, arg) for value, arg in pairs]
    return graph, given, args, Writer(Builder(graph, site.op.loc), site)


def _local(site: Site) -> dict[str, Any]:
    """Attributes of the layer of this rank's experts."""
    return {"experts": site.own, **{name: site.attr(name) for name in _LAYOUT}}


def _row_type(site: Site, row_of: Value) -> TensorType:
    """The type of expert rows before they are weighted."""
    result = site.op.result.type
    assert isinstance(result, TensorType)
    element = tensor_type(row_of).dtype
    if len(site.op.regions) > 1:
        out = site.op.regions[1].outputs[0].type
        assert isinstance(out, TensorType)
        element = out.dtype
    return TensorType(element, (symbol("R"), *result.shape[1:]), result.device)


def forward(site: Site, route: type[Route], options: Mapping[str, Any]) -> Graph:
    """From the layer's operands, shares in the place of whole weights, to its result."""
    graph, _, args, w = _start(site, "forward")
    x, ids, weights, *params = args
    way = route(w, x, ids, **options)
    ones_type = tensor_type(way.ids).with_(dtype=tensor_type(weights).dtype)
    ones = w.b.call("aten.ones_like.default", [way.ids], {"dtype": ones_type.dtype}, result_types=[ones_type]).result
    rows = w.b.op(
        "moe.experts", way.rows, way.ids, ones, *params, attrs=_local(site), result_types=[_row_type(site, x)],
        regions=[r.clone() for r in site.op.regions], groups=site.op.groups,
    ).result  # fmt: skip
    result = site.op.result.type
    assert isinstance(result, TensorType)
    w.b.ret(way.combine(rows, weights, result))
    return graph


def backward(site: Site, route: type[Route], options: Mapping[str, Any]) -> Graph:
    """From the result's gradient and the operands to the gradients of all operands but ids.

    An operand that has none (a captured integer) gets zeros in its place.
    """
    result = site.op.result.type
    assert isinstance(result, TensorType)
    graph, (grad,), args, w = _start(site, "backward", ("grad", result))
    x, ids, weights, *params = args
    way = route(w, x, ids, **options)
    grads, factors = way.go(grad), way.go_slots(weights)
    needs = tuple(tensor_type(a).dtype.is_float and a is not ids for a in args)
    found = iter(
        w.b.op(
            "moe.experts_backward", grads, way.rows, way.ids, factors, *params,
            attrs={**_local(site), "needs": needs}, regions=[r.clone() for r in site.op.regions],
            groups=(1, *site.op.groups),
        ).results
    )  # fmt: skip
    outs = [way.sum_rows(next(found), tensor_type(x)), way.place(next(found), tensor_type(weights))]
    for at, (param, need) in enumerate(zip(params, needs[3:], strict=True)):
        if not need:
            outs.append(w.b.call("aten.zeros_like.default", [param], result_types=[param.type]).result)
            continue
        made = next(found)
        if at < len(site.shards) and site.shards[at].scale != 1:
            made = w.b.call("aten.mul.Scalar", [made, site.shards[at].scale], result_types=[param.type]).result
        outs.append(made)
    w.b.ret(*outs)
    return graph
