"""``moe.slots``: a plan as indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OpDef, OperandDef, register_op
from moec.ir.types import PlanType


@register_op
class Slots(OpDef):
    """The slot and the token of every row of a plan, for other tensors that take the same way as the rows.

    ``%slots, %tokens = moe.slots %plan : i64[2*T], i64[2*T]``
    A slot is ``token * k + j``.
    """

    name = "moe.slots"
    operands = (OperandDef("plan", doc="from moe.dispatch or moe.reach"),)
    results = ("slots", "tokens")

    def verify(self, op: Op) -> None:
        if not isinstance(op.operands[0].type, PlanType):
            self.fail(op, "plan must come from moe.dispatch or moe.reach")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        (plan,) = inputs
        return [plan.order, plan.order // plan.top_k]
