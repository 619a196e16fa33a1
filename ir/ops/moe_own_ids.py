"""``moe.own_ids``: the experts of the rank that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.comm_semantics import current_world
from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.parallel_semantics import edges
from moec.ir.types import TensorType, Type, dtype


@register_op
class OwnIds(OpDef):
    """Ids of this rank's experts, counted from its first one; -1 for all others.

    ``%mine = moe.own_ids %ids {group = "ep", sizes = (2, 2, 2, 1)} : i64[T, 2]``
    Which rank it is, the group says when the graph runs.
    """

    name = "moe.own_ids"
    operands = (OperandDef("ids", doc="int[T, k] experts"),)
    attrs = (
        AttrDef("group", "str", "name of the group, or mesh axis"),
        AttrDef("sizes", "any", "experts of every rank"),
    )

    def infer(self, op: Op) -> Sequence[Type] | None:
        ids = op.operands[0].type
        return [ids.with_(dtype=dtype("i64"))] if isinstance(ids, TensorType) else None

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        (ids,), sizes = inputs, self.attr(op, "sizes")
        rank = current_world().rank(self.attr(op, "group"))
        first, end = edges(sizes)[rank : rank + 2]
        return [(ids.long() - first).masked_fill((ids < first) | (ids >= end), -1)]
