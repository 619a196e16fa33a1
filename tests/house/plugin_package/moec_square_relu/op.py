"""The op ``square.relu``: relu(x)², as Nemotron's experts use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OpDef, OperandDef, register_op
from moec.ir.types import Type


@register_op
class SquareRelu(OpDef):
    """``relu(x)²`` of every element."""

    name = "square.relu"
    operands = (OperandDef("x", doc="any shape"),)

    def infer(self, op: Op) -> Sequence[Type]:
        return [op.operands[0].type]

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [inputs[0].relu().square()]
