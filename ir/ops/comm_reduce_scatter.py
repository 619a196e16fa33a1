"""``comm.reduce_scatter.start``: every rank gets the sum over ranks of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.comm_rows import PartsOfRows
from moec.ir.comm_semantics import begin
from moec.ir.core import Graph, Op
from moec.ir.opdef import OperandDef, register_op


@register_op
class ReduceScatterStart(PartsOfRows):
    """Begins adding up what all ranks hold for every rank; ``comm.wait`` gives this rank's sum.

    ``%t = comm.reduce_scatter.start %rows, counts = %c {group = "ep", ranks = 4} : !comm.token``
    ``sizes`` (constants) or ``counts`` say how many rows belong to every rank; with neither, the parts are equal. The
    order of the sum is the communication library's; in the reference it is that of the ranks. Its paired backward is
    ``comm.all_gather.start``.
    """

    name = "comm.reduce_scatter.start"
    operands = (
        OperandDef("rows", doc="rows for all ranks, those of rank 0 first"),
        PartsOfRows.COUNTS,
    )

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        ranks, rows = self.attr(op, "ranks"), inputs[0]
        counts = self.counts(op, inputs, len(rows) // ranks)
        return [begin("reduce_scatter", self.attr(op, "group"), ranks, rows, counts, ())]
