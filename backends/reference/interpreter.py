"""The reference interpreter: executes any graph by what its ops mean, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op, Value
from moec.ir.errors import IRError
from moec.ir.opdef import op_def

Execute = Callable[[Op, Sequence[Any]], "list[Any] | None"]
"""Executes an op on the values of its flat operands, or gives None where the op is to be run by its definition."""


def run_graph(graph: Graph, inputs: Sequence[Any], execute: Execute | None = None) -> list[Any]:
    """Execute ``graph`` on torch values with plain torch ops; nested graphs too. Differentiable where torch is.

    A value is forgotten after its last use, so memory stays that of straight-line code.

    Args:
        graph: Any graph that ends in ``return``.
        inputs: One value per argument.
        execute: Asked first for every op of the graph itself.

    Raises:
        IRError: The number of inputs is wrong, or an op returned another number of results than it declares.
    """
    if len(inputs) != len(graph.args):
        raise IRError(f"graph @{graph.name} takes {len(graph.args)} inputs, got {len(inputs)}")
    last_use: dict[Value, int] = {}
    for position, op in enumerate(graph.ops):
        for value in op.operands:
            last_use[value] = position
    env: dict[Value, Any] = dict(zip(graph.args, inputs, strict=True))
    for position, op in enumerate(graph.ops):
        values = [env[v] for v in op.operands]
        results = execute(op, values) if execute is not None else None
        if results is None:
            results = op_def(op.name).evaluate(op, values, run_graph)
        if op is graph.terminator:
            return results
        if len(results) != len(op.results):
            raise IRError(f"{op.name} gave {len(results)} results, {len(op.results)} are declared", op=repr(op))
        env.update(zip(op.results, results, strict=True))
        for value in op.operands:
            if last_use[value] == position:
                env.pop(value, None)
    raise IRError(f"graph @{graph.name} does not end in return")
