"""From measurements to a profile: probes, one layer for the curves, three more for what is no GEMM."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch

from moec.backends.cpu.isa import Isa, isa_of
from moec.calibration.layers import SyntheticLayer
from moec.calibration.probes import Probes
from moec.cost import GemmCurve, LayerShape, MachineProfile, ProfileError
from moec.cost.machine import ITEM_BYTES, ROWS, Points, rising
from moec.cost.store import fingerprint, processor_name

Progress = Callable[[str, float], None]
"""Told what is measured, and the part of the whole that is done (0 to 1)."""

_HIDDEN, _INNER = 2048, 1024
_WEIGHT_BYTES = 320 << 20
"""Of the layer that curves are measured on: its experts take turns, and none is in a cache when its turn comes."""
_CALLS, _FEW_CALLS, _TINY_CALLS = 9, 5, 300
_MANY_ROWS = 128
"""From so many rows on, calls touch few experts: arithmetic decides, and a call takes long enough."""


@dataclass(frozen=True)
class _Steps:
    """A part of the whole for one stage: from ``start``, ``share`` of it."""

    progress: Progress
    start: float
    share: float

    def __call__(self, what: str, done: float) -> None:
        self.progress(what, self.start + self.share * done)


def calibrate(
    threads: int, dtypes: Sequence[str] = tuple(ITEM_BYTES), progress: Progress = lambda what, done: None
) -> MachineProfile:
    """Measure this machine with up to ``threads`` threads; under a minute on two cores.

    torch's number of threads is changed meanwhile and put back.

    Raises:
        ProfileError: This processor has none of the cpu backend's instruction sets.
        BuildError: There is no C++ compiler.
    """
    isa = isa_of("cpu")
    if isinstance(isa, str):
        raise ProfileError(f"there is nothing to measure: {isa}", hint="the cost model's defaults need no profile")
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            return _calibrate(isa, threads, dtypes, progress)
    finally:
        torch.set_num_threads(before)


def _calibrate(isa: Isa, threads: int, dtypes: Sequence[str], progress: Progress) -> MachineProfile:
    teams = _teams(threads)
    progress("memory and arithmetic", 0.0)
    probes = Probes(isa)
    machine = MachineProfile(
        name=processor_name(),
        fingerprint=fingerprint(),
        cores=threads,
        isa=isa.name,
        calibrated=True,
        bandwidth=tuple((t, probes.bytes_per_s(t)) for t in teams),
        flops=tuple((d, isa.name, probes.flops_per_s(d)) for d in dtypes),
        curves=(),
        call_seconds=_call_seconds(dtypes[0]),
        barriers=tuple((t, probes.region_seconds(t) if t > 1 else 0.0) for t in teams),
        row_byte_seconds=0.0,
        task_seconds=0.0,
        measured=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    del probes
    progress("moving tokens", 0.04)
    machine = replace(machine, row_byte_seconds=_row_byte_seconds(dtypes[0], machine.call_seconds))
    spreads: list[float] = []
    for i, dtype in enumerate(dtypes):
        steps = _Steps(progress, 0.1 + 0.85 * i / len(dtypes), 0.85 / len(dtypes))
        curves = _curves(machine, isa, dtype, sorted({1, threads}), spreads, steps)
        machine = replace(machine, curves=(*machine.curves, *curves), bandwidth=_at_least(machine, curves))
    progress("tasks", 0.95)
    machine = replace(machine, task_seconds=_task_seconds(machine, dtypes[0]), spread=statistics.median(spreads))
    progress("done", 1.0)
    return machine


def _teams(threads: int) -> list[int]:
    """Powers of two up to ``threads``, and ``threads``."""
    return sorted({threads, *(1 << n for n in range(threads.bit_length()) if 1 << n <= threads)})


def _call_seconds(dtype: str) -> float:
    """A call of one token through a layer of next to nothing, on one thread."""
    torch.set_num_threads(1)
    layer = SyntheticLayer(LayerShape(64, 64, 64, experts=4, top_k=1, dtype=dtype))
    x, ids = layer.tokens(1), torch.zeros(1, 1, dtype=torch.int64)
    return statistics.median(layer.seconds(x, ids) for _ in range(_TINY_CALLS))


def _row_byte_seconds(dtype: str, call_seconds: float) -> float:
    """Packing and combining, for each byte: what remains of a call when its inner width goes to zero.

    GEMMs grow with the inner width and moving tokens does not, so the line through two widths meets zero at the moving.
    """
    torch.set_num_threads(1)
    tokens, top_k, narrow, wide = 256, 8, 64, 192
    times = []
    for inner in (narrow, wide):
        layer = SyntheticLayer(LayerShape(_HIDDEN, inner, _HIDDEN, experts=8, top_k=top_k, dtype=dtype))
        x, ids = layer.tokens(tokens), torch.arange(8).repeat(tokens, 1)
        times.append(statistics.median(layer.seconds(x, ids) for _ in range(2 * _CALLS)))
    at_zero = times[0] - (times[1] - times[0]) * narrow / (wide - narrow) - call_seconds
    moved = tokens * (3 * top_k + 1) * _HIDDEN * ITEM_BYTES[dtype]
    return max(0.0, at_zero / moved)


def _curves(
    machine: MachineProfile, isa: Isa, dtype: str, teams: Sequence[int], spreads: list[float], progress: Progress
) -> list[GemmCurve]:
    """Seconds of a call less what is no GEMM, for each weight element of its experts.

    ``spreads`` gets (median / least - 1) of every point.
    """
    shape = LayerShape(_HIDDEN, _INNER, _HIDDEN, experts=1, top_k=1, dtype=dtype)
    experts = max(16, -(-_WEIGHT_BYTES // (shape.elements * shape.item)))
    layer = SyntheticLayer(replace(shape, experts=experts))
    curves = []
    for n, threads in enumerate(teams):
        points = []
        for i, rows in enumerate(ROWS):
            progress(f"{dtype}, {threads} threads, {rows} rows an expert", (n + i / len(ROWS)) / len(teams))
            few = rows >= _MANY_ROWS
            touched = min(experts // 2, max(2 if few else 8, -(-threads // 4)))
            seconds, least = layer.fixed_rows(rows, touched, threads, _FEW_CALLS if few else _CALLS)
            spreads.append(seconds / least - 1)
            moved = rows * touched * 4 * _HIDDEN * shape.item * machine.row_byte_seconds
            moving = moved * machine.bytes_per_s(1) / machine.bytes_per_s(threads)
            gemm = seconds - machine.call_seconds - machine.barriers_at(threads) - moving
            points.append((rows, max(gemm, seconds / 2) / (touched * shape.elements) * 1e9))
        curves.append(GemmCurve(dtype, isa.name, threads, rising(points)))
    return curves


def _at_least(machine: MachineProfile, curves: Sequence[GemmCurve]) -> Points:
    """The bandwidth, raised where the kernels themselves have read faster than the probe."""
    seen = {c.threads: ITEM_BYTES[c.dtype] / c.seconds(1) for c in curves}
    return tuple((t, max(rate, seen.get(t, 0.0))) for t, rate in machine.bandwidth)


def _task_seconds(machine: MachineProfile, dtype: str) -> float:
    """What a task takes beyond its weights' share of the curve, on a layer of many small experts."""
    shape = LayerShape(512, 128, 512, experts=1024, top_k=1, dtype=dtype)
    layer = SyntheticLayer(shape)
    touched = shape.experts // 4
    seconds, _ = layer.fixed_rows(1, touched, 1, 2 * _CALLS)
    elements = touched * shape.elements
    rest = seconds - machine.call_seconds - elements * machine.curve(dtype, machine.isa, 1).seconds(1)
    return max(0.0, rest / (touched * sum(shape.tasks)))
