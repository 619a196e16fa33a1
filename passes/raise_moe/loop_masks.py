"""Reading which tokens an expert of a loop takes: from an index back to ``ids == e``.

``torch.where(ids == e)``, ``(ids == e).nonzero()`` and ``nonzero(one_hot(ids).permute(2, 1, 0)[e])`` are the
coordinates of one mask's true elements; ``x[mask]`` picks by the mask itself. A mask is read into the ids it compares,
the number it compares them with, and what its dimensions are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moec.ir.core import Op, Value
from moec.ir.types import DTYPES
from moec.passes.matching import CASTS, arg, function, maker, peel, rank, tensor

_EXPERT = -1
"""Stands among a mask's dimensions for the classes of a one-hot tensor."""
_SAME_MASK = frozenset({*CASTS, "contiguous", "clone", "alias"})
_AND = frozenset({"bitwise_and", "logical_and", "__and__", "mul"})


@dataclass(frozen=True)
class Mask:
    """A tensor that is nonzero where ``ids == expert``, and ``keep`` holds if it is given.

    Attributes:
        ids: Chosen experts, ``int[T, k]`` or ``int[T]``.
        expert: The number compared with; None in a one-hot tensor, which holds the answers for all of them.
        dims: The dimension of ``ids`` that every dimension of the mask runs along.
        keep: A condition besides, of the shape of ``ids``.
        once: A token is marked once, however many of its ids are equal to ``expert``.
    """

    ids: Value
    expert: int | None
    dims: tuple[int, ...]
    keep: Value | None = None
    once: bool = False

    @property
    def upright(self) -> bool:
        """The mask lies as the ids do."""
        return self.dims == tuple(range(rank(self.ids)))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_hot(ids: Value) -> Mask:
    return Mask(ids, None, (*range(rank(ids)), _EXPERT))


def _classes(value: Any) -> bool:
    """True for ``arange(E)``, seen through added dimensions in front."""
    counting = maker(peel(value, ("unsqueeze", "view", "reshape", *CASTS)), "arange")
    shape = t.shape if (t := tensor(value)) is not None else ()
    if counting is None or not shape or any(d != 1 for d in shape[:-1]):
        return False
    given = counting.attrs.get("args", ())
    return len(given) == 1 or (arg(counting, 0) == 0 and arg(counting, 2, "step", 1) == 1)


def _equality(op: Op) -> Mask | None:
    left, right = arg(op, 0, "self"), arg(op, 1, "other")
    if _is_int(right):
        inner = read_mask(left) if right == 1 else None
        if inner is not None:
            return inner
        kind = t.dtype.kind if (t := tensor(left)) is not None else ""
        return Mask(left, right, tuple(range(rank(left)))) if kind in ("int", "uint") else None
    for ids, classes in ((left, right), (right, left)):
        wide, whole = tensor(ids), tensor(op.results[0])
        if wide is None or whole is None or wide.rank != whole.rank or wide.shape[-1] != 1 or not _classes(classes):
            continue
        source = peel(ids, ("unsqueeze",))
        if rank(source) == wide.rank - 1 and wide.dtype.kind in ("int", "uint"):
            return _one_hot(source)
    return None


def _conjunction(op: Op) -> Mask | None:
    for one, other in ((arg(op, 0), arg(op, 1)), (arg(op, 1), arg(op, 0))):
        mask, condition, whole = read_mask(one), tensor(other), tensor(op.results[0])
        if mask is None or condition is None or whole is None or mask.keep is not None or not mask.upright:
            continue
        ids = tensor(mask.ids)
        if ids is not None and condition.dtype == DTYPES["i1"] and whole.shape == ids.shape:
            return replace(mask, keep=other)
    return None


def _picked(mask: Mask, dim: Any, index: Any) -> Mask | None:
    """``mask`` with class ``index`` chosen along ``dim``."""
    if not _is_int(dim) or not _is_int(index) or index < 0:
        return None
    at = dim % len(mask.dims)
    if mask.dims[at] != _EXPERT:
        return None
    return replace(mask, expert=index, dims=(*mask.dims[:at], *mask.dims[at + 1 :]))


def _turned(op: Op, mask: Mask) -> Mask | None:
    n = len(mask.dims)
    order = list(range(n))
    if function(op) == "permute":
        order = [d % n for d in arg(op, 1, "dims")]
    else:
        a, b = (0, n - 1) if function(op) == "t" else (arg(op, 1, "dim0") % n, arg(op, 2, "dim1") % n)
        order[a], order[b] = order[b], order[a]
    return replace(mask, dims=tuple(mask.dims[d] for d in order))


def read_mask(value: Any) -> Mask | None:
    """What ``value`` compares, if it is nonzero exactly where ids equal one number (or is one-hot in all numbers)."""
    op = value.op if isinstance(value, Value) else None
    if op is None:
        return None
    name = function(op)
    if name == "eq":
        return _equality(op)
    if name == "one_hot":
        return _one_hot(arg(op, 0, "self"))
    if name in _AND:
        return _conjunction(op)
    if name not in (*_SAME_MASK, "ne", "gt", "permute", "transpose", "t", "select", "unbind", "squeeze", "any"):
        return None
    mask = read_mask(arg(op, 0, "self"))
    if mask is None or name in _SAME_MASK:
        return mask
    if name in ("ne", "gt"):
        return mask if arg(op, 1, "other") == 0 else None
    if name in ("permute", "transpose", "t"):
        return _turned(op, mask)
    if name == "select":
        return _picked(mask, arg(op, 1, "dim"), arg(op, 2, "index"))
    if name == "unbind":
        return _picked(mask, arg(op, 1, "dim", 0), value.index)
    without = _without(op, mask)
    return replace(without, once=True) if without is not None and name == "any" else without


def _without(op: Op, mask: Mask) -> Mask | None:
    """A mask of ``[T, k]`` as one of ``[T]``: k is 1, or any of a token's choices counts."""
    dim = arg(op, 1, "dim")
    dim = dim[0] if isinstance(dim, list) and len(dim) == 1 else dim
    if not _is_int(dim) or rank(op.results[0]) != len(mask.dims) - 1:
        return None
    at = dim % len(mask.dims)
    return replace(mask, dims=(*mask.dims[:at], *mask.dims[at + 1 :])) if mask.dims[at] != _EXPERT else None


def coordinate(value: Any) -> tuple[Value, int] | None:
    """``(mask, dimension)`` if ``value`` holds that coordinate of every nonzero element of ``mask``, in order."""
    op = value.op if isinstance(value, Value) else None
    name = function(op)
    if op is None:
        return None
    if name in ("where", "nonzero_numpy") and len(op.operands) == 1:
        return op.operands[0], value.index
    if name in ("alias", "contiguous", "clone"):
        return coordinate(arg(op, 0, "self"))
    if name in ("select", "unbind"):
        column = value.index if name == "unbind" else arg(op, 2, "index")
        return _column(arg(op, 0, "self"), arg(op, 1, "dim", 0), column)
    if name not in ("view", "reshape", "squeeze", "flatten") or rank(value) != 1:
        return None
    table = arg(op, 0, "self")
    searched = maker(table, "nonzero", "argwhere")
    if searched is not None and rank(arg(searched, 0, "self")) == 1:
        return arg(searched, 0, "self"), 0
    cut = maker(table, "slice")  # the decomposed form of a column: nonzero(mask)[:, d:d+1].squeeze(1)
    if cut is None:
        return None
    start: Any = arg(cut, 2, "start") or 0
    if not _is_int(start) or arg(cut, 3, "end") != start + 1 or arg(cut, 4, "step", 1) != 1:
        return None
    return _column(arg(cut, 0, "self"), arg(cut, 1, "dim", 0), start)


def _column(table: Any, dim: Any, column: Any) -> tuple[Value, int] | None:
    """The coordinate in a column of ``nonzero(mask)``, which may have been transposed."""
    turned = maker(table, "t", "transpose", "permute")
    source = maker(arg(turned, 0, "self") if turned is not None else table, "nonzero", "argwhere")
    if source is None or not _is_int(dim) or not _is_int(column):
        return None
    if dim % 2 != (0 if turned is not None else 1):
        return None
    mask = arg(source, 0, "self")
    return mask, column % rank(mask)
