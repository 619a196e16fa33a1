"""``comm.all_gather.start``: every rank gets the rows of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.comm_semantics import begin
from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.types import TensorType, TokenType, Type


@register_op
class AllGatherStart(OpDef):
    """Begins giving every rank the rows of all ranks; ``comm.wait`` gives them, those of rank 0 first.

    ``%t = comm.all_gather.start %shard {group = "ep", ranks = 4, sizes = (2, 2, 2, 1)} : !comm.token``
    ``sizes`` (constants) or the operand ``counts`` say how many rows every rank gives; with neither, all give as many.
    Its paired backward is ``comm.reduce_scatter.start``.
    """

    name = "comm.all_gather.start"
    operands = (
        OperandDef("rows", doc="this rank's rows"),
        OperandDef("counts", "optional", "i64[N], rows of every rank"),
    )
    attrs = (
        AttrDef("group", "str", "name of the group, or mesh axis"),
        AttrDef("ranks", "int", "size N of the group"),
        AttrDef("sizes", "any", "rows of every rank, where they are constants", default=()),
    )
    results = ("token",)

    def infer(self, op: Op) -> Sequence[Type] | None:
        return [TokenType()]

    def verify(self, op: Op) -> None:
        sizes, rows = self.attr(op, "sizes"), op.operands[0].type
        if not isinstance(rows, TensorType) or not rows.rank:
            self.fail(op, "rows must be a tensor with rows")
            return
        if sizes and (op.group("counts") or len(sizes) != self.attr(op, "ranks")):
            self.fail(op, f"sizes {sizes} must give one size for each of {self.attr(op, 'ranks')} ranks")
        if sizes and rows.shape[0].is_Integer and int(rows.shape[0]) not in sizes:
            self.fail(op, f"this rank gives {rows.shape[0]} rows, which no rank does by sizes {sizes}")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        ranks, rows = self.attr(op, "ranks"), inputs[0]
        counts = inputs[1].tolist() if op.group("counts") else self.attr(op, "sizes") or [len(rows)] * ranks
        return [begin("all_gather", self.attr(op, "group"), ranks, rows, (), counts)]
