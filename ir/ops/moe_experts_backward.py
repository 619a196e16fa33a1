"""``moe.experts_backward``: the gradients of ``moe.experts``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import sympy
import torch

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, op_def, register_op
from moec.ir.ops.moe_experts import Experts
from moec.ir.types import TensorType, Type

STACKS = ("up", "down", "up_bias", "down_bias", "up_scale", "down_scale")
"""Operands that hold something of every expert, where they are stacked."""


@register_op
class ExpertsBackward(OpDef):
    """The gradients of a ``moe.experts`` of the same operands, one result for each that is needed, in their order.

    ``%dx, %dw, %du, %dd = moe.experts_backward %dy, %x, %ids, %w, [%w13], [%w2] {experts = 8, needs = (...)} {...}``
    What lies between the GEMMs is computed again. With ``only = (1, 4)`` no other experts have rows, and gradients of
    stacked weights and biases are those of these experts, in this order.
    """

    name = "moe.experts_backward"
    operands = (OperandDef("grad", doc="[T, H] gradient of the result"), *Experts.operands)
    attrs = (
        *Experts.attrs,
        AttrDef("needs", "any", "one bool for every operand of moe.experts"),
        AttrDef("only", "any", "the experts that have rows, where gradients are of these alone", default=None),
    )
    regions = Experts.regions
    results = ("gradients",)
    variadic_results = True

    def infer(self, op: Op) -> Sequence[Type] | None:
        only, stacks = self.attr(op, "only"), self.stacks(op)
        types = [
            t.with_(shape=(sympy.Integer(len(only)), *t.shape[1:]))
            if only is not None and i in stacks and isinstance(t, TensorType)
            else t
            for i, t in enumerate(v.type for v in op.operands[1:])
        ]
        return [t for t, need in zip(types, self.attr(op, "needs"), strict=True) if need]

    def stacks(self, op: Op) -> set[int]:
        """Which operands of the layer hold something of every expert, counted without the result's gradient."""
        ends, found = [0, *accumulate(op.groups)], set[int]()
        for name in STACKS:
            at = self.group_index(name)
            if at < len(op.groups):
                found |= {i - 1 for i in range(ends[at], ends[at + 1])}
        return found

    def verify(self, op: Op) -> None:
        needs = self.attr(op, "needs")
        if len(needs) != len(op.operands) - 1 or needs[1]:
            self.fail(op, "needs holds one bool for every operand of moe.experts, and ids have no gradient")
        only, experts = self.attr(op, "only"), self.attr(op, "experts")
        if only is None:
            return
        if not self.attr(op, "stacked"):
            self.fail(op, "only is said of stacked weights")
        if len(set(only)) < len(only) or not all(0 <= e < experts for e in only):
            self.fail(op, f"only holds different ones of the {experts} experts")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        needs = self.attr(op, "needs")
        leaves = [t.detach().requires_grad_(bool(n)) for t, n in zip(inputs[1:], needs, strict=True)]
        attrs = {k: v for k, v in op.attrs.items() if k not in ("needs", "only")}
        forward: Any = SimpleNamespace(
            attrs=attrs, groups=op.groups[1:], regions=op.regions, result=SimpleNamespace(type=op.operands[0].type)
        )
        with torch.enable_grad():
            (out,) = op_def("moe.experts").evaluate(forward, leaves, run)
        wanted = [t for t in leaves if t.requires_grad]
        if not out.requires_grad:
            found = [torch.zeros_like(t) for t in wanted]
        else:
            found = list(torch.autograd.grad(out, wanted, inputs[0], allow_unused=True, materialize_grads=True))
        only, stacks = self.attr(op, "only"), self.stacks(op)
        if only is None:
            return found
        places = [i for i, need in enumerate(needs) if need]
        return [g[list(only)] if i in stacks else g for i, g in zip(places, found, strict=True)]
