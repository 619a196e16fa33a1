"""The doors of emission: a graph as a module of its own, or as nodes of a graph that exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moec.emit.emitter import Emitter, LowerOp, emit_module
from moec.emit.errors import EmitError
from moec.emit.modules import ModuleStore
from moec.ir.core import Graph


def graph_to_fx(
    graph: Graph,
    *,
    lower_op: LowerOp | None = None,
    root: torch.nn.Module | None = None,
    value_key: str = "val",
    values: Sequence[Any] | None = None,
) -> torch.fx.GraphModule:
    """Emit ``graph`` as a GraphModule of its own.

    Args:
        graph: The graph; its arguments become placeholders.
        lower_op: Emits ops that are not of the torch dialect.
        root: Where constants are looked up that the graph names but does not hold (a graph read from text).
        value_key: ``"val"`` for an ATen graph, ``"example_value"`` for a torch-level one.
        values: Value (fake tensor, SymInt) of each argument, for arguments that remember none (read from text).

    Raises:
        EmitError: An op has no torch form and ``lower_op`` did not take it, or a constant is missing.
    """
    return emit_module(graph, lower_op=lower_op, root=root, value_key=value_key, values=values)


def emit_into(
    graph: Graph,
    fx_graph: torch.fx.Graph,
    inputs: Sequence[Any],
    *,
    lower_op: LowerOp | None = None,
    root: torch.nn.Module | None = None,
    value_key: str = "val",
) -> list[Any]:
    """Emit the ops of ``graph`` into ``fx_graph`` at its insertion point.

    Args:
        graph: The graph. Its ``return`` is not emitted.
        fx_graph: Where the nodes go. Constants and nested graphs are put on its owning module.
        inputs: A node or constant for each argument of ``graph``.
        lower_op: Emits ops that are not of the torch dialect.
        root: Where constants are looked up that the graph names but does not hold, and where they are put if
            ``fx_graph`` has no owning module.
        value_key: ``"val"`` for an ATen graph, ``"example_value"`` for a torch-level one.

    Returns:
        The outputs: nodes, constants or nested tuples, as ``return`` has them; one entry if it is no tuple or list.

    Raises:
        EmitError: As :func:`graph_to_fx`, or the number of inputs is wrong.
    """
    if len(inputs) != len(graph.args):
        raise EmitError(f"graph @{graph.name} takes {len(graph.args)} arguments, {len(inputs)} were given")
    emitter = Emitter(fx_graph, ModuleStore(fx_graph.owning_module or root, root), lower_op, value_key)
    out = emitter.emit(graph, list(inputs), terminate=False)
    return list(out) if isinstance(out, (tuple, list)) else [out]
