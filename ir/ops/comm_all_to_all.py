"""``comm.all_to_all.start``: every rank gives each rank its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.comm_semantics import begin
from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.types import TensorType, TokenType, Type


@register_op
class AllToAllStart(OpDef):
    """Begins sending each rank its rows; ``comm.wait`` gives the rows that came, those of rank 0 first.

    ``%t = comm.all_to_all.start %rows, send = %s, recv = %r {group = "ep", ranks = 4} : !comm.token``
    ``send`` and ``recv`` count the rows for and from every rank; what ``%rows`` holds beyond the sum of ``send`` stays.
    Where the counts are known when compiling, ``send_sizes`` and ``recv_sizes`` take their place; with neither, all
    parts are of one size, and nothing has to be counted. Its paired backward is itself, with the counts exchanged.
    """

    name = "comm.all_to_all.start"
    operands = (
        OperandDef("rows", doc="rows, those for rank 0 first"),
        OperandDef("send", "optional", "i64[N], rows for every rank"),
        OperandDef("recv", "optional", "i64[N], rows from every rank"),
    )
    attrs = (
        AttrDef("group", "str", "name of the group, or mesh axis"),
        AttrDef("ranks", "int", "size N of the group"),
        AttrDef("send_sizes", "any", "rows for every rank, where they are constants", default=()),
        AttrDef("recv_sizes", "any", "rows from every rank, where they are constants", default=()),
    )
    results = ("token",)

    def infer(self, op: Op) -> Sequence[Type] | None:
        return [TokenType()]

    def verify(self, op: Op) -> None:
        if not isinstance(op.operands[0].type, TensorType) or not op.operands[0].type.rank:
            self.fail(op, "rows must be a tensor with rows")
        if bool(op.group("send")) != bool(op.group("recv")):
            self.fail(op, "send and recv come together")
        send, recv = self.attr(op, "send_sizes"), self.attr(op, "recv_sizes")
        if (send or recv) and (op.group("send") or not len(send) == len(recv) == self.attr(op, "ranks")):
            self.fail(op, "send_sizes and recv_sizes give one size a rank, and stand for the operands")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        ranks, rows = self.attr(op, "ranks"), inputs[0]
        if op.group("send"):
            send, recv = inputs[1].tolist(), inputs[2].tolist()
        elif self.attr(op, "send_sizes"):
            send, recv = list(self.attr(op, "send_sizes")), list(self.attr(op, "recv_sizes"))
        else:
            send = recv = [len(rows) // ranks] * ranks
        return [begin("all_to_all", self.attr(op, "group"), ranks, rows, send, recv)]
