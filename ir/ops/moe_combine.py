"""``moe.combine``: expert rows back to their tokens, weighted and added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.moe_semantics import combine
from moec.ir.opdef import OpDef, OperandDef, register_op, torch_dtype
from moec.ir.types import PlanType, TensorType


@register_op
class Combine(OpDef):
    """``y[t] = Σ_k w[t, k] · rows[slot(t, k)]``.

    ``%y = moe.combine %o, %w, %plan : bf16[T, 4096]``
    The product is taken in the promoted type of rows and weights, the sum runs in order of k (accumulated in f32 for
    narrow floats), and the result is cast to the result's type. Slots without an expert add nothing.
    """

    name = "moe.combine"
    operands = (
        OperandDef("rows", doc="[T*k, H] rows grouped by expert"),
        OperandDef("weights", doc="[T, k] router weights"),
        OperandDef("plan", doc="from moe.dispatch"),
    )

    def verify(self, op: Op) -> None:
        if not isinstance(op.operands[2].type, PlanType):
            self.fail(op, "plan must come from moe.dispatch")
        w, out = op.operands[1].type, op.result.type
        if not (isinstance(w, TensorType) and isinstance(out, TensorType) and w.rank == 2 and out.rank == 2):
            self.fail(op, "weights and result must be matrices [T, k] and [T, H]")
        elif w.shape[0] != out.shape[0]:
            self.fail(op, f"weights have {w.shape[0]} tokens, the result {out.shape[0]}")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        rows, weights, plan = inputs
        assert isinstance(op.result.type, TensorType)
        return [combine(rows, weights, plan, torch_dtype(op.result.type.dtype.name))]
