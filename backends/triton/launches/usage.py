"""What a tile of a grouped GEMM takes of the hardware: shared memory, registers, cycles.

A tile is ``block_m`` rows of one expert by ``block_n`` outputs of each part (gate and up are two parts), summed over
``block_k`` inputs a step. Everything here follows from how Triton lowers ``tl.dot`` with a software pipeline; what the
compiler really took is read from the compiled kernel (``moec.backends.triton.compiled.resources``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moec.backends.triton.launches.device import Device, Mma
from moec.backends.triton.launches.tiles import Tile
from moec.ir.scaled_semantics import SCALED

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
_MOST_SLICED = 128
"""Sums of a thread that leave tensor memory in slices; more of them spill."""
_SPLIT_REGISTERS = 24
"""That storing sums in f32 takes besides."""
_MOST_OUTPUTS = 256
"""Of an instruction of tensor memory; sums of more than one do not leave it without spilling."""
_MOST_F32 = 32
"""Sums of a thread where products are exact in f32: without matrix units both operands are held in registers."""
_MORE_REGISTERS = 16
"""That loops for several heights take, where sums are in tensor memory."""
_TALL, _WIDE = 256, 128
"""Rows of a tile from which it has at least so many outputs of a part, where sums are in tensor memory: ptxas gives
narrower ones 64 registers, and 8 bytes of stack."""
_GATHER_REGISTERS = 24
"""Addresses of rows that do not lie one after another, where sums of one part leave few registers."""
_MANY_WARPS, _MANY_WARPS_AMD = 24, 64
"""That eight warps take besides where operands go through registers."""
_HELD, _HELD_BEYOND = 0.65, 1.6
"""Of a step's operands on AMD, that are held besides: with a loop over tiles; and where each has a program, of inputs
beyond 32."""
_MOST_AMD = 128
"""Sums of a thread on AMD: twice as many spill, though there are registers for them."""
_MOST_AMD_BIASED = 64
"""The same where biases are added: with masks for what lies past the end, scalar registers run out first."""
_BIAS_REGISTERS = 8
"""Where biases lie, and which columns have them."""
_MOST_FP8 = 64
"""Sums of a thread where those of each step are scaled before they are added: both are held in registers."""
STEP_CYCLES = 40
"""Of a step besides its work: barriers, counters, the issue of loads."""
MOST_UNITS = 4
_MS, _NS, _KS = (16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (32, 64, 128)
_UNITS = ((64, 2), (64, 3), (64, 4), (128, 2))
_AMD_UNITS = ((64, 2),)
"""Blocks of rows, and how many a tile may have. Loops for every height keep sums in the matrix units' own memory or in
few registers there; ``mma.sync`` holds operands as well, and spills."""


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


def usage(device: Device, tile: Tile, parts: int, dtype: str, biased: bool = False, gathered: bool = False) -> Usage:
    """What a block takes, as Triton lowers it.

    Args:
        device: The architecture.
        tile: Its ``group_m`` and ``split_k`` do not matter.
        parts: 2 where gate and up are multiplied at once.
        dtype: Of both operands.
        biased: Biases are added to the sums.
        gathered: Rows lie where their tokens do, as those of the up GEMM.
    """
    item, threads = ITEM_BYTES[dtype], device.warp * tile.num_warps
    (rows, more), outputs = tile.forms()[-1], parts * tile.block_n
    instruction = device.mma_for(tile.block_m, tile.num_warps)
    step = (tile.rows + outputs) * tile.block_k * item
    # On their way out rows are made contiguous; on AMD only where biases were added.
    result = 0 if device.hip and not biased else rows * tile.block_n * item
    shared = max(buffers(device, tile) * step, result) + (BARRIER_BYTES if device.mma[0].shared else 0)
    sums = tile.rows * outputs // threads
    addresses = 2 * math.ceil(step / 16 / threads)
    columns = 0
    if instruction.name.startswith("tcgen05"):
        # Sums of 64 rows lie two to a column, those of one part alone.
        columns = max(32, _power(sum(tile.block_n * max(1, parts * m // 128) for m in (rows, more) if m)))
        # Sums are read when the loop is over, slice by slice. Of two parts the activation needs both at once.
        sums = rows * outputs // threads
        fit = sums <= _MOST_SLICED
        held = min(sums, _SLICE_REGISTERS) if parts == 1 and fit else 3 * sums // 4 + tile.block_k // 2
        held = held if fit or (parts > 1 and tile.units == 1 and not more) else 2 * held
        registers = max(held, addresses) + _BASE_REGISTERS + (_MORE_REGISTERS if tile.units > 1 else 0)
        if biased and parts > 1:
            # A thread has whole rows, so a bias for each sum. Other numbers of rows lie otherwise, and need their own.
            registers += sums // 4 + (more * outputs // threads if more != rows else 0)
    elif instruction.shared and tile.units > 1:
        # Descriptors of weights need no addresses, and a program without a loop over tiles keeps none for the next.
        addresses = 2 * math.ceil(tile.rows * tile.block_k * item / 16 / threads)
        registers = sums + addresses + _BASE_REGISTERS + (_GATHER_REGISTERS if parts == 1 and gathered else 0)
    elif instruction.shared:
        registers = sums + addresses + _BASE_REGISTERS
    else:
        wm, wn = warp_grid(tile, rows)
        depth = 16 * item // 2  # bytes of an instruction's depth: 16 elements of two bytes, 8 of four
        fragments = 2 * (rows // wm + outputs // wn) * depth * 2 // 4 // device.warp
        registers = sums + fragments + addresses + _BASE_REGISTERS
        if device.hip:  # operands of a whole step are on their way to registers
            held = (rows // wm + outputs // wn) * tile.block_k * item // 4 // device.warp
            registers += int(held * (_HELD_BEYOND * max(0.0, 1 - 32 / tile.block_k) if tile.units > 1 else _HELD))
        if tile.num_warps > 4:
            registers += _MANY_WARPS_AMD if device.hip else _MANY_WARPS
    registers = max(32, registers + (_BIAS_REGISTERS if biased and not columns else 0))
    resident = device.resident(shared, min(registers, device.thread_registers), tile.num_warps)
    if columns:
        resident = min(resident, device.tensor_columns // columns)
    return Usage(shared, registers, columns, resident)


def warp_grid(tile: Tile, m: int) -> tuple[int, int]:
    """Warps along ``m`` rows and along outputs, as Triton lays them out for ``mma.sync`` and ``v_mfma``."""
    rows, outputs = 1, 1
    while rows * outputs < tile.num_warps:
        more_rows = m // 16 // rows >= tile.block_n // 16 // outputs
        if more_rows and rows < m // 16:
            rows *= 2
        else:
            outputs *= 2
    return rows, outputs


def fits(device: Device, tile: Tile, parts: int, dtype: str, biased: bool = False, gathered: bool = False) -> bool:
    """Whether a block of the tile is within every limit of the hardware."""
    if dtype == "f32" and tile.rows * tile.block_n * parts > _MOST_F32 * device.warp * tile.num_warps:
        return False
    sums = tile.rows * tile.block_n * parts / (device.warp * tile.num_warps)
    if device.hip and sums > (_MOST_AMD_BIASED if biased else _MOST_AMD):
        return False
    # A scale each for more columns takes registers too.
    if dtype == "f8e4m3fn" and (sums > _MOST_FP8 or tile.block_n > SCALED):
        return False
    taken = usage(device, tile, parts, dtype, biased, gathered)
    if taken.columns and (parts * tile.block_n > _MOST_OUTPUTS or (tile.rows >= _TALL and tile.block_n < _WIDE)):
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
        rows: Which of them have such blocks of rows, and so many.
        n, k: Columns and inputs.
        resident: Blocks of a unit at once.
        m: [MOST_UNITS, tiles] rows of a tile that has 1, 2, ... blocks of rows; 0 where it never has so many.
        busy: Cycles of a unit for one step of each: matrix units or reads of their operands, whichever takes longer.
        moved: Bytes that one step of each brings from the last cache.
        ahead: Steps that are on their way while one is multiplied.
        split: Blocks that share the sum over the inputs.
    """

    tiles: tuple[Tile, ...]
    rows: Mapping[tuple[int, int], Ints]
    n: Ints
    k: Ints
    resident: Floats
    m: Floats
    busy: Floats
    moved: Floats
    ahead: Floats
    split: Ints


@lru_cache(maxsize=64)
def tiles_for(
    device: Device, parts: int, dtype: str, splits: tuple[int, ...] = (1,), biased: bool = False, gathered: bool = False
) -> Tiles:
    """Every tile that fits the device, with every number of ``splits``."""
    fitting = [
        tile
        for m, units in [*((m, 1) for m in _MS), *_UNITS]
        for n in _NS
        for k in (_KS if dtype != "f8e4m3fn" else _KS[-1:])  # a scale for every 128 inputs
        for warps in (4, 8)
        for stages in ((2, 3, 4, 5) if not device.hip else (2, 3))
        if fits(device, tile := Tile(m, n, k, 1, warps, stages, units=units), parts, dtype, biased, gathered)
        and m * n >= 128 * warps
        and (units == 1 or (m, units) in (_AMD_UNITS if device.hip else _UNITS if device.mma[0].shared else ()))
    ]
    found = [
        replace(tile, split_k=split)
        for split in splits
        for tile in fitting
        if split == 1 or sharing_registers(device, tile, dtype) <= device.thread_registers
    ]
    return table_of(device, found, parts, dtype, biased, gathered)


def table_of(
    device: Device, found: Sequence[Tile], parts: int, dtype: str, biased: bool = False, gathered: bool = False
) -> Tiles:
    """The columns of some tiles."""
    shapes = [(t.block_m, t.units) for t in found]
    item = ITEM_BYTES[dtype]
    return Tiles(
        tuple(found),
        {s: np.array([i for i, own in enumerate(shapes) if own == s]) for s in dict.fromkeys(shapes)},
        np.array([t.block_n for t in found]),
        np.array([t.block_k for t in found]),
        np.array([float(usage(device, t, parts, dtype, biased, gathered).resident) for t in found]),
        _forms(found, lambda t, rows, more: float(rows + more)),
        _forms(found, lambda t, rows, more: sum(step_cycles(device, t, parts, dtype, m) for m in (rows, more) if m)),
        _forms(found, lambda t, rows, more: float((rows + more + parts * t.block_n) * t.block_k * item)),
        np.array([float(ahead(device, t)) for t in found]),
        np.array([t.split_k for t in found]),
    )


def _forms(tiles: Sequence[Tile], of: Callable[[Tile, int, int], float]) -> Floats:
    """[MOST_UNITS, tiles] a number for every form of every tile."""
    found = np.zeros((MOST_UNITS, len(tiles)))
    for at, tile in enumerate(tiles):
        for n, (rows, more) in enumerate(tile.forms()):
            found[n, at] = of(tile, rows, more)
    return found


def sharing_registers(device: Device, tile: Tile, dtype: str) -> int:
    """Registers of a thread where blocks share the sums of a tile: those are stored in f32, at addresses twice as far.

    Sums of 64 rows lie in half of the lanes of tensor memory; for their columns to be halved they are held twice.
    """
    taken = usage(device, tile, 1, dtype)
    twice = tile.rows * tile.block_n // (device.warp * tile.num_warps) if taken.columns and tile.rows == 64 else 0
    return taken.registers + _SPLIT_REGISTERS + twice


def step_cycles(device: Device, tile: Tile, parts: int, dtype: str, rows: int) -> float:
    """Cycles that a unit is busy with a step of some rows: multiply-adds, or reading operands from shared memory."""
    instruction = device.mma_for(rows, tile.num_warps)
    multiply = 2 * rows * tile.block_n * parts * tile.block_k / (device.unit_flops(dtype) * instruction.rate)
    read = _read_elements(instruction, tile, parts, rows) * tile.block_k * ITEM_BYTES[dtype] / PORT_BYTES
    return max(multiply, read)


def _read_elements(instruction: Mma, tile: Tile, parts: int, rows: int) -> int:
    """Elements read for each input of a step: by every group of warps, or by every instruction, that needs them."""
    outputs = parts * tile.block_n
    if instruction.name.startswith("tcgen05"):
        return rows * parts * math.ceil(tile.block_n / 256) + outputs * math.ceil(rows / 128)
    if instruction.shared:
        blocks = math.ceil(rows / instruction.rows)
        beside = max(1, tile.num_warps // instruction.warps // blocks)  # groups of warps that share rows
        return rows * parts * beside + outputs * blocks
    along, across = warp_grid(tile, rows)
    return rows * across + outputs * along


def _power(n: int) -> int:
    """The least power of two from ``n`` up."""
    return 1 << max(0, n - 1).bit_length()
