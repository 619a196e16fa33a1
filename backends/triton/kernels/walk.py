"""Which tiles of a GEMM a program multiplies.

Each GEMM kernel walks over tiles from its program's number in steps of the number of programs: launched with one
program a tile it makes one step at most, launched with as many as the device holds it is persistent. Where tiles have
several heights each has a program, without a loop: what a loop would keep for the next tile takes registers. Tiles are
ordered so that ``GROUP_M`` row blocks share a stretch of weight columns in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moec.backends.triton.kernels.sort import most_blocks
from moec.backends.triton.kernels.text import Grid, cdiv
from moec.backends.triton.spec import Spec


def walk(
    name: str, columns: int, given: Sequence[str], constants: Sequence[str], described: Sequence[str]
) -> list[str]:
    """Statements: the tiles of a program, each by the function ``{name}_tile``.

    What says which tiles there are is read first: it comes while descriptors are written.
    """
    told = ", ".join([*given, "first", "column_block"])
    fixed = ", ".join(constants)
    return [
        f"columns: tl.constexpr = ({columns} + BLOCK_N - 1) // BLOCK_N",
        "if UNITS == 1:",
        "    blocks = tl.load(used)",
        "else:",
        "    block, column_block = tile_at(tl.program_id(0), tl.num_programs(0) // columns, columns, GROUP_M)",
        "    place = tl.load(places + block)",
        *described,
        "if UNITS == 1:",
        "    for tile in range(tl.program_id(0), blocks * columns, tl.num_programs(0)):",
        "        block, column_block = tile_at(tile, blocks, columns, GROUP_M)",
        "        first = block * BLOCK_M",
        f"        {name}_tile({told}, 1, {fixed})",
        "elif place >= 0:",
        "    first = place // 4 * BLOCK_M",
        "    for units in tl.static_range(1, UNITS + 1):",
        "        if place % 4 == units % 4:",
        f"            {name}_tile({told}, units, {fixed})",
    ]


def tile_grid(spec: Spec, columns: int) -> Grid:
    """Programs of a GEMM: one for every tile that there can be, or as many as are wanted."""

    def grid(tokens: int, c: Mapping[str, int]) -> tuple[int, ...]:
        slots, rows = tokens * spec.top_k, c["BLOCK_M"] * c["UNITS"]
        tiles = most_blocks(slots, spec.experts, rows) * cdiv(columns, c["BLOCK_N"])
        programs = c.get("PROGRAMS", 0) if c["UNITS"] == 1 else 0
        return (min(tiles, programs) if programs else tiles, *([c["SPLIT_K"]] if "SPLIT_K" in c else []))

    return grid
