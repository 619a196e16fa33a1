"""The kernels around the GEMMs: functions of whole rows, and the weighted sum of a token's slots in their order."""

from __future__ import annotations

from collections.abc import Mapping

from moec.backends.triton.kernels.dtypes import POINTERS, TL_TYPES, rounded
from moec.backends.triton.kernels.experts import LIVE, down_arguments
from moec.backends.triton.kernels.gemm import base
from moec.backends.triton.kernels.rows import RowFunction, padded
from moec.backends.triton.kernels.sort import most_blocks
from moec.backends.triton.kernels.text import Argument, Kernel, cdiv, function, indented
from moec.backends.triton.spec import Spec


def row_kernel(spec: Spec, name: str, rows: RowFunction, taken: str) -> tuple[Kernel, str]:
    """A function of whole rows, one program a row. Of sorted rows (``BLOCK_M`` is not 0) those of no slot are left."""
    captures = [Argument(f"c{i}_at", POINTERS[dtype]) for i, (dtype, _) in enumerate(rows.captures)]

    def grid(tokens: int, c: Mapping[str, int]) -> tuple[int, ...]:
        slots = tokens * spec.top_k
        return (most_blocks(slots, spec.experts, c["BLOCK_M"]) * c["BLOCK_M"] if c["BLOCK_M"] else slots,)

    kernel = Kernel(
        name,
        (Argument("source", POINTERS[taken]), *captures, *LIVE, Argument("result", POINTERS[rows.dtype])),
        ("BLOCK_M",),
        grid,
    )
    columns = f"tl.arange(0, {padded(rows.width)})"
    body = [
        "row = tl.program_id(0).to(tl.int64)",
        "if BLOCK_M > 0:",
        "    if row >= tl.load(used) * BLOCK_M:",
        "        return",
        "    if tl.load(rows + row) < 0:",
        "        return",
        f"at = source + row * {rows.takes}",
        *rows.lines,
        f"column = {columns}",
        f"at = result + row * {rows.width} + column",
        f"tl.store(at, {rows.result}.to({TL_TYPES[rows.dtype]}), mask=column < {rows.width})",
    ]
    return kernel, function(kernel, "result[row] = a function of source[row]", body)


def combine_kernels(spec: Spec) -> list[tuple[Kernel, str]]:
    """``combine``, and ``combine_parts`` for the sums of a split down GEMM."""
    given = (
        Argument("weights", POINTERS[spec.weight_dtype]),
        Argument("ids", "*i64"),
        Argument("y", POINTERS[spec.out_dtype]),
    )

    def made(kernel: Kernel, value: list[str], summary: str) -> tuple[Kernel, str]:
        inner = [
            f"slot = token * {spec.top_k} + j",
            "id = tl.load(ids + slot)",
            f"live = column < tl.where((id >= 0) & (id < {spec.experts}), {spec.width}, 0)",
            *value,
            "weight = tl.load(weights + slot).to(tl.float32)",
            f"result += tl.where(live, {rounded('total * weight', spec.product)}, 0.0)",
        ]
        body = [
            "token = tl.program_id(0)",
            "column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)",
            "result = tl.zeros((BLOCK_N,), tl.float32)",
            f"for j in range(0, {spec.top_k}):",
            *indented(inner),
            f"y_at = y + token.to(tl.int64) * {spec.width} + column",
            *([] if spec.out_dtype == "f32" else [f"result = {rounded('result', spec.out_dtype)}"]),
            f"tl.store(y_at, result.to({TL_TYPES[spec.out_dtype]}), mask=column < {spec.width})",
        ]
        return kernel, function(kernel, summary, body)

    def grid(tokens: int, c: Mapping[str, int]) -> tuple[int, ...]:
        return (tokens, cdiv(spec.width, c["BLOCK_N"]))

    o_at = f"o + slot.to(tl.int64) * {spec.width} + column"
    plain = made(
        Kernel("combine", (Argument("o", POINTERS[spec.row_dtype]), *given), ("BLOCK_N",), grid),
        [f"total = tl.load({o_at}, mask=live, other=0.0).to(tl.float32)"],
        "y[token] = sum over its slots, in order, of weight * o[slot]",
    )
    if spec.post is not None:
        return [plain]
    bias = down_arguments(spec)[len(down_arguments(spec)) - (0 if not spec.down_bias else 2 if spec.stacked else 1) :]
    value = [
        "total = tl.zeros((BLOCK_N,), tl.float32)",
        "for part in range(0, SPLIT_K):",
        f"    o_at = o + (part * slots_n + slot).to(tl.int64) * {spec.out} + column",
        "    total += tl.load(o_at, mask=live, other=0.0)",
        f"total = {rounded('total', spec.dtype)}",
    ]
    if spec.down_bias:
        there = f"expert = tl.where((id >= 0) & (id < {spec.experts}), id, 0)"
        load = f"tl.load(b_at + column, mask=column < {spec.out}, other=0.0).to(tl.float32)"
        value += [there, base(spec, "b"), f"total = {rounded(f'total + {load}', spec.dtype)}"]
    arguments = (Argument("o", "*fp32"), Argument("slots_n", "i32"), *bias, *given)
    parts = made(
        Kernel("combine_parts", arguments, ("BLOCK_N", "SPLIT_K"), grid),
        value,
        "y[token] = sum over its slots, in order, of weight * (sum of o[part, slot], in order)",
    )
    return [plain, parts]
