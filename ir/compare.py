"""Structural equality of graphs: same ops in the same order on the same values, whatever the values are called."""

from __future__ import annotations

from moec.ir.core import Graph, Op, Value
from moec.ir.opdef import find_op_def
from moec.ir.printer import effective_attrs, print_attr, print_type


def structurally_equal(a: Graph, b: Graph) -> str | None:
    """The first difference between two graphs, in words, or None if there is none.

    Names of values, locations and ``meta`` are not compared. Types and attributes are compared by their text, so that
    nan equals nan, 0.0 differs from -0.0, 1 from True, and sympy's assumptions about symbols do not count.

    Raises:
        IRError: A type or attribute has no text form.
    """
    return _graphs(a, b, f"graph @{a.name}")


def _graphs(a: Graph, b: Graph, where: str) -> str | None:
    if a.name != b.name:
        return f"{where}: the other is called @{b.name}"
    if print_attr(a.attrs) != print_attr(b.attrs):
        return f"{where}: attributes {print_attr(a.attrs)} and {print_attr(b.attrs)}"
    if len(a.args) != len(b.args):
        return f"{where}: {len(a.args)} and {len(b.args)} arguments"
    same: dict[Value, Value] = {}
    for i, (x, y) in enumerate(zip(a.args, b.args, strict=True)):
        if print_type(x.type) != print_type(y.type):
            return f"{where}, argument {i}: {print_type(x.type)} and {print_type(y.type)}"
        same[x] = y
    for i, (p, q) in enumerate(zip(a.ops, b.ops, strict=False)):
        difference = _ops(p, q, same, f"{where}, op {i} ({p.name})")
        if difference:
            return difference
    if len(a.ops) != len(b.ops):
        return f"{where}: {len(a.ops)} and {len(b.ops)} ops"
    return None


def _ops(a: Op, b: Op, same: dict[Value, Value], where: str) -> str | None:
    if a.name != b.name:
        return f"{where}: the other is {b.name}"
    if a.groups != b.groups:
        return f"{where}: operand groups {a.groups} and {b.groups}"
    for i, (x, y) in enumerate(zip(a.operands, b.operands, strict=True)):
        if same.get(x) is not y:
            return f"{where}: operand {i} is {x!r} and {y!r}"
    definition = find_op_def(a.name)
    left, right = effective_attrs(definition, a), effective_attrs(definition, b)
    for name in [*left, *right]:
        if left.get(name) != right.get(name):
            return f"{where}: attribute {name!r} is {left.get(name, 'absent')} and {right.get(name, 'absent')}"
    if len(a.regions) != len(b.regions):
        return f"{where}: {len(a.regions)} and {len(b.regions)} nested graphs"
    for i, (g, h) in enumerate(zip(a.regions, b.regions, strict=True)):
        difference = _graphs(g, h, f"{where}, nested graph {i}")
        if difference:
            return difference
    if len(a.results) != len(b.results):
        return f"{where}: {len(a.results)} and {len(b.results)} results"
    for i, (x, y) in enumerate(zip(a.results, b.results, strict=True)):
        if print_type(x.type) != print_type(y.type):
            return f"{where}, result {i}: {print_type(x.type)} and {print_type(y.type)}"
        same[x] = y
    return None
