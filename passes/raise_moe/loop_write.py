"""Writing a loop over experts as one block of the moe dialect, and erasing the loop.

The reference adds experts in their order, ``moe.combine`` adds slots in the order of k; and it rounds to the sum's type
once, at the end, where the loop rounds after every addition. Nothing else changes about the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.core import Graph, Op, Value
from moec.ir.types import DTYPES, DType, as_dim
from moec.passes.matching import tensor
from moec.passes.raise_moe.block import Block, Emitter
from moec.passes.raise_moe.loop_branches import Branch
from moec.passes.raise_moe.loop_experts import collect
from moec.passes.raise_moe.loop_ids import keep_ids, may_miss, renumber
from moec.passes.raise_moe.loop_rows import Factor, Weighting
from moec.passes.raise_moe.loops import Loop

_IDS = DTYPES["i64"]
"""The type of ids in a block: others may be unsigned, and no index for torch."""


def cast_all(emit: Emitter, value: Value, casts: Sequence[DType]) -> Value:
    """``value`` cast to one type after the other."""
    for dtype in casts:
        t = tensor(value)
        assert t is not None
        value = emit.call("aten.to.dtype", (value, dtype), t.with_(dtype=dtype))
    return value


def no_weights(emit: Emitter, weighting: Weighting, ids: Value) -> Value:
    """Weights of one for every slot of ``ids``, in the type of the rows."""
    i, finished = tensor(ids), tensor(weighting.finished)
    assert i is not None and finished is not None
    dtype = finished.dtype
    return emit.call("aten.ones_like.default", (ids,), i.with_(dtype=dtype), {"dtype": dtype})


def _of_choices(emit: Emitter, factor: Factor, ids: Value) -> Value:
    """The weights of a token's choices."""
    i, gates = tensor(ids), tensor(factor.weights)
    assert i is not None and gates is not None
    if not factor.by_expert:
        return factor.weights
    return emit.call("aten.gather.default", (factor.weights, 1, ids), i.with_(dtype=gates.dtype))


def write_loop(emit: Emitter, loop: Loop) -> Value:
    """Write the block of ``loop``; the new sum."""
    t, out, factor = tensor(loop.ids), tensor(loop.out), loop.kind.weighting.factor
    assert t is not None and out is not None
    top_k = as_dim(1) if t.rank == 1 else t.shape[1]
    numbers = loop.ids if t.dtype == _IDS else emit.call("aten.to.dtype", (loop.ids, _IDS), t.with_(dtype=_IDS))
    chosen = emit.matrix(numbers, t.shape[0], top_k)
    ids = keep_ids(emit, chosen, loop.keep)
    experts = [b.expert for b in loop.kind.branches]
    if factor is None:
        weights = no_weights(emit, loop.kind.weighting, ids)
    else:
        weights = cast_all(emit, _of_choices(emit, factor, chosen), factor.casts)
        weights = emit.matrix(weights, t.shape[0], top_k)
    *ups, down = collect(loop.expert, loop.kind.first.outside, [b.outside for b in loop.kind.branches])
    block = Block(
        x=cast_all(emit, loop.kind.x, loop.expert.casts),
        ids=renumber(emit, ids, experts),
        weights=weights,
        top_k=top_k,
        experts=len(experts),
        ups=ups,
        down=down,
        activation=loop.expert.activation,
        inner=loop.expert.down.rows,
        post=loop.expert.post,
        finished=loop.expert.finished,
        out=out,
        sentinels=may_miss(loop.ids, loop.keep, experts),
    )
    total = block.write(emit, loop.out.name)
    if loop.start is not None:
        total = emit.call("aten.add.Tensor", (loop.start, total), out)
    for term in loop.terms:
        total = term.write(emit, total, ids, weights)
    return total


def erase(graph: Graph, branches: Sequence[Branch]) -> None:
    """Erase what only the loop used: its steps, its experts, and asserts about their sizes."""
    checks = {op for b in branches for op in b.checks}
    mine = {op for b in branches for op in (*b.ops, *b.step.own, b.step.op)} | checks
    dead: set[Op] = set()
    for op in reversed(graph.ops):
        if op in mine and (op in checks or all(u in dead for r in op.results for u in r.users)):
            dead.add(op)
    graph.erase_many(dead)
