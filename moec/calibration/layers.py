"""Synthetic layers, run by the cpu backend's real kernels at router choices that are made up."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from moec.backends.cpu.huge_pages import empty
from moec.backends.registry import get_backend
from moec.calibration.times import Times, take_times
from moec.cost import LayerShape
from moec.ir.core import Graph
from moec.ir.parser import parse_graph
from moec.ir.torch_dtypes import TO_TORCH

_PROGRAM = """
graph @layer(%x: {dt}[T, {h}], %ids: i64[T, {k}], %w: f32[T, {k}],
             %up: {dt}[{e}, {i2}, {h}], %down: {dt}[{e}, {h}, {i}]) -> {dt}[T, {h}] {{
  %y = moe.experts %x, %ids, %w, [%up], [%down] {{experts = {e}}} {{
    (%g: {dt}[R, {i}], %u: {dt}[R, {i}]) -> {dt}[R, {i}] {{
      %s = torch.call @aten.silu.default(%g) : {dt}[R, {i}]
      %m = torch.call @aten.mul.Tensor(%s, %u) : {dt}[R, {i}]
      return %m
    }}
  }} : {dt}[T, {h}]
  return %y
}}
"""


def swiglu_layer(shape: LayerShape) -> Graph:
    """The program of a layer with silu(gate)·up and stacked weights: x, ids, weights, up [E, 2I, H], down [E, H, I]."""
    sizes = {"h": shape.hidden, "i": shape.inner, "i2": 2 * shape.inner, "e": shape.experts, "k": shape.top_k}
    return parse_graph(_PROGRAM.format(dt=shape.dtype, **sizes))


class SyntheticLayer:
    """A layer with silu(gate)·up, weights of one expert copied to all (memory counts, values do not).

    A call takes the weights after the last call's, as the layers of a model do: pages that were used long ago have left
    the processor's tables, which costs a fourth of the bandwidth at 1 GB against 300 MB. They lie on huge pages: how
    pages of 4 KB come to lie is chance, and on a virtual machine decides more than the layer does.

    Attributes:
        shape: Its sizes.
    """

    def __init__(self, shape: LayerShape, target: str = "cpu", least_bytes: float = 0.0) -> None:
        """As many sets of weights as ``least_bytes`` need, at least one."""
        self.shape = shape
        h, i, e = shape.hidden, shape.inner, shape.experts
        backend = get_backend("cpu")
        self._kernel = backend.load(backend.lower(swiglu_layer(shape), target))
        self._dtype = TO_TORCH[shape.dtype]
        sets = max(1, math.ceil(least_bytes / (e * shape.elements * shape.item)))
        self._weights = [(self._copies(e, 2 * i, h), self._copies(e, h, i)) for _ in range(sets)]
        self._order = torch.randperm(e, generator=torch.Generator().manual_seed(0))
        self._calls = self._at = 0

    def _copies(self, experts: int, rows: int, columns: int) -> Tensor:
        one = torch.empty(rows, columns).uniform_(-0.03, 0.03).to(self._dtype)
        return empty([experts, rows, columns], self._dtype).copy_(one)

    def tokens(self, count: int) -> Tensor:
        """Tokens for calls."""
        return torch.randn(count, self.shape.hidden).to(self._dtype)

    def seconds(self, x: Tensor, ids: Tensor) -> float:
        """One call with router choices ``ids`` (i64 [T, k])."""
        weights = torch.full(ids.shape, 1.0 / self.shape.top_k)
        up, down = self._weights[self._calls % len(self._weights)]
        self._calls += 1
        start = time.perf_counter()
        self._kernel.forward([x, ids, weights, up, down])
        return time.perf_counter() - start

    def fixed_rows(self, rows: int, touched: int, threads: int, calls: int) -> Times:
        """Calls in which each of ``touched`` experts gets ``rows`` rows.

        Every call takes the experts after the last call's, so that weights come from memory. For layers with top_k 1.
        """
        torch.set_num_threads(threads)
        x, slots = self.tokens(rows * touched), torch.arange(rows * touched)

        def call(_: int) -> float:
            ids = self._order[(slots % touched + self._at) % self.shape.experts].unsqueeze(1)
            self._at += touched
            return self.seconds(x, ids)

        return take_times(call, calls)
