"""``moe.arrivals``: what comes, from the counts that all ranks sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.parallel_semantics import arrivals


@register_op
class Arrivals(OpDef):
    """Rows that come from every rank, and which of this rank's experts each is for.

    ``%recv, %ids = moe.arrivals %counts {ranks = 4} : i64[4], i64[R, 1]``
    ``%counts`` holds, rank after rank, the rows for each of this rank's experts. With ``only = (a, b)`` nothing but
    rows for the experts from a up to b comes, and those are counted from a.
    """

    name = "moe.arrivals"
    operands = (OperandDef("counts", doc="i64[N * E'] of N ranks and E' experts here"),)
    attrs = (
        AttrDef("ranks", "int", "size N of the group"),
        AttrDef("only", "any", "first and past-last expert whose rows come", default=()),
    )
    results = ("by_rank", "ids")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return list(arrivals(inputs[0], self.attr(op, "ranks"), self.attr(op, "only")))
