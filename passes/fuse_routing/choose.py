"""Reading which experts are chosen: a top-k, a maximum, or the best of every group.

What is read says it exactly, ties included: ``torch.topk`` takes equal scores in an order of its own, ``max`` and
``argmax`` take the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moec.ir.core import Op, Value
from moec.passes.fuse_routing.groups import neighbours, takes_largest
from moec.passes.fuse_routing.scores import NoAttribute
from moec.passes.matching import CASTS, VIEWS, arg, function, last_dim, maker, peel, peel_views, rank, tensor


@dataclass(frozen=True)
class Chosen:
    """The choice that made the ids.

    Attributes:
        scores: ``[T, E]``, what is chosen by.
        values: The scores of the chosen in slot order, in any shape; None where the choice gives none.
        attrs: ``k``, ``sorted``, ``ties``, ``groups``, ``per_group``, ``by_group`` as far as they are not the defaults.
    """

    scores: Value
    values: Value | None
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Best:
    """The best along the last dimension."""

    source: Value
    values: Value | None
    count: int
    attrs: dict[str, Any]


def _best(ids: Value) -> _Best | None:
    """The op that gives ``ids`` as its indices, if it takes the best along the last dimension.

    Raises:
        NoAttribute: It takes others, or a number of them that only run time knows.
    """
    op = maker(ids, "topk", "max", "argmax")
    if op is None or ids is not op.results[-1]:
        return None
    source: Value = arg(op, 0, "self")
    if function(op) == "topk":
        k = arg(op, 1, "k")
        if not takes_largest(op):
            raise NoAttribute("the top-k does not take the largest over the experts")
        if not isinstance(k, int):
            raise NoAttribute("k is computed at run time")
        return _Best(source, op.results[0], k, {"sorted": arg(op, 4, "sorted", True)})
    if not last_dim(source, arg(op, 1, "dim")):
        raise NoAttribute("the maximum is not taken over the experts")
    values = op.results[0] if len(op.results) == 2 else None
    return _Best(source, values, 1, {"ties": "first"})


def _range(op: Op | None) -> tuple[int, int, int] | None:
    """``(start, end, step)`` of an ``arange`` of numbers."""
    if op is None:
        return None
    given = list(op.attrs.get("args", ()))
    given = [0, *given] if len(given) == 1 else given
    if not all(isinstance(n, int) for n in given) or len(given) not in (2, 3):
        return None
    return given[0], given[1], given[2] if len(given) == 3 else 1


def _first_of_groups(value: Any, axis: int, groups: int, size: int) -> bool:
    """True if ``value`` holds each group's first expert, ``0, size, 2 * size, ...``, along ``axis`` from the end."""
    wide = maker(value, "expand")
    value = arg(wide, 0, "self") if wide is not None else value
    t = tensor(value)
    if t is None or t.rank < axis or any(d != (groups if i == t.rank - axis else 1) for i, d in enumerate(t.shape)):
        return False
    value = peel(value, VIEWS | CASTS)
    times = maker(value, "mul")
    if times is not None:
        counted = _range(maker(peel(arg(times, 0, "self"), VIEWS | CASTS), "arange"))
        return counted == (0, groups, 1) and arg(times, 1, "other") == size
    counted = _range(maker(value, "arange"))
    return counted is not None and tuple(range(*counted)) == tuple(range(0, groups * size, size))


def _rows(by_group: Value) -> Value:
    """The matrix [T, E] that ``by_group`` [T, groups, n] is a view of, or what it is in the end a view of."""
    value = by_group
    while rank(value) != 2 and (op := maker(value, *VIEWS)) is not None:
        value = arg(op, 0, "self")
    return value


def _by_group(ids: Value) -> Chosen | None:
    """The best of every group, their indices in the group made expert ids by adding the group's first expert."""
    plus = maker(peel_views(ids), "add")
    if plus is None:
        return None
    inner, first = arg(plus, 0, "self"), arg(plus, 1, "other")
    if isinstance(first, Value) and _best(first) is not None:
        inner, first = first, inner
    best = _best(inner) if isinstance(inner, Value) else None
    if best is None or rank(best.source) != 3:
        return None
    scores = _rows(best.source)
    cut, indices, out = neighbours(best.source, scores), tensor(inner), tensor(ids)
    if cut is None:
        raise NoAttribute("groups are not made of neighbouring experts")
    groups, size = cut
    if indices is None or out is None or out.rank != 2 or out.shape[1] != groups * best.count:
        raise NoAttribute("the experts of the groups are not put one group after the other")
    if indices.shape[0] != out.shape[0] or tensor(plus.results[0]) != indices:
        raise NoAttribute("the experts of the groups are not put one group after the other")
    if arg(plus, 2, "alpha", 1) != 1 or not _first_of_groups(first, indices.rank - 1, groups, size):
        raise NoAttribute("what is added to the indices in the groups is not known to be each group's first expert")
    attrs = {**best.attrs, "k": groups * best.count, "groups": groups, "per_group": best.count, "by_group": True}
    return Chosen(scores, best.values, attrs)


def read_choice(ids: Value) -> Chosen:
    """The choice behind ``ids`` [T, k].

    Raises:
        NoAttribute: It is none of those that the attributes of ``moe.route`` describe.
    """
    grouped = _by_group(ids)
    if grouped is not None:
        return grouped
    plain, out = peel_views(ids), tensor(ids)
    best = _best(plain)
    made = tensor(plain)
    if best is None or out is None or made is None:
        raise NoAttribute("the expert ids are not the indices of a top-k")
    if rank(best.source) != 2 or made.shape[0] != out.shape[0]:
        raise NoAttribute("the experts are not chosen from one row of scores per token")
    return Chosen(best.source, best.values, {**best.attrs, "k": best.count})
