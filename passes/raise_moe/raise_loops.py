"""Loops over experts of all forms: found, read, replaced."""

from __future__ import annotations

from moec.ir.core import Graph, Location
from moec.passes.base import PassContext
from moec.passes.dce import erase_unused
from moec.passes.raise_moe.block import Emitter
from moec.passes.raise_moe.loop_chosen import ChosenLoop, read_chosen
from moec.passes.raise_moe.loop_dense import find_dense_chains, read_dense
from moec.passes.raise_moe.loop_slots import fold_slots
from moec.passes.raise_moe.loop_steps import Chain, find_chains
from moec.passes.raise_moe.loop_write import erase, write_loop
from moec.passes.raise_moe.loops import Loop, read_loop
from moec.passes.raise_moe.refusal import Refusal


def _read_gathers(graph: Graph, chain: Chain) -> Loop | ChosenLoop | None:
    loop = read_loop(graph, chain)
    return fold_slots(graph, loop) if loop is not None else read_chosen(graph, chain)


def _replace(graph: Graph, loop: Loop | ChosenLoop) -> None:
    last, loc = loop.out.op, loop.chain.steps[-1].op.loc
    assert last is not None
    emit = Emitter(graph, last, Location(loc.module, loc.source, loc.stack))
    total = write_loop(emit, loop) if isinstance(loop, Loop) else loop.write(emit)
    total.meta = dict(loop.out.meta)
    loop.out.replace_all_uses_with(total)
    if loop.out is not loop.chain.out:
        erase_unused(last)
    erase(graph, loop.branches)


def raise_loops(graph: Graph, ctx: PassContext, name: str) -> int:
    """Raise the loops over experts of ``graph``.

    Args:
        graph: The graph, changed in place.
        ctx: Takes remarks and gives fuel.
        name: The pass that speaks.

    Returns:
        How many were raised.
    """
    raised = 0
    for find, read in ((find_chains, _read_gathers), (find_dense_chains, read_dense)):
        for chain in find(graph):
            op = chain.steps[-1].op
            if ctx.leaves(name, op):
                continue
            try:
                loop = read(graph, chain)
            except Refusal as refusal:
                ctx.remark("missed", name, str(refusal), refusal.op or op)
                continue
            if loop is None:
                continue
            if not ctx.take_fuel(name, loop.what, op):
                return raised
            ctx.remark("applied", name, loop.what, op)
            _replace(graph, loop)
            raised += 1
    return raised
