"""Loops that write one row per choice: tokens are repeated k times, and the rows are weighted and added at the end.

``y[flat == e] = expert(rows[flat == e])`` with ``rows = x.repeat_interleave(k)``, then
``(y.view(T, k, H) * weights[..., None]).sum(1)``. As a loop that is a block of one expert per row; with what stands
around it, it is one of k experts per token, and nothing is repeated.
"""

from __future__ import annotations

from dataclasses import replace

from moec.ir.core import Graph
from moec.passes.hazards import write_within
from moec.passes.matching import as_slots, between, rank, tensor
from moec.passes.raise_moe.combine import read_combine
from moec.passes.raise_moe.dispatch import DispatchPlan, repeated_rows
from moec.passes.raise_moe.loop_rows import Factor
from moec.passes.raise_moe.loops import Loop
from moec.passes.raise_moe.refusal import Refusal


def fold_slots(graph: Graph, loop: Loop) -> Loop:
    """``loop`` with the repetition before and the weighted sum behind it, where it has them; else as it is."""
    if loop.terms or loop.keep is not None or loop.start is not None or loop.kind.weighting.factor is not None:
        return loop
    repeated = repeated_rows(loop.kind.x)
    x = tensor(repeated[0]) if repeated is not None else None
    if repeated is None or x is None or not repeated[1].is_Integer:
        return loop
    ids = as_slots(loop.ids, x.shape[0], repeated[1])
    if ids is None or rank(ids) != 2:
        return loop
    try:
        combine = read_combine(loop.out, DispatchPlan(repeated[0], ids, repeated[1], None, (loop.ids,)))
    except Refusal:
        return loop
    inside = between([loop.out], combine.out)
    seen = {u for op in inside for r in op.results if r is not combine.out for u in r.users} | set(loop.out.users)
    steps = {op for b in loop.branches for op in (*b.ops, *b.step.own, b.step.op)}
    if combine.rows is not loop.out or seen - inside or write_within(graph, inside | steps) is not None:
        return loop
    weighting = replace(loop.kind.weighting, factor=Factor(combine.weights, (), None))
    return replace(loop, ids=ids, kind=replace(loop.kind, x=repeated[0], weighting=weighting), out=combine.out)
