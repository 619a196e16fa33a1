"""``moe.dispatch``: token rows, sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.moe_semantics import make_plan
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.types import PlanType, TensorType, Type


@register_op
class Dispatch(OpDef):
    """Gathers each token's row once per chosen expert, grouped by expert, and the plan that undoes it.

    ``%rows, %plan = moe.dispatch %x, %ids {experts = 8} : bf16[2*T, 4096], !moe.plan<8>``
    Slots are sorted by expert, stable in (token, k). With ``sentinels``, ids outside ``0 .. experts-1`` mean "no
    expert here" (expert parallelism, null experts): their rows come last and belong to no group.
    """

    name = "moe.dispatch"
    operands = (OperandDef("x", doc="[T, H] token rows"), OperandDef("ids", doc="int[T, k] chosen experts"))
    attrs = (
        AttrDef("experts", "int", "number of experts E"),
        AttrDef("sentinels", "bool", "ids outside 0 .. E-1 mean no expert", default=False),
    )
    results = ("rows", "plan")

    def infer(self, op: Op) -> Sequence[Type] | None:
        x, ids = op.operands[0].type, op.operands[1].type
        if not (isinstance(x, TensorType) and isinstance(ids, TensorType)):
            return None
        return [x.with_(shape=(ids.shape[0] * ids.shape[1], x.shape[1])), PlanType(op.attrs["experts"])]

    def verify(self, op: Op) -> None:
        x, ids = op.operands[0].type, op.operands[1].type
        if not isinstance(x, TensorType) or x.rank != 2:
            self.fail(op, "x must be a matrix [T, H]")
        if not isinstance(ids, TensorType) or ids.rank != 2 or ids.dtype.kind not in ("int", "uint"):
            self.fail(op, "ids must be an integer matrix [T, k]")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        x, ids = inputs
        plan = make_plan(ids, self.attr(op, "experts"), self.attr(op, "sentinels"))
        return [x[plan.order // plan.top_k], plan]
