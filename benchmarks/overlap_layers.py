"""Layers, routing, curves and links for ``overlap.py``."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.backends.base import Kernel
from moec.backends.distributed.kernel import ParallelKernel, local_program
from moec.backends.registry import get_backend
from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.cost.machine import rising
from moec.ir.core import Graph, Op
from moec.ir.parser import parse_graph
from moec.passes.overlap.cuts import Layer
from moec.passes.overlap.policies import uncut

ALPHA = 5e-4
ROWS = (1, 8, 32, 64, 128, 256, 512)
SKEW = 1.0
BACKWARD = 8 / 3
"""Work of a backward over that of a forward: the up GEMM again, and two GEMMs for each of the three matrices' one."""

TEXT = """
graph @layer(%x: {d}[T, {h}], %ids: i64[T, {k}], %w: f32[T, {k}], %up: {d}[{own}, {i2}, {h}], %down: {d}[{own}, {h}, {i}]) -> {d}[T, {h}] {{
  %a = comm.all_gather.start %up {{group = "ep", ranks = {n}, sizes = {sizes}}} : !comm.token
  %ups = comm.wait %a : {d}[{e}, {i2}, {h}]
  %b = comm.all_gather.start %down {{group = "ep", ranks = {n}, sizes = {sizes}}} : !comm.token
  %downs = comm.wait %b : {d}[{e}, {h}, {i}]
  %y = moe.experts %x, %ids, %w, [%ups], [%downs] {{experts = {e}}} {{
    @activation(%g: {d}[R, {i}], %u: {d}[R, {i}]) -> {d}[R, {i}] {{
      %s = torch.call @aten.silu.default(%g) : {d}[R, {i}]
      %m = torch.call @aten.mul.Tensor(%s, %u) : {d}[R, {i}]
      return %m
    }}
  }} : {d}[T, {h}]
  return %y
}}
"""  # noqa: E501


@dataclass(frozen=True)
class Sizes:
    """One layer: widths, experts and choices a token, tokens of a rank."""

    ranks: int
    hidden: int
    inner: int
    experts: int = 16
    top_k: int = 2
    tokens: int = 1024

    def graph(self) -> Graph:
        """A rank's part, weights gathered as the model says it."""
        own = self.experts // self.ranks
        return parse_graph(
            TEXT.format(
                d="f32", h=self.hidden, k=self.top_k, i=self.inner, i2=2 * self.inner, e=self.experts, own=own,
                n=self.ranks, sizes=(own,) * self.ranks,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """The cost model that passes are given."""

    curve: LayerCurve
    backward_curve: LayerCurve
    link: Link

    def expert_times(self, op: Op, backward: bool = False) -> LayerCurve:
        return self.backward_curve if backward else self.curve

    def transport(self, group: str, ranks: int) -> Link:
        return self.link

    def copying(self, group: str, bytes: float) -> float:
        """Nothing: what is beside experts and links is timed beforehand."""
        return 0.0


@dataclass(frozen=True)
class Loads:
    """The routing profile: the very rows of the step."""

    table: list[list[float]]

    def rows(self, module: str, ranks: int, experts: int) -> list[list[float]]:
        return self.table


def routes(sizes: Sizes, zipf: bool) -> list[Tensor]:
    """The chosen experts of every rank's tokens, i64[T, k]: evenly, or by Zipf's law over shuffled experts."""
    found = []
    place = torch.randperm(sizes.experts, generator=torch.Generator().manual_seed(3))
    odds = (place + 1.0) ** (-SKEW if zipf else 0.0)
    for rank in range(sizes.ranks):
        gen = torch.Generator().manual_seed(rank)
        if zipf:
            found.append(torch.multinomial(odds.expand(sizes.tokens, -1), sizes.top_k, generator=gen))
        else:
            slots = torch.arange(sizes.tokens * sizes.top_k).view(sizes.tokens, sizes.top_k)
            found.append((slots + rank) % sizes.experts)
    return found


def table(sizes: Sizes, ids: list[Tensor]) -> list[list[float]]:
    return [torch.bincount(i.flatten(), minlength=sizes.experts).double().tolist() for i in ids]


def asleep() -> tuple[LayerCurve, LayerCurve]:
    """Curves of emulated experts: reading weights 4 ms, 45 µs a row, 0.5 ms a call."""
    points = tuple((float(r), (0.004**2 + (4.5e-5 * r) ** 2) ** 0.5) for r in (1, 16, 32, 64, 96, 128, 256, 512, 1024))
    curve = LayerCurve(5e-4, points)
    return curve, curve.times(BACKWARD)


def timed(call: Any, seconds: float = 0.25) -> float:
    """Seconds of a call: median."""
    call()
    took: list[float] = []
    end = time.monotonic() + seconds
    while len(took) < 3 or time.monotonic() < end:
        start = time.monotonic()
        call()
        took.append(time.monotonic() - start)
    return statistics.median(took)


def measured(layer: Op, sizes: Sizes, weights: list[Tensor]) -> tuple[LayerCurve, LayerCurve]:
    """Curves of the cpu backend's kernels, with as many experts as a rank has, while other ranks measure too."""
    inner = next(op for op in layer.regions[0].ops if op.name == "moe.experts")
    program = local_program(inner, inner.result.type)
    backend = get_backend("cpu")
    kernel: Kernel = backend.load(backend.lower(program, "cpu"))
    own = sizes.experts // sizes.ranks
    curves = []
    for backward in (False, True):
        points: list[tuple[int, float]] = []
        for rows in ROWS:
            ids = torch.arange(own).repeat_interleave(rows)[:, None]
            x = torch.randn(len(ids), sizes.hidden)
            given = [x, ids, torch.ones(len(ids), 1), *weights]

            def call(given: list[Tensor] = given, backward: bool = backward) -> None:
                if backward:
                    kernel.backward([given[0]], given, [True, False, True, True, True])
                else:
                    kernel.forward(given)

            points.append((rows, timed(call) / own))
        curves.append(LayerCurve(0.0, tuple((float(r), s) for r, s in rising(points))))
    return curves[0], curves[1]


def link_for(layer: Layer, ratio: float) -> Link:
    """Links that the uncut layer's experts take ``ratio`` times as long as."""
    whole = uncut(layer).chunks[0]
    there = Layer(layer.rows, layer.sizes, layer.experts, Link(0, 1), 1.0, 0.0, 1, 1, 0)
    rows = uncut(there).chunks[0].there
    messages = layer.there_messages + layer.back_messages + layer.count_messages
    wire = max(whole.compute) / ratio - messages * ALPHA
    return Link(ALPHA, rows * (layer.there_bytes + layer.back_bytes) / wire)


class ClockedLayer(ParallelKernel):
    """A layer that knows how long its experts took in the last call."""

    computed = 0.0

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        self.computed = 0.0
        return super().forward(inputs)

    def backward(self, grads: Any, inputs: list[Tensor], needs: Any) -> list[Tensor | None]:
        self.computed = 0.0
        return super().backward(grads, inputs, needs)

    def _experts(self, op: Op, inputs: list[Tensor]) -> list[Tensor]:
        start = time.monotonic()
        found = super()._experts(op, inputs)
        self.computed += time.monotonic() - start
        return found

    def _experts_backward(self, op: Op, inputs: list[Tensor]) -> list[Tensor]:
        start = time.monotonic()
        found = super()._experts_backward(op, inputs)
        self.computed += time.monotonic() - start
        return found
