"""``comm.wait``: the result of a started communication."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OpDef, OperandDef, register_op
from moec.ir.types import TensorType, TokenType


@register_op
class Wait(OpDef):
    """Waits for a started communication and gives what came.

    ``%rows = comm.wait %t : bf16[R, 4096]``
    What stands between start and wait may run meanwhile. The number of rows may depend on data: it is a symbol then.
    """

    name = "comm.wait"
    operands = (OperandDef("token", doc="from a start of the comm dialect"),)

    def verify(self, op: Op) -> None:
        token = op.operands[0]
        if not isinstance(token.type, TokenType):
            self.fail(op, "what is waited for must be a !comm.token")
        if len(token.uses) > 1:
            self.fail(op, "a token is waited for once")
        if not isinstance(op.result.type, TensorType):
            self.fail(op, "the result must be a tensor")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [inputs[0].wait()]
