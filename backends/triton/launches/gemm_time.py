"""Predicted time of one grouped GEMM on a GPU, for all tiles at once.

    seconds = max(cycles of the busiest unit / clock, bytes from memory / bandwidth) + launch
    cycles  = max(span of steps x work + end on units, span of fill + steps x max(work, delay / ahead) + end on blocks)
    work    = max(busy, moved / link)

``busy`` is what a step costs the matrix units or the port of the shared memory, ``moved / link`` what it costs to bring
its operands from the last cache, and ``delay / ahead`` what it takes where too few loads are under way to hide memory's
delay (Little's law). The span is the time until all tiles are done, on units or on as many resident blocks as they
hold: whole waves of equal tiles; where heights differ an even share and half of a short tile, as those come last.
``fill`` is the delay of a tile's first loads and ``end`` the writing of its result. Other blocks of the unit work
meanwhile; where one is alone nothing hides them.

Bytes from memory: weights of touched experts, once for each group of row tiles that share them, and once more where
their short tiles come last; rows and results once. Blocks that share a sum write it in parts, in f32, which are read
again where slots are combined.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moec.backends.triton.launches.device import Device
from moec.backends.triton.launches.load import Load
from moec.backends.triton.launches.table import MOST_UNITS, Floats, Ints, Tiles, tiles_for
from moec.backends.triton.launches.tiles import Tile
from moec.backends.triton.launches.usage import ITEM_BYTES, LINK_BYTES, STEP_CYCLES, usage

LAUNCH_SECONDS = 2e-6
"""From the end of one kernel to the begin of the next in a stream."""
_LOADED = 2
"""Times as long a hit of the last cache takes under load, as the delay of memory is counted."""
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
    """Seconds of every tile of a table: in all, of memory alone, and of the busiest unit alone.

    ``late`` says where low tiles of the last experts are better taken last.
    """

    seconds: Floats
    memory: Floats
    unit: Floats
    late: NDArray[np.bool_]


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
    columns = np.ceil(gemm.outputs / table.n)
    for (m, most), at in table.rows.items():
        blocks[:most, at] = load.blocks(m, most)[:, None]
        reads[at] = load.tiles(m * most * group_of(gemm, m * most, device))
    longest = (table.m > 0).sum(0) - 1
    machines = units * table.resident
    # Of the last experts, as many as have a tile for every machine, low tiles may come last, and weights once more.
    lows = np.where(np.arange(MOST_UNITS)[:, None] < longest, blocks, 0.0).sum(0)
    lows *= np.minimum(1.0, np.ceil(machines / columns) / max(load.touched, 1.0))
    steps = np.ceil(np.ceil(gemm.inputs / table.k) / table.split)
    blocks *= columns * table.split
    work = np.maximum(table.busy, table.moved / min(device.link, device.cache_cycle / units))
    delay = device.delay * clock
    end = table.m * table.n * item / LINK_BYTES
    waits = np.maximum(work, delay / table.ahead) + STEP_CYCLES
    filling, first = _filling(gemm, load, device, delay, waits)
    fill, once = np.where(longest > 0, filling, delay), np.where(longest > 0, first, 0.0)
    results = np.where(table.split > 1, table.split * 2 * _SUM_BYTES - item, item)  # parts are written and read again
    rows = load.total * (gemm.outputs * results + gemm.inputs / gemm.top_k * item)

    def ended(late: Floats) -> tuple[Floats, Floats]:
        """Seconds of memory and of the busiest unit where so many row tiles come last."""
        busy = makespan(blocks, steps * work + end, longest, np.full(len(table.tiles), float(units)), late * columns)
        waited = once + makespan(blocks, fill + steps * waits + end, longest, machines, late * columns)
        memory = ((reads + late) * gemm.weights + rows) / device.target.memory_bandwidth
        return memory, np.maximum(busy, waited) / clock

    (memory, unit), (memory_late, unit_late) = ended(np.zeros(len(lows))), ended(lows)
    late = np.maximum(memory_late, unit_late) < np.maximum(memory, unit)
    memory, unit = np.where(late, memory_late, memory), np.where(late, unit_late, unit)
    launch = LAUNCH_SECONDS if load.total else 0.0
    return Times(np.maximum(unit, memory) + launch, memory, unit, late)


def _filling(gemm: Gemm, load: Load, device: Device, delay: float, waits: Floats) -> tuple[Floats, float]:
    """Cycles from a tile's begin to its first product where tiles have several heights, and those of the first alone.

    A program first reads which tile is its own, then the slots of its rows where those are gathered. Where weights are
    read through descriptors it writes those meanwhile, and has them read; and what its first step reads was fetched to
    the last cache by an earlier program, all but rows that lie apart and are too many to stay there. What its second
    step reads comes from memory, while the first is multiplied. Weights that lie apart have no descriptors.
    """
    if not device.mma[0].shared or gemm.apart:
        return np.full(waits.shape, delay + device.hit * (2 if gemm.gathered else 1)), 0.0
    rows = load.total / gemm.top_k * gemm.inputs * ITEM_BYTES[gemm.dtype]
    first = _LOADED * device.hit if not gemm.gathered or rows <= device.cache * _CACHE_PART else delay
    return 2 * device.hit + np.maximum(first, delay - waits), delay - first


def makespan(blocks: Floats, cycles: Floats, longest: Ints, machines: Floats, late: Floats) -> Floats:
    """Cycles until tiles of several lengths are done, each taken by the next machine that is free.

    Equal tiles take whole waves. Others end half of one after an even share, as machines come to their ends evenly
    spread over the length of those that come last: of short ones, if there are enough of them for half of the machines
    (tiles in the kernels' order, scheduled, take up to 0.5 of the longest more than the share); never later than as
    many of the longest would.

    Args:
        blocks: [forms, tables] how many tiles of each form there are.
        cycles: [forms, tables] how long one takes.
        longest: [tables] the form that takes longest.
        machines: [tables] that work side by side.
        late: [tables] tiles of other forms than the longest, that come after all others.
    """
    most = cycles[longest, np.arange(len(longest))]
    waves = np.ceil(blocks.sum(0) / machines - _ROUNDING) * most
    short = np.where(np.arange(len(blocks))[:, None] < longest, blocks, 0.0)
    mean = (short * cycles).sum(0) / np.maximum(short.sum(0), _ROUNDING)
    last = most - (most - mean) * np.minimum(1.0, 2 * late / machines)
    share = np.maximum((blocks * cycles).sum(0) / machines + last / 2, most)
    return np.where(longest > 0, np.minimum(waves, share), waves)


def with_order(tile: Tile, gemm: Gemm, device: Device, late: bool) -> Tile:
    """The tile with the order of tiles that ``times`` counted with."""
    tile = replace(tile, group_m=group_of(gemm, tile.rows, device))
    if tile.units == 1:
        return tile
    resident = usage(device, tile, gemm.parts, gemm.dtype, gemm.biased, gemm.gathered, gemm.apart).resident
    columns, at_once = -(-gemm.outputs // tile.block_n), device.units * resident
    return replace(tile, ahead=at_once, late=-(-at_once // columns) if late else 0)
