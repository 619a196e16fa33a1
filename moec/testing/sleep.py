"""Experts that take as long as a curve says: many ranks on few cores, each as fast as on a machine of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moec.backends.distributed.kernel import ParallelKernel
from moec.backends.distributed.together import Gradients
from moec.cost.curve import LayerCurve
from moec.ir.core import Op


class SleepingLayer(ParallelKernel):
    """A rank's part of a ``moe.parallel_experts`` whose experts compute right, and then sleep until the curve's time.

    Attributes:
        curve: Time of the rank's experts, forwards.
        backward_curve: The same backwards.
        computed: Seconds that experts took in the last call, sleep included.
    """

    def __init__(self, op: Op, target: str, curve: LayerCurve, backward_curve: LayerCurve | None = None) -> None:
        super().__init__(op, target)
        self.curve, self.backward_curve = curve, backward_curve or curve
        self.computed = 0.0

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        self.computed = 0.0
        return super().forward(inputs)

    def backward(
        self, grads: Sequence[Tensor | None], inputs: list[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        self.computed = 0.0
        return super().backward(grads, inputs, needs)

    def _experts(self, op: Op, inputs: list[Tensor]) -> list[Tensor]:
        return self._slept(self.curve, inputs[1], time.monotonic(), super()._experts(op, inputs))

    def _experts_backward(self, op: Op, inputs: list[Tensor], gradients: Gradients | None) -> list[Tensor]:
        start = time.monotonic()
        return self._slept(self.backward_curve, inputs[2], start, super()._experts_backward(op, inputs, gradients))

    def _slept(self, curve: LayerCurve, ids: Tensor, start: float, found: list[Any]) -> list[Any]:
        end = start + curve.seconds(torch.bincount(ids.flatten()).tolist())
        left = end - time.monotonic()
        if left > 0:
            time.sleep(left)
        self.computed += time.monotonic() - start
        return found
