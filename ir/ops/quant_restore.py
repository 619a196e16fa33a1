"""``quant.restore``: rows of ``quant.rows`` as floats again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op, torch_dtype
from moec.ir.quant_semantics import restore_rows
from moec.ir.types import TensorType, Type


@register_op
class QuantRestore(OpDef):
    """``rows * scales``, in the type that the rows had.

    ``%x = quant.restore %q, %s {to = bf16} : bf16[R, 4096]``
    """

    name = "quant.restore"
    operands = (OperandDef("rows", doc="[R, N] narrow rows"), OperandDef("scales", doc="f32[R, 1]"))
    attrs = (AttrDef("to", "dtype", "the element type of the result"),)

    def infer(self, op: Op) -> Sequence[Type] | None:
        rows = op.operands[0].type
        return [rows.with_(dtype=self.attr(op, "to"))] if isinstance(rows, TensorType) else None

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [restore_rows(inputs[0], inputs[1], torch_dtype(self.attr(op, "to").name))]
