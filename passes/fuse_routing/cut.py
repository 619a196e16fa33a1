"""The part of a router that ``moe.route`` can say, where its attributes cannot say all of it.

Many routers are a known choice of experts and then some arithmetic on the weights, or on the ids: a scale per expert, a
norm other than the sum, a threshold on the running sum (top-p), slots over an expert's capacity, experts that compute
nothing. The choice becomes attributes; what follows stays the torch calls that it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moec.ir.core import Op, Value
from moec.passes.fuse_routing.read import Router, read_router
from moec.passes.fuse_routing.scores import NoAttribute
from moec.passes.matching import ancestors, function, tensor


def _matrices(ops: Iterable[Op], kind: str, like: Value) -> Iterator[Value]:
    """The results of ``ops`` of that kind of element type that have the shape of ``like``."""
    wanted = tensor(like)
    for op in ops:
        for value in op.results:
            t = tensor(value)
            if t is not None and wanted is not None and t.shape == wanted.shape and t.dtype.kind == kind:
                yield value


def _follows(after: Iterable[Op], scores: Value, weights: Value) -> bool:
    """True if the weights come from ``scores`` and ``after`` chooses nothing itself, as it would after groups."""
    ops = list(after)
    used = scores is weights or any(scores is v for op in ops for v in op.operands)
    return used and not any(function(op) in ("topk", "sort", "argsort", "max", "argmax") for op in ops)


def read_part(weights: Value, ids: Value, stops: Iterable[Value]) -> tuple[Router, Value, Value, list[Op]]:
    """The latest ``(router, its weights, its ids, the calls after it)`` inside the router of ``weights`` and ``ids``.

    The calls after it work on its weights, and on nothing else from inside it: nothing is computed twice.

    Args:
        weights: ``[T, k]``, as the block uses them.
        ids: ``[T, k]``, as the block uses them.
        stops: Where the router begins.

    Raises:
        NoAttribute: No part of it is a router that the attributes describe; the reason is that of the whole.
    """
    try:
        return read_router(weights, ids), weights, ids, []
    except NoAttribute as reason:
        whole = reason
    stops = list(stops)
    graph = weights.op.parent if weights.op is not None else None
    inside = ancestors([weights, ids], stops)
    ordered = [op for op in reversed(graph.ops) if op in inside] if graph is not None else []
    for chosen in _matrices(ordered, "int", ids):
        for scores in _matrices(ordered, "float", chosen):
            try:
                router = read_router(scores, chosen)
            except NoAttribute:
                continue
            taken = ancestors([scores, chosen], [router.logits, *([router.bias] if router.bias else [])])
            after = ancestors([weights, ids], [scores, chosen, *stops])
            if not after & taken and _follows(after, scores, weights):
                return router, scores, chosen, [op for op in reversed(ordered) if op in after]
    raise whole
