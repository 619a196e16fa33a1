"""What GEMMs on weights in f8e4m3fn mean, in plain torch: a scale for a block of a weight, one for a stretch of a row.

This is the form of DeepSeek-V3's checkpoints (arXiv:2412.19437, section 3.3.2) and of transformers' ``FP8Experts``: a
weight is ``values * scales`` with a scale for 128 x 128 elements, a row is brought to the same type with a scale for
128 columns when it is multiplied. Sums are in f32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

SCALED = 128
"""Elements that share a scale, along each side of a weight and along a row."""
LARGEST = 448.0
"""The largest number of f8e4m3fn; the largest element of a stretch becomes it."""


def blocks(size: int) -> int:
    """Scales along a side of ``size`` elements; the last may stand for fewer than 128."""
    return -(-size // SCALED)


def narrow_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in f8e4m3fn and their scales: ``rows ≈ values * scales``.

    Args:
        rows: [R, K] of any float type. Stretches of zeros have the scale 1.

    Returns:
        f8e4m3fn[R, K], and f32[R, ceil(K / 128)].
    """
    wide = pad(rows.float(), (0, -rows.shape[1] % SCALED)).unflatten(1, (blocks(rows.shape[1]), SCALED))
    largest = wide.abs().amax(dim=2)
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    values = (wide / scales[:, :, None]).clamp(-LARGEST, LARGEST).flatten(1)[:, : rows.shape[1]]
    return values.to(torch.float8_e4m3fn), scales


def wide_rows(values: Tensor, scales: Tensor) -> Tensor:
    """``values * scales`` in f32; what :func:`narrow_rows` made."""
    return values.float() * scales.repeat_interleave(SCALED, dim=1)[:, : values.shape[1]]


def wide_weight(values: Tensor, scales: Tensor) -> Tensor:
    """A weight [.., N, K] as what it stands for, in f32; ``scales`` are [.., ceil(N / 128), ceil(K / 128)]."""
    each = scales.repeat_interleave(SCALED, dim=-2)[..., : values.shape[-2], :]
    return values.float() * each.repeat_interleave(SCALED, dim=-1)[..., : values.shape[-1]]


class _ScaledGemm(torch.autograd.Function):
    """The product; its gradient goes to the rows alone, as if they had not been narrowed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(values, scales)
        return (wide_rows(*narrow_rows(rows)) @ wide_weight(values, scales).t()).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return scaled_gradient(grad, *ctx.saved_tensors), None, None


def scaled_gemm(rows: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """``rows @ Wᵀ`` with both sides in f8e4m3fn and sums in f32, rounded to the rows' type.

    Args:
        rows: [R, K].
        values, scales: The weight, f8e4m3fn[N, K] and f32[ceil(N / 128), ceil(K / 128)].
    """
    out: Tensor = _ScaledGemm.apply(rows, values, scales)  # type: ignore[no-untyped-call]
    return out


def scaled_gradient(grad: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """The gradient of the rows: ``grad @ W``, in f32 and then in the type of ``grad``."""
    return (grad.float() @ wide_weight(values, scales)).to(grad.dtype)


def misfit(weight: tuple[Any, ...], scales: tuple[Any, ...]) -> str:
    """Why scales of such a shape do not fit a weight [.., N, K]; empty where they do."""
    n, k = weight[-2:]
    if isinstance(n, int) or getattr(n, "is_Integer", False):
        want = (*weight[:-2], blocks(int(n)), blocks(int(k)))
        if tuple(scales) != want:
            return (
                f"scales {list(scales)} do not fit a weight {list(weight)}: one for {SCALED} x {SCALED} elements "
                f"makes {list(want)}"
            )
    return ""
