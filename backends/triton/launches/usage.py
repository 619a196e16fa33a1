"""What a tile of a grouped GEMM takes of the hardware: shared memory, registers, cycles.

A tile is ``block_m`` rows of one expert by ``block_n`` outputs of each part (gate and up are two parts), summed over
``block_k`` inputs a step. Everything here follows from how Triton lowers ``tl.dot`` with a software pipeline; what the
compiler really took is read from the compiled kernel (``moec.backends.triton.compiled.resources``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moec.backends.triton.launches.device import Device, Mma
from moec.backends.triton.launches.tiles import Tile
from moec.ir.scaled_semantics import SCALED

ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f8e4m3fn": 1}
"""Types of tokens and weights that there are kernels for."""
PORT_BYTES = 128
"""A cycle: what the shared memory of a unit gives to its matrix units."""
LINK_BYTES = 64
"""A cycle: what a unit stores to the last cache at most."""
BARRIER_BYTES = 1024
"""Shared memory for the barriers of descriptors and asynchronous instructions, where an architecture has them."""
_BASE_REGISTERS = 40
"""Loop counters, base addresses, masks."""
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
_TWICE = (128, 2)
"""Blocks of rows whose tiles of gate and up ptxas gives 128 registers, where sums are in tensor memory, and 8 bytes of
stack; four blocks of 64 rows have tiles of the same heights, and none."""
_DEEPEST = (128, 5)
"""Inputs of a step and stages of tiles whose operands go through registers, that ptxas gives 8 bytes of stack where
programs share their sums on a device with tensor memory, and masks say what is inside."""
_GATHER_REGISTERS = 24
"""Addresses of rows that do not lie one after another, where sums of one part leave few registers."""
_MANY_WARPS, _MANY_WARPS_AMD = 24, 64
"""That eight warps take besides where operands go through registers."""
_HELD, _HELD_BEYOND, _HELD_TALL = 0.65, 1.4, 1.6
"""Of a step's operands on AMD, that are held besides: with a loop over tiles, of the first 32 inputs and of those
beyond; and of those beyond where each tile has a program."""
_HALVES_BYTES = 64
"""Of a thread on AMD, that sums in f32 go through to be halved."""
_NARROW_REGISTERS = 16
"""That few operands on AMD leave room for, and half of the sums: the compiler then loads the next ones early."""
_MOST_AMD = 128
"""Sums of a thread on AMD: twice as many spill, though there are registers for them."""
_MOST_AMD_BIASED = 64
"""The same where biases are added: with masks for what lies past the end, scalar registers run out first."""
_BIAS_REGISTERS = 8
"""Where biases lie, and which columns have them."""
_MOST_FP8 = {4: 64, 8: 96, 16: 64}
"""By warps: sums of a thread where those of each step are scaled before they are added, and both held in registers."""
_SCALED_GATHER = 32
"""That addresses of rows which do not lie one after another take then, where sums are in registers alone."""
_SCALED_SYNC = 20
"""That such a step takes more of four warps whose operands go through registers."""
STEP_CYCLES = 40
"""Of a step besides its work: barriers, counters, the issue of loads."""


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


def usage(
    device: Device, tile: Tile, parts: int, dtype: str, biased: bool = False, gathered: bool = False,
    apart: bool = False,
) -> Usage:  # fmt: skip
    """What a block takes, as Triton lowers it.

    Args:
        device: The architecture.
        tile: Its ``group_m`` does not matter.
        parts: 2 where gate and up are multiplied at once.
        dtype: Of both operands.
        biased: Biases are added to the sums.
        gathered: Rows lie where their tokens do, as those of the up GEMM.
        apart: Weights lie apart, behind a table of addresses: no descriptor says where.
    """
    item, threads, scaled = ITEM_BYTES[dtype], device.warp * tile.num_warps, dtype == "f8e4m3fn"
    (rows, more), outputs = tile.forms()[-1], parts * tile.block_n
    instruction = device.mma_for(tile.block_m, tile.num_warps)
    step = (tile.rows + outputs) * tile.block_k * item
    # On their way out rows are made contiguous; on AMD only where biases were added, or halves of sums are stored.
    result = 0 if device.hip and not biased else rows * tile.block_n * item
    if device.hip and tile.split_k > 1:
        result = min(4 * rows * tile.block_n, _HALVES_BYTES * threads)
    shared = max(buffers(device, tile) * step, result) + (BARRIER_BYTES if device.mma[0].shared else 0)
    sums = tile.rows * outputs // threads
    addresses = 2 * math.ceil(step / 16 / threads)
    if instruction.shared and tile.units > 1 and not apart and (scaled or not instruction.name.startswith("tcgen05")):
        # Descriptors of weights need no addresses, and a program without a loop over tiles keeps none for the next.
        addresses = 2 * math.ceil(tile.rows * tile.block_k * item / 16 / threads)
    columns = 0
    if instruction.name.startswith("tcgen05"):
        # Sums of 64 rows lie two to a column, those of one part alone.
        columns = max(32, _power(sum(tile.block_n * max(1, parts * m // 128) for m in (rows, more) if m)))
    if instruction.shared and scaled:
        # Sums of a step leave the matrix units before they are added; those of two parts one after another, if no other
        # rows follow and registers take them.
        alone = not columns and tile.units > 1 and not more and tile.num_warps > 4 and tile.block_n >= 64
        registers = sums + (sums // parts if alone else sums) + addresses + _BASE_REGISTERS
        registers += (_GATHER_REGISTERS if columns else _SCALED_GATHER) if more and gathered else 0
        registers -= _scaled_fewer(tile, sums, gathered, columns > 0)
    elif columns:
        # Sums are read when the loop is over, slice by slice. Of two parts the activation needs both at once.
        sums = rows * outputs // threads
        fit = sums <= _MOST_SLICED
        held = sums if parts == 1 and fit else 3 * sums // 4 + tile.block_k // 2
        held = held if fit or (parts > 1 and tile.units == 1 and not more) else 2 * held
        if tile.units == 1 and parts == 1 and rows > 64 and tile.num_warps == 4:
            held += 3 * sums // 8  # a loop over tiles begins the next one meanwhile
        elif tile.units == 1 and parts > 1 and more:
            held = max(held, 4 * sums // 3)
        registers = max(held, addresses) + _BASE_REGISTERS + (_MORE_REGISTERS if tile.units > 1 else 0)
        if biased and parts > 1:
            # A thread has whole rows, so a bias for each sum. Other numbers of rows lie otherwise, and need their own.
            registers += sums // 4 + (more * outputs // threads if more != rows else 0)
    elif instruction.shared:
        registers = sums + addresses + _BASE_REGISTERS
        registers += _GATHER_REGISTERS if tile.units > 1 and parts == 1 and gathered else 0
    else:
        wm, wn = warp_grid(tile, rows)
        depth = 16 * item // 2  # bytes of an instruction's depth: 16 elements of two bytes, 8 of four
        fragments = 2 * (rows // wm + outputs // wn) * depth * 2 // 4 // device.warp
        registers = sums + fragments + addresses + _BASE_REGISTERS
        if scaled:
            registers += sums + (_SCALED_SYNC if tile.num_warps == 4 else 0)
        if device.hip:  # operands of a whole step are on their way to registers
            held = (rows // wm + outputs // wn) * tile.block_k * item // 4 // device.warp
            first = 32 / tile.block_k
            if tile.units == 1:
                registers += int(held * (_HELD * first + _HELD_BEYOND * (1 - first)))
            else:
                registers += int(held * _HELD_TALL * (1 - first))
                if outputs <= (64 if tile.split_k > 1 else 128) and tile.block_k == 32 and tile.num_stages == 2:
                    registers += sums // 2 + _NARROW_REGISTERS
        if tile.num_warps > 4:
            registers += _MANY_WARPS_AMD if device.hip else _MANY_WARPS
    registers = max(32, registers + (_BIAS_REGISTERS if biased and not columns else 0))
    if tile.split_k > 1:
        # Sums are stored in f32, at addresses twice as far. Those of 64 rows lie in half of the lanes of tensor memory;
        # for their columns to be halved they are held twice.
        lanes = sums if columns and tile.rows == 64 else 0
        # On AMD a tall tile, which has no loop over tiles, has let go of its operands by then.
        registers += 0 if device.hip and tile.units > 1 else _SPLIT_REGISTERS + lanes + (sums // 8 if device.hip else 0)
    resident = device.resident(shared, min(registers, device.thread_registers), tile.num_warps)
    if columns:
        resident = min(resident, device.tensor_columns // columns)
    return Usage(shared, registers, columns, resident)


def _scaled_fewer(tile: Tile, sums: int, gathered: bool, columns: bool) -> int:
    """Registers that a loop with scaled sums has less besides them than others: what ptxas gave, compared."""
    if tile.num_warps == 4:
        return 8 if gathered or tile.block_m >= 128 else 28 if sums >= 64 else 16
    if tile.num_warps == 16:
        return 8 if tile.units == 1 or tile.forms()[-1][1] else 16
    return 8 if columns and sums <= 16 else 16


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


def fits(
    device: Device, tile: Tile, parts: int, dtype: str, biased: bool = False, gathered: bool = False,
    apart: bool = False,
) -> bool:  # fmt: skip
    """Whether a block of the tile is within every limit of the hardware."""
    if dtype == "f32" and tile.rows * tile.block_n * parts > _MOST_F32 * device.warp * tile.num_warps:
        return False
    sums = tile.rows * tile.block_n * parts / (device.warp * tile.num_warps)
    if device.hip and sums > (_MOST_AMD_BIASED if biased else _MOST_AMD):
        return False
    sync = not device.mma_for(tile.block_m, tile.num_warps).shared
    # A scale each for more columns takes registers too; and two parts of few columns take as many as of twice.
    few = sync and parts > 1 and tile.block_n < 64
    if dtype == "f8e4m3fn" and (few or sums > _MOST_FP8[tile.num_warps] or tile.block_n > SCALED):
        return False
    if sync and device.tensor_columns and tile.split_k > 1 and (tile.block_k, tile.num_stages) == _DEEPEST:
        return False
    taken = usage(device, tile, parts, dtype, biased, gathered, apart)
    if taken.columns and (parts * tile.block_n > _MOST_OUTPUTS or (tile.rows >= _TALL and tile.block_n < _WIDE)):
        return False
    if taken.columns and parts > 1 and (tile.block_m, tile.units) == _TWICE:
        return False
    return (
        taken.shared <= device.shared_block
        and taken.registers <= device.thread_registers
        and taken.columns <= device.tensor_columns
        and tile.num_warps * device.warp <= 1024
        and taken.resident >= 1
    )


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
