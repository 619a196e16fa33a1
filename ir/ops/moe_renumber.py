"""``moe.renumber``: experts by their place in another order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.parallel_semantics import renumber
from moec.ir.types import TensorType, Type


@register_op
class Renumber(OpDef):
    """The place of every chosen expert in ``order``; a dispatch by these sorts rows in that order.

    ``%p = moe.renumber %ids {order = (2, 0, 3, 1)} : i64[T, 2]``
    Ids of no expert stay ids of no expert.
    """

    name = "moe.renumber"
    operands = (OperandDef("ids", doc="int[T, k] chosen experts"),)
    attrs = (AttrDef("order", "any", "all experts, in the order that is wanted"),)
    results = ("places",)

    def infer(self, op: Op) -> Sequence[Type] | None:
        return [op.operands[0].type]

    def verify(self, op: Op) -> None:
        ids, order = op.operands[0].type, self.attr(op, "order")
        if not isinstance(ids, TensorType) or ids.dtype.kind not in ("int", "uint"):
            self.fail(op, "ids must be integers")
        if sorted(order) != list(range(len(order))):
            self.fail(op, "order holds every expert once")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [renumber(inputs[0], self.attr(op, "order"))]
