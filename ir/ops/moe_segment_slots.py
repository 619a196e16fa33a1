"""``moe.segment_slots``: how many slots the copies from each rank stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OpDef, OperandDef, register_op
from moec.ir.parallel_semantics import segment_slots
from moec.ir.types import Type


@register_op
class SegmentSlots(OpDef):
    """Slots with an expert here among the tokens that came from every rank.

    ``%back = moe.segment_slots %ids, %copies : i64[2]``
    """

    name = "moe.segment_slots"
    operands = (
        OperandDef("ids", doc="i64[U, k], those from rank 0 first; -1 is no expert here"),
        OperandDef("copies", doc="i64[G], tokens from every rank"),
    )

    def infer(self, op: Op) -> Sequence[Type] | None:
        return [op.operands[1].type]

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [segment_slots(inputs[0], inputs[1])]
