"""``moe.backward_as``: a value made in one way, with the gradients of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OpDef, OperandDef, register_op
from moec.ir.types import Type


@register_op
class BackwardAs(OpDef):
    """The value of ``made``. A backward runs as if ``given`` had been computed instead, and never that of ``made``.

    ``%y = moe.backward_as %made, %given : bf16[T, 4096]``
    Both are the same rows: of the tokens where they are, and where they were regrouped to. A compiled graph does not
    compute ``given``, which is a ``moe.experts`` or ``moe.parallel_experts`` that nothing else uses. So gradients of
    experts' weights are sums over the rows that they were sums over before.
    """

    name = "moe.backward_as"
    operands = (
        OperandDef("made", doc="[T, N] rows that are computed"),
        OperandDef("given", doc="[T, N] the same rows, as the backward sees them"),
    )

    def infer(self, op: Op) -> Sequence[Type] | None:
        return [op.operands[1].type]

    def verify(self, op: Op) -> None:
        if op.operands[0].type != op.operands[1].type:
            self.fail(op, f"{op.operands[0].type} is made, and {op.operands[1].type} is given")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [inputs[0]]
