"""Linear layers in fp8 (transformers' ``FP8Linear``): attention, dense MLPs, shared experts of a quantized checkpoint.

Their own forward calls kernels that are downloaded for one kind of GPU. Here both sides are brought to what they stand
for and multiplied in the rows' type, by operations that every device has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moec.ir.scaled_semantics import SCALED, misfit, narrow_rows, wide_rows, wide_weight
from moec.readiness.rewriters.known import Rewriter


class _Narrowed(torch.autograd.Function):
    """Rows as what they stand for once they are in f8e4m3fn; their gradient is that of rows that were not narrowed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return wide_rows(*narrow_rows(rows)).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def forward(self: Any, input: Tensor) -> Tensor:
    """x ``[.., K]`` to ``[.., N]``."""
    rows: Tensor = _Narrowed.apply(input.reshape(-1, self.in_features))  # type: ignore[no-untyped-call]
    weight = wide_weight(self.weight.detach(), self.weight_scale_inv.detach().float()).to(input.dtype)
    return linear(rows, weight, self.bias).view(*input.shape[:-1], self.out_features)


def _check(module: Any) -> str | None:
    if module.activation_scheme != "dynamic":
        return f"rows are quantized with scales of the checkpoint (activation_scheme={module.activation_scheme!r})"
    if module.block_size is None or tuple(module.block_size) != (SCALED, SCALED):
        return f"its weight has a scale for a block of {module.block_size}, not of {SCALED} x {SCALED}"
    if module.weight.dtype != torch.float8_e4m3fn:
        return f"its weight is {str(module.weight.dtype).removeprefix('torch.')}, not float8_e4m3fn"
    return misfit(tuple(module.weight.shape), tuple(module.weight_scale_inv.shape)) or None


REWRITER = Rewriter(
    target="transformers.integrations.finegrained_fp8.FP8Linear",
    how="what its weight and rows in fp8 stand for, multiplied by PyTorch",
    methods={"forward": forward},
    sources={"FP8Linear.forward": "5b21fc0daab1f939"},
    check=_check,
    runs_experts=False,
)
