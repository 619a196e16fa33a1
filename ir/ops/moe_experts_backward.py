"""``moe.experts_backward``: the gradients of ``moe.experts``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, op_def, register_op
from moec.ir.ops.moe_experts import Experts
from moec.ir.types import Type


@register_op
class ExpertsBackward(OpDef):
    """The gradients of a ``moe.experts`` of the same operands, one result for each that is needed, in their order.

    ``%dx, %dw, %du, %dd = moe.experts_backward %dy, %x, %ids, %w, [%w13], [%w2] {experts = 8, needs = (...)} {...}``
    What lies between the GEMMs is computed again.
    """

    name = "moe.experts_backward"
    operands = (OperandDef("grad", doc="[T, H] gradient of the result"), *Experts.operands)
    attrs = (*Experts.attrs, AttrDef("needs", "any", "one bool for every operand of moe.experts"))
    regions = Experts.regions
    results = ("gradients",)
    variadic_results = True

    def infer(self, op: Op) -> Sequence[Type] | None:
        return [v.type for v, need in zip(op.operands[1:], self.attr(op, "needs"), strict=True) if need]

    def verify(self, op: Op) -> None:
        needs = self.attr(op, "needs")
        if len(needs) != len(op.operands) - 1 or needs[1]:
            self.fail(op, "needs holds one bool for every operand of moe.experts, and ids have no gradient")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        needs = self.attr(op, "needs")
        leaves = [t.detach().requires_grad_(bool(n)) for t, n in zip(inputs[1:], needs, strict=True)]
        attrs = {k: v for k, v in op.attrs.items() if k != "needs"}
        forward: Any = SimpleNamespace(
            attrs=attrs, groups=op.groups[1:], regions=op.regions, result=SimpleNamespace(type=op.operands[0].type)
        )
        with torch.enable_grad():
            (out,) = op_def("moe.experts").evaluate(forward, leaves, run)
        wanted = [t for t in leaves if t.requires_grad]
        if not out.requires_grad:
            return [torch.zeros_like(t) for t in wanted]
        return list(torch.autograd.grad(out, wanted, inputs[0], allow_unused=True, materialize_grads=True))
