"""What ops on something and the plan of its slots have in common."""

from __future__ import annotations

from moec.ir.core import Op
from moec.ir.opdef import OpDef, OperandDef
from moec.ir.types import PlanType


class OfSlots(OpDef):
    """An op whose second operand is a plan."""

    PLAN = OperandDef("plan", doc="from moe.dispatch")

    def verify(self, op: Op) -> None:
        if not isinstance(op.operands[1].type, PlanType):
            self.fail(op, "plan must come from moe.dispatch or moe.reach")
