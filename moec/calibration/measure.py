"""From measurements to a profile: probes, one layer for the curves, three more for what is no GEMM, and links."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from moec.backends.cpu.isa import Isa, isa_of
from moec.calibration.layers import SyntheticLayer
from moec.calibration.links import measure_links
from moec.calibration.probes import Probes, beyond_caches
from moec.calibration.times import Times, take_times
from moec.cost import GemmCurve, LayerShape, MachineProfile, ProfileError, predict
from moec.cost.links import Link
from moec.cost.machine import ITEM_BYTES, ROWS, Overhead, rising
from moec.cost.store import fingerprint, processor_name
from moec.targets import cpu_cores

Progress = Callable[[str, float], None]
"""Told what is measured, and the part of the whole that is done (0 to 1)."""

_HIDDEN, _INNER = 2048, 1024
_WEIGHT_BYTES = 1 << 30
"""Least size of the layer that curves are measured on. Its experts take turns, and none is in a cache on its turn."""
_ROUNDS, _CALLS, _TINY_CALLS = 3, 3, 300
"""All points of all types are measured in rounds, so that what changes with time (clock rates, the bandwidth that a
virtual machine's neighbours leave, other work) meets them alike."""
_TIMES_SOLVED = 3
_LINKS_FROM, _MOST_PROCESSES = 0.95, 8
_TOUCHED = ((32, 8), (64, 4), (128, 2))
"""(rows up to which, experts touched by a call): calls of some milliseconds, short enough to go by undisturbed."""


def calibrate(
    threads: int, dtypes: Sequence[str] = tuple(ITEM_BYTES), progress: Progress = lambda what, done: None
) -> MachineProfile:
    """Measure this machine with up to ``threads`` threads; under a minute on two cores.

    torch's number of threads is changed meanwhile and put back. Links are those of processes made for it.

    Raises:
        ProfileError: This processor has none of the cpu backend's instruction sets, or processes cannot talk.
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
        overheads=(Overhead(dtypes[0], ((1, 0.0),), ((1, 0.0),)),),
        measured=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    del probes
    progress("tasks and moving tokens", 0.05)
    layers = {dtype: _layer(dtype) for dtype in dtypes}
    ends = sorted({1, threads})
    machine = replace(machine, overheads=tuple(_overhead(machine, layer, ends) for layer in layers.values()))
    seen = Times()
    machine = _with_curves(machine, layers, ends, seen, progress)
    del layers
    machine = replace(machine, links=_links(progress))
    progress("done", 1.0)
    return replace(machine, interrupted=len(seen.interrupted) / len(seen.clean + seen.interrupted))


def _links(progress: Progress) -> tuple[tuple[int, Link], ...]:
    """Of two processes, and of as many as there are cores; of none where one core would take turns."""
    counts = sorted({2, min(cpu_cores(), _MOST_PROCESSES)}) if cpu_cores() > 1 and dist.is_available() else []
    found = []
    for count in counts:
        progress(f"links of {count} processes", _LINKS_FROM)
        found.append((count, measure_links(count)))
    return tuple(found)


def _teams(threads: int) -> list[int]:
    """Powers of two up to ``threads``, and ``threads``."""
    return sorted({threads, *(1 << n for n in range(threads.bit_length()) if 1 << n <= threads)})


def _call_seconds(dtype: str) -> float:
    """A call of one token through a layer of next to nothing, on one thread."""
    torch.set_num_threads(1)
    layer = SyntheticLayer(LayerShape(16, 16, 16, experts=4, top_k=1, dtype=dtype))
    x, ids = layer.tokens(1), torch.zeros(1, 1, dtype=torch.int64)
    return take_times(partial(_same_call, layer, x, ids), _TINY_CALLS).seconds


def _overhead(machine: MachineProfile, large: SyntheticLayer, teams: Sequence[int]) -> Overhead:
    """Seconds for each task and for each byte that is packed or combined, by threads.

    Experts of one row, small against large: their times are w x curve(1) + tasks + bytes for w weight elements. Layers
    of many rows, wide against narrow, tell bytes from tasks: what remains as the inner width goes to zero is bytes and
    the tasks of the down GEMM.
    """
    isa, dtype = machine.isa, large.shape.dtype
    shape = LayerShape(_HIDDEN // 4, _INNER // 8, _HIDDEN // 4, experts=1024, top_k=1, dtype=dtype)
    small = SyntheticLayer(shape, least_bytes=beyond_caches(_WEIGHT_BYTES))
    differences = dict.fromkeys(teams, 0.0)
    task = byte = 0.0
    for layer, touched, sign in ((small, 256, 1), (large, 8, -1)):
        for threads in teams:
            seconds = layer.fixed_rows(1, touched, threads, _ROUNDS * _CALLS).seconds
            gemm = seconds - machine.call_seconds - machine.barriers_at(threads)
            differences[threads] += sign * gemm / (touched * layer.shape.elements)
        task += sign * sum(layer.shape.tasks(isa)) / layer.shape.elements
        byte += sign * layer.shape.moved_bytes(1) / layer.shape.elements
    wide = _at_zero_width(machine, dtype, teams)
    found = [(t, _positive_solution((task, byte, differences[t]), wide[t])) for t in teams]
    return Overhead(dtype, tuple((t, one) for t, (one, _) in found), tuple((t, each) for t, (_, each) in found))


def _at_zero_width(machine: MachineProfile, dtype: str, teams: Sequence[int]) -> dict[int, tuple[float, float, float]]:
    """Tasks and bytes of a call whose inner width is almost zero, and its seconds, by threads.

    Of so many tokens that they do not stay in a cache between the GEMMs.
    """
    tokens, top_k, narrow, wide = 1024, 8, 64, 192
    times: dict[int, list[float]] = {t: [] for t in teams}
    for inner in (wide, narrow):
        shape = LayerShape(_HIDDEN, inner, _HIDDEN, experts=top_k, top_k=top_k, dtype=dtype)
        layer = SyntheticLayer(shape)
        x, ids = layer.tokens(tokens), torch.arange(top_k).repeat(tokens, 1)
        for threads in teams:
            torch.set_num_threads(threads)
            times[threads].append(take_times(partial(_same_call, layer, x, ids), _CALLS).seconds)
    segments = top_k * -(-tokens // shape.cut(machine.isa).rows)
    tasks, moved = segments * shape.tasks(machine.isa)[1], shape.moved_bytes(tokens * top_k)
    found: dict[int, tuple[float, float, float]] = {}
    for threads, (most, least) in times.items():
        seconds = least - (most - least) * narrow / (wide - narrow)
        found[threads] = (tasks, moved, seconds - machine.call_seconds - machine.barriers_at(threads))
    return found


def _same_call(layer: SyntheticLayer, x: Tensor, ids: Tensor, number: int) -> float:
    return layer.seconds(x, ids)


def _positive_solution(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float]:
    """x and y with a0 x + a1 y = a2 and b0 x + b1 y = b2; a negative one is 0, and b gives the other."""
    scale = a[0] * b[1] - a[1] * b[0]
    x, y = (a[2] * b[1] - a[1] * b[2]) / scale, (a[0] * b[2] - a[2] * b[0]) / scale
    if x < 0:
        return 0.0, max(0.0, b[2] / b[1])
    if y < 0:
        return max(0.0, b[2] / b[0]), 0.0
    return x, y


def _with_curves(
    machine: MachineProfile, layers: Mapping[str, SyntheticLayer], teams: Sequence[int], seen: Times, progress: Progress
) -> MachineProfile:
    """The profile with the curves of all element types. ``seen`` gets the times of all calls."""
    curves = {
        (dtype, threads): [_Call(rows, _touched(rows, threads, layers[dtype].shape.experts)) for rows in ROWS]
        for dtype, threads in product(layers, teams)
    }
    for turn, (n, ((dtype, threads), calls)) in product(range(_ROUNDS), enumerate(curves.items())):
        done = (turn + n / len(curves)) / _ROUNDS
        for call in calls:
            part = 0.1 + (_LINKS_FROM - 0.1) * done
            progress(f"{dtype}, {threads} threads, round {turn + 1}, {call.rows} rows an expert", part)
            call.times.add(layers[dtype].fixed_rows(call.rows, call.touched, threads, _CALLS))
    for (dtype, threads), calls in curves.items():
        for call in calls:
            seen.add(call.times)
        shape = layers[dtype].shape
        curve = _solve(machine, shape, threads, calls)
        # The kernels may read faster than the probe does; then that is the bandwidth.
        reached = shape.item / curve.seconds(1)
        bandwidth = tuple((t, max(rate, reached) if t == threads else rate) for t, rate in machine.bandwidth)
        machine = replace(machine, curves=(*machine.curves, curve), bandwidth=bandwidth)
    return machine


def _layer(dtype: str) -> SyntheticLayer:
    """A layer of more experts than any cache holds."""
    shape = LayerShape(_HIDDEN, _INNER, _HIDDEN, experts=1, top_k=1, dtype=dtype)
    experts = max(16, -(-beyond_caches(_WEIGHT_BYTES) // (shape.elements * shape.item)))
    return SyntheticLayer(replace(shape, experts=experts))


@dataclass(frozen=True)
class _Call:
    """A kind of call, ``touched`` experts with ``rows`` rows each, and its times."""

    rows: int
    touched: int
    times: Times = field(default_factory=Times)


def _touched(rows: int, threads: int, experts: int) -> int:
    """Experts that a call touches: few where each has many rows, and enough for all threads."""
    count = next((count for most, count in _TOUCHED if rows <= most), 1)
    return min(experts // 2, max(count, -(-threads // 4)))


def _solve(machine: MachineProfile, shape: LayerShape, threads: int, calls: Sequence[_Call]) -> GemmCurve:
    """The curve with which the model predicts the measured calls.

    What is no GEMM depends a little on the curve (threads wait for the last task), so it is taken off several times.
    """
    others = [machine.call_seconds for _ in calls]
    for _ in range(_TIMES_SOLVED):
        points = []
        for call, other in zip(calls, others, strict=True):
            gemm = max(call.times.seconds - other, call.times.seconds / 2)
            points.append((call.rows, gemm / (call.touched * shape.elements) * 1e9))
        curve = GemmCurve(shape.dtype, machine.isa, threads, rising(points))
        trial = replace(machine, curves=(*machine.curves, curve))
        loads = [[c.rows] * c.touched + [0] * (shape.experts - c.touched) for c in calls]
        others = [predict(shape, load, trial, threads).overhead_seconds for load in loads]
    return curve
