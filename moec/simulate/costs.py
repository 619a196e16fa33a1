"""How long an op keeps a rank's compute stream busy.

Experts take what the layer's curve of rows says (:mod:`moec.cost.curve`). A product of matrices takes the longer of its
multiply-adds and its bytes, and so does the core of attention (:mod:`moec.cost.attention`). Anything else takes its
bytes, read and written once; views take nothing. Beside a collective an op has fewer units for its arithmetic, and the
same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moec.cost.attention import core_seconds
from moec.cost.curve import LayerCurve, assumed_curve, measured_curve
from moec.cost.layer import LayerShape
from moec.cost.machine import ITEM_BYTES
from moec.cost.products import EFFICIENCY, written_seconds
from moec.ir.core import Op
from moec.ir.opdef import op_def
from moec.passes.calls import call_args
from moec.passes.matching import ATTENTION_CORE, FREE, function
from moec.simulate.topology import Device

FLOAT_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f8e4m3fn": torch.float8_e4m3fn, "f32": torch.float32}
"""Element types that devices multiply, by their names."""
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "matmul", "linear"})
_FREE = frozenset(
    {
        *("moe.slots", "moe.loads", "moe.count_tokens", "moe.own_ids", "return", "torch.get_attr"),
        *("moe.split_rows", "moe.token_part"),  # pieces of what is there
    }
)


class Costs:
    """Times of ops on one kind of device; curves are made once for every layer."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._curves: dict[tuple[LayerShape, bool], LayerCurve] = {}

    def seconds(self, op: Op, values: Sequence[Any], results: Sequence[Any]) -> float:
        """Time of one op.

        Args:
            op: The op.
            values: Its operands, with or without numbers.
            results: What it gave.
        """
        if op.name == "moe.experts":
            return self._experts(op, values[0], values[1], values)
        if op.name == "moe.experts_backward":
            return self._experts_backward(op, values)
        if is_free(op) or not any(isinstance(r, Tensor) for r in results):
            return 0.0
        moved = sum(_bytes(v) for v in (*values, *results))
        if function(op) == ATTENTION_CORE:
            return self.device.launch_s + core_seconds(_core_flops(op, values), moved, self.device.target)
        if function(op) in _PRODUCTS:
            return self._product(_flops(values, results), moved, _bytes(results[0]), results[0].dtype)
        return self.device.launch_s + moved / self.device.target.memory_bandwidth

    def product(self, rows: float, inputs: float, outputs: float, dtype: torch.dtype) -> float:
        """Time of ``rows x inputs`` times ``inputs x outputs``, all of one type."""
        moved = (rows * inputs + inputs * outputs + rows * outputs) * dtype.itemsize
        return self._product(2 * rows * inputs * outputs, moved, rows * outputs * dtype.itemsize, dtype)

    def _product(self, flops: float, moved: float, written: float, dtype: torch.dtype) -> float:
        target = self.device.target
        summed = flops / (self._rate(dtype) * EFFICIENCY) + written_seconds(written, target)
        return self.device.launch_s + max(moved / target.memory_bandwidth, summed)

    @cached_property
    def beside(self) -> Costs | None:
        """Times of ops while a collective is under way; None where it takes nothing from them."""
        device = self.device
        return Costs(replace(device, target=device.beside_collective, comm_units=0.0)) if device.comm_units else None

    def curve_of(self, shape: LayerShape, backward: bool = False) -> LayerCurve:
        """Seconds of a layer's experts by their rows.

        A backward is the up GEMM again, and for each GEMM one for the gradients of rows and one for those of weights.
        """
        if (shape, backward) not in self._curves:
            curve = self._curve(shape)
            again = shape.parts * shape.hidden / (shape.parts * shape.hidden + shape.width)
            self._curves[shape, backward] = curve.times(2 + again) if backward else curve
        return self._curves[shape, backward]

    def _curve(self, shape: LayerShape) -> LayerCurve:
        machine = self.device.machine
        if machine is None:
            return assumed_curve(shape, self.device.target)
        together = measured_curve(shape, machine, machine.cores)  # all cores on one layer, here each on its own
        return LayerCurve(machine.call_seconds, together.times(machine.cores).points)

    def _rate(self, dtype: torch.dtype) -> float:
        return self.device.target.flops_per_s(_name(dtype))

    def _experts(self, op: Op, x: Tensor, ids: Tensor, values: Sequence[Any]) -> float:
        shape = expert_shape(op, x, ids.shape[1], values)
        return self.curve_of(shape).seconds(rows_of_experts(ids, shape.experts))

    def _experts_backward(self, op: Op, values: Sequence[Any]) -> float:
        shape = expert_shape(op, values[1], values[2].shape[1], values)
        return self.curve_of(shape, backward=True).seconds(rows_of_experts(values[2], shape.experts))


def is_free(op: Op) -> bool:
    """Whether an op starts nothing on the device."""
    return op.name in _FREE or function(op) in FREE


def rows_of_experts(ids: Tensor, experts: int) -> list[int]:
    """Rows of each expert; those of none do not count."""
    flat = ids.flatten()
    return torch.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts).tolist()


def expert_shape(op: Op, x: Tensor, top_k: int, values: Sequence[Any]) -> LayerShape:
    """The layer of a ``moe.experts`` or its backward, with its operands' sizes; types that are not known count as f32.

    Experts of different widths count with their mean.
    """
    get = op_def(op.name).attr
    place = [o.name for o in op_def(op.name).operands].index("down")
    start = sum(op.groups[:place])
    downs = [values[start + i] for i in range(op.groups[place])]
    last = -1 if get(op, "down_form") == "nk" else -2
    inner = round(sum(d.shape[last] for d in downs) / max(1, len(downs)))
    width = int(downs[0].shape[-2 if last == -1 else -1])
    parts = 1 if get(op, "layout") in ("single", "rows") else 2
    dtype = _name(downs[0].dtype)
    return LayerShape(
        int(x.shape[1]), inner, width, get(op, "experts"), top_k, parts, dtype if dtype in ITEM_BYTES else "f32"
    )


def _name(dtype: torch.dtype) -> str:
    return next((name for name, known in FLOAT_TYPES.items() if known == dtype), "f32")


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _flops(values: Sequence[Any], results: Sequence[Any]) -> float:
    """Of a product: two for each element of the result and each that is summed over."""
    factors = [v for v in values if isinstance(v, Tensor) and v.dim() >= 2]
    return 2.0 * results[0].numel() * factors[0].shape[-1] if factors else 0.0


def _core_flops(op: Op, values: Sequence[Any]) -> float:
    """Of attention on queries ``[B, h, S, d]``; half of it where a token sees none that comes later."""
    query, key, value = values[:3]
    pairs = query.shape[:-1].numel() * key.shape[-2]
    args, kwargs = call_args(op)
    causal = kwargs.get("is_causal", args[5] if len(args) > 5 else False)
    return float(pairs) * (query.shape[-1] + value.shape[-1]) * (1 if causal else 2)
