"""Which tiles of several heights a GEMM has, and in which order they are taken.

A tile has up to ``UNITS`` blocks of rows of one expert; all of an expert's tiles but its last have so many. Programs
are handed out by their number, so the order of tiles decides how evenly a call ends. Tiles go in groups of row tiles,
each through all columns before the next group begins, so that a group shares weights in the L2 cache. Of the last
``LATE`` experts the lower tiles come after all others, highest first: what is taken last is short, so that programs end
within half a short tile of each other instead of half a tall one (longest processing time first; R. L. Graham, SIAM J.
Appl. Math. 17, 1969). The weights of those experts are read once more.

A program's place is one number of 64 bits: its first block of rows, its expert, its column of tiles, and how many
blocks it has. -1: there is no tile.
"""

from __future__ import annotations

from moec.backends.triton.kernels.rows import padded

PLACES = ("UNITS", "UP_COLUMNS", "UP_GROUP", "UP_LATE", "DOWN_COLUMNS", "DOWN_GROUP", "DOWN_LATE")
"""Constants: blocks of a tile; and of both GEMMs columns of tiles, row tiles of a group, and experts whose low tiles
come last."""

HELPER = '''\
@triton.jit
def place_of(first, expert, column, units):
    """The first block of a tile, its expert, its column and its number of blocks, as one number."""
    return (first.to(tl.int64) << 35) | (expert.to(tl.int64) << 19) | (column << 3) | units


@triton.jit
def first_of(place):
    """The first block of a tile."""
    return (place >> 35).to(tl.int32)


@triton.jit
def expert_of(place):
    """The expert of a tile."""
    return ((place >> 19) & 65535).to(tl.int32)


@triton.jit
def column_of(place):
    """Which column of tiles it is in."""
    return ((place >> 3) & 65535).to(tl.int32)


@triton.jit
def units_of(place):
    """How many blocks of rows a tile has."""
    return (place & 7).to(tl.int32)


@triton.jit
def write_places(
    places, units, tile, most, UNITS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
    BINS: tl.constexpr, STEPS: tl.constexpr,
):
    """The places of this program's row tiles; the first program writes those of low tiles that come last as well.

    ``units`` are the blocks of every expert, ``most`` the row tiles that there can be; experts from EARLY on have their
    low tiles last.
    """
    expert = tl.arange(0, BINS)
    rest = units % UNITS
    late = (rest > 0) & (expert >= EARLY)
    count = units // UNITS + ((rest > 0) & (expert < EARLY)).to(tl.int32)
    ends = tl.cumsum(count, 0)
    blocks = tl.cumsum(units, 0) - units
    grouped = tl.max(ends, 0)
    lows = tl.sum(late.to(tl.int32), 0)
    owner = count_up_to(ends, tile, BINS, STEPS)
    earlier = (tile - tl.gather(ends - count, owner, 0)) * UNITS
    high = tl.minimum(tl.gather(units, owner, 0) - earlier, UNITS)
    first = tl.gather(blocks, owner, 0) + earlier
    group = tile // GROUP * GROUP
    size = tl.minimum(grouped - group, GROUP)
    for column in range(COLUMNS):
        at = tl.where(tile < grouped, group * COLUMNS + column * size + tile - group, tile * COLUMNS + column)
        place = tl.where(tile < grouped, place_of(first, owner, column, high), -1)
        tl.store(places + at, place, mask=(tile < grouped) | ((tile >= grouped + lows) & (tile < most)))
    if tl.program_id(0) == 0:
        rank = tl.zeros_like(units)
        begin = grouped
        for lower in tl.static_range(1, UNITS):
            own = late & (rest == UNITS - lower)
            rank += tl.where(own, begin + tl.cumsum(own.to(tl.int32), 0) - 1, 0)
            begin += tl.sum(own.to(tl.int32), 0)
        for column in range(COLUMNS):
            place = place_of(blocks + units - rest, expert, column, rest)
            tl.store(places + rank * COLUMNS + column, place, mask=late)
'''


def place_lines(experts: int, chunk: int) -> list[str]:
    """Statements of a program that has ``chunk`` blocks: the places of both GEMMs, where tiles have several heights."""
    bins = padded(experts + 1)

    def written(gemm: str) -> str:
        late = f"{experts} - {gemm.upper()}_LATE"
        order = f"{gemm.upper()}_COLUMNS, {gemm.upper()}_GROUP, {late}"
        return f"write_places({gemm}_places, units, block, most, UNITS, {order}, {bins}, {bins.bit_length() - 1})"

    return [
        "if UNITS > 1:",
        "    units = (ends - starts) // BLOCK_M",
        f"    most = (slots_n + tl.minimum(slots_n, {experts}) * (BLOCK_M * UNITS - 1)) // (BLOCK_M * UNITS)",
        f"    if tl.program_id(0) * {chunk} < most:",
        f"        {written('up')}",
        f"        {written('down')}",
    ]
