"""Launch parameters of one call: tile sizes, warps, stages, and which form of the kernels runs."""

from __future__ import annotations

from dataclasses import dataclass

from moec.backends.triton.spec import Spec
from moec.ir.scaled_semantics import SCALED


@dataclass(frozen=True)
class Tile:
    """How one GEMM is cut.

    Attributes:
        block_m, block_n, block_k: Rows, output columns and inputs of a tile.
        group_m: Row blocks that share a stretch of columns before the next one begins, for the L2 cache.
        num_warps, num_stages: Of a program, and of its software pipeline.
        split_k: Programs that share the inputs of one tile (down GEMM; their sums are added in order).
        tma: Weights are read through tensor descriptors.
        units: A tile has up to so many times ``block_m`` rows (1 to 4), and only so many blocks as its expert has.
        ahead: Tiles that are multiplied side by side on all units of the device, where they have several heights: a
            program has what the tile so many places later reads first fetched to the cache; 0: of none.
        halves: It has ``block_n`` columns of both halves of the result (down GEMM), by :func:`may_halve`.
        late: Experts, of the last ones, whose lower tiles come after all others.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1
    tma: bool = False
    units: int = 1
    ahead: int = 0
    late: int = 0
    halves: bool = False

    @property
    def rows(self) -> int:
        """Most rows of a tile."""
        return self.block_m * self.units

    def forms(self) -> list[tuple[int, int]]:
        """Rows that a tile of 1, 2, ... blocks multiplies at once, and those that it multiplies after them."""
        first = [self.block_m * (1 + (n > 1 and self.block_m <= 64)) for n in range(1, self.units + 1)]
        first = [rows // (1 + (rows > 128)) for rows in first]
        return [(rows, n * self.block_m - rows) for n, rows in enumerate(first, 1)]


def may_halve(element: str, columns: int) -> bool:
    """Whether the down GEMM has a kernel whose tiles have columns of both halves of the result.

    In fp8 a tile that is wider than a block of scales would need a scale for every column, which takes too many
    registers; columns of two stretches have two.
    """
    return element == "f8e4m3fn" and columns % (2 * SCALED) == 0


@dataclass(frozen=True)
class Launch:
    """How the kernels of a layer run for some number of tokens.

    Attributes:
        form: ``gemm`` on sorted and aligned rows; ``gemv``, a program for each slot and stretch of columns.
        up, down: Both have the same ``block_m`` and ``units``; rows are aligned to blocks.
        programs: Of a persistent GEMM; 0 for one program a tile.
        atomic: The down GEMM adds to the result itself, in no fixed order.
    """

    form: str
    up: Tile
    down: Tile
    programs: int = 0
    atomic: bool = False

    def __post_init__(self) -> None:
        if self.down.halves and (self.atomic or self.down.split_k > 1):
            raise ValueError("a tile with columns of both halves neither shares its sums nor adds to the result")


GEMV_SLOTS = 32
"""So few slots meet mostly experts of their own: a tile of rows would be empty but for one."""


def choose(spec: Spec, tokens: int, target: str) -> Launch:
    """The launch parameters for ``tokens`` tokens on ``target`` (``"cuda:sm90"``).

    On a GPU the model of times chooses. What is no GPU interprets the kernels, for which small tiles are best.
    """
    from moec.backends.triton.launches.device import is_gpu
    from moec.backends.triton.launches.here import device_for
    from moec.backends.triton.launches.launch import plan_launch

    if is_gpu(target):
        return plan_launch(spec, tokens, device_for(target)).launch
    slots = tokens * spec.top_k
    if slots <= GEMV_SLOTS and not spec.fp8:
        tile = Tile(block_m=1, block_n=16, block_k=128)
        return Launch("gemv", tile, tile)
    share = slots / spec.experts
    block_m = 16 if share <= 16 else 32 if share <= 64 else 64
    tile = Tile(block_m=block_m, block_n=64, block_k=128 if spec.fp8 else 64)
    return Launch("gemm", tile, tile)
