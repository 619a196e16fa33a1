"""Expert ids of a loop: what is known about them, and ids that count from zero."""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.core import Op, Value
from moec.ir.types import DTYPES
from moec.passes.matching import CASTS, VIEWS, arg, function, maker, same_dim, tensor
from moec.passes.raise_moe.block import Emitter

_NO_EXPERT = -1
_EXACT_ID_BITS = 16
"""Casts to fewer bits could change an expert id."""
_DIM_AT = {"topk": 2, "sort": 1, "argsort": 1, "argmax": 1, "max": 1}
"""Where the dimension stands among the arguments of a call that gives places of scores."""
_SEVERAL = ("topk", "sort", "argsort")


def _choice(ids: Value) -> tuple[Op, bool] | None:
    """The call that chose ``ids`` among the last dimension of its scores, and whether a token's choices differ."""
    value, apart = ids, True
    while (op := maker(value, *CASTS, *VIEWS, "slice")) is not None:
        source, t = arg(op, 0, "self"), tensor(value)
        wide = tensor(source)
        if wide is None or t is None or t.dtype.kind != "int" or t.dtype.bits < _EXACT_ID_BITS:
            return None
        if function(op) in VIEWS:
            apart = apart and wide.rank > 0 and same_dim(wide.shape[-1], t.shape[-1])
        value = source
    op, scores = value.op, tensor(arg(value.op, 0, "self")) if value.op is not None else None
    if op is None or scores is None or value is not op.results[-1]:
        return None
    name = function(op)
    if name not in _DIM_AT:
        return None
    given = [v for v in op.attrs.get("args", ())[_DIM_AT[name] :] if not isinstance(v, bool)]  # a flag may stand first
    default = -1 if name in _SEVERAL else None
    dim = given[0] if given else op.attrs.get("kwargs", {}).get("dim", default)
    if not isinstance(dim, int) or dim % scores.rank != scores.rank - 1:
        return None
    return op, apart and name in _SEVERAL


def choices_differ(ids: Value) -> bool:
    """True if the ids of one token are known to be different: they are the places of its best scores."""
    found = _choice(ids)
    return found is not None and found[1]


def id_bound(ids: Value) -> int | None:
    """A number that all ids are known to be below, or None. They are not negative then."""
    found = _choice(ids)
    scores = tensor(arg(found[0], 0, "self")) if found is not None else None
    return int(scores.shape[-1]) if scores is not None and scores.shape[-1].is_Integer else None


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
