"""``moe.grouped_gemm``: one GEMM per expert over its own rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.moe_semantics import grouped_gemm
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.scaled_types import scales_misfit
from moec.ir.types import PlanType, TensorType, Type


@register_op
class GroupedGemm(OpDef):
    """Multiplies every expert's rows with that expert's weight, and adds its bias in the output's type.

    ``%h = moe.grouped_gemm %rows, [%w13], %plan {form = "nk"} : bf16[2*T, 28672]``
    ``form`` says how a weight lies: ``nk`` rows are outputs (``y = x Wᵀ``), ``kn`` rows are inputs (``y = x W``).
    ``stacked`` weights are one tensor ``[E, ..]``; otherwise the group holds one matrix per expert.
    A stacked weight ``nk`` in f8e4m3fn has ``scales``; rows are then brought to that type too, with a scale for 128
    columns, and sums are in f32 (:mod:`moec.ir.scaled_semantics`). Its gradients are those of the rows alone.
    """

    name = "moe.grouped_gemm"
    operands = (
        OperandDef("rows", doc="[R, K] rows grouped by expert"),
        OperandDef("weights", "many", "[E, N, K] or [E, K, N], or E matrices"),
        OperandDef("plan", doc="from moe.dispatch"),
        OperandDef("bias", "many", "[E, N], or E vectors, or none"),
        OperandDef("scales", "many", "f32[E, N/128, K/128], rounded up, of a weight in f8e4m3fn; or none"),
    )
    attrs = (
        AttrDef("form", "str", "how a weight lies", default="nk", choices=("nk", "kn")),
        AttrDef("stacked", "bool", "one tensor holds all experts", default=True),
    )

    def infer(self, op: Op) -> Sequence[Type] | None:
        rows, weight = op.operands[0].type, op.group("weights")[0].type
        if not (isinstance(rows, TensorType) and isinstance(weight, TensorType)):
            return None
        n = weight.shape[-2] if self.attr(op, "form") == "nk" else weight.shape[-1]
        return [rows.with_(shape=(rows.shape[0], n))]

    def verify(self, op: Op) -> None:
        rows, plan = op.operands[0].type, op.group("plan")[0].type
        if not isinstance(plan, PlanType):
            self.fail(op, "plan must come from moe.dispatch")
        if not isinstance(rows, TensorType) or rows.rank != 2:
            self.fail(op, "rows must be a matrix [R, K]")
        weights = op.group("weights")
        stacked = self.attr(op, "stacked")
        if len(weights) != (1 if stacked else plan.experts):
            self.fail(op, f"{len(weights)} weights do not fit stacked = {stacked} with {plan.experts} experts")
        if len(op.group("bias")) not in (0, len(weights)):
            self.fail(op, f"{len(op.group('bias'))} biases do not fit {len(weights)} weights")
        for w in weights:
            t = w.type
            if not isinstance(t, TensorType) or t.rank != (3 if stacked else 2):
                self.fail(op, f"weight {w!r} must be a tensor of rank {3 if stacked else 2}")
            k = t.shape[-1] if self.attr(op, "form") == "nk" else t.shape[-2]
            if k != rows.shape[1]:
                self.fail(op, f"weight {w!r} reduces over {k}, the rows are {rows.shape[1]} wide")
            if t.dtype != rows.dtype and not op.group("scales"):
                self.fail(op, f"rows are {rows.dtype}, weight {w!r} is {t.dtype}")
        if reason := scales_misfit(weights, op.group("scales"), self.attr(op, "form"), stacked):
            self.fail(op, reason)

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        n, biases = op.groups[1], op.groups[3]
        rows, weights, plan, rest = inputs[0], inputs[1 : 1 + n], inputs[1 + n], inputs[2 + n :]
        form, stacked = self.attr(op, "form"), self.attr(op, "stacked")
        return [grouped_gemm(rows, weights, rest[:biases], plan, form, stacked, rest[biases:])]
