"""Which tiles of a GEMM a program multiplies.

Each GEMM kernel walks over tiles from its program's number in steps of the number of programs: launched with one
program a tile it makes one step at most, launched with as many as the device holds it is persistent. Tiles are ordered
so that ``GROUP_M`` row blocks share a stretch of weight columns in the L2 cache. Where tiles have several heights each
has a program, without a loop: what a loop would keep for the next tile takes registers. One number says all of such a
tile (``places``), so that its first loads wait for one other at most.
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
    told = ", ".join([*given, "expert", "first", "column_block"])
    fixed = ", ".join(constants)
    later = "tl.program_id(0) + AHEAD"
    return [
        "if UNITS == 1:",
        f"    columns: tl.constexpr = ({columns} + BLOCK_N - 1) // BLOCK_N",
        "    blocks = tl.load(used)",
        "else:",
        "    place = tl.load(places + tl.program_id(0))",
        "    if AHEAD:",
        f"        later = tl.load(places + {later}, mask={later} < tl.num_programs(0), other=-1)",
        *described,
        "if UNITS == 1:",
        "    for tile in range(tl.program_id(0), blocks * columns, tl.num_programs(0)):",
        "        block, column_block = tile_at(tile, blocks, columns, GROUP_M)",
        "        expert = tl.load(experts + block)",
        "        first = block * BLOCK_M",
        f"        {name}_tile({told}, 1, {fixed})",
        "elif place >= 0:",
        "    expert = expert_of(place)",
        "    first = first_of(place) * BLOCK_M",
        "    column_block = column_of(place)",
        "    if AHEAD:",
        "        if later >= 0:",
        f"            {name}_warm({', '.join(given)}, later, UNITS, BLOCK_M, BLOCK_N, BLOCK_K)",
        "    for units in tl.static_range(1, UNITS + 1):",
        "        if units_of(place) == units:",
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
