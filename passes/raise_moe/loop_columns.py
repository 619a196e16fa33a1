"""Columns that an expert of a loop has by its own number: ``gates[:, e:e+1]``, ``g[e][:, None]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.ir.core import Value
from moec.ir.types import DType
from moec.passes.matching import CASTS, VIEWS, arg, function, maker, rank, tensor
from moec.passes.raise_moe.loop_branches import Branch
from moec.passes.raise_moe.loop_ids import id_bound
from moec.passes.raise_moe.loop_masks import Mask, coordinate
from moec.passes.raise_moe.loop_rows import Factor, indices_of, peel_column
from moec.passes.raise_moe.refusal import Refusal


@dataclass(frozen=True)
class Column:
    """A column ``[u, 1]`` of one expert.

    Attributes:
        source: The matrix that all experts' columns come from.
        dim: The dimension of it that counts experts.
        expert: The place along it.
        casts: Types that the column is cast to, one after the other.
    """

    source: Value
    dim: int
    expert: int
    casts: tuple[DType, ...]


def read_column(value: Value) -> Column | None:
    """``value`` as one expert's column of a matrix."""
    casts: list[DType] = []
    while (op := maker(value, *VIEWS, *CASTS)) is not None:
        if function(op) in CASTS and (t := tensor(value)) is not None:
            casts.insert(0, t.dtype)
        value = arg(op, 0, "self")
    op = maker(value, "select", "unbind", "slice", "split")
    if op is None or rank(arg(op, 0, "self")) != 2:
        return None
    name = function(op)
    dim = arg(op, 2 if name == "split" else 1, "dim", 0)
    if name in ("unbind", "split"):
        index, whole = value.index, name == "unbind" or arg(op, 1, "split_size") == 1
    elif name == "select":
        index, whole = arg(op, 2, "index"), True
    else:
        index, whole = arg(op, 2, "start") or 0, arg(op, 4, "step", 1) == 1
        whole = whole and isinstance(index, int) and arg(op, 3, "end") == index + 1
    if not whole or not isinstance(dim, int) or not isinstance(index, int) or index < 0:
        return None
    return Column(arg(op, 0, "self"), dim % 2, index, tuple(casts))


def gate_factor(column: Value, branches: Sequence[Branch], mask: Mask) -> tuple[Factor, Value] | None:
    """``gates[token, e, None]``: every branch's own column, at its tokens; and that column as the first takes it in.

    Raises:
        Refusal: Another branch has another expert's column, or an id may be none of the columns.
    """
    picked, casts = peel_column(column, set(branches[0].ops))
    op = maker(picked, "index", "index_select")
    indices = indices_of(op) if op is not None else []
    if op is None or len(indices) != 1:
        return None
    place = coordinate(indices[0]) if indices[0] is not branches[0].root else (branches[0].root, 0)
    if place is None or place[0] is not branches[0].root or mask.dims[place[1]] != 0:
        return None
    factor = shared_factor(arg(op, 0, "self"), branches, 1)
    if factor is None:
        return None
    gates, bound = tensor(factor.weights), id_bound(mask.ids)
    if gates is None or bound is None or not gates.shape[1].is_Integer or bound > int(gates.shape[1]):
        raise Refusal("nothing says that every expert id has a column of gates", op)
    return Factor(factor.weights, (*factor.casts, *casts), op, by_expert=True), arg(op, 0, "self")


def shared_factor(column: Value, branches: Sequence[Branch], dim: int) -> Factor | None:
    """The matrix that every branch has its own column of, if ``column`` is that of the first.

    Raises:
        Refusal: Another branch has another expert's column, or one of another matrix.
    """
    mine = read_column(column)
    if mine is None or mine.dim != dim or column not in branches[0].outside:
        return None
    place = branches[0].outside.index(column)
    for branch in branches:
        theirs = read_column(branch.outside[place])
        if theirs is None or (theirs.source, theirs.dim, theirs.casts) != (mine.source, mine.dim, mine.casts):
            raise Refusal("the experts of the loop are weighted with different tensors", branch.step.op)
        if theirs.expert != branch.expert:
            raise Refusal("an expert of the loop is weighted with another one's column", branch.step.op)
    return Factor(mine.source, mine.casts, None)
