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
    rows for the experts from a up to b comes, and those are counted from a. With ``among = (a, c, d)`` nothing but rows
    for these comes, in this order of every rank, and ids are the experts' own.
    """

    name = "moe.arrivals"
    operands = (OperandDef("counts", doc="i64[N * E'] of N ranks and E' experts here"),)
    attrs = (
        AttrDef("ranks", "int", "size N of the group"),
        AttrDef("only", "any", "first and past-last expert whose rows come", default=()),
        AttrDef("among", "any", "the experts whose rows come, in the order that they come in", default=None),
    )
    results = ("by_rank", "ids")

    def verify(self, op: Op) -> None:
        among = self.attr(op, "among")
        if among is not None and (self.attr(op, "only") or len(set(among)) < len(among)):
            self.fail(op, "among holds different experts, and stands instead of only")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return list(arrivals(inputs[0], *(self.attr(op, name) for name in ("ranks", "only", "among"))))
