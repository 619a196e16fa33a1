"""Factories for ``moec compile tests.aot.factories:NAME``, none of which can be compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def raises() -> nn.Module:
    """Raises."""
    raise RuntimeError("the disk with the weights is gone")


def dense() -> tuple[nn.Module, Any]:
    """A model without MoE."""
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(2, 4)


class _Looks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def control_flow() -> tuple[nn.Module, Any]:
    """A model whose Python asks for data."""
    return _Looks(), torch.ones(2, 4)
