"""``moe.loads``: how many rows go to each expert and each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.parallel_semantics import loads
from moec.ir.types import PlanType, TensorType, Type


@register_op
class Loads(OpDef):
    """Counts the rows of a plan by expert and by rank.

    ``%by_expert, %by_rank = moe.loads %rows, %plan {sizes = (2, 2, 2, 1)} : i64[7], i64[4]``
    Rank r holds the next ``sizes[r]`` experts. ``%rows`` says where the counts lie (on which device), no more. Where
    ids went through ``moe.renumber``, ``order`` is its order: sizes are then of places, by_expert still of experts.
    """

    name = "moe.loads"
    operands = (OperandDef("rows", doc="the dispatched rows"), OperandDef("plan", doc="from moe.dispatch"))
    attrs = (
        AttrDef("sizes", "any", "experts of every rank"),
        AttrDef("order", "any", "the expert at every place of the plan, where that is not its number", default=()),
    )
    results = ("by_expert", "by_rank")

    def infer(self, op: Op) -> Sequence[Type] | None:
        rows, sizes = op.operands[0].type, op.attrs["sizes"]
        device = rows.device if isinstance(rows, TensorType) else "cpu"
        return [TensorType.of("i64", sum(sizes), device=device), TensorType.of("i64", len(sizes), device=device)]

    def verify(self, op: Op) -> None:
        plan = op.operands[1].type
        if not isinstance(plan, PlanType) or plan.experts != sum(self.attr(op, "sizes")):
            self.fail(op, f"sizes {self.attr(op, 'sizes')} must add up to the experts of the plan")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return list(loads(inputs[1], self.attr(op, "sizes"), inputs[0].device, self.attr(op, "order")))
