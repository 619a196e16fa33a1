"""``quant.rows``: rows in fewer bits, for sending."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op, torch_dtype
from moec.ir.quant_semantics import quantize_rows
from moec.ir.types import TensorType, Type, dtype

NARROW = ("i8", "f8e4m3fn", "f8e5m2")


@register_op
class QuantRows(OpDef):
    """Scales every row so that its largest element is the largest of a narrow type, and rounds to that type.

    ``%q, %s = quant.rows %x {to = "i8"} : i8[R, 4096], f32[R, 1]``
    """

    name = "quant.rows"
    operands = (OperandDef("x", doc="[R, N] rows of floats"),)
    attrs = (AttrDef("to", "str", "the narrow type", default="i8", choices=NARROW),)
    results = ("rows", "scales")

    def infer(self, op: Op) -> Sequence[Type] | None:
        x = op.operands[0].type
        if not isinstance(x, TensorType):
            return None
        scales = TensorType(dtype("f32"), (x.shape[0], sympy.Integer(1)), x.device)
        return [x.with_(dtype=dtype(self.attr(op, "to"))), scales]

    def verify(self, op: Op) -> None:
        x = op.operands[0].type
        if not isinstance(x, TensorType) or x.rank != 2 or not x.dtype.is_float:
            self.fail(op, "x must be a matrix of floats")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return list(quantize_rows(inputs[0], torch_dtype(self.attr(op, "to"))))
