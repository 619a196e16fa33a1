"""``moe.sum_slots``: rows of slots added up per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OperandDef, register_op
from moec.ir.parallel_semantics import sum_slots
from moec.ir.plan_rows import OfSlots


@register_op
class SumSlots(OfSlots):
    """``y[t] = Σ_k rows[slot(t, k)]``, in order of k: the paired backward of dispatching token rows.

    ``%dx = moe.sum_slots %rows, %plan : bf16[T, 4096]``
    """

    name = "moe.sum_slots"
    operands = (OperandDef("rows", doc="[S, H] rows in the plan's order"), OfSlots.PLAN)

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [sum_slots(inputs[0], inputs[1])]
