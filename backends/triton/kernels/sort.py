"""The kernels that sort slots by expert and align them to row blocks, without the host knowing any count.

A slot is (token, k-th choice). Slots of an expert keep their order; every expert's rows begin at a multiple of
``BLOCK_M``, and what is left of its last block is dead (-1). Buffers and grids have static upper bounds: ``S`` slots of
``E`` experts fill at most ``(S + min(E, S) * (BLOCK_M - 1)) // BLOCK_M`` blocks. Few slots take one program
(``sort_few``), many take three kernels: ``count`` counts each stretch of slots, ``offsets`` adds up over the stretches,
``place`` gives every slot its row. Ids outside ``0 .. E-1`` go nowhere.

A tile of a GEMM may have up to ``UNITS`` blocks of one expert: all of its tiles but the last have so many. What tiles
there are, and in which order they are taken, is written by ``moec.backends.triton.kernels.places``.
"""

from __future__ import annotations

from collections.abc import Mapping

from moec.backends.triton.kernels.places import PLACES, place_lines
from moec.backends.triton.kernels.rows import padded
from moec.backends.triton.kernels.text import Argument, Kernel, cdiv, function

HELPER = '''\
@triton.jit
def count_up_to(ends, x, BINS: tl.constexpr, STEPS: tl.constexpr):
    """How many of the ascending ends are at most x, by bisection: a comparison of each with each takes registers."""
    found = tl.zeros_like(x)
    step = BINS // 2
    for _ in range(STEPS):
        found += tl.where(tl.gather(ends, found + step - 1, 0) <= x, step, 0)
        step = step // 2
    return found
'''
CHUNK = 128
"""Slots that one program counts and places."""
_SCAN = 512
"""Counts that ``offsets`` adds up at a time."""
_OTHERS = 16
"""Slots that each slot is compared with at a time: on AMD's GPUs every comparison takes scalar registers."""
_DEAD = 16
"""Rows of a block that ``place`` looks at at a time; as many as the smallest block has."""


def most_blocks(slots: int, experts: int, block_m: int) -> int:
    """The most row blocks that so many slots can fill."""
    return (slots + min(experts, slots) * (block_m - 1)) // block_m


def _place_grid(experts: int, top_k: int, tokens: int, constants: Mapping[str, int]) -> tuple[int, ...]:
    slots = tokens * top_k
    blocks = most_blocks(slots, experts, constants["BLOCK_M"])
    return (max(cdiv(slots, CHUNK), cdiv(blocks, CHUNK)),)


def _read(experts: int) -> list[str]:
    """Statements: the experts of this program's slots, E where there is none."""
    return [
        f"slot = tl.program_id(0) * {CHUNK} + tl.arange(0, {CHUNK})",
        "id = tl.load(ids + slot, mask=slot < slots_n, other=-1)",
        f"expert = tl.where((id >= 0) & (id < {experts}), id, {experts}).to(tl.int32)",
        f"bins = tl.arange(0, {padded(experts + 1)})",
    ]


def _align(experts: int) -> list[str]:
    """Statements: where each expert's rows begin and end; then this program's blocks and their dead rows."""
    bins = padded(experts + 1)
    return [
        "ends = tl.cumsum(tl.cdiv(total, BLOCK_M) * BLOCK_M, 0)",
        "starts = ends - tl.cdiv(total, BLOCK_M) * BLOCK_M",
        "blocks = tl.max(ends, 0) // BLOCK_M",
        "tl.store(used, blocks, mask=tl.program_id(0) == 0)",
        "",
        f"block = tl.program_id(0) * {CHUNK} + tl.arange(0, {CHUNK})",
        f"owner = count_up_to(ends, block * BLOCK_M, {bins}, {bins.bit_length() - 1})",
        "tl.store(experts + block, owner, mask=block < blocks)",
        "past = tl.gather(starts + total, owner, 0)",
        f"for begin in range(0, BLOCK_M, {_DEAD}):",
        f"    row = block[:, None] * BLOCK_M + begin + tl.arange(0, {_DEAD})[None, :]",
        "    dead = (block < blocks)[:, None] & (row >= past[:, None])",
        "    tl.store(rows + row, tl.full((1, 1), -1, tl.int32), mask=dead)",
        *place_lines(experts, CHUNK),
    ]


def _rank() -> list[str]:
    """Statements: how many slots of the same expert come before each slot in this program."""
    return [
        f"i = tl.arange(0, {CHUNK})",
        f"rank = tl.zeros(({CHUNK},), tl.int32)",
        f"for begin in range(0, {CHUNK}, {_OTHERS}):",
        f"    other = begin + tl.arange(0, {_OTHERS})",
        "    same = expert[:, None] == tl.gather(expert, other, 0)[None, :]",
        "    rank += tl.sum((same & (other[None, :] < i[:, None])).to(tl.int32), 1)",
    ]


def sort_kernels(experts: int, top_k: int, id_type: str = "i64") -> list[tuple[Kernel, str]]:
    """The four kernels and their texts."""
    ids, slots = Argument("ids", f"*{id_type}"), Argument("slots_n", "i32")
    counts, totals = Argument("counts", "*i32"), Argument("totals", "*i32")
    placed = tuple(Argument(name, "*i32") for name in ("rows", "experts", "used"))
    placed += tuple(Argument(f"{gemm}_places", "*i64") for gemm in ("up", "down"))
    few = Kernel("sort_few", (ids, slots, *placed), ("BLOCK_M", *PLACES), lambda t, c: (1,))
    count = Kernel("count", (ids, slots, counts), (), lambda t, c: (cdiv(t * top_k, CHUNK),))
    offsets = Kernel("offsets", (counts, totals, Argument("chunks", "i32")), (), lambda t, c: (experts,))
    place = Kernel(
        "place",
        (ids, slots, counts, totals, *placed),
        ("BLOCK_M", *PLACES),
        lambda t, c: _place_grid(experts, top_k, t, c),
    )
    histogram = f"tl.histogram(expert, {padded(experts + 1)}, mask=expert < {experts})"
    return [
        (
            few,
            function(
                few,
                f"Rows of at most {CHUNK} slots.",
                [
                    *_read(experts),
                    f"total = {histogram}",
                    *_align(experts),
                    "",
                    *_rank(),
                    "row = tl.gather(starts, expert, 0) + rank",
                    f"tl.store(rows + row, slot, mask=expert < {experts})",
                ],
            ),
        ),
        (
            count,
            function(
                count,
                f"counts[chunk, expert]: slots of each expert among {CHUNK}.",
                [
                    *_read(experts),
                    f"total = {histogram}",
                    f"tl.store(counts + tl.program_id(0) * {experts} + bins, total, mask=bins < {experts})",
                ],
            ),
        ),
        (
            offsets,
            function(
                offsets,
                "Makes counts of an expert the slots in earlier chunks; totals[expert] is the sum.",
                [
                    "expert = tl.program_id(0)",
                    "before = 0",
                    f"for start in range(0, chunks, {_SCAN}):",
                    f"    chunk = start + tl.arange(0, {_SCAN})",
                    f"    at = counts + chunk * {experts} + expert",
                    "    here = tl.load(at, mask=chunk < chunks, other=0)",
                    "    tl.store(at, before + tl.cumsum(here, 0) - here, mask=chunk < chunks)",
                    "    before += tl.sum(here, 0)",
                    "tl.store(totals + expert, before)",
                ],
            ),
        ),
        (
            place,
            function(
                place,
                "Rows of all slots; expert and dead rows of each block; used is the number of blocks.",
                [
                    *_read(experts),
                    f"total = tl.load(totals + bins, mask=bins < {experts}, other=0)",
                    *_align(experts),
                    "",
                    *_rank(),
                    f"own = counts + tl.program_id(0) * {experts} + expert",
                    f"earlier = tl.load(own, mask=expert < {experts}, other=0)",
                    "row = tl.gather(starts, expert, 0) + earlier + rank",
                    f"tl.store(rows + row, slot, mask=expert < {experts})",
                ],
            ),
        ),
    ]
