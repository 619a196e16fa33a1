"""Reading a block's combine: how expert rows are weighted and go back to their tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from moec.ir.core import Op, Value
from moec.passes.matching import (
    CASTS,
    VIEWS,
    arg,
    as_slots,
    function,
    maker,
    peel,
    rank,
    same_dim,
    single_index,
    tensor,
)
from moec.passes.raise_moe.dispatch import DispatchPlan
from moec.passes.raise_moe.refusal import Refusal

_OTHER_SUMS = frozenset({"index_add", "scatter_add", "index_put", "einsum", "bmm", "matmul", "scatter_reduce"})
_OVER_SLOTS = ([1], 1, [-2], -2)


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


def _downstream(rows: Value) -> Iterator[Op]:
    """The torch calls that use ``rows``, nearest first."""
    queue, seen = deque([rows]), set()
    while queue:
        for user in queue.popleft().users:
            if user not in seen and user.name == "torch.call":
                seen.add(user)
                yield user
                queue.extend(user.results)


def _is_inverse(index: Value, permutation: Value) -> bool:
    """True if ``index`` undoes ``permutation``: ``inv[perm] = arange``, or ``argsort(perm)``."""
    op = maker(index, "index_put", "argsort", "sort", "scatter")
    if op is None:
        return False
    if function(op) in ("argsort", "sort"):
        ascending = arg(op, 2, "descending", False) is False
        return ascending and arg(op, 0, "self") is permutation and index is op.results[-1]
    if function(op) == "scatter":
        where, what = arg(op, 2, "index"), arg(op, 3, "src")
        plain = arg(op, 4, "reduce") is None
    else:
        indices, what = arg(op, 1, "indices"), arg(op, 2, "values")
        where = indices[0] if len(indices) == 1 else None
        plain = arg(op, 3, "accumulate", False) is not True
    counting = maker(peel(what, VIEWS), "arange")  # of one number, torch makes a view
    if where is not permutation or not plain or counting is None:
        return False
    length, slots = tensor(counting.results[0]), tensor(permutation)
    if length is None or slots is None or not same_dim(length.shape[0], slots.shape[0]):
        return False
    positional = counting.attrs.get("args", ())
    if len(positional) == 1:
        return True
    return len(positional) >= 2 and arg(counting, 0) == 0 and arg(counting, 2, "step", 1) == 1


def read_factor(op: Op, permutation: Value | None) -> tuple[Value, Value]:
    """``(rows, weights)`` of ``rows * weights[..., None]`` with one weight per slot.

    Args:
        op: The product.
        permutation: How the rows are sorted; the weights must be sorted by it too. None: both lie in slot order.

    Raises:
        Refusal: It is another product.
    """
    for rows, column in ((arg(op, 0), arg(op, 1)), (arg(op, 1), arg(op, 0))):
        r, c = tensor(rows), tensor(column)
        if r is None or c is None or r.rank != c.rank or c.rank < 2 or c.shape[-1] != 1:
            continue
        if not all(same_dim(a, b) for a, b in zip(r.shape[:-1], c.shape[:-1], strict=True)):
            continue
        if permutation is None:
            return rows, column
        picked = single_index(peel(column, VIEWS))
        if picked is not None and picked[1] is permutation:
            return rows, picked[0]
    raise Refusal("the factor on the expert rows is not the router weight of the row's slot", op)


def _unwind(value: Value, plan: DispatchPlan) -> tuple[Value, Value]:
    """``(rows, weights)`` behind ``value``, the weighted rows in slot order. Weighting may come before reordering.

    Raises:
        Refusal: One of the two is missing or is not what it should be.
    """
    weights: Value | None = None
    order: Value | None = None  # how the rows lie at ``value``
    while weights is None or order is not plan.permutation or rank(value) != 2:
        op = maker(value, *VIEWS, "mul", "index", "index_select")
        if op is None:
            break
        if function(op) in VIEWS:
            value = arg(op, 0, "self")
        elif function(op) == "mul" and weights is None:
            value, weights = read_factor(op, order)
        else:
            picked = single_index(value)
            if picked is None or order is not None or plan.permutation is None:
                break
            if not _is_inverse(picked[1], plan.permutation):
                raise Refusal("the expert rows are brought to an order that is not that of the slots", op)
            value, order = picked[0], plan.permutation
    if weights is None:
        raise Refusal("the expert rows are not multiplied by router weights", value.op)
    if order is not plan.permutation:
        raise Refusal("the expert rows are not brought back to slot order before the sum", value.op)
    return value, weights


def _find_sum(rows: Value) -> Op | None:
    """The first sum over k downstream of ``rows``."""
    for op in _downstream(rows):
        if function(op) == "sum" and rank(arg(op, 0, "self")) == 3 and arg(op, 1, "dim") in _OVER_SLOTS:
            return op
    return None


def _without_sum(rows: Value, plan: DispatchPlan) -> tuple[Value, Value, Value]:
    """``(rows, weights, out)`` of a block with one expert per token, which needs no sum."""
    refusal = Refusal("the expert rows are not multiplied by router weights", rows.op)
    for op in _downstream(rows):
        if function(op) not in ("mul", "index", "index_select"):
            continue
        try:
            return *_unwind(op.results[0], plan), op.results[0]
        except Refusal as reason:
            refusal = reason
    raise refusal


def read_combine(down_out: Value, plan: DispatchPlan) -> CombinePlan:
    """The combine that follows the rows ``down_out`` of the down GEMM.

    Raises:
        Refusal: The rows go elsewhere, in another order, or without router weights.
    """
    x = tensor(plan.x)
    assert x is not None
    total = _find_sum(down_out)
    if total is not None:
        summed = tensor(arg(total, 0, "self"))
        assert summed is not None
        if summed.shape[1] != plan.top_k or not same_dim(summed.shape[0], x.shape[0]):
            raise Refusal(f"the sum runs over {summed.shape[1]} slots, each token has {plan.top_k}", total)
        if arg(total, 3, "dtype") is not None or arg(total, 2, "keepdim", False) is True:
            raise Refusal("the sum over k changes type or keeps its dimension", total)
        (rows, factor), out = _unwind(arg(total, 0, "self"), plan), total.results[0]
    elif plan.top_k == 1:
        rows, factor, out = _without_sum(down_out, plan)
    else:
        other = next((function(op) for op in _downstream(down_out) if function(op) in _OTHER_SUMS), None)
        how = f"; they are added by {other}" if other else ""
        raise Refusal(f"the expert rows are not added per token by a sum over k{how}", down_out.op)
    weights = as_slots(factor, x.shape[0], plan.top_k)
    row_type, out_type = tensor(rows), tensor(out)
    assert row_type is not None and out_type is not None
    if weights is None:
        raise Refusal("the router weights have not the shape of the expert ids", rows.op)
    slots = (x.shape[0] * plan.top_k, x.shape[0])
    if out_type.rank != 2 or not all(
        same_dim(t.shape[0], n) and same_dim(t.shape[1], out_type.shape[1])
        for t, n in zip((row_type, out_type), slots, strict=True)
    ):
        raise Refusal("the sum over k does not give one row per token as wide as the expert rows", out.op)
    return CombinePlan(rows, weights, _with_cast(out))


def _with_cast(out: Value) -> Value:
    """``out`` with the cast that is its only use."""
    users = out.users
    if len(users) != 1 or function(users[0]) not in CASTS or users[0].operands[0] is not out:
        return out
    before, after = tensor(out), tensor(users[0].results[0])
    assert before is not None and after is not None
    return users[0].results[0] if before.device == after.device else out
