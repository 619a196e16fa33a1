"""What a tile of a grouped GEMM takes of the hardware: shared memory, registers, cycles.

A tile is ``block_m`` rows of one expert by ``block_n`` outputs of each part (gate and up are two parts), summed over
``block_k`` inputs a step. Everything here follows from how Triton lowers ``tl.dot`` with a software pipeline; what the
compiler really took is read from the compiled kernel (``moec.backends.triton.compiled.resources``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moec.backends.triton.launches.device import Device, Mma
from moec.backends.triton.launches.tiles import Tile

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f8e4m3fn": 1}
"""Types of tokens and weights that there are kernels for."""
PORT_BYTES = 128
"""A cycle: what the shared memory of a unit gives to its matrix units."""
LINK_BYTES = 64
"""A cycle: what a unit gets from the last cache at most."""
BARRIER_BYTES = 1024
"""Shared memory for the barriers of descriptors and asynchronous instructions, where an architecture has them."""
_BASE_REGISTERS = 40
"""Loop counters, base addresses, masks."""
_SLICE_REGISTERS = 210
"""What holds sums on their way out of tensor memory at most: the compiler cuts larger tiles of one part."""
_MOST_SLICED = 256
"""Sums of a thread that leave tensor memory in slices; more of them spill."""
_SPLIT_REGISTERS = 24
"""That storing sums in f32 takes besides."""
_MOST_OUTPUTS = 256
"""Of an instruction of tensor memory; sums of more than one do not leave it without spilling."""
_MOST_F32 = 32
"""Sums of a thread where products are exact in f32: without matrix units both operands are held in registers."""
STEP_CYCLES = 40
"""Of a step besides its work: barriers, counters, the issue of loads."""
_MS, _NS, _KS = (16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (32, 64, 128)


@dataclass(frozen=True)
class Usage:
    """What a block of a tile takes: bytes of shared memory, registers of a thread, columns of tensor memory."""

    shared: int
    registers: int
    columns: int
    resident: int


def buffers(device: Device, tile: Tile) -> int:
    """Steps whose operands lie in shared memory: asynchronous instructions read one while others are loaded."""
    return tile.num_stages if device.mma_for(tile.block_m, tile.num_warps).shared else max(1, tile.num_stages - 1)


def ahead(device: Device, tile: Tile) -> int:
    """Steps that are loaded while one is multiplied."""
    in_use = 1 if device.mma_for(tile.block_m, tile.num_warps).shared else 0
    return max(1, buffers(device, tile) - in_use)


def usage(device: Device, tile: Tile, parts: int, dtype: str) -> Usage:
    """What a block takes, as Triton lowers it.

    Args:
        device: The architecture.
        tile: Its ``group_m`` and ``split_k`` do not matter.
        parts: 2 where gate and up are multiplied at once.
        dtype: Of both operands.
    """
    item, threads = ITEM_BYTES[dtype], device.warp * tile.num_warps
    instruction = device.mma_for(tile.block_m, tile.num_warps)
    step = (tile.block_m + parts * tile.block_n) * tile.block_k * item
    result = tile.block_m * tile.block_n * item  # on its way out rows are made contiguous
    shared = max(buffers(device, tile) * step, result) + (BARRIER_BYTES if device.mma[0].shared else 0)
    sums = tile.block_m * tile.block_n * parts // threads
    addresses = 2 * math.ceil(step / 16 / threads)
    columns = 0
    if instruction.name.startswith("tcgen05"):
        # Sums of 64 rows lie two to a column, those of one part alone.
        columns = max(32, _power(tile.block_n * max(1, parts * tile.block_m // 128)))
        # Sums are read when the loop is over, slice by slice. Of two parts the activation needs both at once.
        held = min(sums, _SLICE_REGISTERS) if parts == 1 and sums <= _MOST_SLICED else 3 * sums // 4 + tile.block_k // 2
        registers = max(held, addresses) + _BASE_REGISTERS
    elif instruction.shared:
        registers = sums + addresses + _BASE_REGISTERS
    else:
        wm, wn = warp_grid(tile)
        depth = 16 * item // 2  # bytes of an instruction's depth: 16 elements of two bytes, 8 of four
        fragments = 2 * (tile.block_m // wm + parts * tile.block_n // wn) * depth * 2 // 4 // device.warp
        registers = sums + fragments + addresses + _BASE_REGISTERS
    registers = max(32, registers)
    resident = device.resident(shared, min(registers, device.thread_registers), tile.num_warps)
    if columns:
        resident = min(resident, device.tensor_columns // columns)
    return Usage(shared, registers, columns, resident)


def warp_grid(tile: Tile) -> tuple[int, int]:
    """How many warps lie along rows and along outputs, as Triton lays them out for ``mma.sync`` and ``v_mfma``."""
    rows, outputs = 1, 1
    while rows * outputs < tile.num_warps:
        more_rows = tile.block_m // 16 // rows >= tile.block_n // 16 // outputs
        if more_rows and rows < tile.block_m // 16:
            rows *= 2
        else:
            outputs *= 2
    return rows, outputs


def fits(device: Device, tile: Tile, parts: int, dtype: str) -> bool:
    """Whether a block of the tile is within every limit of the hardware."""
    if dtype == "f32" and tile.block_m * tile.block_n * parts > _MOST_F32 * device.warp * tile.num_warps:
        return False
    taken = usage(device, tile, parts, dtype)
    if taken.columns and parts * tile.block_n > _MOST_OUTPUTS:
        return False
    return (
        taken.shared <= device.shared_block
        and taken.registers <= device.thread_registers
        and taken.columns <= device.tensor_columns
        and tile.num_warps * device.warp <= 1024
        and taken.resident >= 1
    )


@dataclass(frozen=True, eq=False)
class Tiles:
    """All tiles that fit, as columns: one entry a tile.

    Attributes:
        tiles: The tiles.
        rows: Which of them have so many rows.
        m, n, k: Their sizes.
        resident: Blocks of a unit at once.
        busy: Cycles of a unit for one step: matrix units or the reads of their operands, whichever takes longer.
        moved: Bytes that one step brings from the last cache.
        ahead: Steps that are on their way while one is multiplied.
        split: Blocks that share the sum over the inputs.
    """

    tiles: tuple[Tile, ...]
    rows: Mapping[int, Ints]
    m: Ints
    n: Ints
    k: Ints
    resident: Floats
    busy: Floats
    moved: Floats
    ahead: Floats
    split: Ints


@lru_cache(maxsize=64)
def tiles_for(device: Device, parts: int, dtype: str, splits: tuple[int, ...] = (1,)) -> Tiles:
    """Every tile that fits the device, with every number of ``splits``."""
    fitting = [
        tile
        for m in _MS
        for n in _NS
        for k in (_KS if dtype != "f8e4m3fn" else _KS[-1:])  # a scale for every 128 inputs
        for warps in (4, 8)
        for stages in ((2, 3, 4, 5) if not device.hip else (2, 3))
        if fits(device, tile := Tile(m, n, k, 1, warps, stages), parts, dtype) and m * n >= 128 * warps
    ]
    found = [
        replace(tile, split_k=split) for split in splits for tile in fitting if _splits(device, tile, split, dtype)
    ]
    sizes = np.array([t.block_m for t in found])
    return Tiles(
        tuple(found),
        {m: np.flatnonzero(sizes == m) for m in _MS if (sizes == m).any()},
        sizes,
        np.array([t.block_n for t in found]),
        np.array([t.block_k for t in found]),
        np.array([float(usage(device, t, parts, dtype).resident) for t in found]),
        np.array([step_cycles(device, t, parts, dtype) for t in found]),
        np.array([float((t.block_m + parts * t.block_n) * t.block_k * ITEM_BYTES[dtype]) for t in found]),
        np.array([float(ahead(device, t)) for t in found]),
        np.array([t.split_k for t in found]),
    )


def _splits(device: Device, tile: Tile, split: int, dtype: str) -> bool:
    """Whether blocks may share the sums of a tile: those are stored in f32, with addresses of twice the width."""
    sums = tile.block_m * tile.block_n // (device.warp * tile.num_warps)
    if split == 1:
        return True
    fits_registers = usage(device, tile, 1, dtype).registers + _SPLIT_REGISTERS <= device.thread_registers
    return fits_registers and (not device.tensor_columns or 2 * sums <= _MOST_SLICED)


def step_cycles(device: Device, tile: Tile, parts: int, dtype: str) -> float:
    """Cycles that a unit is busy with one step: the multiply-adds, or reading their operands from shared memory."""
    instruction = device.mma_for(tile.block_m, tile.num_warps)
    multiply = 2 * tile.block_m * tile.block_n * parts * tile.block_k / (device.unit_flops(dtype) * instruction.rate)
    read = _read_elements(instruction, tile, parts) * tile.block_k * ITEM_BYTES[dtype] / PORT_BYTES
    return max(multiply, read)


def _read_elements(instruction: Mma, tile: Tile, parts: int) -> int:
    """Elements read for each input of a step: by every group of warps, or by every instruction, that needs them."""
    if instruction.name.startswith("tcgen05"):
        return tile.block_m * parts * math.ceil(tile.block_n / 256) + parts * tile.block_n * math.ceil(
            tile.block_m / 128
        )
    if instruction.shared:
        return tile.block_m * parts + parts * tile.block_n * math.ceil(tile.block_m / instruction.rows)
    rows, outputs = warp_grid(tile)
    return tile.block_m * outputs + parts * tile.block_n * rows


def _power(n: int) -> int:
    """The least power of two from ``n`` up."""
    return 1 << max(0, n - 1).bit_length()
