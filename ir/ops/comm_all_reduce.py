"""``comm.all_reduce.start``: every rank gets the sum over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.comm_semantics import begin
from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.types import TensorType, TokenType, Type


@register_op
class AllReduceStart(OpDef):
    """Begins adding up one tensor over all ranks; ``comm.wait`` gives the sum, of the same shape.

    ``%t = comm.all_reduce.start %x {group = "ep", ranks = 4} : !comm.token``
    Its paired backward is itself: the loss is the sum of the ranks' losses.
    """

    name = "comm.all_reduce.start"
    operands = (OperandDef("x", doc="a tensor of one shape on all ranks"),)
    attrs = (
        AttrDef("group", "str", "name of the group, or mesh axis"),
        AttrDef("ranks", "int", "size N of the group"),
    )
    results = ("token",)

    def infer(self, op: Op) -> Sequence[Type] | None:
        return [TokenType()]

    def verify(self, op: Op) -> None:
        if not isinstance(op.operands[0].type, TensorType):
            self.fail(op, "x must be a tensor")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [begin("all_reduce", self.attr(op, "group"), self.attr(op, "ranks"), inputs[0], (), ())]
