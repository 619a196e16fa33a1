"""``moe.place_slots``: values of slots as a matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OperandDef, register_op
from moec.ir.parallel_semantics import place_slots
from moec.ir.plan_rows import OfSlots


@register_op
class PlaceSlots(OfSlots):
    """Puts one value of every slot at its place (token, k-th choice); slots of no expert get 0.

    ``%dw = moe.place_slots %values, %plan : f32[T, 2]``
    """

    name = "moe.place_slots"
    operands = (OperandDef("values", doc="[S, 1] in the plan's order"), OfSlots.PLAN)

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [place_slots(inputs[0], inputs[1])]
