"""Reading the ends of one expert of a loop: which token rows it takes, and how its rows are weighted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moec.ir.core import Op, Value
from moec.ir.types import DType, TensorType
from moec.passes.matching import CASTS, VIEWS, arg, function, maker, peel, rank, same_dim, single_index, tensor
from moec.passes.raise_moe.loop_branches import Branch
from moec.passes.raise_moe.loop_masks import Mask, coordinate
from moec.passes.raise_moe.refusal import Refusal


@dataclass(frozen=True)
class Factor:
    """What an expert's rows are multiplied with.

    Attributes:
        weights: Of all slots.
        casts: Types that they are cast to, one after the other.
        gather: The call that takes the expert's own.
        by_expert: ``weights`` has a column for every expert rather than one for every choice.
    """

    weights: Value
    casts: tuple[DType, ...]
    gather: Op | None
    by_expert: bool = False


@dataclass(frozen=True)
class Weighting:
    """The end of an expert's program.

    Attributes:
        finished: Its rows before they are weighted.
        product: The weighted rows; the same where they are not weighted.
        factor: What they are multiplied with, or None.
    """

    finished: Value
    product: Value
    factor: Factor | None


def peel_column(column: Value, inside: set[Op]) -> tuple[Value, tuple[DType, ...]]:
    """A column with its views and casts taken off, and the types that it was cast to."""
    casts: list[DType] = []
    while (op := maker(column, *VIEWS, *CASTS)) is not None and op in inside:
        if function(op) in CASTS and (t := tensor(column)) is not None:
            casts.insert(0, t.dtype)
        column = arg(op, 0, "self")
    return column, tuple(casts)


def read_weighting(branch: Branch, read: Callable[[Value], Factor | None]) -> Weighting:
    """How the rows of ``branch`` are weighted: ``added = (rows * column)``, cast to the sum's type.

    Args:
        branch: The expert.
        read: What a column ``[u, 1]`` is, or None if it is no router weight.
    """
    total = tensor(branch.step.op.results[0])
    inside = set(branch.ops)
    value = branch.added
    while total is not None and value.op in inside:
        op = value.op
        assert op is not None
        t = tensor(value)
        if function(op) in CASTS and t is not None and t.dtype == total.dtype:
            value = arg(op, 0, "self")
            continue
        if function(op) != "mul":
            break
        for rows, column in ((arg(op, 0), arg(op, 1)), (arg(op, 1), arg(op, 0))):
            r, c = tensor(rows), tensor(column)
            if r is None or c is None or r.rank != 2 or c.rank != 2 or c.shape[1] != 1:
                continue
            factor = read(column) if same_dim(r.shape[0], c.shape[0]) else None
            if factor is not None:
                return Weighting(rows, value, factor)
        break
    return Weighting(branch.added, branch.added, None)


def _of_slots(source: Any, ids: TensorType) -> Value | None:
    """The ``[T, k]`` (``[T]``) tensor behind ``source``, which may have a dimension of one at its end."""
    t = tensor(source)
    if t is not None and t.rank == ids.rank + 1 and t.shape[-1] == 1:
        source = peel(source, ("unsqueeze",))
        t = tensor(source)
    if t is None or t.rank != ids.rank or not all(same_dim(a, b) for a, b in zip(t.shape, ids.shape, strict=True)):
        return None
    assert isinstance(source, Value)
    return source


def indices_of(op: Op) -> list[Any]:
    """The indices of a gather, in order of the dimensions that they index."""
    if function(op) == "index_select":
        return [arg(op, 2, "index")] if arg(op, 1, "dim") == 0 else []
    return list(arg(op, 1, "indices"))


def slot_factor(column: Value, branch: Branch, mask: Mask) -> Factor | None:
    """``weights[token, slot, None]``, or ``weights[mask]``, of the slots that chose this expert."""
    picked, casts = peel_column(column, set(branch.ops))
    op = maker(picked, "index", "index_select")
    ids = tensor(mask.ids)
    if op is None or ids is None:
        return None
    indices = indices_of(op)
    weights = _of_slots(arg(op, 0, "self"), ids)
    if weights is None or not indices:
        return None
    if indices == [branch.root]:
        return Factor(weights, casts, op) if mask.upright else None
    places = [coordinate(v) for v in indices]
    if any(p is None or p[0] is not branch.root for p in places):
        return None
    along = [mask.dims[p[1]] for p in places if p is not None]
    alone = ids.rank == 2 and ids.shape[1] == 1 and along == [0]
    return Factor(weights, casts, op) if along == list(range(ids.rank)) or alone else None


def read_gather(branch: Branch, factor: Factor | None) -> tuple[Value, Value]:
    """``(rows, x)``: the token rows of ``branch``, and the matrix that they are taken from.

    Raises:
        Refusal: There are none, or several.
    """
    inside = {r for op in branch.ops for r in op.results}
    found: list[tuple[Value, Value]] = []
    for op in branch.ops:
        if function(op) not in ("index", "index_select") or (factor is not None and op is factor.gather):
            continue
        if arg(op, 0, "self") in inside:
            continue
        taken = _taken(op, branch)
        if taken is not None:
            found.append(taken)
    if len(found) != 1:
        what = "several tensors" if found else "no matrix of tokens"
        raise Refusal(f"an expert of the loop takes its rows from {what}", branch.step.op)
    return found[0]


def _taken(op: Op, branch: Branch) -> tuple[Value, Value] | None:
    """``(rows, x)`` of ``x[token]``, or of ``x[None, token].reshape(-1, H)``."""
    picked = single_index(op.results[0])
    if picked is not None:
        x, index = picked
        return (op.results[0], x) if index is branch.step.index and rank(x) == 2 else None
    indices = arg(op, 1, "indices") if function(op) == "index" else []
    wide = maker(arg(op, 0, "self"), "unsqueeze")
    if len(indices) != 2 or indices[0] is not None or indices[1] is not branch.step.index or wide is None:
        return None
    x, users = arg(wide, 0, "self"), op.results[0].users
    if arg(wide, 1, "dim") != 0 or rank(x) != 2 or len(users) != 1 or function(users[0]) not in VIEWS:
        return None
    flat, whole = tensor(users[0].results[0]), tensor(op.results[0])
    if flat is None or whole is None or flat.shape != whole.shape[1:]:
        return None
    return users[0].results[0], x
