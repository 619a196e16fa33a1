"""Statements of a GEMM tile: rows at ``row_at`` times tiles of weights, summed over K in f32."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moec.backends.triton.kernels.dtypes import TL_TYPES, rounded
from moec.backends.triton.kernels.text import indented
from moec.backends.triton.spec import ALIGNED, Spec
from moec.ir.scaled_semantics import SCALED

HELPERS = '''\
@triton.jit
def tile_at(tile, blocks, columns, GROUP_M: tl.constexpr):
    """Row block and column of a tile: GROUP_M row blocks go through all columns before the next ones begin."""
    group = tile // (GROUP_M * columns)
    first = group * GROUP_M
    size = tl.minimum(blocks - first, GROUP_M)
    within = tile - first * columns
    return first + within % size, within // size


@triton.jit
def halves(sums, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def load_tile(at, inside, WHOLE: tl.constexpr):
    """A tile of a weight; what is not inside is 0."""
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def load_rows(at, live, inside, WHOLE: tl.constexpr):
    """A tile of rows; what is not inside, and rows that are not live, is 0."""
    if WHOLE:
        return tl.load(at, mask=live, other=0.0)
    return tl.load(at, mask=live & inside, other=0.0)


@triton.jit
def store_rows(at, value, live, inside, WHOLE: tl.constexpr):
    """Store the rows of a tile that are live, and what of them is inside."""
    if WHOLE:
        tl.store(at, value, mask=live)
    else:
        tl.store(at, value, mask=inside)
'''
SCALES = '''\
@triton.jit
def load_scale(at, each, first, ONE: tl.constexpr):
    """Scales of a tile's outputs, of each or of all."""
    if ONE:
        scale = tl.load(at + first)
    else:
        scale = tl.load(at + each)[None, :]
    return scale
'''
DOT = '''\
@triton.jit
def dot(a, b, acc):
    """acc + a @ b in f32."""
    return tl.dot(a, b, acc, input_precision="ieee")
'''
DOT_INTERPRETED = '''\
@triton.jit
def dot(a, b, acc):
    """acc + a @ b in f32. Triton's interpreter multiplies no bf16, but its products are exact in f32."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
'''


@dataclass(frozen=True)
class Product:
    """One product of a tile: the rows times a stretch of a weight's outputs.

    Attributes:
        name: What its sum is called.
        weight: What the weight is called.
        first: The first output of the weight that belongs to it.
        wide: Outputs for each column of the tile, next to each other (2 where gate and up are interleaved).
        outputs, inputs: Of the weight.
        columns: Outputs that belong to it.
        nk: Rows of the weight in memory are outputs.
    """

    name: str
    weight: str
    first: int
    wide: int
    outputs: int
    inputs: int
    columns: int
    nk: bool

    @property
    def block(self) -> str:
        """Outputs of a tile."""
        return "BLOCK_N" if self.wide == 1 else f"{self.wide} * BLOCK_N"

    @property
    def outputs_at(self) -> str:
        """The name of the tile's outputs."""
        return f"{self.name}_n"

    def places(self) -> str:
        """Statement: the outputs of the tile. Those past the end read others, and are not stored.

        Where outputs lie one after another they go on from the first: Triton sees that a remainder leaves neighbours
        together, and loads them at once. After a choice it would load each with an address of its own.
        """
        if self.wide == 1:
            column = "column_in" if self.nk else f"column % {self.columns}"
            return f"{self.name}_n = {column} + {self.first}" if self.first else f"{self.name}_n = {column}"
        at = f"column_block * ({self.block}) + tl.arange(0, {self.block})"
        if not self.nk:
            return f"{self.name}_n = ({at}) % {self.outputs}"
        return f"{self.name}_n = tl.where({at} < {self.outputs}, {at}, 0)"

    def pointers(self) -> str:
        """Where a tile ``[BLOCK_K, outputs]`` lies at inputs ``k_in``."""
        if self.nk:
            return f"{self.weight}_at + {self.name}_n[None, :] * {self.weight}_s + k_in[:, None]"
        return f"{self.weight}_at + {self.name}_n[None, :] + k_in[:, None] * {self.weight}_s"

    def descriptor(self, experts: int) -> str:
        """A tensor descriptor of the whole weight, its blocks tiles of one expert."""
        shape, block = f"{self.outputs}, {self.inputs}", f"{self.block}, BLOCK_K"
        if not self.nk:
            shape, block = f"{self.inputs}, {self.outputs}", f"BLOCK_K, {self.block}"
        return (
            f"tl.make_tensor_descriptor({self.weight}, shape=[{experts}, {shape}], "
            f"strides=[{self.weight}_se, {self.weight}_s, 1], block_shape=[1, {block}])"
        )

    def scales(self) -> str:
        """Where the scales of the tile's outputs lie at inputs ``k``."""
        blocks = -(-self.outputs // SCALED), -(-self.inputs // SCALED)
        expert = f"{self.weight}_scale + expert.to(tl.int64) * {blocks[0] * blocks[1]}"
        return f"{expert} + {self.name}_n // {SCALED} * {blocks[1]} + k // {SCALED}"

    def scale(self) -> str:
        """The scales of the tile at inputs ``k``: one number where all of its outputs are in one block."""
        expert, blocks = f"{self.weight}_scale + expert.to(tl.int64)", -(-self.inputs // SCALED)
        at = f"{expert} * {-(-self.outputs // SCALED) * blocks} + k // {SCALED}"
        first = f"column_block * ({self.block}) + {self.first}"
        one = f"{SCALED} % ({self.block}) == 0" if self.first % SCALED == 0 else "False"
        return f"load_scale({at}, {self.name}_n // {SCALED} * {blocks}, ({first}) // {SCALED} * {blocks}, {one})"

    def described(self) -> str:
        """The tile at inputs ``k``, through the descriptor."""
        first = f"column_block * ({self.block}) + {self.first}"
        if self.nk:
            return f"{self.weight}_d.load([expert, {first}, k]).reshape({self.block}, BLOCK_K).T"
        return f"{self.weight}_d.load([expert, k, {first}]).reshape(BLOCK_K, {self.block})"


def address(table: str, dtype: str, aligned: bool) -> str:
    """The expert's address out of a table, as a pointer.

    It is any number to Triton. Where it is not told that they are multiples of 16, every element behind one is loaded
    by itself, and through registers.
    """
    at = f"tl.load({table} + expert).to(tl.pointer_type({TL_TYPES[dtype]}))"
    return f"tl.multiple_of({at}, {ALIGNED})" if aligned else at


def base(spec: Spec, name: str, aligned: bool = False) -> str:
    """Statement: where the expert's own weight or bias begins."""
    if spec.stacked:
        return f"{name}_at = {name} + expert.to(tl.int64) * {name}_se"
    return f"{name}_at = {address(name, spec.dtype, aligned)}"


@dataclass(frozen=True)
class Rows:
    """Rows of a tile that are multiplied at once.

    Attributes:
        size: The constant that says how many.
        begin: The first, counted from the tile's first.
        mark: What ends the names of all that belongs to them.
    """

    size: str
    begin: str = ""
    mark: str = ""

    def named(self, line: str, names: Sequence[str]) -> str:
        """The line with these names marked."""
        return re.sub(rf"\b({'|'.join(names)})\b", rf"\1{self.mark}", line) if self.mark else line


ROWS, MORE = Rows("ROWS"), Rows("MORE", " + ROWS", "_more")


def tile_lines(
    spec: Spec, products: Sequence[Product], row_lines: Sequence[str], gathered: bool, split: bool = False
) -> list[str]:
    """Statements: the sums of the products of a tile, of ROWS rows from ``first`` and of MORE rows after them.

    Both are multiplied with the same tiles of weights, which come once.

    Args:
        spec: The layer.
        products: What is summed.
        row_lines: From ``slot`` and ``row`` to ``row_at``, where rows begin, and with fp8 ``row_scale``.
        gathered: Rows lie where their slots say. Others lie in order, so that no load waits for slots: what rows of no
            slot hold is multiplied, and not stored.
        split: program_id(1) of SPLIT_K has every SPLIT_K-th block of inputs.
    """
    (inputs,) = {p.inputs for p in products}
    names = ["row", "slot", "live", "row_at", "row_scale", "r", "r_scale", *(p.name for p in products)]

    def begin(rows: Rows) -> list[str]:
        lines = [
            f"row = first{rows.begin} + tl.arange(0, {rows.size})",
            *(("slot = tl.load(rows + row)", "live = slot >= 0") if gathered else ()),
            *row_lines,
            *(f"{p.name} = tl.zeros(({rows.size}, {p.block}), tl.float32)" for p in products),
        ]
        return [rows.named(line, names) for line in lines]

    def step(rows: Rows) -> list[str]:
        at = "row_at[:, None] + k_in[None, :]"
        load = f"load_rows({at}, live[:, None]," if gathered else f"load_tile({at},"
        lines = [f"r = {load} inside, {inputs} % BLOCK_K == 0)"]
        if spec.fp8:
            # Rows in order are all there. Asking keeps ptxas from 8 bytes of stack where there are 128 registers.
            there = "live" if gathered else "row >= 0"
            lines.append(f"r_scale = tl.load(row_scale + k // {SCALED}, mask={there}, other=0.0)[:, None]")
            for p in products:
                zero = f"tl.zeros(({rows.size}, {p.block}), tl.float32)"
                lines.append(f"{p.name} += dot(r, {p.name}_w, {zero}) * (r_scale * {p.name}_scale)")
        else:
            lines += [f"{p.name} = dot(r, {p.name}_w, {p.name})" for p in products]
        return [rows.named(line, names) for line in lines]

    loads = [f"{p.name}_w = load_tile({p.pointers()}, there, {inputs} % BLOCK_K == 0)" for p in products]
    if spec.stacked:
        described = [f"{p.name}_w = {p.described()}" for p in products]
        loads = ["if TMA:", *indented(described), "else:", *indented(loads)]
    if spec.fp8:
        loads += [f"{p.name}_scale = {p.scale()}" for p in products]
    start, stride = ("tl.program_id(1) * BLOCK_K", "BLOCK_K * SPLIT_K") if split else ("0", "BLOCK_K")
    return [
        *(base(spec, name, spec.aligned) for name in dict.fromkeys(p.weight for p in products)),
        *(p.places() for p in products),
        *begin(ROWS),
        "if MORE:",
        *indented(begin(MORE)),
        f"for k in range({start}, {inputs}, {stride}):",
        *indented(
            [
                "k_in = k + tl.arange(0, BLOCK_K)",
                f"there = (k_in < {inputs})[:, None]",
                f"inside = (k_in < {inputs})[None, :]",
                *loads,
                *step(ROWS),
                "if MORE:",
                *indented(step(MORE)),
            ]
        ),
    ]


def bias_lines(spec: Spec, products: Sequence[Product], biases: Sequence[str], across: str) -> list[str]:
    """Statements: the products rounded to the type that the GEMM gives, with their biases if there are any."""
    lines = [base(spec, name) for name in biases]
    lines += [f"{p.name} = {rounded(p.name, spec.dtype)}" for p in products if spec.dtype != "f32"]
    for i, p in enumerate(products if biases else ()):
        name = biases[i if len(biases) > 1 else 0]
        value = f"tl.load({name}_at + {p.outputs_at}).to(tl.float32){across}"
        lines.append(f"{p.name} = {rounded(f'{p.name} + {value}', spec.dtype)}")
    return lines
