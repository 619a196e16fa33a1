"""Keys by which ops are equal: same op and operands, same attributes down to number types, same nested graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from moec.ir.attributes import ListAttr, Literal
from moec.ir.core import Graph, Op, Value
from moec.ir.opdef import op_def


def attr_key(value: Any) -> Hashable:
    """``value`` as something hashable that keeps apart what torch keeps apart: 1, 1.0 and True, 0.0 and -0.0."""
    if isinstance(value, (bool, int, float)):
        return type(value).__name__, repr(value)
    if isinstance(value, ListAttr):
        return "list", tuple(attr_key(v) for v in value.items)
    if isinstance(value, tuple):
        return "tuple", tuple(attr_key(v) for v in value)
    if isinstance(value, Literal) and value.kind == "opaque":
        return object()  # the text of an object that the IR cannot name: equal to nothing, not even to itself
    if isinstance(value, dict):
        return "dict", tuple((k, attr_key(v)) for k, v in sorted(value.items()))
    return value


def _attrs_key(op: Op) -> Hashable:
    """The attributes, those left at their default included."""
    definition = op_def(op.name)
    given = dict(op.attrs)
    for a in definition.attrs:
        if not a.required:
            given.setdefault(a.name, a.default)
    return attr_key(given)


def op_key(op: Op, operand: Callable[[Value], Hashable] = id) -> Hashable:
    """Equal keys mean equal results, given equal memory. ``operand`` names the values used."""
    return (
        op.name,
        op.groups,
        tuple(operand(v) for v in op.operands),
        _attrs_key(op),
        tuple(graph_key(r) for r in op.regions),
        tuple(r.type for r in op.results),
    )


def graph_key(graph: Graph) -> Hashable:
    """The structure of a closed graph; names of values, locations and metadata do not count."""
    number: dict[Value, int] = {a: i for i, a in enumerate(graph.args)}
    ops: list[Hashable] = []
    for op in graph.ops:
        ops.append(op_key(op, number.__getitem__))
        for r in op.results:
            number[r] = len(number)
    return tuple(a.type for a in graph.args), attr_key(graph.attrs), tuple(ops)
