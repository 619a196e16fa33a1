"""The two GEMM kernels of the backward: sorted rows times an expert's matrix, and sums over an expert's rows."""

from __future__ import annotations

from collections.abc import Mapping

from moec.backends.triton.kernels.dtypes import POINTERS, TL_TYPES, rounded
from moec.backends.triton.kernels.gemm import DOT, DOT_INTERPRETED, HELPERS, address
from moec.backends.triton.kernels.source import kernel_file
from moec.backends.triton.kernels.text import Argument, Kernel, KernelFile, cdiv, function, indented

CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")


def _product_grid(tokens: int, c: Mapping[str, int]) -> tuple[int, ...]:
    return (c["BLOCKS"] * cdiv(c["OUTPUTS"], c["BLOCK_N"]),)


def _sums_grid(tokens: int, c: Mapping[str, int]) -> tuple[int, ...]:
    return (c["EXPERTS"] * cdiv(c["OUTPUTS"], c["BLOCK_M"]) * cdiv(c["INPUTS"], c["BLOCK_N"]),)


def write_gradients(dtype: str, stacked: bool, interpreted: bool = False, aligned: bool = True) -> KernelFile:
    """``rows_product`` and ``rows_sums`` for matrices of any size and strides.

    Args:
        dtype: Element type of rows and matrices.
        stacked: One tensor holds the matrices of all experts; else there is a table of addresses.
        interpreted: For Triton's interpreter.
        aligned: The addresses of a table are multiples of 16.
    """
    parts = [_rows_product(dtype, stacked, aligned), _rows_sums(dtype)]
    dot = DOT_INTERPRETED if interpreted else DOT
    return kernel_file(f"Gradients of a MoE layer in {dtype}", parts, f"{HELPERS}\n\n{dot}", interpreted)


def _rows_product(dtype: str, stacked: bool, aligned: bool) -> tuple[Kernel, str]:
    weight = (Argument("w", POINTERS[dtype] if stacked else "*i64"), Argument("w_se", "i64"))
    at = "w + expert.to(tl.int64) * w_se" if stacked else address("w", dtype, aligned)
    kernel = Kernel(
        "rows_product",
        (
            Argument("a", POINTERS[dtype]),
            *weight,
            Argument("w_sn", "i64"),
            Argument("w_sk", "i64"),
            Argument("experts", "*i32"),
            Argument("used", "*i32"),
            Argument("o", POINTERS[dtype]),
            Argument("inputs", "i32"),
            Argument("outputs", "i32"),
        ),
        CONSTANTS,
        _product_grid,
    )
    inner = [
        "expert = tl.load(experts + block)",
        f"w_at = {at}",
        "row = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)",
        "column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)",
        "total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)",
        "for k in range(0, inputs, BLOCK_K):",
        "    k_in = k + tl.arange(0, BLOCK_K)",
        "    r = tl.load(a + row[:, None] * inputs + k_in[None, :], mask=(k_in < inputs)[None, :], other=0.0)",
        "    there = (k_in < inputs)[:, None] & (column < outputs)[None, :]",
        "    t = tl.load(w_at + k_in[:, None] * w_sk + column[None, :] * w_sn, mask=there, other=0.0)",
        "    total = dot(r, t, total)",
        *([] if dtype == "f32" else [f"total = {rounded('total', dtype)}"]),
        "inside = (row >= 0)[:, None] & (column < outputs)[None, :]",
        f"tl.store(o + row[:, None] * outputs + column[None, :], total.to({TL_TYPES[dtype]}), mask=inside)",
    ]
    body = [
        "columns = tl.cdiv(outputs, BLOCK_N)",
        "block = tl.program_id(0) // columns",
        "column_block = tl.program_id(0) % columns",
        "if block < tl.load(used):",
        *indented(inner),
    ]
    return kernel, function(kernel, "o[row] = a[row] @ w[expert of row]; w[k, n] lies at k * w_sk + n * w_sn", body)


def _rows_sums(dtype: str) -> tuple[Kernel, str]:
    kernel = Kernel(
        "rows_sums",
        (
            Argument("d", POINTERS[dtype]),
            Argument("r", POINTERS[dtype]),
            Argument("rows", "*i32"),
            Argument("firsts", "*i32"),
            Argument("lasts", "*i32"),
            Argument("o", POINTERS[dtype]),
            Argument("o_sn", "i64"),
            Argument("o_sk", "i64"),
            Argument("inputs", "i32"),
            Argument("outputs", "i32"),
        ),
        CONSTANTS,
        _sums_grid,
    )
    body = [
        "n_blocks = tl.cdiv(outputs, BLOCK_M)",
        "k_blocks = tl.cdiv(inputs, BLOCK_N)",
        "expert = tl.program_id(0) // (n_blocks * k_blocks)",
        "within = tl.program_id(0) % (n_blocks * k_blocks)",
        "n = within // k_blocks * BLOCK_M + tl.arange(0, BLOCK_M)",
        "k = within % k_blocks * BLOCK_N + tl.arange(0, BLOCK_N)",
        "total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)",
        "last = tl.load(lasts + expert)",
        "for start in range(tl.load(firsts + expert), last, BLOCK_K):",
        "    row = start + tl.arange(0, BLOCK_K)",
        "    live = tl.load(rows + row, mask=row < last, other=-1) >= 0",
        "    at = row.to(tl.int64)[:, None]",
        "    d_t = tl.load(d + at * outputs + n[None, :], mask=live[:, None] & (n < outputs)[None, :], other=0.0)",
        "    r_t = tl.load(r + at * inputs + k[None, :], mask=live[:, None] & (k < inputs)[None, :], other=0.0)",
        "    total = dot(tl.trans(d_t), r_t, total)",
        *([] if dtype == "f32" else [f"total = {rounded('total', dtype)}"]),
        "at = expert.to(tl.int64) * outputs * inputs + n[:, None] * o_sn + k[None, :] * o_sk",
        "inside = (n < outputs)[:, None] & (k < inputs)[None, :]",
        f"tl.store(o + at, total.to({TL_TYPES[dtype]}), mask=inside)",
    ]
    return kernel, function(kernel, "o[expert, n, k] = sum over its live rows of d[row, n] * r[row, k]", body)
