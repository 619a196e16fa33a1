"""``moe.token_part``: some of the tokens, by their share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.types import TensorType


@register_op
class TokenPart(OpDef):
    """Rows ``T * first / of`` up to ``T * last / of``, rounded down; they share the memory of all.

    ``%a = moe.token_part %x {first = 3, last = 16, of = 16} : bf16[T1, 4096]``
    """

    name = "moe.token_part"
    operands = (OperandDef("x", doc="[T, N], a row a token"),)
    attrs = (
        AttrDef("first", "int", "shares before"),
        AttrDef("last", "int", "shares before and in it"),
        AttrDef("of", "int", "shares of all"),
    )

    def verify(self, op: Op) -> None:
        if not isinstance(op.operands[0].type, TensorType) or not op.operands[0].type.rank:
            self.fail(op, "x must be a tensor with rows")
        if not 0 <= self.attr(op, "first") <= self.attr(op, "last") <= self.attr(op, "of"):
            self.fail(op, "0 <= first <= last <= of")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        (x,) = inputs
        first, last = (len(x) * self.attr(op, name) // self.attr(op, "of") for name in ("first", "last"))
        return [x[first:last]]
