"""Predicted time of one grouped GEMM on a GPU, for all tiles at once.

    seconds = max(cycles of the busiest unit / clock, bytes from memory / bandwidth) + launch
    cycles  = max(span of steps x work + end on units, span of fill + steps x max(work, delay / ahead) + end on blocks)
    work    = max(busy, moved / link)

``busy`` is what a step costs the matrix units or the port of the shared memory, ``moved / link`` what it costs to bring
its operands from the last cache, and ``delay / ahead`` what it takes where too few loads are under way to hide memory's
delay (Little's law). The span is the time until all tiles are done, on units or on as many resident blocks as they
hold: whole waves of equal tiles; an even share and half a tile where heights differ. ``fill`` is the delay of a tile's
first loads and ``end`` the writing of its result. Other blocks of the unit work meanwhile; where one is alone nothing
hides them.

Bytes from memory: weights of touched experts, once for each group of row tiles that share them; rows and results once.
Blocks that share a sum write it in parts, in f32, which are read again where slots are combined.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moec.backends.triton.launches.device import Device
from moec.backends.triton.launches.load import Load
from moec.backends.triton.launches.table import MOST_UNITS, Floats, Ints, Tiles, tiles_for
from moec.backends.triton.launches.tiles import Tile
from moec.backends.triton.launches.usage import ITEM_BYTES, LINK_BYTES, STEP_CYCLES

LAUNCH_SECONDS = 2e-6
"""From the end of one kernel to the begin of the next in a stream."""
CACHE_CYCLES = 263
"""From a load's issue to its data in the last cache (arXiv:2402.13499, table IV: 262 on A100, 263 on H800)."""
_CACHE_PART = 0.5
"""Of the last cache, that rows may fill while weights stream by."""
_MOST_GROUP = 64
_SUM_BYTES = 4
_ROUNDING = 1e-6
"""Of expectations, so that a hair more than a whole wave is no other wave."""


@dataclass(frozen=True)
class Gemm:
    """One grouped GEMM: rows of every expert times its weight, ``[rows, inputs] x [inputs, parts * outputs]``."""

    inputs: int
    outputs: int
    parts: int
    dtype: str
    experts: int
    top_k: int
    biased: bool = False
    gathered: bool = False
    apart: bool = False

    @property
    def weights(self) -> int:
        """Bytes of an expert's weights."""
        return self.inputs * self.outputs * self.parts * ITEM_BYTES[self.dtype]

    def limit(self, load: Load, device: Device) -> tuple[float, float]:
        """Seconds that no kernel can beat: of memory, and of arithmetic."""
        rows = load.total
        moved = load.touched * self.weights + rows * (self.outputs + self.inputs / self.top_k) * ITEM_BYTES[self.dtype]
        flops = 2.0 * rows * self.inputs * self.outputs * self.parts
        return moved / device.target.memory_bandwidth, flops / device.target.flops_per_s(self.dtype)


@dataclass(frozen=True)
class Times:
    """Seconds of every tile of a table: in all, of memory alone, and of the busiest unit alone."""

    seconds: Floats
    memory: Floats
    unit: Floats


def group_of(gemm: Gemm, rows: int, device: Device) -> int:
    """Tiles of rows that may share weights before others are read: what their inputs may fill of the last cache."""
    held = rows * gemm.inputs * ITEM_BYTES[gemm.dtype]
    return max(1, min(_MOST_GROUP, int(device.cache * _CACHE_PART // held)))


def times(gemm: Gemm, load: Load, device: Device, table: Tiles | None = None) -> Times:
    """Seconds for every tile of ``table``, by default of all that fit."""
    if table is None:
        table = tiles_for(device, gemm.parts, gemm.dtype, (1,), gemm.biased, gemm.gathered, gemm.apart)
    item, clock, units = ITEM_BYTES[gemm.dtype], device.clock, device.units
    blocks, reads = np.zeros((MOST_UNITS, len(table.tiles))), np.zeros(len(table.tiles))
    for (m, most), at in table.rows.items():
        blocks[:most, at] = load.blocks(m, most)[:, None]
        reads[at] = load.tiles(m * most * group_of(gemm, m * most, device))
    longest = (table.m > 0).sum(0) - 1
    steps = np.ceil(np.ceil(gemm.inputs / table.k) / table.split)
    blocks *= np.ceil(gemm.outputs / table.n) * table.split
    link = min(LINK_BYTES, device.cache_cycle / units)
    work = np.maximum(table.busy, table.moved / link)
    delay = device.delay * clock
    end = table.m * table.n * item / LINK_BYTES
    waits = np.maximum(work, delay / table.ahead) + STEP_CYCLES
    # Tiles of several heights have a program each. It first reads which blocks are its own, and where weights are read
    # through descriptors it writes those and has them read.
    begin = CACHE_CYCLES * (3 if device.mma[0].shared else 1)
    fill = np.where(longest > 0, delay + begin, delay)
    busy = makespan(blocks, steps * work + end, longest, np.full(len(table.tiles), float(units)))
    waited = makespan(blocks, fill + steps * waits + end, longest, units * table.resident)
    unit = np.maximum(busy, waited) / clock
    results = np.where(table.split > 1, table.split * 2 * _SUM_BYTES - item, item)  # parts are written and read again
    moved = reads * gemm.weights + load.total * (gemm.outputs * results + gemm.inputs / gemm.top_k * item)
    memory = moved / device.target.memory_bandwidth
    launch = LAUNCH_SECONDS if load.total else 0.0
    return Times(np.maximum(unit, memory) + launch, memory, unit)


def makespan(blocks: Floats, cycles: Floats, longest: Ints, machines: Floats) -> Floats:
    """Cycles until tiles of several lengths are done, each taken by the next machine that is free.

    Equal tiles take whole waves. Others end half a tile after an even share, as machines come to their ends evenly
    spread over the length of one (tiles in the kernels' order, scheduled, take 0.3 to 0.6 of it more than the share);
    never later than as many of the longest would.

    Args:
        blocks: [forms, tables] how many tiles of each form there are.
        cycles: [forms, tables] how long one takes.
        longest: [tables] the form that takes longest.
        machines: [tables] that work side by side.
    """
    most = cycles[longest, np.arange(len(longest))]
    waves = np.ceil(blocks.sum(0) / machines - _ROUNDING) * most
    share = np.maximum((blocks * cycles).sum(0) / machines + most / 2, most)
    return np.where(longest > 0, np.minimum(waves, share), waves)


def with_group(tile: Tile, gemm: Gemm, device: Device) -> Tile:
    """The tile with the group that ``times`` counted with."""
    return replace(tile, group_m=group_of(gemm, tile.rows, device))
