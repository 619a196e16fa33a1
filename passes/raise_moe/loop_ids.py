"""Expert ids of a loop: what is known about them, and ids that count from zero."""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.core import Op, Value
from moec.ir.types import DTYPES
from moec.passes.matching import CASTS, VIEWS, arg, function, peel, same_dim, tensor
from moec.passes.raise_moe.block import Emitter

_NO_EXPERT = -1
_CHOICES = ("topk", "sort", "argsort")


def _choice(ids: Value) -> Op | None:
    """The call that chose ``ids`` along the last dimension, if it is known."""
    value = peel(ids, (*CASTS, *VIEWS, "slice"))
    op = value.op if isinstance(value, Value) else None
    known = op is not None and (function(op) in (*_CHOICES, "argmax", "max")) and value is op.results[-1]
    return op if known else None


def _chosen_from(op: Op) -> tuple[Value, int] | None:
    """``(scores, dim)`` of a choice."""
    scores = arg(op, 0, "self")
    given = [v for v in op.attrs.get("args", ())[1:] if isinstance(v, int) and not isinstance(v, bool)]
    default = given[-1] if given and function(op) != "topk" else -1
    dim = arg(op, 2, "dim", -1) if function(op) == "topk" else arg(op, 99, "dim", default)
    t = tensor(scores)
    if t is None or not isinstance(dim, int) or dim % t.rank != t.rank - 1:
        return None
    return scores, dim


def choices_differ(ids: Value) -> bool:
    """True if the ids of one token are known to be different: they are the places of its best scores."""
    op, t = _choice(ids), tensor(ids)
    if op is None or t is None or function(op) not in _CHOICES or _chosen_from(op) is None:
        return False
    made = tensor(op.results[-1])
    return made is not None and (function(op) != "topk" or same_dim(made.shape[-1], t.shape[-1]))


def id_bound(ids: Value) -> int | None:
    """A number that all ids are known to be below, or None. They are not negative then."""
    op = _choice(ids)
    chosen = _chosen_from(op) if op is not None else None
    t = tensor(chosen[0]) if chosen is not None else None
    return int(t.shape[-1]) if t is not None and t.shape[-1].is_Integer else None


def keep_ids(emit: Emitter, ids: Value, keep: Value | None) -> Value:
    """``ids`` ``[T, k]`` with those that do not count replaced by a number that is no expert's."""
    i, k = tensor(ids), tensor(keep)
    if i is None or k is None:
        return ids
    if k.rank == 1 and i.shape[1] == 1:
        keep = emit.matrix(keep, k.shape[0], i.shape[1])  # type: ignore[arg-type]
        k = k.with_(shape=(k.shape[0], i.shape[1]))
    dropped = emit.call("aten.logical_not.default", (keep,), k)
    return emit.call("aten.masked_fill.Scalar", (ids, dropped, _NO_EXPERT), i)


def renumber(emit: Emitter, ids: Value, experts: Sequence[int]) -> Value:
    """``ids`` as places in ``experts``, which rise; ids of no expert come out below zero or beyond the last.

    Args:
        emit: Where to write.
        ids: ``[T, k]``.
        experts: The number of every expert.
    """
    t = tensor(ids)
    assert t is not None
    gaps = sorted(set(range(experts[0], experts[-1])) - set(experts))
    places = emit.call("aten.sub.Tensor", (ids, experts[0]), t) if experts[0] else ids
    for gap in gaps:
        above = emit.call("aten.gt.Scalar", (ids, gap), t.with_(dtype=DTYPES["i1"]))
        step = emit.call("aten.to.dtype", (above, t.dtype), t)
        places = emit.call("aten.sub.Tensor", (places, step), t)
    for gap in gaps:
        missing = emit.call("aten.eq.Scalar", (ids, gap), t.with_(dtype=DTYPES["i1"]))
        places = emit.call("aten.masked_fill.Scalar", (places, missing, _NO_EXPERT), t)
    return places


def may_miss(ids: Value, keep: Value | None, experts: Sequence[int]) -> bool:
    """True if some id may be no expert's."""
    bound = id_bound(ids)
    return keep is not None or bound is None or list(experts) != list(range(bound))
