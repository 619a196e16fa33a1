"""What one ``moe.experts`` op says, read once when its kernel is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.backends.aten.region import RegionFn, compile_region
from moec.backends.aten.slots import Group, Slots
from moec.ir.core import Op
from moec.ir.opdef import op_def, torch_dtype
from moec.ir.types import TensorType


@dataclass(frozen=True)
class Params:
    """The flat operands of the op by role. The lists are empty where the op has none."""

    up: list[Tensor]
    down: list[Tensor]
    up_bias: list[Tensor]
    down_bias: list[Tensor]
    captures: list[Tensor]
    post_captures: list[Tensor]
    up_scale: list[Tensor]
    down_scale: list[Tensor]


def _take(stack: Tensor, experts: list[int]) -> list[Tensor]:
    # One unbind makes all views for the price of a few selects; with few experts among many it is the dearer way.
    if 4 * len(experts) >= stack.shape[0]:
        views = stack.unbind(0)
        return [views[e] for e in experts]
    return [stack.select(0, e) for e in experts]


@dataclass(frozen=True)
class Spec:
    """Attributes, operand sizes and compiled regions of a ``moe.experts`` op.

    Attributes:
        experts: E.
        parts: 2 where gate and up are separate weights, else 1.
        up_nk, down_nk: True where a weight's rows are outputs.
        bounds: Where each operand group ends in the flat operands.
        ragged: Experts have intermediate widths of their own.
    """

    experts: int
    layout: str
    parts: int
    up_nk: bool
    down_nk: bool
    stacked: bool
    sentinels: bool
    bounds: tuple[int, ...]
    activation: RegionFn
    post: RegionFn | None
    out_dtype: torch.dtype
    ragged: bool

    @staticmethod
    def of(op: Op) -> Spec:
        """Read a verified op."""
        get = op_def(op.name).attr
        bounds, total = [], 0
        for size in (*op.groups, *[0] * (11 - len(op.groups))):
            total += size
            bounds.append(total)
        result = op.result.type
        assert isinstance(result, TensorType)
        layout = get(op, "layout")
        return Spec(
            experts=get(op, "experts"),
            layout=layout,
            parts=2 if layout == "separate" else 1,
            up_nk=get(op, "up_form") == "nk",
            down_nk=get(op, "down_form") == "nk",
            stacked=get(op, "stacked"),
            sentinels=get(op, "sentinels"),
            bounds=tuple(bounds),
            activation=compile_region(op.regions[0]),
            post=compile_region(op.regions[1]) if len(op.regions) > 1 else None,
            out_dtype=torch_dtype(result.dtype.name),
            ragged=len({v.type for v in op.group("down")}) > 1,
        )

    def params(self, inputs: list[Tensor]) -> Params:
        """Cut the flat operands."""
        b = self.bounds
        return Params(*(inputs[b[i] : b[i + 1]] for i in range(2, 10)))

    def matrices(self, tensors: list[Tensor], experts: list[int], nk: bool, part: int = 0) -> list[Tensor]:
        """The experts' weights as ``[K, N]`` views, ready to stand right of their rows in a GEMM."""
        if not self.stacked:
            found = [tensors[part * self.experts + e] for e in experts]
            return [w.t() for w in found] if nk else found
        stack = tensors[part].transpose(1, 2) if nk else tensors[part]
        return _take(stack, experts)

    def vectors(self, tensors: list[Tensor], experts: list[int], part: int = 0) -> list[Tensor]:
        """The experts' biases."""
        if not self.stacked:
            return [tensors[part * self.experts + e] for e in experts]
        return _take(tensors[part], experts)

    def groups(self, slots: Slots, row_bytes: int, whole: bool = False) -> Iterable[Group]:
        """The segments, cut into groups that one up GEMM's output holds together: experts of one width.

        Args:
            slots: The sorted slots.
            row_bytes: Working memory of a row.
            whole: One group where widths allow it.
        """
        if self.ragged:
            return ([segment] for segment in slots.segments)
        return [slots.segments] if whole and slots.segments else slots.groups(row_bytes)

    def up_width(self, up: list[Tensor], expert: int = 0) -> int:
        """Columns of one up GEMM's output."""
        return up[expert if self.ragged else 0].shape[-2 if self.up_nk else -1]

    def down_width(self, down: list[Tensor]) -> int:
        """Columns of the down GEMM's output."""
        return down[0].shape[-2 if self.down_nk else -1]

    def split(self, parts: list[Tensor]) -> list[Tensor]:
        """The activation's row inputs, as views of the up GEMMs' outputs."""
        if self.layout == "concat":
            half = parts[0].shape[1] // 2
            return [parts[0][:, :half], parts[0][:, half:]]
        if self.layout == "interleaved":
            return [parts[0][:, ::2], parts[0][:, 1::2]]
        return parts
