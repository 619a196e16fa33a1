"""``moe.experts``: the whole routed expert layer as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.moe_semantics import combine, grouped_gemm, make_plan, split_gate
from moec.ir.opdef import AttrDef, OpDef, OperandDef, RegionDef, register_op, torch_dtype
from moec.ir.ops.moe_activation import LAYOUTS
from moec.ir.types import TensorType


@register_op
class Experts(OpDef):
    """Dispatch, up GEMM, activation, down GEMM, weighting and combine in one.

    ``%y = moe.experts %x, %ids, %w, [%w13], [%w2] {experts = 8} { (%g, %u) -> ... } : bf16[T, 4096]``

    The meaning is that of ``moe.dispatch``, ``moe.grouped_gemm``, ``moe.activation``, ``moe.grouped_gemm``, the
    ``post`` region if there is one, and ``moe.combine``, in this order. ``up`` holds gate and up together in one
    tensor (``layout`` concat, interleaved, rows), one projection (single), or two tensors, gate first (separate).
    Not ``stacked``: one matrix per expert, all gates before all ups.
    """

    name = "moe.experts"
    operands = (
        OperandDef("x", doc="[T, H] token rows"),
        OperandDef("ids", doc="int[T, k] chosen experts"),
        OperandDef("weights", doc="[T, k] router weights"),
        OperandDef("up", "many", "[E, 2I, H] or as layout, form and stacked say"),
        OperandDef("down", "many", "[E, H, I]"),
        OperandDef("up_bias", "many", "[E, 2I], or none"),
        OperandDef("down_bias", "many", "[E, H], or none"),
        OperandDef("captures", "many", "what the activation uses besides"),
        OperandDef("post_captures", "many", "what the post region uses besides"),
    )
    attrs = (
        AttrDef("experts", "int", "number of experts E"),
        AttrDef("layout", "str", "where gate and up lie", default="concat", choices=LAYOUTS),
        AttrDef("up_form", "str", "how an up weight lies", default="nk", choices=("nk", "kn")),
        AttrDef("down_form", "str", "how a down weight lies", default="nk", choices=("nk", "kn")),
        AttrDef("stacked", "bool", "one tensor holds all experts", default=True),
        AttrDef("sentinels", "bool", "ids outside 0 .. E-1 mean no expert", default=False),
    )
    regions = (
        RegionDef("activation", "the function between the GEMMs"),
        RegionDef("post", "the function of a row after the down GEMM", optional=True),
    )

    def up_parts(self, op: Op, values: Sequence[Any]) -> list[Sequence[Any]]:
        """``values`` of the up (or up_bias) group, cut into gate and up where they are apart."""
        if self.attr(op, "layout") != "separate" or not values:
            return [values]
        half = len(values) // 2
        return [values[:half], values[half:]]

    def verify(self, op: Op) -> None:
        x, ids, w = (v.type for v in op.operands[:3])
        if not all(isinstance(t, TensorType) and t.rank == 2 for t in (x, ids, w)):
            self.fail(op, "x, ids and weights must be matrices [T, H], [T, k], [T, k]")
            return
        assert isinstance(x, TensorType)
        assert isinstance(ids, TensorType)
        assert isinstance(w, TensorType)
        if ids.shape != w.shape or x.shape[0] != ids.shape[0]:
            self.fail(op, f"x is {x.shape}, ids {ids.shape}, weights {w.shape}: tokens and k must agree")
        per_part = 1 if self.attr(op, "stacked") else self.attr(op, "experts")
        parts = 2 if self.attr(op, "layout") == "separate" else 1
        for name, count in (("up", per_part * parts), ("down", per_part)):
            if len(op.group(name)) != count:
                self.fail(op, f"{name} holds {len(op.group(name))} tensors where {count} are due")
            if op.group(f"{name}_bias") and len(op.group(f"{name}_bias")) != count:
                self.fail(op, f"{name}_bias holds {len(op.group(f'{name}_bias'))} tensors where {count} are due")
        inputs = 1 if self.attr(op, "layout") in ("single", "rows") else 2
        if len(op.regions[0].args) != inputs + len(op.group("captures")):
            self.fail(op, "the activation's arguments do not fit layout and captures")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        cut: list[Sequence[Any]] = []
        start = 0
        for size in op.groups:
            cut.append(inputs[start : start + size])
            start += size
        (x,), (ids,), (w,), up, down, up_bias, down_bias, captures, post_captures = cut
        stacked = self.attr(op, "stacked")
        plan = make_plan(ids, self.attr(op, "experts"), self.attr(op, "sentinels"))
        rows = x[plan.order // plan.top_k]
        biases = self.up_parts(op, up_bias) if up_bias else [()] * 2
        h = [
            grouped_gemm(rows, part, bias, plan, self.attr(op, "up_form"), stacked)
            for part, bias in zip(self.up_parts(op, up), biases, strict=False)
        ]
        a = run(op.regions[0], [*split_gate(h, self.attr(op, "layout")), *captures])[0]
        o = grouped_gemm(a, down, down_bias, plan, self.attr(op, "down_form"), stacked)
        if len(op.regions) > 1:
            o = run(op.regions[1], [o, *post_captures])[0]
        assert isinstance(op.result.type, TensorType)
        return [combine(o, w, plan, torch_dtype(op.result.type.dtype.name))]
