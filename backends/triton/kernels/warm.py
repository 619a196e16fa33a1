"""Bringing what a later tile reads first to the last cache, while this one is multiplied.

Where a block fills a multiprocessor nothing hides the first loads of a tile, which wait for memory. The multiprocessors
take tiles one after another: when a program begins, the tile that follows on one of them is ``AHEAD`` places later. A
program has the lines of that tile's first step fetched, so that its first loads meet them in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.backends.triton.kernels.gemm import Product, base
from moec.backends.triton.kernels.text import helper
from moec.backends.triton.launches.usage import ITEM_BYTES
from moec.backends.triton.spec import Spec

LINE_BYTES = 128
"""Of the last cache."""
HELPER = '''\
@triton.jit
def fetch(at):
    """Have the lines of these addresses brought to the last cache."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)
'''
HELPER_INTERPRETED = '''\
@triton.jit
def fetch(at):
    """Have the lines of these addresses brought to the last cache, which Triton's interpreter does not have."""
'''


def warm_helper(
    spec: Spec, name: str, given: Sequence[str], products: Sequence[Product], rows: str, split: bool
) -> str:
    """The text of ``{name}_warm``: fetches what the tile at ``place`` reads in its first step.

    Args:
        spec: The layer.
        name: Of the kernel.
        given: Arguments of its functions.
        products: What is summed.
        rows: What holds its rows one after another; empty where they are gathered.
        split: program_id(1) begins with as many steps.
    """
    (inputs,) = {p.inputs for p in products}
    begin = "tl.program_id(1) * BLOCK_K + " if split else ""
    lines = [
        "expert = expert_of(place)",
        "column_block = column_of(place)",
        *(base(spec, weight) for weight in dict.fromkeys(p.weight for p in products)),
        *(f"fetch({_lines(spec, p, begin)})" for p in products),
    ]
    if rows:
        # Rows lie next to each other; a tile may have fewer than so many.
        lines += [
            "ROWS: tl.constexpr = BLOCK_M * (4 if UNITS > 2 else UNITS)",
            "row = tl.minimum(tl.arange(0, ROWS), units_of(place) * BLOCK_M - 1) + first_of(place) * BLOCK_M",
            f"row_at = {rows} + row.to(tl.int64) * {inputs}",
            f"fetch(row_at[:, None] + {_along(spec, 'BLOCK_K', inputs, begin)}[None, :])",
        ]
    constants = ("UNITS", "BLOCK_M", "BLOCK_N", "BLOCK_K")
    about = f"Fetch the first {'inputs' if rows else 'weights'} of the tile at ``place``."
    return helper(f"{name}_warm", [*given, "place"], constants, about, lines)


def _along(spec: Spec, block: str, size: int, first: str = "") -> str:
    """The first element of every line of a stretch of ``block`` elements, none past ``size``."""
    item = ITEM_BYTES[spec.element]
    lines = f"tl.arange(0, (({block}) * {item} + {LINE_BYTES - 1}) // {LINE_BYTES}) * {LINE_BYTES // item}"
    return f"(({first}{lines}) % {size})"


def _lines(spec: Spec, p: Product, begin: str) -> str:
    """An address in each line of a product's first tile of weights; its inputs start with ``begin``."""
    first = f"column_block * ({p.block}) + "
    shift = f" + {p.first}" if p.first else ""
    if p.nk:
        outputs = f"(({first}tl.arange(0, {p.block})) % {p.columns}{shift})"
        return (
            f"{p.weight}_at + {outputs}[None, :] * {p.weight}_s + {_along(spec, 'BLOCK_K', p.inputs, begin)}[:, None]"
        )
    outputs = f"({_along(spec, p.block, p.columns, first)}{shift})"
    inputs = f"(({begin}tl.arange(0, BLOCK_K)) % {p.inputs})"
    return f"{p.weight}_at + {outputs}[None, :] + {inputs}[:, None] * {p.weight}_s"
