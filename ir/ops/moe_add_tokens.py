"""``moe.add_tokens``: rows added up per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moec.ir.core import Graph, Op
from moec.ir.opdef import OpDef, OperandDef, register_op


@register_op
class AddTokens(OpDef):
    """``y[t]`` is the sum of the rows whose token is t, in f32 for narrow floats; tokens without a row get 0.

    ``%y = moe.add_tokens %rows, %tokens, %x : bf16[T, 4096]``
    ``%x`` says how many tokens there are, no more.
    """

    name = "moe.add_tokens"
    operands = (
        OperandDef("rows", doc="[U, N] rows"),
        OperandDef("tokens", doc="i64[U], the token of each"),
        OperandDef("like", doc="[T, ...] a row per token"),
    )

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        rows, tokens, like = inputs
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = rows.new_zeros((len(like), rows.shape[1]), dtype=wide)
        return [total.index_add(0, tokens, rows.to(wide)).to(rows.dtype)]
