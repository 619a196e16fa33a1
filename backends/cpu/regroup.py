"""The kernel of ``moe.regroup``: the definition's arithmetic around a compiled search."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from moec.backends.base import Kernel
from moec.backends.cpu.build import build
from moec.backends.cpu.isa import Isa
from moec.ir.core import Op
from moec.ir.ops.moe_regroup import plan
from moec.ir.regroup import Floats, Split

_SOURCE = Path(__file__).with_name("regroup.cpp")


@lru_cache(maxsize=4)
def compiled_split(isa: Isa) -> Split:
    """The search in C++. Its answers are as good as those of :func:`moec.ir.regroup.two_batches`, not the same.

    Raises:
        BuildError: There is no C++ compiler.
    """
    run = ctypes.CDLL(str(build(_SOURCE.read_text(encoding="utf-8"), isa))).moec_split
    run.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    run.restype = None

    def split(chosen: Floats, size: int) -> Floats:
        chosen = np.ascontiguousarray(chosen, np.float32)
        side = np.empty(len(chosen), np.uint8)
        run(chosen.ctypes.data, *chosen.shape, size, side.ctypes.data)
        return side.astype(np.float32)

    return split


class CpuRegroup(Kernel):
    """Which tokens run together. The plan is made by one thread."""

    def __init__(self, op: Op, isa: Isa) -> None:
        self.op, self.split = op, compiled_split(isa)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return plan(self.op, inputs, self.split)

    def backward(
        self, grads: Sequence[Tensor | None], inputs: list[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        return [None] * len(inputs)  # ids have no gradients
