"""Reading a block's dispatch: which rows of which tensor go to which expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from moec.ir.core import Op, Value
from moec.ir.types import as_dim
from moec.passes.matching import (
    CASTS,
    VIEWS,
    arg,
    as_slots,
    function,
    maker,
    peel,
    peel_views,
    rank,
    same_dim,
    single_index,
    tensor,
    whole,
)
from moec.passes.raise_moe.anchors import Gemm
from moec.passes.raise_moe.refusal import Refusal

_EXACT_COUNT_BITS = 32
"""Casts to fewer bits could change a count of rows."""
_EXACT_ID_BITS = 16
"""Casts to fewer bits could change an expert id."""


@dataclass(frozen=True)
class DispatchPlan:
    """What the graph says about dispatch.

    Attributes:
        x: ``[T, H]`` token rows.
        ids: Chosen experts, ``[T, k]``, or ``[T*k]`` where they never had two dimensions.
        top_k: k, a number or what run time makes of a size.
        permutation: Slot number of every sorted row (grouped form), else None.
        row_ids: The values that hold the expert id of every row, in row order.
    """

    x: Value
    ids: Value
    top_k: sympy.Expr
    permutation: Value | None
    row_ids: tuple[Value, ...]


def _token_of_slot(index: Value) -> tuple[Value, sympy.Expr] | None:
    """``(slots, k)`` if ``index`` is ``slots // k``."""
    op = maker(index, "floor_divide", "div")
    if op is None or (function(op) == "div" and arg(op, 2, "rounding_mode") not in ("floor", "trunc")):
        return None
    k = whole(arg(op, 1, "other"))
    return (arg(op, 0, "self"), k) if k is not None else None


def _peel_exact(value: Any, names: frozenset[str], bits: int) -> Any:
    """``value`` without the casts and views in ``names``; a cast to fewer than ``bits`` bits stays."""
    while (op := maker(value, *names)) is not None:
        t = tensor(value)
        if function(op) in CASTS and (t is None or t.dtype.bits < bits):
            return value
        value = arg(op, 0, "self")
    return value


def _check_offsets(offsets: Value, experts: int, flat: Value, sorted_ids: Value | None) -> None:
    """Offsets must be the running sum of the histogram of exactly the sorted ids."""
    running = maker(_peel_exact(offsets, CASTS, _EXACT_COUNT_BITS), "cumsum")
    total = tensor(running.results[0]) if running is not None else None
    if running is None or total is None or arg(running, 1, "dim") not in (0, -1):
        raise Refusal("the row offsets of the grouped GEMM are no running sum of tokens per expert", offsets.op)
    if total.dtype.bits < _EXACT_COUNT_BITS:
        raise Refusal(
            f"the running sum of tokens per expert is taken in {total.dtype}, which cannot count far", running
        )
    counts = maker(_peel_exact(arg(running, 0, "self"), CASTS, _EXACT_COUNT_BITS), "histc", "bincount")
    if counts is None:
        raise Refusal("tokens per expert are not counted by a histogram of the expert ids", running)
    if function(counts) == "histc":
        bins, low, high = arg(counts, 1, "bins", 100), arg(counts, 2, "min", 0), arg(counts, 3, "max", 0)
        if bins != experts or low != 0 or high != bins - 1:
            raise Refusal(f"the histogram has {bins} bins over {low}..{high}, the weight {experts} experts", counts)
    elif arg(counts, 1, "weights") is not None:
        raise Refusal("bincount adds weights instead of counting", counts)
    elif arg(counts, 2, "minlength", 0) != experts:
        raise Refusal(f"bincount has not exactly {experts} bins", counts)
    same = CASTS | VIEWS
    source = _peel_exact(arg(counts, 0, "self"), same, _EXACT_ID_BITS)
    if source is not sorted_ids and source is not _peel_exact(flat, same, _EXACT_ID_BITS):
        raise Refusal("the histogram counts other ids than the rows are sorted by", counts)


def _check_sort(sort: Op) -> None:
    if arg(sort, 2, "descending", False) is not False:
        raise Refusal("the slots are sorted in descending order", sort)


def _sorted_slots(rows: Value) -> tuple[Value, Value, sympy.Expr]:
    """``(x, permutation, k)`` from the sorted rows of the up GEMM."""
    picked = single_index(peel(rows, ("alias",)))
    if picked is None:
        raise Refusal("the rows of the up GEMM are not gathered from token rows", rows.op)
    x, index = picked
    slots = _token_of_slot(index)
    if slots is not None:
        return x, *slots
    if maker(index, "sort", "argsort") is None:
        raise Refusal("the gather of token rows is not by slot // k", rows.op)
    repeated = repeated_rows(x)  # rows repeated per slot first, then sorted
    return (repeated[0], index, repeated[1]) if repeated is not None else (x, index, as_dim(1))


def _sorted(gemm: Gemm) -> DispatchPlan:
    x, permutation, top_k = _sorted_slots(gemm.rows)
    sort = maker(permutation, "sort", "argsort")
    if sort is None or permutation is not sort.results[-1]:
        raise Refusal("the slots are not sorted by expert id", permutation.op)
    flat = arg(sort, 0, "self")
    _check_sort(sort)
    if function(sort) == "sort":
        gathered = [sort.results[0]]
    else:
        picks = ((u, single_index(u.results[0])) for u in permutation.users if len(u.results) == 1)
        gathered = [
            u.results[0] for u, p in picks if p and p[1] is permutation and peel_views(p[0]) is peel_views(flat)
        ]
    source = next((g for g in gathered), None)
    _check_offsets(gemm.groups, expert_count(gemm), flat, source)
    return DispatchPlan(x, flat, top_k, permutation, tuple(gathered))


def expert_count(gemm: Gemm) -> int:
    """E of a GEMM's weights.

    Raises:
        Refusal: E is not a number.
    """
    if not gemm.stacked:
        return len(gemm.weights)
    weight = tensor(gemm.weights[0])
    if weight is None or not weight.shape[0].is_Integer:
        raise Refusal("the number of experts is not known before run time", gemm.op)
    return int(weight.shape[0])


def repeated_rows(rows: Value) -> tuple[Value, sympy.Expr] | None:
    """``(x, k)`` if ``rows`` is every row of ``x`` repeated k times in place."""
    op = maker(rows, "repeat_interleave")
    if op is not None:
        k = whole(arg(op, 1, "repeats"))
        return (arg(op, 0, "self"), k) if k is not None and arg(op, 2, "dim") == 0 else None
    wide = maker(peel_views(rows), "expand")  # its decomposition: expand [T, 1, H] to [T, k, H], then flatten
    if wide is None or rank(wide.results[0]) != 3:
        return None
    x, spread, flat = arg(wide, 0, "self"), tensor(wide.results[0]), tensor(rows)
    narrow = tensor(x)
    if narrow is None or spread is None or flat is None or narrow.rank != 3 or narrow.shape[1] != 1:
        return None
    if not same_dim(spread.shape[0], narrow.shape[0]):
        return None
    if not same_dim(spread.shape[2], narrow.shape[2]) or not same_dim(flat.shape[-1], narrow.shape[2]):
        return None
    source = peel(x, ("unsqueeze",))  # no further: a view of the tokens may lie behind
    source_type = tensor(source)
    if source_type is None or source_type.rank != 2 or not same_dim(source_type.shape[1], narrow.shape[2]):
        return None
    return source, spread.shape[1]


def _in_slot_order(gemm: Gemm) -> DispatchPlan:
    repeated = repeated_rows(gemm.rows)
    rows, ids = tensor(gemm.rows), tensor(gemm.groups)
    if repeated is None and rows is not None and ids is not None and same_dim(rows.shape[0], ids.shape[0]):
        repeated = gemm.rows, as_dim(1)  # one expert per row, as the weight was indexed
    if repeated is None:
        raise Refusal("the rows of the up GEMM are not the token rows repeated k times", gemm.op)
    x, top_k = repeated
    return DispatchPlan(x, gemm.groups, top_k, None, (gemm.groups,))


def read_dispatch(gemm: Gemm) -> DispatchPlan:
    """The dispatch that feeds the up GEMM ``gemm``.

    Raises:
        Refusal: The rows are gathered in a way that the moe dialect does not say.
    """
    plan = _sorted(gemm) if gemm.sorted else _in_slot_order(gemm)
    flat, x = tensor(plan.ids), tensor(plan.x)
    if flat is None or x is None or x.rank != 2 or flat.dtype.kind != "int":
        raise Refusal("the token rows are no matrix or the expert ids no integers", gemm.op)
    ids = as_slots(plan.ids, x.shape[0], plan.top_k)
    if ids is None:
        raise Refusal(
            f"expert ids of shape {list(flat.shape)} do not give each of {x.shape[0]} tokens {plan.top_k}", gemm.op
        )
    return DispatchPlan(plan.x, ids, plan.top_k, plan.permutation, plan.row_ids)
