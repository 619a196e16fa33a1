"""``moe.sum_slots``: rows of slots added up per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OpDef, OperandDef, register_op
from moec.ir.parallel_semantics import sum_slots
from moec.ir.types import PlanType


@register_op
class SumSlots(OpDef):
    """``y[t] = Σ_k rows[slot(t, k)]``, in order of k: the paired backward of dispatching token rows.

    ``%dx = moe.sum_slots %rows, %plan : bf16[T, 4096]``
    """

    name = "moe.sum_slots"
    operands = (OperandDef("rows", doc="[S, H] rows in the plan's order"), OperandDef("plan", doc="from moe.dispatch"))

    def verify(self, op: Op) -> None:
        if not isinstance(op.operands[1].type, PlanType):
            self.fail(op, "plan must come from moe.dispatch or moe.reach")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [sum_slots(inputs[0], inputs[1])]
