"""Predicted time of the form without tiles: a program for each slot and stretch of columns.

It reads an expert's weights once for each slot that it has and multiplies without matrix units, so it is for few
tokens; and it launches two kernels, where tiles take the sorting of slots and a sum besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from moec.backends.triton.launches.device import Device
from moec.backends.triton.launches.gemm_time import LAUNCH_SECONDS, Gemm
from moec.backends.triton.launches.load import Load
from moec.backends.triton.launches.tiles import Tile
from moec.backends.triton.launches.usage import ITEM_BYTES

_NS, _KS = (4, 8, 16, 32, 64), (64, 128, 256, 512)
_BASE_REGISTERS = 32
_MOST_REGISTERS = 128
"""Of a thread: products and operands of a step are all in registers."""


@dataclass(frozen=True)
class VectorTime:
    """A stretch of columns, the seconds that it takes, and those that a unit is busy."""

    tile: Tile
    seconds: float
    unit: float


def vector_registers(tile: Tile, parts: int, device: Device) -> int:
    """Registers of a thread: sums of a step in f32, and as many elements of weights on their way."""
    return _BASE_REGISTERS + 2 * parts * tile.block_n * tile.block_k // (device.warp * tile.num_warps)


@lru_cache(maxsize=64)
def vector_tiles(device: Device, parts: int) -> tuple[Tile, ...]:
    """Stretches whose sums and operands fit into registers."""
    found = (Tile(1, n, k) for n in _NS for k in _KS)
    return tuple(
        t for t in found if vector_registers(t, parts, device) <= min(_MOST_REGISTERS, device.thread_registers)
    )


def vector_time(gemm: Gemm, load: Load, device: Device) -> VectorTime:
    """The fastest stretch for a GEMM of a few rows."""
    tiles = vector_tiles(device, gemm.parts)
    whole = [t for t in tiles if gemm.inputs % t.block_k == 0]  # loads of the others have masks
    found = [_time(gemm, load, device, t) for t in whole or tiles]
    least = min(v.seconds for v in found) * (1 + 1e-9)
    return min((v for v in found if v.seconds <= least), key=lambda v: v.unit)


def _time(gemm: Gemm, load: Load, device: Device, tile: Tile) -> VectorTime:
    item, units, clock = ITEM_BYTES[gemm.dtype], device.units, device.clock
    step = tile.block_n * tile.block_k * gemm.parts * item
    steps = math.ceil(gemm.inputs / tile.block_k)
    of_unit = math.ceil(load.total * math.ceil(gemm.outputs / tile.block_n) / units - 1e-6)
    resident = device.resident(0, vector_registers(tile, gemm.parts, device), tile.num_warps)
    together = min(resident, max(1, of_unit))
    link = min(device.link, device.cache_cycle / units)
    multiply = 2 * tile.block_n * tile.block_k * gemm.parts / device.unit_flops("f32")
    busy = max(step / link, multiply)
    # Nothing is loaded ahead: a program waits for every step, and others on its unit go on meanwhile.
    waits = max(busy, device.delay * clock)
    unit = max(of_unit * steps * busy, math.ceil(of_unit / together) * steps * waits) / clock
    moved = load.touched * gemm.weights + load.total * (gemm.inputs + gemm.outputs) * item
    launch = LAUNCH_SECONDS if load.total else 0.0
    return VectorTime(tile, max(unit, moved / device.target.memory_bandwidth) + launch, unit)
