"""Time of a rank's experts against the rows that each of them has: a curve, never a constant per row.

Few rows cost what reading the weights costs, many what their multiply-adds do, so halves of a layer's rows take more
than half of its time. Cutting a layer into chunks must count that: in one training run, two chunks made the expert
GEMMs 35 % slower (pytorch/torchtitan#3434).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from moec.cost.layer import LayerShape, predict
from moec.cost.machine import ROWS, MachineProfile
from moec.cost.products import EFFICIENCY, TILE, whole_rows, written_seconds
from moec.targets import Target

LAUNCH_S = 10e-6
"""Start of the kernels of one call on a device, where nothing was measured."""


@dataclass(frozen=True)
class LayerCurve:
    """Seconds of one call of a layer's experts on one rank, both GEMMs and the activation.

    Attributes:
        launch_s: What a call costs beside its experts.
        points: (rows, seconds of one expert that has so many) pairs, rows above 0 and rising, times not falling.
    """

    launch_s: float
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        rows = [r for r, _ in self.points]
        times = [0.0, *(s for _, s in self.points)]
        if not rows or rows[0] <= 0 or any(b <= a for a, b in pairwise(rows)):
            raise ValueError("a curve has points, whose rows are above 0 and rise")
        if self.launch_s < 0 or any(b < a for a, b in pairwise(times)):
            raise ValueError("more rows take no less time, and none less than nothing")

    def expert_seconds(self, rows: float) -> float:
        """Of one expert. Below the first point rows are chances of a row; past the last, time grows in proportion."""
        (first, least), last = self.points[0], self.points[-1][0]
        if rows <= first:
            return least * max(0.0, rows) / first
        return _between(self.points, rows) * max(1.0, rows / last)

    def seconds(self, loads: Iterable[float]) -> float:
        """Of a call whose experts have ``loads`` rows; without any row nothing is called."""
        rows = [r for r in loads if r > 0]
        return self.launch_s + sum(map(self.expert_seconds, rows)) if rows else 0.0

    def times(self, factor: float) -> LayerCurve:
        """The curve of work that is ``factor`` times as much on the same rows, as a backward is."""
        return LayerCurve(self.launch_s, tuple((r, s * factor) for r, s in self.points))


def _between(points: tuple[tuple[float, float], ...], rows: float) -> float:
    i = bisect_left(points, (rows,))
    if i == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)


def measured_curve(shape: LayerShape, machine: MachineProfile, threads: int, isa: str | None = None) -> LayerCurve:
    """The curve of a layer on a processor, from its profile: what one more expert with so many rows adds to a call."""
    few, many = 4, 8
    of = LayerShape(shape.hidden, shape.inner, shape.width, many, 1, shape.parts, shape.dtype)
    points: list[tuple[float, float]] = []
    for rows in ROWS:
        more, less = ([rows] * n + [0] * (many - n) for n in (many, few))
        added = predict(of, more, machine, threads, isa).seconds - predict(of, less, machine, threads, isa).seconds
        points.append((float(rows), max(added / (many - few), points[-1][1] if points else 0.0)))
    return LayerCurve(machine.call_seconds + machine.barriers_at(threads), tuple(points))


def assumed_curve(shape: LayerShape, target: Target) -> LayerCurve:
    """The curve of a layer on a target that nobody measured: reading weights, or whole tiles of rows and their results.

    The up GEMM writes what the activation leaves of it, ``inner`` elements a row, in no less than 16 bits.
    """
    tile = TILE[target.kind]
    reading = shape.elements * shape.item / target.memory_bandwidth
    row = 2 * shape.elements / (target.flops_per_s(shape.dtype) * EFFICIENCY)
    written = written_seconds((shape.inner + shape.width) * max(2, shape.item), target)
    most = 64 * tile
    rows = sorted({1, *(n * tile + more for n in (*range(9), 12, 16, 24, 32, 48, 64) for more in (0, 1))} - {0})
    points = [(float(r), max(reading, whole_rows(r, target) * row + r * written)) for r in rows if r <= most]
    return LayerCurve(LAUNCH_S, tuple(points))
