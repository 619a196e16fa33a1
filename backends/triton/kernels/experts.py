"""The GEMM kernels of a layer on sorted rows: gather and up GEMM with the activation, down GEMM, combine.

Each GEMM kernel walks over tiles from its program's number in steps of the number of programs: launched with one
program a tile it makes one step at most, launched with as many as the device holds it is persistent. Tiles are ordered
so that ``GROUP_M`` row blocks share a stretch of weight columns in the L2 cache. Sums are in f32 and rounded where the
traced model rounds.
"""

from __future__ import annotations

from collections.abc import Mapping

from moec.backends.triton.kernels.dtypes import POINTERS, TL_TYPES, rounded
from moec.backends.triton.kernels.expression import Elementwise
from moec.backends.triton.kernels.gemm import Product, bias_lines, tile_lines
from moec.backends.triton.kernels.sort import most_blocks
from moec.backends.triton.kernels.text import Argument, Grid, Kernel, cdiv, function, indented
from moec.backends.triton.spec import Spec
from moec.ir.scaled_semantics import SCALED

GEMM = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "TMA")
"""Constants of a GEMM kernel."""
WHICH = (Argument("rows", "*i32"), Argument("experts", "*i32"), Argument("used", "*i32"))
"""What ``sort`` made: the slot of every row, the expert of every block, the number of blocks."""


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
        return Product(name, weight, first, wide, outputs, spec.hidden, spec.up_nk)

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


def _tiles(columns: int) -> list[str]:
    return [
        "blocks = tl.load(used)",
        f"columns: tl.constexpr = ({columns} + BLOCK_N - 1) // BLOCK_N",
        "for tile in range(tl.program_id(0), blocks * columns, tl.num_programs(0)):",
    ]


def _tile(columns: int) -> list[str]:
    return [
        "block, column_block = tile_at(tile, blocks, columns, GROUP_M)",
        "expert = tl.load(experts + block)",
        "row = block * BLOCK_M + tl.arange(0, BLOCK_M)",
        "slot = tl.load(rows + row)",
        "live = slot >= 0",
        "column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)",
        f"column_in = tl.where(column < {columns}, column, 0)",
    ]


def _tile_grid(spec: Spec, columns: int) -> Grid:
    def grid(tokens: int, c: Mapping[str, int]) -> tuple[int, ...]:
        tiles = most_blocks(tokens * spec.top_k, spec.experts, c["BLOCK_M"]) * cdiv(columns, c["BLOCK_N"])
        programs = c.get("PROGRAMS", 0)
        return (min(tiles, programs) if programs else tiles, *([c["SPLIT_K"]] if "SPLIT_K" in c else []))

    return grid


def up_kernel(spec: Spec) -> tuple[Kernel, str]:
    """``up``: a[row] = activation(x[token of row] @ w[expert of row])."""
    kernel = Kernel(
        "up", (*up_arguments(spec), *WHICH, Argument("a", POINTERS[spec.dtype])), GEMM, _tile_grid(spec, spec.up)
    )
    products = up_products(spec)
    body = [
        *_tile(spec.up),
        *row_lines(spec, "x", f"(slot // {spec.top_k})", "x_s", spec.hidden),
        *tile_lines(spec, products),
        *bias_lines(spec, products, up_biases(spec), "[None, :]"),
        *activation_lines(spec, "BLOCK_M, ", "BLOCK_N"),
        f"a_at = a + row.to(tl.int64)[:, None] * {spec.up} + column[None, :]",
        f"inside = live[:, None] & (column < {spec.up})[None, :]",
        f"tl.store(a_at, {up_result(spec)}.to({TL_TYPES[spec.dtype]}), mask=inside)",
    ]
    summary = "a[row] = activation(x[token of row] @ w[expert of row])"
    return kernel, function(kernel, summary, [*_descriptors(spec, products), *_tiles(spec.up), *indented(body)])


def _descriptors(spec: Spec, products: tuple[Product, ...]) -> list[str]:
    """Statements: tensor descriptors of the weights, where they are wanted."""
    if not spec.stacked:
        return ['tl.static_assert(not TMA, "weights that lie apart have no descriptor")']
    found = {p.weight: p.descriptor(spec.experts) for p in products}
    return ["if TMA:", *indented([f"{name}_d = {text}" for name, text in found.items()])]


def down_kernels(spec: Spec) -> list[tuple[Kernel, str]]:
    """``down`` writes a row for each slot, ``down_parts`` sums of split inputs; ``down_atomic`` adds to the result."""
    product = Product("total", "w", 0, 1, spec.out, spec.inner, spec.down_nk)
    read = (*row_arguments(spec, "a"), *down_arguments(spec))
    biases = ("b",) if spec.down_bias else ()
    start = [*_tile(spec.out), *row_lines(spec, "a", "row", str(spec.inner), spec.inner)]
    bias = bias_lines(spec, (product,), biases, "[None, :]")
    inside = f"inside = live[:, None] & (column < {spec.out})[None, :]"
    at = f"{{}} + {{}}.to(tl.int64)[:, None] * {spec.out} + column[None, :]"
    grid = _tile_grid(spec, spec.out)

    def made(
        name: str, extra: tuple[Argument, ...], constants: tuple[str, ...], summary: str, body: list[str]
    ) -> tuple[Kernel, str]:
        kernel = Kernel(name, (*read, *WHICH, *extra), (*GEMM, *constants), grid)
        lines = [*_descriptors(spec, (product,)), *_tiles(spec.out), *indented(body)]
        return kernel, function(kernel, summary, lines)

    plain = made(
        "down",
        (Argument("o", POINTERS[spec.dtype]),),
        (),
        "o[slot of row] = a[row] @ w[expert of row]",
        [
            *start,
            *tile_lines(spec, (product,)),
            *bias,
            inside,
            f"tl.store({at.format('o', 'slot')}, total.to({TL_TYPES[spec.dtype]}), mask=inside)",
        ],
    )
    parts = made(
        "down_parts",
        (Argument("o", "*fp32"), Argument("slots_n", "i32")),
        ("SPLIT_K",),
        "o[part, slot of row] = a[row, inputs of the part] @ w[expert of row]",
        [
            *start,
            *tile_lines(spec, (product,), split=True),
            inside,
            "place = tl.program_id(1) * slots_n + slot",
            f"tl.store({at.format('o', 'place')}, total, mask=inside)",
        ],
    )
    weight = "tl.load(weights + slot, mask=live, other=0.0).to(tl.float32)[:, None]"
    atomic = made(
        "down_atomic",
        (Argument("weights", POINTERS[spec.weight_dtype]), Argument("y", "*fp32")),
        (),
        "y[token of row] += weight of slot * (a[row] @ w[expert of row]), in no fixed order",
        [
            *start,
            *tile_lines(spec, (product,)),
            *(bias or [f"total = {rounded('total', spec.dtype)}"]),
            f"total = {rounded(f'total * {weight}', spec.product)}",
            inside,
            f"token = slot // {spec.top_k}",
            f'tl.atomic_add({at.format("y", "token")}, total, mask=inside, sem="relaxed")',
        ],
    )
    return [plain, parts, atomic]
