"""``moe.slot_rows``: rows sorted by expert, back in the order of their slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OperandDef, register_op
from moec.ir.parallel_semantics import slot_rows
from moec.ir.plan_rows import OfSlots


@register_op
class SlotRows(OfSlots):
    """The rows of slots that have an expert, in the order (token, k-th choice).

    ``%r = moe.slot_rows %o, %plan : bf16[S, 4096]``
    Nothing is added up: every slot keeps its row, for a combine elsewhere.
    """

    name = "moe.slot_rows"
    operands = (OperandDef("rows", doc="[R, N] rows grouped by expert"), OfSlots.PLAN)

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [slot_rows(inputs[0], inputs[1])]
