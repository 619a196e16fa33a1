"""Cutting a piece of a graph out as a closed nested graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sympy

from moec.ir.attributes import Operand, freeze
from moec.ir.core import Graph, Op, Value, clone_op
from moec.ir.types import SymType, TensorType, Type
from moec.passes.matching import arg, function, tensor


class NotClosed(Exception):
    """The piece uses something that a region cannot take in; ``str`` is the reason."""


def generalise(type: Type, rows: sympy.Expr | None, symbol: str) -> Type:
    """``type`` with a leading dimension equal to ``rows`` renamed to ``symbol``, so that regions do not depend on T."""
    if rows is not None and isinstance(type, TensorType) and type.rank and (type.shape[0] - rows).expand() == 0:
        return type.with_(shape=(sympy.Symbol(symbol, integer=True), *type.shape[1:]))
    return type


def _without_sizes(op: Op) -> dict[str, Any] | None:
    """The attributes of a view, reshape or expand with its one symbolic size written as -1, or None if it has none.

    A region has no argument for a dynamic size; -1 says the same in ``view``/``reshape`` for one unknown size, and in
    ``expand`` for a size that the operand has already.
    """
    name = function(op)
    if name not in ("view", "reshape", "_unsafe_view", "expand"):
        return None
    sizes = arg(op, 1, "size") or arg(op, 1, "shape")
    symbolic = [i for i, s in enumerate(sizes) if isinstance(s, Value)]
    if not symbolic or (name != "expand" and (len(symbolic) > 1 or -1 in sizes)):
        return None
    if name == "expand":
        source, result = tensor(arg(op, 0, "self")), tensor(op.results[0])
        assert source is not None and result is not None
        shift = result.rank - source.rank
        if any(i < shift or source.shape[i - shift] != result.shape[i] for i in symbolic):
            return None
    new = [-1 if i in symbolic else s for i, s in enumerate(sizes)]
    return {**op.attrs, "args": (Operand(0), freeze(new)), "kwargs": {}}


def extract(
    name: str,
    ops: Collection[Op],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    *,
    rows: sympy.Expr | None = None,
    symbol: str = "R",
) -> tuple[Graph, list[Value]]:
    """A closed graph of ``ops`` from ``inputs`` to ``outputs``, and the further values it captures, in argument order.

    Args:
        name: Name of the new graph.
        ops: The ops to copy, all in one graph.
        inputs: Values that become the first arguments.
        outputs: Values to return.
        rows: If given, leading dimensions equal to it are called ``symbol`` inside.
        symbol: That name.

    Raises:
        NotClosed: A number computed from shapes is used that cannot be written away.
    """
    chosen = set(ops)
    graph = Graph(name)
    env: dict[Value, Value] = {v: graph.add_arg(generalise(v.type, rows, symbol), v.name) for v in inputs}
    captures: list[Value] = []

    def lookup(value: Value) -> Value:
        if value not in env:
            if isinstance(value.type, SymType):
                raise NotClosed(f"it uses the size {value.type.expr}, which is computed outside")
            if not isinstance(value.type, TensorType):
                raise NotClosed(f"it uses {value!r}, which is no tensor")
            captures.append(value)
            env[value] = graph.add_arg(value.type, value.name)
        return env[value]

    order = [op for op in next(iter(chosen)).parent.ops if op in chosen] if chosen else []  # type: ignore[union-attr]
    for op in order:
        attrs = _without_sizes(op)
        if attrs is None:
            copy = clone_op(op, lookup, env)
        else:
            copy = Op(op.name, [lookup(op.operands[0])], [r.type for r in op.results], attrs=attrs, loc=op.loc)
            env.update(zip(op.results, copy.results, strict=True))
        copy.meta = {}
        for result in copy.results:
            result.type = generalise(result.type, rows, symbol)
            result.meta = {}
        graph.append(copy)
    graph.append(Op("return", [lookup(v) for v in outputs], groups=[len(outputs)]))
    return graph, captures
