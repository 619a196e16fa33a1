"""Reading what happens to an expert's rows between its GEMMs: the activation, and a norm after the down GEMM."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from moec.ir.core import Graph, Op, Value
from moec.ir.errors import IRError
from moec.ir.torch_bridge import resolve_target
from moec.ir.types import as_dim
from moec.passes.effects import is_pure
from moec.passes.matching import (
    ancestors,
    arg,
    between,
    function,
    last_dim,
    peel_views,
    rank,
    same_dim,
    single_index,
    tensor,
)
from moec.passes.raise_moe.refusal import Refusal
from moec.passes.regions import NotClosed, extract

_CASTS = frozenset({"to", "_to_copy", "type_as", "clone", "contiguous", "alias"})
# Functions of a row that are not elementwise: their ``dim`` must be the last one.
_ROW_DIM_AT = {"sum": 1, "mean": 1, "softmax": 1, "_softmax": 1, "amax": 1, "max": 1, "var": 1, "norm": 2, "cat": 1}
_ROW_NORMS = frozenset({"rms_norm", "layer_norm"})


@dataclass(frozen=True)
class RowProgram:
    """A function of rows as a region.

    Attributes:
        layout: How the region sees the rows (``moe.activation``'s attribute).
        region: From the rows (and captures) to the result.
        captures: What the region uses besides the rows, in argument order.
    """

    layout: str
    region: Graph
    captures: list[Value]


def is_elementwise(op: Op) -> bool:
    """True if the call treats every element by itself (torch's ``pointwise`` tag, and casts)."""
    if op.name != "torch.call":
        return False
    if function(op) in _CASTS:
        return True
    try:
        target = resolve_target(op.attrs["target"])
    except IRError:
        return False
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _check_draws_nothing(op: Op) -> None:
    """Refuse what is not a function of its operands alone."""
    drawn = is_elementwise(op) and torch.Tag.nondeterministic_seeded in resolve_target(op.attrs["target"]).tags
    if drawn or not is_pure(op):
        raise Refusal(f"{op.attrs.get('target', op.name)} between the expert GEMMs draws numbers or writes memory", op)


def keeps_rows_apart(op: Op) -> bool:
    """True if the op is elementwise, or works inside rows along the last dimension."""
    name = function(op)
    if is_elementwise(op):
        return True
    source = tensor(op.operands[0])
    if source is None or source.rank < 2:
        return False
    if name in ("unsqueeze", "squeeze"):
        dim, room = arg(op, 1, "dim"), source.rank + (name == "unsqueeze")
        return isinstance(dim, int) and dim % room != 0
    if name in _ROW_NORMS:
        shape = arg(op, 1, "normalized_shape")
        return isinstance(shape, (list, tuple)) and len(shape) == 1
    if name in ("chunk", "split", "split_with_sizes"):
        return last_dim(op.operands[0], arg(op, 2, "dim", 0))
    if name in ("slice", "select"):
        return last_dim(op.operands[0], arg(op, 1, "dim", 0))
    return name in _ROW_DIM_AT and last_dim(op.operands[0], arg(op, _ROW_DIM_AT[name], "dim"))


def _check_rows(ops: Sequence[Op], sources: Sequence[Value]) -> None:
    """Refuse a program that could mix rows or look at their positions.

    The row must stay the first dimension of every value. Values of one op that hold rows have the same rank, so that
    broadcasting cannot put a row beside another one; what else the op uses has a smaller rank.
    """
    first = tensor(sources[0])
    assert first is not None
    held: set[Value] = set(sources)
    for op in ops:
        target = op.attrs.get("target", op.name)
        _check_draws_nothing(op)
        ranks = {rank(v) for v in op.operands if v in held}
        others = [rank(v) for v in op.operands if v not in held]
        aligned = len(ranks) == 1 and max(others, default=0) < min(ranks)
        shapes = [t.shape if (t := tensor(r)) is not None else () for r in op.results]
        if not (keeps_rows_apart(op) and all(s and same_dim(s[0], first.shape[0]) for s in shapes)):
            raise Refusal(f"{target} between the expert GEMMs may mix rows of different tokens", op)
        if not aligned and function(op) not in ("to", "type_as"):
            raise Refusal(
                f"{target} between the expert GEMMs uses a matrix besides the rows, or rows of two shapes", op
            )
        held |= set(op.results)


def _halves(h: Value) -> tuple[str, list[Value]] | None:
    """``(layout, [gate, up])`` if every use of ``h`` takes one of its two halves, or its even or odd columns."""
    t = tensor(h)
    users = [u for u in h.users if function(u) not in ("_assert_tensor_metadata", "sym_size")]
    if t is None or not t.shape[1].is_Integer:
        return None
    width = int(t.shape[1])
    if len(users) == 1 and function(users[0]) in ("chunk", "split", "split_with_sizes"):
        op = users[0]
        if (
            len(op.results) == 2
            and last_dim(h, arg(op, 2, "dim", 0))
            and tensor(op.results[0]) == tensor(op.results[1])
        ):
            return "concat", list(op.results)
        return None
    pieces: dict[tuple[int, int, int], Value] = {}
    for op in users:
        if function(op) != "slice" or not last_dim(h, arg(op, 1, "dim", 0)):
            return None
        start, stop, step = arg(op, 2, "start") or 0, arg(op, 3, "end"), arg(op, 4, "step", 1)
        if not all(isinstance(n, int) for n in (start, step)) or not (stop is None or isinstance(stop, int)):
            return None
        pieces[(start, min(stop, width) if stop is not None else width, step)] = op.results[0]
    if set(pieces) == {(0, width // 2, 1), (width // 2, width, 1)} and width % 2 == 0:
        return "concat", [pieces[(0, width // 2, 1)], pieces[(width // 2, width, 1)]]
    if set(pieces) == {(0, width, 2), (1, width, 2)}:
        return "interleaved", [pieces[(0, width, 2)], pieces[(1, width, 2)]]
    return None


def check_captures(captures: list[Value], per_token: Collection[Value]) -> None:
    """Refuse a program that uses values of the tokens besides its rows, or a matrix."""
    for value in captures:
        if value in per_token or any(v in per_token for op in ancestors([value]) for v in op.operands):
            raise Refusal(
                f"the experts' program uses {value!r}, which is computed from the tokens or their ids", value.op
            )
        if rank(value) > 1:
            raise Refusal(f"the experts' program uses the matrix {value!r} besides its own rows", value.op)


def _layout(sources: list[Value], ops: list[Op], split: bool) -> tuple[str, list[Value], list[Op]]:
    """``(layout, inputs of the region, ops of the region)``."""
    halves = _halves(sources[0]) if split and len(sources) == 1 else None
    makers = {h.op for h in halves[1]} if halves else set()
    rest = [op for op in ops if op not in makers]
    inputs = halves[1] if halves else sources
    shapes = {t.shape for v in (*inputs, *(r for op in rest for r in op.results)) if (t := tensor(v)) is not None}
    if split and len(shapes) == 1 and all(is_elementwise(op) for op in rest):
        return (halves[0] if halves else "single" if len(sources) == 1 else "separate"), inputs, rest
    if len(sources) > 1:
        raise Refusal("gate and up come from two GEMMs and are not joined element by element", sources[0].op)
    return "rows", sources, ops


def read_rows(
    name: str, sources: list[Value], target: Value, per_token: Collection[Value], *, split: bool = True
) -> RowProgram | None:
    """The program from the rows ``sources`` to the rows ``target``, or None if they are the same value.

    Args:
        name: Name of the region.
        sources: ``[R, N]``; two where gate and up are apart.
        target: ``[R, M]``.
        per_token: Values that differ between tokens; the program may not use them besides ``sources``.
        split: Look for gate and up in ``sources``; else the program is one of whole rows.

    Raises:
        Refusal: The program mixes rows, is seen from outside, or uses other per-token values.
    """
    if sources == [target]:
        return None
    found = between(sources, target)
    graph = next((op.parent for op in found), None)
    if graph is None:
        raise Refusal("the two expert GEMMs are not joined row by row", sources[0].op)
    ops = [op for op in graph.ops if op in found]
    for op in ops:
        for result in op.results:
            if result is not target and any(u not in found for u in result.users):
                raise Refusal(f"{result!r}, computed between the expert GEMMs, is also used elsewhere", op)
    for source in sources:
        if any(u not in found for u in source.users):
            raise Refusal(f"{source!r}, the result of an expert GEMM, is also used elsewhere", source.op)
    _check_rows(ops, sources)
    layout, inputs, body = _layout(sources, ops, split)
    t = tensor(sources[0])
    assert t is not None
    try:
        region, captures = extract(name, body, inputs, [target], rows=t.shape[0])
    except NotClosed as e:
        raise Refusal(f"the experts' program cannot stand alone: {e}", sources[0].op) from None
    for arg_, short in zip(region.args, ("h",) if len(inputs) == 1 else ("g", "u"), strict=False):
        arg_.name = short
    check_captures(captures, per_token)
    return RowProgram(layout, region, captures)


def split_bias(out: Value, experts: int, row_ids: Collection[Value]) -> tuple[Value, Value | None]:
    """``(rows, bias)``: the rows after ``out + bias[expert of the row]``, if that is what follows ``out``."""
    users, rows = out.users, tensor(out)
    if rows is None or len(users) != 1 or function(users[0]) != "add" or arg(users[0], 2, "alpha", 1) != 1:
        return out, None
    op = users[0]
    picked = single_index(arg(op, 1, "other") if arg(op, 0, "self") is out else arg(op, 0, "self"))
    if picked is None or not any(peel_views(picked[1]) is peel_views(r) for r in row_ids):
        return out, None
    bias = tensor(picked[0])
    if bias is None or bias != rows.with_(shape=(as_dim(experts), rows.shape[1])):
        return out, None
    return op.results[0], picked[0]
