"""Layers, routing, curves and links for ``overlap.py``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.backends.base import Kernel
from moec.backends.distributed.kernel import ParallelKernel, local_program
from moec.backends.distributed.together import Gradients
from moec.backends.registry import get_backend
from moec.cost.chunks import ChunkCosts
from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.cost.machine import rising
from moec.ir.core import Graph, Op
from moec.parallel.costs import sweep
from moec.parallel.sample import sample_layer
from moec.passes.overlap.cuts import Layer
from moec.passes.overlap.plan import BACKWARD
from moec.passes.overlap.policies import uncut
from moec.testing import SleepingLayer

ALPHA = 5e-4
SMALL_SWEEP = 1 << 23
"""Bytes that a rank sweeps between two timings of experts: its core's own cache, and not the other ranks' memory."""
ROWS = (1, 8, 16, 32, 64, 128, 256, 512)
SKEW = 1.0
BACKWARD_WORK = 8 / 3
"""Work of a backward over that of a forward: the up GEMM again, and two GEMMs for each of the three matrices' one."""


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
        return sample_layer((own,) * self.ranks, own, self.top_k, self.hidden, self.inner)


@dataclass(frozen=True)
class Costs:
    """The cost model that passes are given."""

    curve: LayerCurve
    backward_curve: LayerCurve
    link: Link
    chunks: ChunkCosts
    copy_rate: float  # bytes a second
    writes: bool = False  # kernels put gradients of weights where they belong

    def in_place(self, op: Op) -> bool:
        return self.writes

    def expert_times(self, op: Op, backward: bool = False) -> LayerCurve:
        return self.backward_curve if backward else self.curve

    def transport(self, group: str, ranks: int) -> Link:
        return self.link

    def copying(self, group: str, bytes: float) -> float:
        return bytes / self.copy_rate

    def chunk_seconds(self, op: Op, place: int, along: str) -> float:
        return self.chunks.of(place, along).all

    def front_seconds(self, op: Op, place: int, along: str) -> float:
        return self.chunks.of(place, along).front

    def burden(self, group: str) -> Link | None:
        return self.chunks.burden


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
    return curve, curve.times(BACKWARD_WORK)


def timed(call: Any, seconds: float = 0.25, before: Any = None) -> float:
    """Seconds of a call: median. ``before`` runs before each and is not timed."""
    call()
    took: list[float] = []
    end = time.monotonic() + seconds
    while len(took) < 3 or time.monotonic() < end:
        if before is not None:
            before()
        start = time.monotonic()
        call()
        took.append(time.monotonic() - start)
    return statistics.median(took)


def measured(
    layer: Op,
    sizes: Sizes,
    weights: list[Tensor],
    backward: bool,
    at: Sequence[int] = ROWS,
    seconds: float = 0.1,
) -> LayerCurve:
    """The curve of the cpu backend's kernels, with as many experts as a rank has, while other ranks measure too.

    Weights come from beyond the core's own cache, as in a step. Each of the numbers of rows ``at`` is timed for so
    many seconds.
    """
    inner = next(op for op in layer.regions[0].ops if op.name == "moe.experts")
    program = local_program(inner, inner.result.type)
    backend = get_backend("cpu")
    kernel: Kernel = backend.load(backend.lower(program, "cpu"))
    own = sizes.experts // sizes.ranks
    points: list[tuple[int, float]] = []
    for rows in at:
        ids = torch.arange(own).repeat_interleave(rows)[:, None]
        x = torch.randn(len(ids), sizes.hidden)
        given = [x, ids, torch.ones(len(ids), 1), *weights]

        def call(given: list[Tensor] = given) -> None:
            if backward:
                kernel.backward([given[0]], given, [True, False, True, True, True])
            else:
                kernel.forward(given)

        points.append((rows, timed(call, seconds, lambda: sweep(SMALL_SWEEP)) / own))
    return LayerCurve(0.0, tuple((float(r), s) for r, s in rising(points)))


def curve_of(sizes: Sizes, layer: Op, weights: list[Tensor], compute: str, place: int) -> LayerCurve:
    """Times of a rank's experts in one direction; all ranks have the first one's numbers."""
    if compute == "sleep":
        return asleep()[place]
    dist.barrier()
    mine = measured(layer, sizes, weights, place == BACKWARD)
    everyone: list[Any] = [None] * sizes.ranks
    dist.all_gather_object(everyone, mine)
    first: LayerCurve = everyone[0]
    return first


def way(layer: Layer) -> float:
    """Seconds for which the rows of a whole layer travel, there and back."""
    chunk = uncut(layer).chunks[0]
    return chunk.there + chunk.back


def copy_rate(bytes: int = 1 << 22) -> float:
    """Bytes a second that are put together from two pieces."""
    half = torch.zeros(bytes // 2, dtype=torch.uint8)
    return bytes / timed(lambda: torch.cat([half, half]), 0.1, sweep)


def link_for(layer: Layer, ratio: float) -> Link:
    """Links that the uncut layer's experts take ``ratio`` times as long as."""
    whole = uncut(layer).chunks[0]
    there = Layer(layer.rows, layer.sizes, layer.experts, Link(0, 1), 1.0, 0.0, 1, 1, 0)
    rows = uncut(there).chunks[0].there
    messages = layer.there_messages + layer.back_messages + layer.count_messages
    wire = max(whole.compute) / ratio - messages * ALPHA
    return Link(ALPHA, rows * (layer.there_bytes + layer.back_bytes) / wire)


class Clocked(ParallelKernel):
    """A layer that knows how long its experts took in the last call."""

    computed = 0.0

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        self.computed = 0.0
        return super().forward(inputs)

    def backward(self, grads: Any, inputs: list[Tensor], needs: Any) -> list[Tensor | None]:
        self.computed = 0.0
        return super().backward(grads, inputs, needs)


class WorkingLayer(Clocked):
    """One with the backend's kernels."""

    def _experts(self, op: Op, inputs: list[Tensor]) -> list[Tensor]:
        start = time.monotonic()
        found = super()._experts(op, inputs)
        self.computed += time.monotonic() - start
        return found

    def _experts_backward(self, op: Op, inputs: list[Tensor], gradients: Gradients | None) -> list[Tensor]:
        start = time.monotonic()
        found = super()._experts_backward(op, inputs, gradients)
        self.computed += time.monotonic() - start
        return found


class AsleepLayer(Clocked, SleepingLayer):
    """One whose experts sleep."""
