"""``comm.reduce_scatter.start``: every rank gets the sum over ranks of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.comm_semantics import begin
from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.types import TensorType, TokenType, Type


@register_op
class ReduceScatterStart(OpDef):
    """Begins adding up what all ranks hold for every rank; ``comm.wait`` gives this rank's sum.

    ``%t = comm.reduce_scatter.start %rows, counts = %c {group = "ep", ranks = 4} : !comm.token``
    ``sizes`` (constants) or ``counts`` say how many rows belong to every rank; with neither, the parts are equal. The
    order of the sum is the communication library's; in the reference it is that of the ranks. Its paired backward is
    ``comm.all_gather.start``.
    """

    name = "comm.reduce_scatter.start"
    operands = (
        OperandDef("rows", doc="rows for all ranks, those of rank 0 first"),
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
        sizes = self.attr(op, "sizes")
        if not isinstance(op.operands[0].type, TensorType) or not op.operands[0].type.rank:
            self.fail(op, "rows must be a tensor with rows")
        if sizes and (op.group("counts") or len(sizes) != self.attr(op, "ranks")):
            self.fail(op, f"sizes {sizes} must give one size for each of {self.attr(op, 'ranks')} ranks")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        ranks, rows = self.attr(op, "ranks"), inputs[0]
        counts = inputs[1].tolist() if op.group("counts") else self.attr(op, "sizes") or [len(rows) // ranks] * ranks
        return [begin("reduce_scatter", self.attr(op, "group"), ranks, rows, counts, ())]
