"""The kernel of ``moe.regroup``: from ids to indices in one call of compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.backends.base import Kernel
from moec.backends.cpu.build import build
from moec.backends.cpu.isa import Isa
from moec.ir.core import Op
from moec.ir.opdef import op_def
from moec.ir.ops.moe_regroup import Regroup

_SOURCE = Path(__file__).with_name("regroup.cpp")
_WHOLE = ctypes.c_int64
_POINTER = ctypes.c_void_p
_BYTES_OF_A_STEP = 2840
"""Of weights. Two cores read so many in some sixty times as long: a plan takes less than a fiftieth of its layer."""
_USUAL, _MOST = 9 << 20, 36 << 20
"""Bytes of an expert where they are unknown, and above which no more is looked for."""


@lru_cache(maxsize=4)
def _compiled(isa: Isa) -> Any:
    """The search in C++. Its answers are as good as those of :func:`moec.ir.regroup.regroup`, not the same.

    Raises:
        BuildError: There is no C++ compiler.
    """
    run = ctypes.CDLL(str(build(_SOURCE.read_text(encoding="utf-8"), isa, ("-O3",)))).moec_regroup
    run.argtypes = [
        _POINTER, _POINTER, *[_WHOLE] * 4, _POINTER, _WHOLE, _POINTER, _WHOLE, ctypes.c_double, _WHOLE, _POINTER,
        _POINTER,
    ]  # fmt: skip
    run.restype = None
    return run


def steps_of_an_expert(expert_bytes: int) -> int:
    """How many steps may be planned for every expert that the tokens touch."""
    return min(expert_bytes or _USUAL, _MOST) // _BYTES_OF_A_STEP


class CpuRegroup(Kernel):
    """Which tokens run together. The plan is made by one thread."""

    def __init__(self, op: Op, isa: Isa) -> None:
        definition = op_def(op.name)
        assert isinstance(definition, Regroup)
        self.definition, self.run = definition, _compiled(isa)
        self.experts, self.parts, sizes, least = (
            definition.attr(op, name) for name in ("experts", "parts", "sizes", "least")
        )
        self.price = steps_of_an_expert(definition.attr(op, "expert_bytes"))
        self.least = np.array(least, np.float64).reshape(-1, 2)
        self.columns = len(sizes) or self.experts
        self.column = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes) if sizes else None

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        rows = [len(t) for t in inputs]
        sizes = self.definition.part_sizes(rows[0], self.parts) if self.parts else rows
        wide = inputs[0].dtype != torch.int32
        ids = [(t.long() if wide else t).contiguous() for t in inputs]
        there = [torch.empty(size, dtype=torch.int64) for size in sizes]
        home = [torch.empty(size, dtype=torch.int64) for size in rows]
        least = float(np.interp(sum(rows), *self.least.T)) if len(self.least) else 0.0
        self.run(
            _addresses(ids), (_WHOLE * len(rows))(*rows), len(rows), inputs[0].shape[1], wide, self.experts,
            None if self.column is None else self.column.ctypes.data, self.columns,
            (_WHOLE * len(sizes))(*sizes), len(sizes), least, self.price, _addresses(there),
            _addresses(home),
        )  # fmt: skip
        return [*there, *home]

    def backward(
        self, grads: Sequence[Tensor | None], inputs: list[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        return [None] * len(inputs)  # ids have no gradients


def _addresses(tensors: list[Tensor]) -> Any:
    return (_POINTER * len(tensors))(*(t.data_ptr() for t in tensors))
