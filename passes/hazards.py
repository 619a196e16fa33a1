"""Writes that stand in the way of moving a piece of a graph.

A fused op reads all that its piece read, but at one place. If something in between writes to that memory, the op would
see another value than the piece did.
"""

from __future__ import annotations

from collections.abc import Collection

from moec.ir.core import Graph, Op
from moec.ir.types import SymType, TensorType
from moec.passes.aliases import AliasSets, reaches_outside
from moec.passes.effects import is_pure, written_operands


def write_within(graph: Graph, ops: Collection[Op], at: Op | None = None) -> Op | None:
    """The first op that may write to memory which ``ops`` read or make, between the first and the last of them.

    Args:
        graph: The graph that holds them.
        ops: The piece.
        at: The place where the fused op is to stand, if it may lie outside the piece.
    """
    ops = [op for op in ops if not _reads_sizes_alone(op)]
    position = {op: i for i, op in enumerate(graph.ops)}
    places = [position[op] for op in ops] + ([position[at]] if at is not None else [])
    if not places:
        return None
    span = graph.ops[min(places) : max(places) + 1]
    impure = [op for op in span if op.name != "return" and not is_pure(op)]
    if not impure:
        return None
    aliases = AliasSets(graph)
    for op in graph.ops:
        aliases.add(op)
    touched = {v for op in ops for v in (*op.operands, *op.results)}
    for op in impure:
        written = {v for i in written_operands(op) for v in aliases.of(op.operands[i])}
        if reaches_outside(op):
            written |= set(aliases.outside)
        if written & touched:
            return op
    return None


def _reads_sizes_alone(op: Op) -> bool:
    """It makes numbers of numbers and of tensors' sizes, which no write changes; it may stand far from its piece."""
    if not op.results or not all(isinstance(r.type, SymType) for r in op.results):
        return False
    of_tensors = any(isinstance(v.type, TensorType) for v in op.operands)
    return not of_tensors or str(op.attrs.get("target", "")).startswith("aten.sym_")
