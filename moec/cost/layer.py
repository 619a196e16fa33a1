"""Predicted time of one MoE layer's experts: gather, up GEMM, activation, down GEMM, combine.

    seconds = sum over touched experts of (weight elements x curve(rows))      weights and multiply-adds, overlapped
            + tasks x task_seconds(threads)                                    begin of a stream of weights
            + bytes of tokens packed and combined x row_byte_seconds(threads)  between the GEMMs
            + half a task, and never less than the longest one                 what the last thread is waited for
            + call_seconds + barriers

With a histogram of rows per expert the sum is exact. With a number of tokens it is the expectation over uniform
routing: an expert's rows are then binomial, T draws of chance k/E, and E(1 - (1 - k/E)^T) experts are touched.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from moec.cost.machine import ITEM_BYTES, MachineProfile


@dataclass(frozen=True)
class Cut:
    """How large a task of the cpu backend is.

    Attributes:
        up: Outputs of each part, in the up GEMM.
        down: Outputs, in the down GEMM.
        rows: Most rows of an expert.
    """

    up: int
    down: int
    rows: int


_LEAST_CHANCE = 1e-9

Load = list[tuple[float, float]]
"""(rows, how many experts have so many) pairs, rows from 1 up and ascending."""


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer.

    Attributes:
        hidden: Width of a token (K of the up GEMM).
        inner: Width of the activation (K of the down GEMM).
        width: Width of the result.
        experts: Number of experts.
        top_k: Experts of a token.
        parts: Projections of the up GEMM: 2 for gate and up, else 1.
        dtype: Element type of tokens and weights.
    """

    hidden: int
    inner: int
    width: int
    experts: int
    top_k: int
    parts: int = 2
    dtype: str = "bf16"

    @property
    def elements(self) -> int:
        """Weight elements of one expert."""
        return self.inner * (self.parts * self.hidden + self.width)

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return ITEM_BYTES[self.dtype]

    def cut(self, isa: str) -> Cut:
        """Tasks of the kernels for ``isa``."""
        return Cut(128 // self.parts, 128, 256) if isa == "amx" and self.dtype == "bf16" else Cut(64, 64, 512)

    def tasks(self, isa: str) -> tuple[int, int]:
        """Tasks of one segment of rows, in the up and in the down GEMM."""
        cut = self.cut(isa)
        return -(-self.inner // cut.up), -(-self.width // cut.down)

    def moved_bytes(self, slots: float) -> float:
        """Bytes of tokens that are read and packed, and of results that are combined, for ``slots`` rows of experts."""
        return (slots * (2 * self.hidden + self.width) + slots / self.top_k * self.width) * self.item


@dataclass(frozen=True)
class LayerTime:
    """What the model says of one call.

    Attributes:
        seconds: Predicted time.
        limit_seconds: No kernel can be faster: the larger of ``memory_seconds`` and ``compute_seconds``.
        memory_seconds: ``weight_bytes`` over the read bandwidth.
        compute_seconds: ``flops`` over the peak of multiply-adds.
        overhead_seconds: The part of ``seconds`` that is no GEMM: call, barriers, tasks, moving tokens, waiting.
        weight_bytes: Weights of the touched experts, each read once.
        flops: Operations of both GEMMs; a multiply-add is two.
        bound: Which of the three is the largest: ``"memory"``, ``"compute"`` or ``"overhead"``.
    """

    seconds: float
    limit_seconds: float
    memory_seconds: float
    compute_seconds: float
    overhead_seconds: float
    weight_bytes: float
    flops: float
    bound: str


def predict(
    shape: LayerShape, load: int | Sequence[int], machine: MachineProfile, threads: int, isa: str | None = None
) -> LayerTime:
    """The time of one call of a layer whose weights are in memory and not in a cache.

    Args:
        shape: The layer.
        load: Tokens of the call, spread uniformly over the experts; or the rows of every expert.
        machine: Measured or assumed profile.
        threads: Threads of the call.
        isa: Instruction set of the kernels, by default the machine's own.

    Raises:
        ValueError: A histogram of another number of experts, negative rows, or no thread.
    """
    if threads < 1:
        raise ValueError(f"{threads} threads")
    rows_of = _uniform(load, shape.top_k, shape.experts) if isinstance(load, int) else _counted(load, shape.experts)
    isa = isa or machine.isa
    touched = sum(count for _, count in rows_of)
    slots = float(load * shape.top_k) if isinstance(load, int) else float(sum(load))
    weight_bytes, flops = touched * shape.elements * shape.item, 2 * slots * shape.elements
    memory = weight_bytes / machine.bytes_per_s(threads)
    compute = flops / machine.flops_per_s(shape.dtype, isa, threads)
    gemm, overhead = 0.0, machine.call_seconds
    if rows_of:
        curve = machine.curve(shape.dtype, isa, threads)
        gemm = shape.elements * sum(count * curve.seconds(rows) for rows, count in rows_of)
        overhead += _overhead(shape, rows_of, slots, machine, threads, isa, gemm)
    bound = max((overhead, "overhead"), (memory, "memory"), (compute, "compute"))[1]
    return LayerTime(gemm + overhead, max(memory, compute), memory, compute, overhead, weight_bytes, flops, bound)


def _overhead(
    shape: LayerShape, load: Load, slots: float, machine: MachineProfile, threads: int, isa: str, gemm: float
) -> float:
    """All that is no GEMM, but the call itself."""
    segments = sum(count * math.ceil(rows / shape.cut(isa).rows) for rows, count in load)
    tasks = segments * sum(shape.tasks(isa)) * machine.task_seconds(shape.dtype, threads)
    moving = shape.moved_bytes(slots) * machine.row_byte_seconds(shape.dtype, threads)
    return machine.barriers_at(threads) + tasks + moving + _waiting(shape, load, machine, threads, isa, gemm)


def _waiting(shape: LayerShape, load: Load, machine: MachineProfile, threads: int, isa: str, gemm: float) -> float:
    """What threads wait for the last one, in both GEMMs.

    Tasks are taken one at a time, so on average the last thread ends (1 - 1/threads)/2 of a task after the mean; with
    fewer tasks than threads the longest task alone decides.
    """
    if threads == 1:
        return 0.0
    cut, (ups, downs) = shape.cut(isa), shape.tasks(isa)
    longest = min(_longest(load), cut.rows)
    together = machine.curve(shape.dtype, isa, threads).seconds(longest) * threads
    alone = machine.curve(shape.dtype, isa, 1).seconds(longest)
    waited = 0.0
    for count, most, outputs, k in (
        (ups, cut.up, shape.inner, shape.parts * shape.hidden),
        (downs, cut.down, shape.width, shape.inner),
    ):
        task = min(most, outputs) * k  # weight elements
        phase = gemm * outputs * k / shape.elements
        end = phase + task * together * (1 - 1 / threads) / 2 if count > 0 else phase
        waited += max(end, task * alone) - phase
    return waited


def _longest(load: Load) -> float:
    """Rows of the most loaded expert; of expected counts, those that it has with a chance of about a half."""
    seen = 0.0
    for rows, count in reversed(load):
        seen += count
        if seen >= 0.5:
            return rows
    return load[-1][0]


def _counted(histogram: Sequence[int], experts: int) -> Load:
    if len(histogram) != experts or min(histogram, default=0) < 0:
        raise ValueError(f"a histogram of {experts} experts has so many numbers from 0 up, not {list(histogram)}")
    return sorted((float(rows), float(count)) for rows, count in Counter(histogram).items() if rows)


@lru_cache(maxsize=1024)
def _uniform(tokens: int, top_k: int, experts: int) -> Load:
    """Expected number of experts for each number of rows, if every token draws ``top_k`` different experts evenly."""
    if tokens <= 0:
        return []
    chance = top_k / experts
    if chance >= 1:
        return [(float(tokens), float(experts))]
    mode = min(tokens, int((tokens + 1) * chance))
    odds = chance / (1 - chance)
    top = math.exp(
        math.lgamma(tokens + 1) - math.lgamma(mode + 1) - math.lgamma(tokens - mode + 1)
        + mode * math.log(chance) + (tokens - mode) * math.log1p(-chance)
    )  # fmt: skip
    found = [(mode, top)] if mode else []
    p = top
    for rows in range(mode + 1, tokens + 1):  # each from its neighbour
        p *= odds * (tokens - rows + 1) / rows
        if p < _LEAST_CHANCE:
            break
        found.append((rows, p))
    p = top
    for rows in range(mode - 1, 0, -1):
        p *= (rows + 1) / (odds * (tokens - rows))
        if p < _LEAST_CHANCE:
            break
        found.append((rows, p))
    return sorted((float(rows), p * experts) for rows, p in found)


@lru_cache(maxsize=4096)
def threads_for(shape: LayerShape, tokens: int, machine: MachineProfile, threads: int, isa: str | None = None) -> int:
    """How many of ``threads`` threads make a call of ``tokens`` tokens fastest: 1, all, or a power of two between.

    A few tokens of a tiny layer are done before a team of threads has met at its barriers. The answer is the smallest
    team within 2 % of the best, and is remembered.
    """
    teams = sorted({threads, *(1 << n for n in range(threads.bit_length()) if 1 << n <= threads)})
    times = {team: predict(shape, tokens, machine, team, isa).seconds for team in teams}
    best = min(times.values())
    return next(team for team in teams if times[team] <= 1.02 * best)
