"""What collectives over parts of rows have in common: whose rows are how many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.core import Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef
from moec.ir.types import TensorType, TokenType, Type


class PartsOfRows(OpDef):
    """A start whose parts ``sizes`` (constants) or the operand ``counts`` give; with neither, they are equal."""

    COUNTS = OperandDef("counts", "optional", "i64[N], rows of every rank")
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

    def counts(self, op: Op, inputs: Sequence[Any], equal: int) -> list[int]:
        """Rows of every rank; ``equal`` where nothing says how many."""
        given = inputs[1].tolist() if op.group("counts") else list(self.attr(op, "sizes"))
        return given or [equal] * self.attr(op, "ranks")
