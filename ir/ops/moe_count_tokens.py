"""``moe.count_tokens``: the number of tokens, as a tensor that can be sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moec.ir.core import Graph, Op
from moec.ir.opdef import OpDef, OperandDef, register_op
from moec.ir.types import TensorType, Type


@register_op
class CountTokens(OpDef):
    """How many rows a tensor has.

    ``%n = moe.count_tokens %x : i64[1]``
    """

    name = "moe.count_tokens"
    operands = (OperandDef("x", doc="[T, ...] a row per token"),)

    def infer(self, op: Op) -> Sequence[Type] | None:
        x = op.operands[0].type
        return [TensorType.of("i64", 1, device=x.device)] if isinstance(x, TensorType) else None

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return [torch.tensor([len(inputs[0])], device=inputs[0].device)]
