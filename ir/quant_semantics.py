"""Rows in fewer bits: one scale a row, chosen from its largest element when it is sent."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""The largest number of each narrow type; a row's largest element becomes it."""


def quantize_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Narrow rows and their scales: ``rows ≈ narrow * scale``.

    Args:
        rows: [R, N] of any float type. Rows of zeros have the scale 1.
        dtype: A key of :data:`LARGEST`.

    Returns:
        ``dtype``[R, N], and f32[R, 1].
    """
    wide = rows.float()
    largest = wide.abs().amax(dim=1, keepdim=True) if rows.shape[1] else wide.new_zeros((len(rows), 1))
    scale = torch.where(largest > 0, largest / LARGEST[dtype], 1.0)
    narrow = wide / scale
    return (narrow.round() if dtype == torch.int8 else narrow).to(dtype), scale


def restore_rows(narrow: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``narrow * scale`` as ``dtype``."""
    return (narrow.float() * scale).to(dtype)
