"""The kernels for few slots, which need no sorting: one program for a slot and a stretch of columns.

With few tokens nearly every slot has an expert of its own, and a tile of rows would be empty but for one. These read
each weight once and multiply it with one row, at the speed of memory. The down kernel adds up a token's slots itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.backends.triton.kernels.dtypes import POINTERS, TL_TYPES, rounded
from moec.backends.triton.kernels.experts import (
    activation_lines,
    down_arguments,
    row_arguments,
    row_lines,
    up_arguments,
    up_biases,
    up_products,
    up_result,
)
from moec.backends.triton.kernels.gemm import Product, base, bias_lines
from moec.backends.triton.kernels.text import Argument, Kernel, cdiv, function, indented
from moec.backends.triton.spec import Spec
from moec.ir.scaled_semantics import SCALED

_IDS = Argument("ids", "*i64")
CONSTANTS = ("BLOCK_N", "BLOCK_K")


def _sums(spec: Spec, products: Sequence[Product]) -> list[str]:
    """Statements: the products of the row at ``row_at`` with each product's outputs of the expert."""
    (inputs,) = {p.inputs for p in products}
    lines = [base(spec, name, spec.aligned) for name in dict.fromkeys(p.weight for p in products)]
    lines += [p.places() for p in products]

    def shape(p: Product) -> str:
        return f"({p.block}, BLOCK_K)" if p.nk else f"(BLOCK_K, {p.block})"

    lines += [f"{p.name} = tl.zeros({shape(p)}, tl.float32)" for p in products]
    inner = [
        "k_in = k + tl.arange(0, BLOCK_K)",
        f"r = tl.load(row_at + k_in, mask=k_in < {inputs}, other=0.0).to(tl.float32)",
    ]
    if spec.fp8:
        inner.append(f"r *= tl.load(row_scale + k // {SCALED})")
    for p in products:
        n, k = ("[:, None]", "[None, :]") if p.nk else ("[None, :]", "[:, None]")
        step_n, step_k = (f" * {p.weight}_s", "") if p.nk else ("", f" * {p.weight}_s")
        at = f"{p.weight}_at + {p.name}_n{n}{step_n} + k_in{k}{step_k}"
        there = f"(k_in < {inputs}){k}"
        value = f"load_tile({at}, {there}, {inputs} % BLOCK_K == 0).to(tl.float32) * r{k}"
        inner.append(f"{p.name} += {value}" + (f" * tl.load({p.scales()}){n}" if spec.fp8 else ""))
    lines += [f"for k in range(0, {inputs}, BLOCK_K):", *indented(inner)]
    lines += [f"{p.name} = tl.sum({p.name}, {1 if p.nk else 0})" for p in products]
    return lines


def _columns(columns: int) -> list[str]:
    return [
        "column_block = tl.program_id(1)",
        "column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)",
        f"column_in = tl.where(column < {columns}, column, 0)",
    ]


def _expert(spec: Spec) -> list[str]:
    return ["id = tl.load(ids + slot)", f"live = (id >= 0) & (id < {spec.experts})"]


def up_vector(spec: Spec) -> tuple[Kernel, str]:
    """``up_vector``: a[slot] = activation(x[token of slot] @ w[expert of slot])."""
    kernel = Kernel(
        "up_vector",
        (*up_arguments(spec), _IDS, Argument("a", POINTERS[spec.dtype])),
        CONSTANTS,
        lambda t, c: (t * spec.top_k, cdiv(spec.up, c["BLOCK_N"])),
    )
    products = up_products(spec)
    inner = [
        "expert = id",
        *row_lines(spec, "x", f"(slot // {spec.top_k})", "x_s", spec.hidden),
        *_sums(spec, products),
        *bias_lines(spec, products, up_biases(spec), ""),
        *activation_lines(spec, "", "BLOCK_N"),
        f"a_at = a + slot.to(tl.int64) * {spec.up} + column",
        f"tl.store(a_at, {up_result(spec)}.to({TL_TYPES[spec.dtype]}), mask=column < {spec.up})",
    ]
    body = ["slot = tl.program_id(0)", *_columns(spec.up), *_expert(spec), "if live:", *indented(inner)]
    return kernel, function(kernel, "a[slot] = activation(x[token of slot] @ w[expert of slot])", body)


def down_vector(spec: Spec) -> tuple[Kernel, str]:
    """``down_vector``: the result of a token, or the rows of its slots where a function of whole rows follows."""
    product = Product("total", "w", 0, 1, spec.out, spec.inner, spec.out, spec.down_nk)
    read = (*row_arguments(spec, "a"), *down_arguments(spec), _IDS)
    row = [
        "expert = id",
        *row_lines(spec, "a", "slot", str(spec.inner), spec.inner),
        *_sums(spec, (product,)),
        *bias_lines(spec, (product,), ("b",) if spec.down_bias else (), ""),
    ]
    if spec.post is not None:
        kernel = Kernel(
            "down_vector",
            (*read, Argument("o", POINTERS[spec.dtype])),
            CONSTANTS,
            lambda t, c: (t * spec.top_k, cdiv(spec.out, c["BLOCK_N"])),
        )
        row += [
            f"o_at = o + slot.to(tl.int64) * {spec.out} + column",
            f"tl.store(o_at, total.to({TL_TYPES[spec.dtype]}), mask=column < {spec.out})",
        ]
        body = ["slot = tl.program_id(0)", *_columns(spec.out), *_expert(spec), "if live:", *indented(row)]
        return kernel, function(kernel, "o[slot] = a[slot] @ w[expert of slot]", body)
    kernel = Kernel(
        "down_vector",
        (*read, Argument("weights", POINTERS[spec.weight_dtype]), Argument("y", POINTERS[spec.out_dtype])),
        CONSTANTS,
        lambda t, c: (t, cdiv(spec.out, c["BLOCK_N"])),
    )
    row += [
        "weight = tl.load(weights + slot).to(tl.float32)",
        f"result += {rounded('total * weight', spec.product)}",
    ]
    body = [
        "token = tl.program_id(0)",
        *_columns(spec.out),
        "result = tl.zeros((BLOCK_N,), tl.float32)",
        f"for j in range(0, {spec.top_k}):",
        *indented([f"slot = token * {spec.top_k} + j", *_expert(spec), "if live:", *indented(row)]),
        f"y_at = y + token.to(tl.int64) * {spec.out} + column",
        *([] if spec.out_dtype == "f32" else [f"result = {rounded('result', spec.out_dtype)}"]),
        f"tl.store(y_at, result.to({TL_TYPES[spec.out_dtype]}), mask=column < {spec.out})",
    ]
    return kernel, function(kernel, "y[token] = sum over its slots, in order, of weight * (a[slot] @ w[expert])", body)
