"""The kernels that bring rows to f8e4m3fn: values, and a scale to multiply them with for 128 columns of a row."""

from __future__ import annotations

from collections.abc import Mapping

from moec.backends.triton.kernels.dtypes import POINTERS
from moec.backends.triton.kernels.sort import most_blocks
from moec.backends.triton.kernels.text import Argument, Kernel, cdiv, function
from moec.backends.triton.spec import Spec
from moec.ir.scaled_semantics import LARGEST, SCALED

ROWS = 16
"""Rows of a program."""
HELPER = '''\
@triton.jit
def to_fp8(x):
    """f32 between -448 and 448, rounded to f8e4m3fn."""
    return x.to(tl.float8e4nv)
'''
HELPER_INTERPRETED = '''\
@triton.jit
def to_fp8(x):
    """f32 between -448 and 448, rounded to f8e4m3fn. Triton's interpreter loses carries, so no bit is left to round."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
    few = (x + 24576.0) - 24576.0  # below 2^-6 numbers are multiples of 2^-9
    return tl.where(tl.abs(x) < 0.015625, few, bits.to(tl.float32, bitcast=True)).to(tl.float8e4nv)
'''


def quantize_kernels(spec: Spec) -> list[tuple[Kernel, str]]:
    """``quantize_x`` for the tokens' rows, ``quantize_a`` for those between the GEMMs."""

    def made(name: str, width: int, sorted_rows: bool) -> tuple[Kernel, str]:
        def grid(tokens: int, c: Mapping[str, int]) -> tuple[int, ...]:
            rows = tokens * spec.top_k if sorted_rows else tokens
            if sorted_rows and c["BLOCK_M"]:
                rows = most_blocks(rows, spec.experts, c["BLOCK_M"]) * c["BLOCK_M"]
            return (cdiv(rows, ROWS), cdiv(width, SCALED))

        kernel = Kernel(
            name,
            (
                Argument("source", POINTERS[spec.dtype]),
                Argument("source_s", "i64"),
                Argument("rows_n", "i32"),
                *((Argument("used", "*i32"),) if sorted_rows else ()),
                Argument("values", POINTERS["f8e4m3fn"]),
                Argument("scales", "*fp32"),
            ),
            ("BLOCK_M",),
            grid,
        )
        body = [
            f"row = tl.program_id(0) * {ROWS} + tl.arange(0, {ROWS})",
            f"column = tl.program_id(1) * {SCALED} + tl.arange(0, {SCALED})",
            *(["if BLOCK_M > 0:", "    rows_n = tl.load(used) * BLOCK_M"] if sorted_rows else []),
            f"there = (row < rows_n)[:, None] & (column < {width})[None, :]",
            "at = source + row.to(tl.int64)[:, None] * source_s + column[None, :]",
            "x = tl.load(at, mask=there, other=0.0).to(tl.float32)",
            "largest = tl.max(tl.abs(x), 1)",
            f"scale = tl.where(largest > 0.0, largest / {LARGEST}, 1.0)",
            f"x = tl.minimum(tl.maximum(x / scale[:, None], -{LARGEST}), {LARGEST})",
            f"at = values + row.to(tl.int64)[:, None] * {width} + column[None, :]",
            "tl.store(at, to_fp8(x), mask=there)",
            f"at = scales + row.to(tl.int64) * {cdiv(width, SCALED)} + tl.program_id(1)",
            "tl.store(at, scale, mask=row < rows_n)",
        ]
        return kernel, function(kernel, f"values * scales = source, rows of {width}", body)

    return [made("quantize_x", spec.hidden, False), made("quantize_a", spec.inner, True)]
