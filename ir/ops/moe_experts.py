"""``moe.experts``: the whole routed expert layer as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moec.ir.core import Graph, Op
from moec.ir.moe_semantics import combine, expert_gemm, grouped_gemm, make_plan, split_gate
from moec.ir.opdef import AttrDef, OpDef, OperandDef, RegionDef, register_op, torch_dtype
from moec.ir.ops.moe_activation import LAYOUTS
from moec.ir.scaled_types import scales_misfit
from moec.ir.types import TensorType


@register_op
class Experts(OpDef):
    """Dispatch, up GEMM, activation, down GEMM, weighting and combine in one.

    ``%y = moe.experts %x, %ids, %w, [%w13], [%w2] {experts = 8} { (%g, %u) -> ... } : bf16[T, 4096]``

    The meaning is that of ``moe.dispatch``, ``moe.grouped_gemm``, ``moe.activation``, ``moe.grouped_gemm``, the
    ``post`` region if there is one, and ``moe.combine``, in this order. ``up`` holds gate and up together in one
    tensor (``layout`` concat, interleaved, rows), one projection (single), or two tensors, gate first (separate).
    Not ``stacked``: one matrix per expert, all gates before all ups; each expert may have an intermediate width of its
    own, and the activation's program is then written for a symbolic one. Weights in f8e4m3fn have scales, as those of
    ``moe.grouped_gemm``.
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
        OperandDef("up_scale", "many", "f32[E, 2I/128, H/128], rounded up, of weights in f8e4m3fn; or none"),
        OperandDef("down_scale", "many", "f32[E, H/128, I/128], as up_scale"),
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

    def parts(self, op: Op) -> int:
        """2 where gate and up are separate weights, else 1."""
        return 2 if self.attr(op, "layout") == "separate" else 1

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
        for name, count in (("up", per_part * self.parts(op)), ("down", per_part)):
            if len(op.group(name)) != count:
                self.fail(op, f"{name} holds {len(op.group(name))} tensors where {count} are due")
            if op.group(f"{name}_bias") and len(op.group(f"{name}_bias")) != count:
                self.fail(op, f"{name}_bias holds {len(op.group(f'{name}_bias'))} tensors where {count} are due")
            scales, form = op.group(f"{name}_scale"), self.attr(op, f"{name}_form")
            if reason := scales_misfit(op.group(name), scales, form, self.attr(op, "stacked")):
                self.fail(op, f"{name}: {reason}")
        if bool(op.group("up_scale")) != bool(op.group("down_scale")):
            self.fail(op, "up and down weights have scales, or neither")
        inputs = 1 if self.attr(op, "layout") in ("single", "rows") else 2
        if len(op.regions[0].args) != inputs + len(op.group("captures")):
            self.fail(op, "the activation's arguments do not fit layout and captures")
        for expert in range(1 if self.attr(op, "stacked") else self.attr(op, "experts")):
            self._verify_expert(op, expert)

    def _verify_expert(self, op: Op, expert: int) -> None:
        """The sizes of one expert's weights fit each other. Experts that are not stacked may have different ones."""

        def sizes(name: str, index: int) -> tuple[Any, Any]:
            """Outputs and inputs."""
            t = op.group(name)[index].type
            rank = 3 if self.attr(op, "stacked") else 2
            if not isinstance(t, TensorType) or t.rank != rank:
                self.fail(op, f"{name} weight {index} must be a tensor of rank {rank}")
            n, k = t.shape[-2:] if self.attr(op, f"{name}_form") == "nk" else (t.shape[-1], t.shape[-2])
            bias = op.group(f"{name}_bias")
            if bias and not (isinstance(b := bias[index].type, TensorType) and b.shape[-1] == n):
                self.fail(op, f"{name}_bias {index} does not fit the {n} outputs of its weight")
            return n, k

        x = op.operands[0].type
        assert isinstance(x, TensorType)
        apart = 1 if self.attr(op, "stacked") else self.attr(op, "experts")
        ups = [sizes("up", part * apart + expert) for part in range(self.parts(op))]
        width, inner = sizes("down", expert)
        per_output = {"concat": 2, "interleaved": 2}.get(self.attr(op, "layout"), 1)
        for n, k in ups:
            if k != x.shape[1]:
                self.fail(op, f"an up weight of expert {expert} reduces over {k}, tokens are {x.shape[1]} wide")
            if self.attr(op, "layout") != "rows" and n != per_output * inner:
                self.fail(op, f"expert {expert} has {n} outputs of the up GEMM where {per_output * inner} are due")
        if width != sizes("down", 0)[0]:
            self.fail(op, f"the down weight of expert {expert} has {width} outputs, that of expert 0 has others")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        cut: list[Sequence[Any]] = []
        start = 0
        for size in op.groups:
            cut.append(inputs[start : start + size])
            start += size
        cut += [()] * (len(self.operands) - len(cut))
        (x,), (ids,), (w,), up, down, up_bias, down_bias, captures, post_captures, up_scale, down_scale = cut
        layout, stacked, experts = (self.attr(op, name) for name in ("layout", "stacked", "experts"))
        plan = make_plan(ids, experts, self.attr(op, "sentinels"))
        rows = x[plan.order // plan.top_k]
        out_dtype = torch_dtype(op.result.type.dtype.name) if isinstance(op.result.type, TensorType) else x.dtype
        post = op.regions[1] if len(op.regions) > 1 else None
        if stacked or len({w_up.shape for w_up in up}) == 1:  # all rows at once: the very ops of the chain
            apart = len(up) // self.parts(op)
            h = [
                grouped_gemm(
                    rows, up[i : i + apart], up_bias[i : i + apart], plan, self.attr(op, "up_form"), stacked,
                    up_scale[i : i + apart],
                )
                for i in range(0, len(up), apart)
            ]  # fmt: skip
            a = run(op.regions[0], [*split_gate(h, layout), *captures])[0]
            o = grouped_gemm(a, down, down_bias, plan, self.attr(op, "down_form"), stacked, down_scale)
            return [combine(run(post, [o, *post_captures])[0] if post else o, w, plan, out_dtype)]
        found = []
        for expert, start, stop in plan.segments():
            h = [
                expert_gemm(rows[start:stop], up, up_bias, expert, experts, self.attr(op, "up_form"), stacked, part)
                for part in range(self.parts(op))
            ]
            a = run(op.regions[0], [*split_gate(h, layout), *captures])[0]
            o = expert_gemm(a, down, down_bias, expert, experts, self.attr(op, "down_form"), stacked)
            found.append(run(post, [o, *post_captures])[0] if post else o)
        assert isinstance(op.result.type, TensorType)
        like = found[0] if found else x
        dead = like.new_zeros((rows.shape[0] - sum(plan.counts), int(op.result.type.shape[-1])))
        return [combine(torch.cat([*found, dead]), w, plan, out_dtype)]
