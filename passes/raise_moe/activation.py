"""Reading what happens to an expert's rows between its GEMMs: the activation, and a norm after the down GEMM."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from moec.ir.core import Graph, Op, Value
from moec.ir.errors import IRError
from moec.ir.torch_bridge import resolve_target
from moec.passes.matching import ancestors, arg, between, function, last_dim, rank, single_index, tensor
from moec.passes.raise_moe.refusal import Refusal
from moec.passes.regions import NotClosed, extract

_CASTS = frozenset({"to", "_to_copy", "type_as", "clone", "contiguous", "alias"})
_SPLITS = frozenset({"chunk", "split", "split_with_sizes", "slice", "select"})
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


def _check_row_wise(op: Op) -> None:
    """Refuse an op that could mix rows."""
    name = function(op)
    if is_elementwise(op) or name in _ROW_NORMS:
        return
    if op.attrs.get("target") == "py._operator.neg":
        return
    if name in ("squeeze", "unsqueeze"):
        return
    source = arg(op, 0, "self") if name != "cat" else op.operands[0]
    if name in _SPLITS:
        dim = arg(op, 2, "dim", 0) if name in ("chunk", "split", "split_with_sizes") else arg(op, 1, "dim", 0)
    elif name in _ROW_DIM_AT:
        dim = arg(op, _ROW_DIM_AT[name], "dim", None)
    else:
        raise Refusal(
            f"{op.attrs.get('target', op.name)} between the expert GEMMs may mix rows of different tokens", op
        )
    if not last_dim(source, dim):
        raise Refusal(f"{op.attrs['target']} between the expert GEMMs works along dimension {dim}, across rows", op)


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


def _check_captures(captures: list[Value], per_token: Collection[Value]) -> None:
    for value in captures:
        if value in per_token or any(op.results and set(op.results) & set(per_token) for op in ancestors([value])):
            raise Refusal(f"the experts' program uses {value!r}, which differs from token to token", value.op)
        if rank(value) > 1:
            raise Refusal(f"the experts' program uses the matrix {value!r} besides its own rows", value.op)


def read_rows(
    name: str, source: Value, target: Value, per_token: Collection[Value], *, split: bool = True
) -> RowProgram | None:
    """The program from the rows ``source`` to the rows ``target``, or None if they are the same value.

    Args:
        name: Name of the region.
        source: ``[R, N]``.
        target: ``[R, M]``.
        per_token: Values that differ between tokens; the program may not use them besides ``source``.
        split: Look for gate and up in ``source``.

    Raises:
        Refusal: The program mixes rows, is seen from outside, or uses other per-token values.
    """
    if source is target:
        return None
    ops = between([source], target)
    if not ops:
        raise Refusal("the two expert GEMMs are not joined row by row", source.op)
    for op in ops:
        _check_row_wise(op)
        for result in op.results:
            if result is not target and any(u not in ops for u in result.users):
                raise Refusal(f"{result!r}, computed between the expert GEMMs, is also used elsewhere", op)
    if any(u not in ops for u in source.users):
        raise Refusal(f"{source!r}, the result of an expert GEMM, is also used elsewhere", source.op)
    layout, inputs, body = "rows", [source], set(ops)
    halves = _halves(source) if split else None
    rest = ops - {h.op for h in halves[1]} if halves else ops
    if all(is_elementwise(op) for op in rest):
        layout = "single"
        if halves:
            (layout, inputs), body = halves, set(rest)
    t = tensor(source)
    assert t is not None
    try:
        region, captures = extract(name, body, inputs, [target], rows=t.shape[0])
    except NotClosed as e:
        raise Refusal(f"the experts' program cannot stand alone: {e}", source.op) from None
    for arg_, short in zip(region.args, ("h",) if len(inputs) == 1 else ("g", "u"), strict=False):
        arg_.name = short
    _check_captures(captures, per_token)
    if layout == "single" and not split:
        layout = "rows"
    return RowProgram(layout, region, captures)


def split_bias(out: Value, row_ids: Collection[Value]) -> tuple[Value, Value | None]:
    """``(rows, bias)``: the rows after ``out + bias[expert of the row]``, if that is what follows ``out``."""
    users = out.users
    if len(users) == 1 and function(users[0]) == "add" and arg(users[0], 2, "alpha", 1) == 1:
        op = users[0]
        other = arg(op, 1, "other") if arg(op, 0, "self") is out else arg(op, 0, "self")
        picked = single_index(other)
        if picked is not None and picked[1] in row_ids and rank(picked[0]) == 2:
            return op.results[0], picked[0]
    return out, None
