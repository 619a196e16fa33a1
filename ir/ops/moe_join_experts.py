"""``moe.join_experts``: a stack of all experts, put together from what was made of some at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.types import TensorType, Type


@register_op
class JoinExperts(OpDef):
    """Every expert's part of a stack, from parts that hold some experts each.

    ``%g = moe.join_experts [%a, %b] {order = (0, 3, 1, 2)} : f32[4, 12, 4]``
    ``order`` says which expert is at every place of the parts, one part behind the other: here %a might hold 0 and 3.
    """

    name = "moe.join_experts"
    operands = (OperandDef("parts", "many", "[E_i, ...] some experts each"),)
    attrs = (AttrDef("order", "any", "the expert at every place of the parts"),)

    def infer(self, op: Op) -> Sequence[Type] | None:
        like = op.operands[0].type
        assert isinstance(like, TensorType)
        return [like.with_(shape=(sympy.Integer(len(self.attr(op, "order"))), *like.shape[1:]))]

    def verify(self, op: Op) -> None:
        order, types = self.attr(op, "order"), [v.type for v in op.operands]
        if sorted(order) != list(range(len(order))):
            self.fail(op, "order holds every expert once")
        if not all(isinstance(t, TensorType) and t.rank and t.shape[0].is_Integer for t in types):
            self.fail(op, "parts are tensors of a known number of experts")
        if sum(int(t.shape[0]) for t in types if isinstance(t, TensorType)) != len(order):
            self.fail(op, f"the parts do not hold the {len(order)} experts of order")
        if len({t.shape[1:] for t in types if isinstance(t, TensorType)}) > 1:
            self.fail(op, "parts differ in what they hold of an expert")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        places = torch.tensor(self.attr(op, "order"), dtype=torch.int64, device=inputs[0].device)
        return [torch.cat(list(inputs)).index_select(0, places.argsort())]
