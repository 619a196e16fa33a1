"""Every tile that fits a device, as columns that times are computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moec.backends.triton.launches.device import Device
from moec.backends.triton.launches.tiles import Tile
from moec.backends.triton.launches.usage import ITEM_BYTES, ahead, fits, step_cycles, usage

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_UNITS = 4
_MS, _NS, _KS = (16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (32, 64, 128)
_UNITS = ((64, 2), (64, 3), (64, 4), (128, 2))
_AMD_UNITS = ((64, 2),)
"""Blocks of rows, and how many a tile may have. Loops for every height keep sums in the matrix units' own memory or in
few registers there; ``mma.sync`` holds operands as well, and spills."""


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
    device: Device, parts: int, dtype: str, splits: tuple[int, ...] = (1,), biased: bool = False,
    gathered: bool = False, apart: bool = False,
) -> Tiles:  # fmt: skip
    """Every tile that fits the device, with every number of ``splits``."""
    found = [
        tile
        for split in splits
        for m, units in [*((m, 1) for m in _MS), *_UNITS]
        for n in _NS
        for k in (_KS if dtype != "f8e4m3fn" else _KS[-1:])  # a scale for every 128 inputs
        for warps in _warps(device, dtype)
        for stages in ((2, 3, 4, 5) if not device.hip else (2, 3))
        for tile in (Tile(m, n, k, 1, warps, stages, split, units=units),)
        if fits(device, tile, parts, dtype, biased, gathered, apart)
        and m * n >= 32 * min(warps, 8) ** 2  # eight warps on less of it take more registers than four
        and (units == 1 or (m, units) in (_AMD_UNITS if device.hip else _UNITS if device.mma[0].shared else ()))
    ]
    return table_of(device, found, parts, dtype, biased, gathered, apart)


def _warps(device: Device, dtype: str) -> tuple[int, ...]:
    """Of a program. Sums that are held twice need more registers than eight warps have of a wide tile."""
    more = dtype == "f8e4m3fn" and device.mma[0].shared and not device.tensor_columns
    return (4, 8, 16) if more else (4, 8)


def table_of(
    device: Device, found: Sequence[Tile], parts: int, dtype: str, biased: bool = False, gathered: bool = False,
    apart: bool = False,
) -> Tiles:  # fmt: skip
    """The columns of some tiles."""
    shapes = [(t.block_m, t.units) for t in found]
    item = ITEM_BYTES[dtype]
    return Tiles(
        tuple(found),
        {s: np.array([i for i, own in enumerate(shapes) if own == s]) for s in dict.fromkeys(shapes)},
        np.array([t.block_n for t in found]),
        np.array([t.block_k for t in found]),
        np.array([float(usage(device, t, parts, dtype, biased, gathered, apart).resident) for t in found]),
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
