"""Sums over a token's slots in the order of k, one by one, as the ``cpu`` backend's kernels take them.

The reference and ``aten`` leave the order inside such a sum to ``torch.sum``. A layer on several ranks has the bits of
one process only if it adds as the backend does that would run it there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.ir.moe_semantics import Plan


def _row_of_slot(plan: Plan) -> tuple[Tensor, Tensor]:
    """The row of every slot (i64[T, k], 0 where it has none), and where it has none (bool[T, k])."""
    live = sum(plan.counts)
    order = plan.order[:live]
    rows = torch.zeros_like(plan.order).index_copy_(0, order, torch.arange(live, device=order.device))
    dead = torch.ones_like(plan.order, dtype=torch.bool).index_fill_(0, order, False)
    return rows.view(plan.tokens, plan.top_k), dead.view(plan.tokens, plan.top_k)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def combine_in_order(rows: Tensor, weights: Tensor, plan: Plan, out_dtype: torch.dtype) -> Tensor:
    """``moe_semantics.combine``: each product rounded to the promoted type, then added to a running sum in f32."""
    wide = torch.promote_types(rows.dtype, weights.dtype)
    total = rows.new_zeros((plan.tokens, rows.shape[1]), dtype=_accumulator(wide))
    if len(rows):
        at, dead = _row_of_slot(plan)
        for j in range(plan.top_k):
            product = rows.index_select(0, at[:, j]) * weights[:, j, None]
            total += product.masked_fill(dead[:, j, None], 0).to(total.dtype)
    return total.to(wide).to(out_dtype)


def sum_in_order(rows: Tensor, plan: Plan) -> Tensor:
    """``parallel_semantics.sum_slots``, with a running sum in f32."""
    total = rows.new_zeros((plan.tokens, rows.shape[1]), dtype=_accumulator(rows.dtype))
    if len(rows):
        at, dead = _row_of_slot(plan)
        for j in range(plan.top_k):
            total += rows.index_select(0, at[:, j]).masked_fill(dead[:, j, None], 0).to(total.dtype)
    return total.to(rows.dtype)
