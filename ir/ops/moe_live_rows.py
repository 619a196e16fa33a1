"""``moe.live_rows``: dispatched rows without those of no expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OperandDef, register_op
from moec.ir.plan_rows import OfSlots


@register_op
class LiveRows(OfSlots):
    """The rows of a plan that have an expert: those of no expert, which come last, are left out.

    ``%r = moe.live_rows %rows, %plan : bf16[R, 4096]``
    """

    name = "moe.live_rows"
    operands = (
        OperandDef("rows", doc="[T*k, N] rows in the plan's order"),
        OfSlots.PLAN,
    )

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [inputs[0][: sum(inputs[1].counts)]]
