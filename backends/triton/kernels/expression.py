"""Activation regions as Triton: one expression of f32 tensors per traced op, rounded to its traced type.

torch computes an elementwise op on narrow types in f32 and rounds its result. The generated code does the same, op by
op, so that a result differs from the reference's by no more than the elementary functions do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moec.backends.calls import (
    FIRST_ALONE,
    Emit,
    Language,
    emit_alpha,
    emit_binary,
    emit_clamp,
    emit_function,
    emit_same,
)
from moec.backends.elementwise import read_elementwise
from moec.backends.triton.kernels.dtypes import TL_TYPES, number, rounded
from moec.ir.core import Graph

HELPERS = {
    "sigmoid": """\
@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
""",
    "silu": """\
@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))
""",
    "tanh": """\
@triton.jit
def tanh(x):
    t = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -y, y)
""",
    "gelu": """\
@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
""",
    "gelu_tanh": """\
@triton.jit
def gelu_tanh(x):
    # 0.5 * (1 + tanh(z)) is sigmoid(2 * z)
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
""",
    "at_least": """\
@triton.jit
def at_least(x, low):
    return tl.where(x < low, low, x)
""",
    "at_most": """\
@triton.jit
def at_most(x, high):
    return tl.where(x > high, high, x)
""",
    "larger": """\
@triton.jit
def larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
""",
    "smaller": """\
@triton.jit
def smaller(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
""",
    "softplus": """\
@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))
""",
}
"""Functions that Triton's language lacks, by the name that expressions call them."""
_ROUNDING = {
    "round_f16": """\
@triton.jit
def round_f16(x):
    return x.to(tl.float16).to(tl.float32)
""",
    "round_bf16": """\
@triton.jit
def round_bf16(x):
    return x.to(tl.bfloat16).to(tl.float32)
""",
}
_ROUNDING_INTERPRETED = {
    "round_bf16": """\
@triton.jit
def round_bf16(x):
    # Triton's interpreter cuts bits off. A GPU rounds to the nearest, to even.
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
""",
}


@dataclass(frozen=True)
class Elementwise:
    """The statements of an activation.

    Attributes:
        lines: One for every op; ``g`` and ``u`` (or ``g`` alone) are the rows in f32, ``c0``, ``c1``, ... the captures.
        result: The name of the result.
        captures: Element type of every captured tensor, and whether it has a value for each column (else one alone).
    """

    lines: tuple[str, ...]
    result: str
    captures: tuple[tuple[str, bool], ...]


OPS: dict[str, Emit] = {
    **{name: emit_function(name) for name in ("silu", "sigmoid", "tanh", "gelu", "gelu_tanh", "softplus")},
    **{
        name: emit_function(f"tl.{name}")
        for name in ("exp", "exp2", "log", "log2", "sin", "cos", "erf", "abs", "floor")
    },
    "relu": lambda a, kw: f"larger({a[0]}, 0.0)",
    "neg": lambda a, kw: f"-{a[0]}",
    "sqrt": emit_function("tl.sqrt_rn"),
    "rsqrt": lambda a, kw: f"1.0 / tl.sqrt_rn({a[0]})",
    "reciprocal": lambda a, kw: f"1.0 / {a[0]}",
    **dict.fromkeys(("square", "pow2"), lambda a, kw: f"{a[0]} * {a[0]}"),
    "pow3": lambda a, kw: f"{a[0]} * {a[0]} * {a[0]}",
    "mul": emit_binary("*"),
    "div": emit_binary("/"),
    "add": emit_alpha("+"),
    "sub": emit_alpha("-"),
    "rsub": lambda a, kw: f"{a[1]} - {a[0]}" + (f" * {kw['alpha']}" if "alpha" in kw else ""),
    "minimum": emit_function("smaller", 2),
    "maximum": emit_function("larger", 2),
    "clamp": emit_clamp,
    "clamp_min": emit_function("at_least", 2),
    "clamp_max": emit_function("at_most", 2),
    "hardtanh": emit_clamp,
    "leaky_relu": lambda a, kw: f"tl.where({a[0]} > 0, {a[0]}, {a[0]} * {a[1] if len(a) > 1 else '0.01'})",
    "elu": lambda a, kw: f"tl.where({a[0]} > 0, {a[0]}, tl.exp({a[0]}) - 1.0)",
    "hardswish": lambda a, kw: f"{a[0]} * at_most(at_least({a[0]} + 3.0, 0.0), 6.0) / 6.0",
    "hardsigmoid": lambda a, kw: f"at_most(at_least({a[0]} + 3.0, 0.0), 6.0) / 6.0",
    "mish": lambda a, kw: f"{a[0]} * tanh(softplus({a[0]}))",
    **dict.fromkeys(FIRST_ALONE, emit_same),
}
"""An expression for every op that a region may call."""
TRITON = Language(TL_TYPES, OPS, number, {"elu": 1, "softplus": 1})
"""How kernels write elementwise ops: as expressions of tensors in f32."""


def helpers_in(text: str, interpreted: bool = False) -> list[str]:
    """The helper functions that a text calls, in an order in which they can be defined."""
    known = _ROUNDING | (_ROUNDING_INTERPRETED if interpreted else {}) | HELPERS
    return [known[name] for name in known if re.search(rf"\b{name}\(", text)]


def compile_elementwise(region: Graph, rows: int, dtype: str) -> Elementwise:
    """The Triton statements of an elementwise region.

    Args:
        region: Takes ``rows`` row arguments, then its captures.
        rows: 2 for gate and up, 1 for one projection.
        dtype: Element type of the result, that of the down GEMM's operand.

    Raises:
        UnsupportedError: Something in it is not elementwise or has no form in Triton.
    """
    read = read_elementwise(region, rows, dtype, TRITON)
    lines = (f"{s.name} = {rounded(s.text, s.dtype)}" for s in read.statements)
    return Elementwise(tuple(lines), read.result, read.captures)
