"""``moe.owners``: which rank holds an expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.parallel_semantics import edges, owners
from moec.ir.types import TensorType, Type, dtype


@register_op
class Owners(OpDef):
    """The rank that holds each id's expert, and the id counted from that rank's first expert.

    ``%ranks, %local = moe.owners %ids {sizes = (2, 2, 2, 1)} : i64[T, 2], i64[T, 2]``
    An id of no expert belongs to rank N, and stays -1.
    """

    name = "moe.owners"
    operands = (OperandDef("ids", doc="int[...] experts"),)
    attrs = (AttrDef("sizes", "any", "experts of every rank"),)
    results = ("ranks", "local")

    def infer(self, op: Op) -> Sequence[Type] | None:
        ids = op.operands[0].type
        return [ids.with_(dtype=dtype("i64"))] * 2 if isinstance(ids, TensorType) else None

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        (ids,), sizes = inputs, self.attr(op, "sizes")
        ranks = owners(ids, sizes)
        first = ranks.new_tensor(edges(sizes))[ranks]
        return [ranks, (ids - first).masked_fill(ranks == len(sizes), -1)]
