"""``comm.all_gather.start``: every rank gets the rows of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.comm_rows import PartsOfRows
from moec.ir.comm_semantics import begin
from moec.ir.core import Graph, Op
from moec.ir.opdef import OperandDef, register_op
from moec.ir.types import TensorType


@register_op
class AllGatherStart(PartsOfRows):
    """Begins giving every rank the rows of all ranks; ``comm.wait`` gives them, those of rank 0 first.

    ``%t = comm.all_gather.start %shard {group = "ep", ranks = 4, sizes = (2, 2, 2, 1)} : !comm.token``
    ``sizes`` (constants) or the operand ``counts`` say how many rows every rank gives; with neither, all give as many.
    Its paired backward is ``comm.reduce_scatter.start``.
    """

    name = "comm.all_gather.start"
    operands = (
        OperandDef("rows", doc="this rank's rows"),
        PartsOfRows.COUNTS,
    )

    def verify(self, op: Op) -> None:
        super().verify(op)
        sizes, rows = self.attr(op, "sizes"), op.operands[0].type
        if sizes and isinstance(rows, TensorType) and rows.shape[0].is_Integer and int(rows.shape[0]) not in sizes:
            self.fail(op, f"this rank gives {rows.shape[0]} rows, which no rank does by sizes {sizes}")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        rows = inputs[0]
        counts = self.counts(op, inputs, len(rows))
        return [begin("all_gather", self.attr(op, "group"), self.attr(op, "ranks"), rows, (), counts)]
