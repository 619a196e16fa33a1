"""``moe.place_slots``: values of slots as a matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OpDef, OperandDef, register_op
from moec.ir.parallel_semantics import place_slots
from moec.ir.types import PlanType


@register_op
class PlaceSlots(OpDef):
    """Puts one value of every slot at its place (token, k-th choice); slots of no expert get 0.

    ``%dw = moe.place_slots %values, %plan : f32[T, 2]``
    """

    name = "moe.place_slots"
    operands = (OperandDef("values", doc="[S, 1] in the plan's order"), OperandDef("plan", doc="from moe.dispatch"))

    def verify(self, op: Op) -> None:
        if not isinstance(op.operands[1].type, PlanType):
            self.fail(op, "plan must come from moe.dispatch or moe.reach")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [place_slots(inputs[0], inputs[1])]
