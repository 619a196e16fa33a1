"""Which dense MLPs stand beside a MoE block: their result is added to the block's, and they read what it reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from moec.ir.core import Graph, Op, Value
from moec.passes.matching import CASTS, VIEWS, ancestors, arg, function, peel, peel_views, tensor
from moec.passes.raise_shared_experts.dense import CALLS, Dense, feeders, read_dense

_ADDS = frozenset({"add", "add_", "sub", "rsub"})
_SCALES = frozenset({"mul", "mul_", "div", "div_"})
_STEPS = VIEWS | CASTS | _SCALES | _ADDS | {"view_as", "reshape_as"}
_ONWARD = _STEPS | {"sum"}
"""What may lie between a block and the sum: the rows of a token's choices may still have to be added."""
BLOCKS = ("moe.combine", "moe.experts")


def beside_blocks(graph: Graph) -> Iterator[tuple[Dense, list[Dense]]]:
    """The down GEMM and the GEMMs that feed it, of every shared expert of a whole program.

    What the block's own result depends on is not beside it: a dense layer before the block is none of its experts.
    """
    told: set[Op] = set()
    for block in [op for op in graph.ops if op.name in BLOCKS]:
        before = ancestors([block.result])
        read = {v for op in before for v in op.operands}
        for down in _added(block.result, before):
            ups = feeders(down, before)
            if down.op not in told and any(up.rows in read or peel_views(up.rows) in read for up in ups):
                told.add(down.op)
                yield down, ups


def alone(result: Value) -> tuple[Dense, list[Dense]] | None:
    """The GEMMs of a shared expert that was cut out of its model, by its result."""
    values = [result]
    while values:
        value = peel(values.pop(), VIEWS | CASTS)
        down = read_dense(value.op)
        if down is not None:
            return down, feeders(down)
        if function(value.op) in _SCALES:
            values += [v for v in reversed(value.op.operands) if tensor(v) is not None]
    return None


def _added(result: Value, before: Collection[Op]) -> Iterator[Dense]:
    """The dense GEMMs whose results are added to a block's result: scaled, cast or viewed on the way, or not."""
    seen: set[Value] = {result}
    stack = [(result, True)]
    while stack:
        value, may_project = stack.pop()
        for user in value.users:
            name = function(user)
            projects = name in CALLS and may_project and arg(user, 1 if name == "addmm" else 0) is value
            if name not in _ONWARD and not projects:
                continue
            if name in _ADDS:
                for other in user.operands:
                    if other is not value:
                        yield from _behind(other, before)
            new = [r for r in user.results if r not in seen]
            seen.update(new)
            stack += [(r, may_project and not projects) for r in new]


def _behind(value: Value, before: Collection[Op]) -> Iterator[Dense]:
    """The dense GEMMs that ``value`` is a sum of."""
    seen: set[Op] = set()
    stack = [value]
    while stack:
        op = stack.pop().op
        if op is None or op in seen or op in before:
            continue
        seen.add(op)
        if (dense := read_dense(op)) is not None:
            yield dense
        elif function(op) in _STEPS:
            stack.extend(op.operands)
