"""What the cost model knows about a processor: bandwidth, arithmetic, and how fast the kernels' GEMMs really are.

The heart is a curve: time of one touched expert against the rows of tokens it gets, for weights that come from memory.
It starts flat, where the weights' bytes decide, and ends as a line, where the multiply-adds do. How well the two
overlap between lies in the measured points; no formula is fitted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from moec.cost.links import Link
from moec.targets import Target, detect_level, parse_target

ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4}
"""Element types that the model knows, and their sizes in bytes."""
ROWS = (1, 2, 4, 6, 7, 8, 12, 13, 16, 18, 24, 32, 48, 64, 96, 128, 256, 512)
"""Rows per expert at which curves have points; both sides of the first steps of a tile's 6 rows are among them."""

# Of the default curve: rows of a tile, rows that a tile with fewer of them costs all the same (the multiply-adds'
# latency), and the part of the peak that many rows reach. Seen with the cpu backend's kernels on Zen 5, AMX's assumed.
_TILE, _AMX_TILE = (6, 3, 0.78), (16, 16, 0.35)
_OVERLAP = 1.5
"""Exponent that joins memory's and arithmetic's times. 1: one after the other; infinity: perfectly overlapped."""

_CALL_SECONDS = 40e-6
_BARRIER_SECONDS = 6e-6  # of all barriers of a layer together, for each doubling of the threads
_TASK_SECONDS = 0.2e-6

Points = tuple[tuple[int, float], ...]


def at(points: Points, x: float) -> float:
    """The value at ``x``: linear between the points, constant before the first and after the last."""
    i = bisect_right(points, x, key=lambda p: p[0])
    if i == 0:
        return points[0][1]
    if i == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class GemmCurve:
    """Time of a touched expert's GEMMs against its rows.

    Attributes:
        dtype: Element type of tokens and weights (``"bf16"``).
        isa: Instruction set of the kernels (``"avx512_bf16"``).
        threads: Threads that share the work.
        points: (rows, nanoseconds for each weight element) pairs, rows ascending, times not descending.
    """

    dtype: str
    isa: str
    threads: int
    points: Points

    def seconds(self, rows: float) -> float:
        """Seconds for each weight element of an expert with ``rows`` rows; after the last point in proportion."""
        if rows <= 0:
            return 0.0
        last = self.points[-1][0]
        return at(self.points, rows) * max(1.0, rows / last) * 1e-9


@dataclass(frozen=True)
class Overhead:
    """What the kernels of an element type spend beside their GEMMs. Both are (threads, seconds) pairs.

    Attributes:
        dtype: Element type of tokens and weights.
        tasks: What each task adds to a call. Reading weights hides them where it binds.
        rows: For each byte of tokens that is packed or combined.
    """

    dtype: str
    tasks: Points
    rows: Points


@dataclass(frozen=True, eq=False)
class MachineProfile:
    """One processor, as measured or as assumed. Compared by identity, so that answers can be remembered by it.

    Attributes:
        name: The processor's own name, or the target's.
        fingerprint: Of model, features and cores; see ``moec.cost.store``.
        cores: Cores that may be used.
        isa: The instruction set of its kernels, where nothing else is said.
        calibrated: Measured here; False for assumed numbers.
        bandwidth: (threads, bytes read from memory a second) pairs.
        flops: (element type, instruction set, operations a second of one thread); a multiply-add is two.
        curves: Measured curves; where one is missing, a default is made from the numbers above.
        call_seconds: Of a call that does nothing, on one thread.
        barriers: (threads, seconds that the team's start and all barriers of a layer add) pairs.
        overheads: By element type; one that is not among them is taken to cost what the first does.
        interrupted: Part of the measured calls that other work interrupted; they do not count where others went by.
        measured: When, as text; empty for assumed numbers.
        links: (processes of this machine, links between any two of them while all send) pairs; () where there are no
            such processes, or nobody measured them.
    """

    name: str
    fingerprint: str
    cores: int
    isa: str
    calibrated: bool
    bandwidth: Points
    flops: tuple[tuple[str, str, float], ...]
    curves: tuple[GemmCurve, ...]
    call_seconds: float
    barriers: Points
    overheads: tuple[Overhead, ...]
    interrupted: float = 0.0
    measured: str = ""
    links: tuple[tuple[int, Link], ...] = ()

    def bytes_per_s(self, threads: int) -> float:
        """Bytes that ``threads`` threads read from memory in a second."""
        return at(self.bandwidth, threads)

    def flops_per_s(self, dtype: str, isa: str, threads: int) -> float:
        """Operations a second at most of ``threads`` threads."""
        for known, level, rate in self.flops:
            if (known, level) == (dtype, isa):
                return rate * threads
        assumed = parse_target(f"cpu:{isa}")
        return assumed.flops_per_s(dtype) / assumed.cores * threads

    def barriers_at(self, threads: int) -> float:
        """Seconds that a team of ``threads`` threads adds to a call: its start and the barriers between the phases."""
        return at(self.barriers, threads)

    def task_seconds(self, dtype: str, threads: int) -> float:
        """Seconds that a task adds to a call of ``threads`` threads, beyond its share of the curve."""
        return at(self._overhead(dtype).tasks, threads)

    def row_byte_seconds(self, dtype: str, threads: int) -> float:
        """Seconds for each byte of tokens that ``threads`` threads move."""
        return at(self._overhead(dtype).rows, threads)

    def _overhead(self, dtype: str) -> Overhead:
        return next((o for o in self.overheads if o.dtype == dtype), self.overheads[0])

    def floor(self, dtype: str, isa: str, threads: int, rows: float) -> float:
        """Seconds that an expert with ``rows`` rows takes at least, for each weight element."""
        return max(ITEM_BYTES[dtype] / self.bytes_per_s(threads), 2 * rows / self.flops_per_s(dtype, isa, threads))

    def with_memory(self, factor: float) -> MachineProfile:
        """The same processor while its memory reads ``factor`` times as fast: neighbours on a host change that.

        What stays is the ratio of the measured times to the machine's limit.
        """
        slowed = replace(self, bandwidth=tuple((t, rate * factor) for t, rate in self.bandwidth))
        curves = []
        for c in self.curves:

            def scaled(rows: int, ns: float, c: GemmCurve = c) -> float:
                return ns * slowed.floor(c.dtype, c.isa, c.threads, rows) / self.floor(c.dtype, c.isa, c.threads, rows)

            curves.append(replace(c, points=rising([(rows, scaled(rows, ns)) for rows, ns in c.points])))
        return replace(slowed, curves=tuple(curves))

    def has_curve(self, dtype: str, isa: str) -> bool:
        """Whether the GEMM was measured for this type and instruction set."""
        return any((c.dtype, c.isa) == (dtype, isa) for c in self.curves)

    def curve(self, dtype: str, isa: str, threads: int) -> GemmCurve:
        """The curve for ``threads`` threads: measured, between two measured ones, or assumed."""
        return _curve(self, dtype, isa, threads)


@lru_cache(maxsize=256)
def _curve(machine: MachineProfile, dtype: str, isa: str, threads: int) -> GemmCurve:
    measured = sorted((c for c in machine.curves if (c.dtype, c.isa) == (dtype, isa)), key=lambda c: c.threads) or [
        default_curve(machine, dtype, isa, t) for t in sorted({1, max(1, machine.cores)})
    ]
    for curve in measured:
        if curve.threads == threads:
            return curve
    # Between measured thread counts neither time nor speed-up is linear: bandwidth saturates and arithmetic does not.
    # What changes little is the ratio of a time to the machine's limit.
    points = []
    for rows in (r for r, _ in measured[0].points):
        ratios = tuple((c.threads, c.seconds(rows) / machine.floor(dtype, isa, c.threads, rows)) for c in measured)
        points.append((rows, at(ratios, threads) * machine.floor(dtype, isa, threads, rows) * 1e9))
    return GemmCurve(dtype, isa, threads, rising(points))


def rising(points: Sequence[tuple[int, float]]) -> Points:
    """The nearest curve that never falls (least squares, by pooling neighbours): more rows take no less time."""
    pools: list[list[float]] = []  # sum, count
    for _, value in points:
        pools.append([value, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    values = [total / count for total, count in pools for _ in range(int(count))]
    return tuple((rows, value) for (rows, _), value in zip(points, values, strict=True))


def default_curve(machine: MachineProfile, dtype: str, isa: str, threads: int) -> GemmCurve:
    """A curve from bandwidth and peak: whole tiles of rows, and memory and arithmetic that overlap in part."""
    tile, least, efficiency = _AMX_TILE if (dtype, isa) == ("bf16", "amx") else _TILE
    memory = ITEM_BYTES[dtype] / machine.bytes_per_s(threads)
    row_seconds = 2 / (machine.flops_per_s(dtype, isa, threads) * efficiency)
    points = []
    for rows in ROWS:
        compute = max(rows, least * -(-rows // tile)) * row_seconds
        points.append((rows, (memory**_OVERLAP + compute**_OVERLAP) ** (1 / _OVERLAP) * 1e9))
    return GemmCurve(dtype, isa, threads, rising(points))


def defaults_for(target: Target) -> MachineProfile:
    """A profile without measuring, from the target's peaks.

    Raises:
        ValueError: The target is no CPU.
    """
    if target.kind != "cpu":
        raise ValueError(f"{target.name} is no CPU target; the cost model of layers knows CPUs")
    level = target.name.partition(":")[2] or detect_level()
    cores = max(1, target.cores)
    one = min(target.memory_bandwidth, 2 * target.memory_bandwidth / cores)  # one core alone draws more than its share
    teams = sorted({1, max(1, cores // 2), cores})
    return MachineProfile(
        name=target.name,
        fingerprint="",
        cores=cores,
        isa=level,
        calibrated=False,
        bandwidth=tuple((t, one if t == 1 else target.memory_bandwidth) for t in teams),
        flops=tuple((d, level, target.flops_per_s(d) / cores) for d in ITEM_BYTES),
        curves=(),
        call_seconds=_CALL_SECONDS,
        barriers=tuple((t, _BARRIER_SECONDS * (t - 1).bit_length()) for t in teams),
        overheads=(
            Overhead(
                "bf16",
                tasks=tuple((t, _TASK_SECONDS / t) for t in teams),
                rows=tuple((t, max(1 / one / t, 1 / target.memory_bandwidth)) for t in teams),
            ),
        ),
    )
