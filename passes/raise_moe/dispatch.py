"""Reading a block's dispatch: which rows of which tensor go to which expert."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.core import Value
from moec.passes.matching import (
    CASTS,
    VIEWS,
    arg,
    function,
    maker,
    peel,
    peel_views,
    rank,
    same_dim,
    single_index,
    tensor,
)
from moec.passes.raise_moe.anchors import Gemm
from moec.passes.raise_moe.refusal import Refusal


@dataclass(frozen=True)
class DispatchPlan:
    """What the graph says about dispatch.

    Attributes:
        x: ``[T, H]`` token rows.
        ids: Chosen experts, ``[T, k]``, or ``[T*k]`` where they never had two dimensions.
        top_k: k.
        permutation: Slot number of every sorted row (grouped form), else None.
        row_ids: The values that hold the expert id of every row, in row order.
    """

    x: Value
    ids: Value
    top_k: int
    permutation: Value | None
    row_ids: tuple[Value, ...]


def _token_of_slot(index: Value) -> tuple[Value, int] | None:
    """``(slots, k)`` if ``index`` is ``slots // k``."""
    op = maker(index, "floor_divide", "div")
    if op is None or (function(op) == "div" and arg(op, 2, "rounding_mode") not in ("floor", "trunc")):
        return None
    k = arg(op, 1, "other")
    return (arg(op, 0, "self"), k) if isinstance(k, int) else None


def _check_offsets(offsets: Value, experts: object, sorted_ids: Value) -> None:
    """Offsets must be the running sum of the histogram of exactly the sorted ids."""
    running = maker(peel(offsets, CASTS), "cumsum")
    if running is None or arg(running, 1, "dim") not in (0, -1):
        raise Refusal("the row offsets of the grouped GEMM are no running sum of tokens per expert", offsets.op)
    counts = maker(peel(arg(running, 0, "self"), CASTS), "histc", "bincount")
    if counts is None:
        raise Refusal("tokens per expert are not counted by a histogram of the expert ids", running)
    if function(counts) == "histc":
        bins, low, high = arg(counts, 1, "bins", 100), arg(counts, 2, "min", 0), arg(counts, 3, "max", 0)
        if bins != experts or low != 0 or high != bins - 1:
            raise Refusal(f"the histogram has {bins} bins over {low}..{high}, the weight {experts} experts", counts)
    elif arg(counts, 2, "minlength", 0) != experts:
        raise Refusal(f"bincount has not exactly {experts} bins", counts)
    source = peel(arg(counts, 0, "self"), CASTS | VIEWS)
    sort = sorted_ids.op
    assert sort is not None
    if source is not sorted_ids and source is not peel_views(arg(sort, 0, "self")):
        raise Refusal("the histogram counts other ids than the rows are sorted by", counts)


def _sorted(gemm: Gemm) -> DispatchPlan:
    picked = single_index(peel(gemm.rows, ("alias",)))
    if picked is None:
        raise Refusal("the rows of the up GEMM are not gathered from token rows", gemm.op)
    x, index = picked
    slots = _token_of_slot(index)
    if slots is None:
        raise Refusal("the gather of token rows is not by slot // k", gemm.rows.op)
    permutation, top_k = slots
    sort = maker(permutation, "sort", "argsort")
    if sort is None:
        raise Refusal("the slots are not sorted by expert id", permutation.op)
    flat = arg(sort, 0, "self")
    if arg(sort, 2, "descending", False) is True:
        raise Refusal("the slots are sorted in descending order", sort)
    sorted_ids = sort.results[0] if function(sort) == "sort" else None
    if sorted_ids is None:
        gathered = [u.results[0] for u in permutation.users if single_index(u.results[0]) == (flat, permutation)]
        if not gathered:
            raise Refusal("the sorted expert ids are not used", sort)
        sorted_ids = gathered[0]
    experts = tensor(gemm.weight)
    assert experts is not None
    _check_offsets(gemm.groups, int(experts.shape[0]), sorted_ids)
    return DispatchPlan(x, peel_views(flat), top_k, permutation, (sorted_ids,))


def _repeated(rows: Value) -> tuple[Value, int] | None:
    """``(x, k)`` if ``rows`` is every row of ``x`` repeated k times in place."""
    op = maker(rows, "repeat_interleave")
    if op is not None:
        k = arg(op, 1, "repeats")
        return (arg(op, 0, "self"), k) if isinstance(k, int) and arg(op, 2, "dim") == 0 else None
    wide = maker(peel_views(rows), "expand")  # its decomposition: expand [T, 1, H] to [T, k, H], then flatten
    if wide is None or rank(wide.results[0]) != 3:
        return None
    x, wide_type = arg(wide, 0, "self"), tensor(wide.results[0])
    x_type = tensor(x)
    assert wide_type is not None
    if x_type is None or x_type.rank != 3 or x_type.shape[1] != 1 or not wide_type.shape[1].is_Integer:
        return None
    source = peel(x, ("unsqueeze",))
    return (source, int(wide_type.shape[1])) if rank(source) == 2 else None


def _in_slot_order(gemm: Gemm) -> DispatchPlan:
    repeated = _repeated(gemm.rows)
    if repeated is None:
        raise Refusal("the rows of the up GEMM are not the token rows repeated k times", gemm.op)
    x, top_k = repeated
    return DispatchPlan(x, peel_views(gemm.groups), top_k, None, (gemm.groups,))


def read_dispatch(gemm: Gemm) -> DispatchPlan:
    """The dispatch that feeds the up GEMM ``gemm``.

    Raises:
        Refusal: The rows are gathered in a way that the moe dialect does not say.
    """
    plan = _sorted(gemm) if gemm.sorted else _in_slot_order(gemm)
    ids, x = tensor(plan.ids), tensor(plan.x)
    if ids is None or x is None or x.rank != 2 or ids.dtype.kind not in ("int", "uint"):
        raise Refusal("the token rows are no matrix or the expert ids no integers", gemm.op)
    shape_ok = (ids.rank == 2 and ids.shape[1] == plan.top_k) or ids.rank == 1
    slots = ids.shape[0] * (ids.shape[1] if ids.rank == 2 else 1)
    if not shape_ok or not same_dim(slots, x.shape[0] * plan.top_k):
        raise Refusal(
            f"expert ids of shape {list(ids.shape)} do not give each of {x.shape[0]} tokens {plan.top_k}", gemm.op
        )
    return plan
