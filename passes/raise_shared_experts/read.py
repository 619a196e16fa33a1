"""Reading a shared expert: a dense MLP on all tokens, and the factor of each token that its result may have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from moec.ir.core import Graph, Op, Value
from moec.ir.types import TensorType, as_dim
from moec.passes.hazards import write_within
from moec.passes.matching import VIEWS, ancestors, between, function, rank, same_dim, tensor
from moec.passes.raise_moe.activation import RowProgram, check_captures, read_rows
from moec.passes.raise_moe.combine import read_factor
from moec.passes.raise_moe.refusal import Refusal
from moec.passes.raise_shared_experts.dense import Dense
from moec.passes.raise_shared_experts.flatten import flat_rows


@dataclass(frozen=True)
class SharedExpert:
    """A shared expert as read from the graph.

    Attributes:
        x: Tokens ``[..., H]``.
        ups: Its up GEMM, or gate and up.
        down: Its down GEMM.
        activation: Between them; None if the rows go on as they are.
        factor: ``[..., 1]``, what each token's result is multiplied with; None for nothing.
        out: ``[..., N]``, its result.
    """

    x: Value
    ups: Sequence[Dense]
    down: Dense
    activation: RowProgram | None
    factor: Value | None
    out: Value


def read_shared(down: Dense, ups: Sequence[Dense]) -> SharedExpert:
    """The shared expert that ends in ``down``, with all that is part of it.

    Raises:
        Refusal: It is another computation, something of it is seen elsewhere, or its weights are no parameters.
    """
    _check_gemms(down, ups)
    sources = [up.out for up in ups]
    found = between(sources, down.rows)
    graph = down.op.parent
    assert graph is not None
    ops = [op for op in graph.ops if op in found] if found else []
    _check_closed([*ops, *(up.op for up in ups)], down)
    many = any(rank(v) != 2 for v in (*sources, down.rows, *(r for op in ops for r in op.results)))
    x = ups[0].rows
    if not many or not ops:
        program = read_rows("activation", sources, down.rows, {x})
    else:
        program = flat_rows(ops, sources, down.rows)
    if program is not None:
        check_captures(program.captures, {x, *sources})
    factor, out = _factor_after(down.out)
    lead, width = _lead(out), [_rows(v) for v in (x, down.out, *([] if factor is None else [factor]))]
    if not all(same_dim(w, _rows(out)) for w in width):
        raise Refusal("the dense MLP does not give one row for each of its own", down.op)
    if len(lead) > 1 and sum(not d.is_Integer for d in lead) > 1 and _lead(x) != lead:
        raise Refusal("the dense MLP gives its rows in another shape than it takes them in", down.op)
    expert = SharedExpert(x, ups, down, program, factor, out)
    _check_writes(graph, expert)
    return expert


def _lead(value: Value) -> tuple[sympy.Expr, ...]:
    t = tensor(value)
    assert t is not None
    return t.shape[:-1]


def _rows(value: Value) -> sympy.Expr:
    t = tensor(value)
    assert t is not None
    return as_dim(math.prod(t.shape[:-1]))


def _check_gemms(down: Dense, ups: Sequence[Dense]) -> None:
    """Refuse GEMMs that are no gate, up and down of one expert with parameters of its own."""
    if not 1 <= len(ups) <= 2:
        raise Refusal(
            f"{len(ups)} dense GEMMs feed the last one of the MLP; gate and up, together or apart, are known", down.op
        )
    if any(up.rows is not ups[0].rows for up in ups):
        raise Refusal("the gate and the up GEMM of the dense MLP read different rows", ups[-1].op)
    if len({(up.form, up.bias is None) for up in ups}) > 1:
        raise Refusal("gate and up of the dense MLP lie differently, or one of them has a bias", ups[-1].op)
    for gemm in (*ups, down):
        rows = tensor(gemm.rows)
        if rows is None or not rows.shape[-1].is_Integer:
            raise Refusal("the width of the dense MLP's rows is not known", gemm.op)
        if not gemm.plain:
            raise Refusal(f"{gemm.weight!r}, a weight of the dense MLP, is no parameter but computed", gemm.op)
        t = tensor(gemm.weight)
        if t is None or not all(d.is_Integer for d in t.shape):
            raise Refusal(f"{gemm.weight!r}, a weight of the dense MLP, has a size that is not fixed", gemm.op)


def _check_closed(inside: Sequence[Op], down: Dense) -> None:
    """Refuse an MLP of which something but the result is used elsewhere."""
    own = {*inside, down.op}
    for op in inside:
        for result in op.results:
            if any(u not in own for u in result.users):
                raise Refusal(f"{result!r}, inside the dense MLP, is also used elsewhere", op)


def _factor_after(rows: Value) -> tuple[Value | None, Value]:
    """``(factor, result)``: the factor of each row that is all that follows ``rows``; ``(None, rows)`` without one."""
    value = rows
    while len(value.users) == 1 and function(value.users[0]) in VIEWS and _same_width(value, value.users[0].results[0]):
        value = value.users[0].results[0]
    if len(value.users) != 1 or function(value.users[0]) != "mul":
        return None, rows
    op = value.users[0]
    try:
        multiplied, factor = read_factor(op, None)
    except Refusal:
        return None, rows
    return (factor, op.results[0]) if multiplied is value else (None, rows)


def _same_width(a: Value, b: Value) -> bool:
    before, after = tensor(a), tensor(b)
    return before is not None and after is not None and same_dim(before.shape[-1], after.shape[-1])


def _check_writes(graph: Graph, expert: SharedExpert) -> None:
    weights = [v for g in (*expert.ups, expert.down) for v in (g.weight, g.bias) if v is not None]
    captures = expert.activation.captures if expert.activation is not None else []
    outside = [expert.x, *weights, *captures, *([] if expert.factor is None else [expert.factor])]
    write = write_within(graph, ancestors([expert.out], outside))
    if write is not None:
        raise Refusal(f"{write.attrs.get('target', write.name)} writes to memory of the dense MLP while it runs", write)


def row_type(value: Value) -> TensorType:
    """``[..., N]`` as ``[T, N]``."""
    t = tensor(value)
    assert t is not None
    return t.with_(shape=(as_dim(math.prod(t.shape[:-1])), t.shape[-1]))
