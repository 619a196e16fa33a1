"""The GEMM kernels of a layer on sorted rows: gather and up GEMM with the activation, down GEMM, combine.

Sums are in f32 and rounded where the traced model rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moec.backends.triton.kernels.dtypes import POINTERS, TL_TYPES, rounded
from moec.backends.triton.kernels.expression import Elementwise
from moec.backends.triton.kernels.gemm import Product, bias_lines, tile_lines
from moec.backends.triton.kernels.text import Argument, Kernel, cdiv, function, helper, indented
from moec.backends.triton.kernels.walk import tile_grid, walk
from moec.backends.triton.kernels.warm import warm_helper
from moec.backends.triton.launches.tiles import may_halve
from moec.backends.triton.spec import Spec
from moec.ir.scaled_semantics import SCALED

GEMM = ("UNITS", "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "TMA", "AHEAD")
"""Constants of a GEMM kernel: BLOCK_M rows of an expert are aligned, and a tile has up to UNITS such blocks; what the
tile AHEAD places later reads first is fetched (0: of none)."""
WHICH = (*(Argument(name, "*i32") for name in ("rows", "experts", "used")), Argument("places", "*i64"))
"""What ``sort`` made: the slot of every row, the expert of every block, the number of blocks, and the place of every
program, where tiles have several heights."""

LIVE = (Argument("rows", "*i32"), Argument("used", "*i32"))
"""What says which sorted rows there are."""


def weight_arguments(spec: Spec, name: str) -> tuple[Argument, ...]:
    """A weight and its strides in elements: between experts, and between rows in memory."""
    if not spec.stacked:
        return (Argument(name, "*i64"), Argument(f"{name}_s", "i64"))
    scale = (Argument(f"{name}_scale", "*fp32"),) if spec.fp8 else ()
    strides = (Argument(f"{name}_se", "i64"), Argument(f"{name}_s", "i64"))
    return (Argument(name, POINTERS[spec.element]), *strides, *scale)


def row_arguments(spec: Spec, name: str) -> tuple[Argument, ...]:
    """The rows that a GEMM multiplies."""
    scale = (Argument(f"{name}_scale", "*fp32"),) if spec.fp8 else ()
    return (Argument(name, POINTERS[spec.element]), *scale)


def row_lines(spec: Spec, name: str, row: str, stride: str, width: int) -> list[str]:
    """Statements: where rows begin, and their scales."""
    lines = [f"row_at = {name} + {row}.to(tl.int64) * {stride}"]
    if spec.fp8:
        lines.append(f"row_scale = {name}_scale + {row}.to(tl.int64) * {cdiv(width, SCALED)}")
    return lines


def bias_arguments(spec: Spec, name: str) -> tuple[Argument, ...]:
    """A bias and its stride in elements between experts."""
    if not spec.stacked:
        return (Argument(name, "*i64"),)
    return (Argument(name, POINTERS[spec.dtype]), Argument(f"{name}_se", "i64"))


def up_weights(spec: Spec) -> tuple[str, ...]:
    """What the up weights are called; gate and up where they are apart."""
    return ("w_gate", "w_up") if spec.layout == "separate" else ("w",)


def up_biases(spec: Spec) -> tuple[str, ...]:
    """What the biases of the up GEMM are called."""
    return tuple(f"b{name[1:]}" for name in up_weights(spec)) if spec.up_bias else ()


def up_arguments(spec: Spec) -> tuple[Argument, ...]:
    """Rows, weights, biases and captures of the up kernels."""
    found = [*row_arguments(spec, "x"), Argument("x_s", "i64")]
    for name in up_weights(spec):
        found += weight_arguments(spec, name)
    for name in up_biases(spec):
        found += bias_arguments(spec, name)
    if isinstance(spec.activation, Elementwise):
        found += [Argument(f"c{i}_at", POINTERS[dtype]) for i, (dtype, _) in enumerate(spec.activation.captures)]
    return tuple(found)


def down_arguments(spec: Spec) -> tuple[Argument, ...]:
    """Weight and bias of the down kernels."""
    bias = bias_arguments(spec, "b") if spec.down_bias else ()
    return (*weight_arguments(spec, "w"), *bias)


def up_products(spec: Spec) -> tuple[Product, ...]:
    """The products of a tile of the up GEMM."""
    outputs = spec.up * (2 if spec.layout in ("concat", "interleaved") else 1)

    def product(name: str, weight: str, first: int = 0, wide: int = 1) -> Product:
        return Product(name, weight, first, wide, outputs, spec.hidden, spec.up * wide, spec.up_nk)

    if spec.layout == "concat":
        return (product("g", "w"), product("u", "w", spec.inner))
    if spec.layout == "separate":
        return (product("g", "w_gate"), product("u", "w_up"))
    return (product("h", "w", 0, 2),) if spec.layout == "interleaved" else (product("g", "w"),)


def activation_lines(spec: Spec, shape: str, columns: str) -> list[str]:
    """Statements from the products to the activation's result. ``shape`` is that of a product, ``columns`` its last."""
    lines: list[str] = []
    if spec.layout == "interleaved":
        lines.append(f"g, u = tl.split(tl.reshape(h, ({shape}{columns}, 2)))")
    if isinstance(spec.activation, Elementwise):
        across = "[None, :]" if shape else ""
        for i, (_, wide) in enumerate(spec.activation.captures):
            at = f"tl.load(c{i}_at + column_in).to(tl.float32){across}" if wide else f"tl.load(c{i}_at).to(tl.float32)"
            lines.append(f"c{i} = {at}")
        lines += spec.activation.lines
    return lines


def up_result(spec: Spec) -> str:
    """The name of what an up kernel stores."""
    return spec.activation.result if isinstance(spec.activation, Elementwise) else "g"


TILE = ("UNITS", "BLOCK_M", "BLOCK_N", "BLOCK_K", "TMA")
"""Constants of a tile; its UNITS are its own."""


def _columns(columns: int) -> list[str]:
    """Statements: the columns of a tile, and those that are read where there are none."""
    return [
        "column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)",
        f"column_in = tl.where(column < {columns}, column, 0)",
    ]


def _gemm(
    spec: Spec,
    kernel: Kernel,
    summary: str,
    products: tuple[Product, ...],
    columns: int,
    row_at: Sequence[str],
    end: Sequence[str],
) -> tuple[Kernel, str]:
    """A GEMM kernel: the walk over tiles, the sums of a tile, and what becomes of them.

    Args:
        spec: The layer.
        kernel: Its name, arguments and constants.
        summary: What it computes.
        products: What is summed.
        columns: Of the result.
        row_at: Statements: where rows begin.
        end: Statements: from the sums of some rows to what is stored.
    """
    name = kernel.name
    weights = tuple(dict.fromkeys(p.weight for p in products)) if spec.stacked else ()
    which = ("experts", "used", "places")
    given = [a.name for a in kernel.arguments if a.name not in which] + [f"{w}_d" for w in weights]
    extra = [c for c in kernel.constants if c not in (*TILE, "GROUP_M", "AHEAD")]
    sums = [p.name for p in products]
    ending = [*given, *sums, "expert", "first", "column_block"]
    finish = helper(
        f"{name}_end", ending, ("ROWS", "BLOCK_N", *extra), "Sums of ROWS rows from ``first`` to what is stored.",
        ["row = first + tl.arange(0, ROWS)", "slot = tl.load(rows + row)", "live = slot >= 0", *_columns(columns),
         *(p.places() for p in products), *end],
    )  # fmt: skip
    more = [f"{s}_more" for s in sums]
    told = ", ".join(given)
    constants = "".join(f", {c}" for c in extra)

    def finished(names: Sequence[str], begin: str, size: str) -> list[str]:
        at = f"expert, first{begin}"
        if "SPLIT_K" not in extra:
            return [f"{name}_end({told}, {', '.join(names)}, {at}, column_block, {size}, BLOCK_N{constants})"]
        # Sums in f32 leave in two halves of their columns: all of a tall tile at once take too many registers.
        (total,) = names
        return [f"left, right = halves({total}, {size}, BLOCK_N)"] + [
            f"{name}_end({told}, {half}, {at}, column_block * 2 + {i}, {size}, BLOCK_N // 2{constants})"
            for i, half in enumerate(("left", "right"))
        ]

    tile = helper(
        f"{name}_tile", [*given, "expert", "first", "column_block"], (*TILE, *extra),
        "UNITS blocks of rows from ``first``, all of one expert, times a stretch of columns.",
        [
            "ROWS: tl.constexpr = BLOCK_M * (1 + (UNITS > 1) * (BLOCK_M <= 64)) // (1 + (BLOCK_M > 128))",
            "MORE: tl.constexpr = UNITS * BLOCK_M - ROWS",
            *_columns(columns),
            *tile_lines(spec, products, row_at, name == "up", "SPLIT_K" in extra),
            *finished(sums, "", "ROWS"),
            "if MORE:",
            *indented(finished(more, " + ROWS", "MORE")),
        ],
    )  # fmt: skip
    warm = warm_helper(spec, name, given, products, "" if name == "up" else "a", "SPLIT_K" in extra)
    body = walk(name, columns, given, [*TILE[1:], *extra], _descriptors(spec, products))
    return kernel, "\n\n".join([finish, tile, warm, function(kernel, summary, body)])


def up_kernel(spec: Spec) -> tuple[Kernel, str]:
    """``up``: a[row] = activation(x[token of row] @ w[expert of row])."""
    kernel = Kernel(
        "up", (*up_arguments(spec), *WHICH, Argument("a", POINTERS[spec.dtype])), GEMM, tile_grid(spec, spec.up)
    )
    products = up_products(spec)
    # Rows lie one after another; offsets within a tile are of 32 bits, for addresses of 64 take registers of every sum.
    end = [
        *bias_lines(spec, products, up_biases(spec), "[None, :]"),
        *activation_lines(spec, "ROWS, ", "BLOCK_N"),
        f"a_at = a + tl.cast(first, tl.int64) * {spec.up} + column_block * BLOCK_N",
        f"within = tl.arange(0, ROWS)[:, None] * {spec.up} + tl.arange(0, BLOCK_N)[None, :]",
        f"inside = live[:, None] & (column < {spec.up})[None, :]",
        f"value = {up_result(spec)}.to({TL_TYPES[spec.dtype]})",
        f"store_rows(a_at + within, value, live[:, None], inside, {spec.up} % BLOCK_N == 0)",
    ]
    row_at = row_lines(spec, "x", f"(slot // {spec.top_k})", "x_s", spec.hidden)
    return _gemm(
        spec, kernel, "a[row] = activation(x[token of row] @ w[expert of row])", products, spec.up, row_at, end
    )


def _descriptors(spec: Spec, products: tuple[Product, ...]) -> list[str]:
    """Statements: tensor descriptors of the weights, where they are wanted."""
    if not spec.stacked:
        return ['tl.static_assert(not TMA, "weights that lie apart have no descriptor")']
    found = {p.weight: p.descriptor(spec.experts) for p in products}
    wanted = [f"{name}_d = {text}" for name, text in found.items()]
    return ["if TMA:", *indented(wanted), "else:", *(f"    {name}_d = {name}" for name in found)]


def down_kernels(spec: Spec) -> list[tuple[Kernel, str]]:
    """``down`` writes a row for each slot, ``down_parts`` sums of split inputs; ``down_atomic`` adds to the result.

    ``down_halves`` is ``down`` with tiles that have columns of both halves of the result.
    """
    whole = (Product("total", "w", 0, 1, spec.out, spec.inner, spec.out, spec.down_nk),)
    half = spec.out // 2
    halves = tuple(
        replace(whole[0], name=name, first=i * half, columns=half) for i, name in enumerate(("left", "right"))
    )
    read = (*row_arguments(spec, "a"), *down_arguments(spec))
    row_at = row_lines(spec, "a", "row", str(spec.inner), spec.inner)

    def bias(products: tuple[Product, ...]) -> list[str]:
        return bias_lines(spec, products, ("b",) if spec.down_bias else (), "[None, :]")

    def at(result: str, row: str, first: int = 0) -> str:
        begin = f"{result} + {row}.to(tl.int64) * {spec.out} + column_block * BLOCK_N"
        return f"({begin}{f' + {first}' if first else ''})[:, None] + tl.arange(0, BLOCK_N)[None, :]"

    def stored(row: str, value: str, p: Product) -> str:
        return f"store_rows({at('o', row, p.first)}, {value}, live[:, None], inside, {p.columns} % BLOCK_N == 0)"

    def made(
        name: str,
        products: tuple[Product, ...],
        extra: tuple[Argument, ...],
        constants: tuple[str, ...],
        summary: str,
        end: Sequence[str],
        begin: Sequence[str] = (),
    ) -> tuple[Kernel, str]:
        columns = products[0].columns
        kernel = Kernel(name, (*read, *WHICH, *extra), (*GEMM, *constants), tile_grid(spec, columns))
        inside = f"inside = live[:, None] & (column < {columns})[None, :]"
        return _gemm(spec, kernel, summary, products, columns, row_at, [*begin, inside, *end])

    def plain(name: str, products: tuple[Product, ...]) -> tuple[Kernel, str]:
        end = [stored("slot", f"{p.name}.to({TL_TYPES[spec.dtype]})", p) for p in products]
        about = "o[slot of row] = a[row] @ w[expert of row]"
        return made(name, products, (Argument("o", POINTERS[spec.dtype]),), (), about, end, bias(products))

    parts = made(
        "down_parts",
        whole,
        (Argument("o", "*fp32"), Argument("slots_n", "i32")),
        ("SPLIT_K",),
        "o[part, slot of row] = a[row, inputs of the part] @ w[expert of row]",
        ["place = tl.program_id(1) * slots_n + slot", stored("place", "total", whole[0])],
    )
    weight = "tl.load(weights + slot, mask=live, other=0.0).to(tl.float32)[:, None]"
    atomic = made(
        "down_atomic",
        whole,
        (Argument("weights", POINTERS[spec.weight_dtype]), Argument("y", "*fp32")),
        (),
        "y[token of row] += weight of slot * (a[row] @ w[expert of row]), in no fixed order",
        [
            f"total = {rounded(f'total * {weight}', spec.product)}",
            f"token = slot // {spec.top_k}",
            f'tl.atomic_add({at("y", "token")}, total, mask=inside, sem="relaxed")',
        ],
        bias(whole) or [f"total = {rounded('total', spec.dtype)}"],
    )
    made_halves = [plain("down_halves", halves)] if may_halve(spec.element, spec.out) else []
    return [plain("down", whole), *made_halves, parts, atomic]
