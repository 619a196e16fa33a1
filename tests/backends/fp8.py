"""Numbers in f8e4m3fn with scales, written for the tests: block by block, in f32."""

from __future__ import annotations

import torch
from torch import Tensor


def fp8_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """[E, N, K] in f8e4m3fn and the scales of its 128 x 128 blocks, block by block."""
    values = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(w), -(-w.shape[1] // 128), -(-w.shape[2] // 128))
    for e in range(len(w)):
        for i in range(scales.shape[1]):
            for j in range(scales.shape[2]):
                at = (e, slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
                scales[e, i, j] = w[at].abs().max() / 448
                values[at] = (w[at] / scales[e, i, j]).to(torch.float8_e4m3fn)
    return values, scales


def fp8_weight_value(values: Tensor, scales: Tensor) -> Tensor:
    """What [E, N, K] in f8e4m3fn with scales stands for, in f32."""
    _, n, k = values.shape
    return values.float() * scales.repeat_interleave(128, 1)[:, :n].repeat_interleave(128, 2)[:, :, :k]


def fp8_row_value(x: Tensor) -> Tensor:
    """What a row stands for when it has been brought to f8e4m3fn with a scale for 128 columns, in f32."""
    found = []
    for stretch in x.float().split(128):
        scale = stretch.abs().max() / 448
        found.append((stretch / scale).to(torch.float8_e4m3fn).float() * scale if scale else stretch)
    return torch.cat(found)
