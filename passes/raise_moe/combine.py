"""Reading a block's combine: how expert rows are weighted and go back to their tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from moec.ir.core import Op, Value
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
from moec.passes.raise_moe.dispatch import DispatchPlan
from moec.passes.raise_moe.refusal import Refusal


@dataclass(frozen=True)
class CombinePlan:
    """What the graph says about the combine.

    Attributes:
        rows: ``[R, H]`` expert rows before weighting.
        weights: Router weights ``[T, k]`` (or ``[T*k]``).
        out: ``[T, H]`` result, its final cast included.
    """

    rows: Value
    weights: Value
    out: Value


def _find_sum(rows: Value) -> Op:
    """The first sum over k downstream of ``rows``."""
    queue, seen = deque([rows]), set()
    while queue:
        value = queue.popleft()
        for user in value.users:
            if user in seen or user.name != "torch.call":
                continue
            seen.add(user)
            if (
                function(user) == "sum"
                and rank(arg(user, 0, "self")) == 3
                and arg(user, 1, "dim") in ([1], 1, [-2], -2)
            ):
                return user
            queue.extend(user.results)
    raise Refusal("the expert rows are not added per token by a sum over k", rows.op)


def _is_inverse(index: Value, permutation: Value) -> bool:
    """True if ``index`` undoes ``permutation``: ``inv[perm] = arange``, or ``argsort(perm)``."""
    op = maker(index, "index_put", "argsort", "sort", "scatter")
    if op is None:
        return False
    if function(op) in ("argsort", "sort"):
        return arg(op, 0, "self") is permutation and index is op.results[-1]
    if function(op) == "scatter":
        where, what = arg(op, 2, "index"), arg(op, 3, "src")
    else:
        indices, what = arg(op, 1, "indices"), arg(op, 2, "values")
        where = indices[0] if len(indices) == 1 else None
    if where is not permutation or arg(op, 3, "accumulate", False) is True:
        return False
    counting = maker(what, "arange")
    if counting is None:
        return False
    positional = counting.attrs.get("args", ())
    if len(positional) == 1:
        return True
    return len(positional) >= 2 and arg(counting, 0) == 0 and arg(counting, 2, "step", 1) == 1


def _column(value: Value) -> Value | None:
    """The vector that ``value`` holds as a column ``[R, 1]``."""
    t = tensor(value)
    if t is None or t.rank != 2 or t.shape[1] != 1:
        return None
    return peel(value, VIEWS)


def _weighting(value: Value, plan: DispatchPlan) -> tuple[Value, Value]:
    """``(rows, weights)`` of the product ``rows * weights[:, None]``."""
    op = maker(value, "mul")
    if op is None:
        raise Refusal("the expert rows are not multiplied by router weights", value.op)
    for rows, column in ((arg(op, 0), arg(op, 1)), (arg(op, 1), arg(op, 0))):
        vector = _column(column) if isinstance(column, Value) else None
        if vector is None:
            continue
        if plan.permutation is None:
            return rows, vector
        picked = single_index(vector)
        if picked is not None and picked[1] is plan.permutation:
            return rows, peel_views(picked[0])
    raise Refusal("the factor on the expert rows is not the router weight of the row's slot", op)


def read_combine(down_out: Value, plan: DispatchPlan) -> CombinePlan:
    """The combine that follows the rows ``down_out`` of the down GEMM.

    Raises:
        Refusal: The rows go elsewhere, in another order, or without router weights.
    """
    total = _find_sum(down_out)
    slots = peel(arg(total, 0, "self"), VIEWS)
    x = tensor(plan.x)
    shape = tensor(arg(total, 0, "self"))
    assert x is not None and shape is not None
    if shape.shape[1] != plan.top_k or not same_dim(shape.shape[0], x.shape[0]):
        raise Refusal(f"the sum runs over {shape.shape[1]} slots, each token has {plan.top_k}", total)
    if arg(total, 3, "dtype") is not None or arg(total, 2, "keepdim", False) is True:
        raise Refusal("the sum over k changes type or keeps its dimension", total)
    if plan.permutation is not None:
        picked = single_index(slots)
        if picked is None or not _is_inverse(picked[1], plan.permutation):
            raise Refusal("the expert rows are not brought back to slot order before the sum", slots.op)
        slots = picked[0]
    rows, weights = _weighting(slots, plan)
    w = tensor(weights)
    if w is None or not ((w.rank == 2 and w.shape[1] == plan.top_k) or w.rank == 1):
        raise Refusal("the router weights have not the shape of the expert ids", slots.op)
    out = total.results[0]
    if len(out.users) == 1 and function(out.users[0]) in CASTS:
        out = out.users[0].results[0]
    return CombinePlan(rows, weights, out)
