"""Activation regions as C++: one expression of a vector per traced op, rounded to its traced type.

torch computes an elementwise op on narrow types in f32 and rounds its result. The generated function does the same, op
by op, so that a result differs from the reference's by no more than the elementary functions do.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from moec.backends.cpu.cpp import C_TYPES, real
from moec.backends.elementwise import read_elementwise
from moec.ir.core import Graph, Value


@dataclass(frozen=True)
class Activation:
    """The statements of the C++ function.

    Attributes:
        lines: One for every captured tensor and op; ``g`` and ``u`` (or ``g`` alone) are the rows, ``captures`` the
            pointers.
        names: What each value of the region is called.
        result: The name of the region's result.
    """

    lines: tuple[str, ...]
    names: Mapping[Value, str]
    result: str

    @property
    def body(self) -> str:
        """The function's body."""
        return "\n        ".join((*self.lines, f"return {self.result};"))


_FUNCTIONS = ("silu", "relu", "sigmoid", "tanh", "exp", "erf", "gelu", "gelu_tanh")
OPS: dict[str, Emit] = {
    **{name: emit_function(name) for name in _FUNCTIONS},
    "neg": emit_function("negate"),
    "abs": emit_function("absolute"),
    "sqrt": emit_function("root"),
    "rsqrt": lambda a, kw: f"set1(1.0f) / root({a[0]})",
    "reciprocal": lambda a, kw: f"set1(1.0f) / {a[0]}",
    **dict.fromkeys(("square", "pow2"), lambda a, kw: f"{a[0]} * {a[0]}"),
    "pow3": lambda a, kw: f"{a[0]} * {a[0]} * {a[0]}",
    "mul": emit_binary("*"),
    "div": emit_binary("/"),
    "add": emit_alpha("+"),
    "sub": emit_alpha("-"),
    "rsub": lambda a, kw: f"{a[1]} - {a[0]}" + (f" * {kw['alpha']}" if "alpha" in kw else ""),
    "minimum": emit_function("minimum", 2),
    "maximum": emit_function("maximum", 2),
    "clamp": emit_clamp,
    "clamp_min": emit_function("at_least", 2),
    "clamp_max": emit_function("at_most", 2),
    "hardtanh": emit_clamp,
    **dict.fromkeys(FIRST_ALONE, emit_same),
}
"""An expression of vectors for every op that a region may call."""


def number(value: float) -> str:
    """A vector of one number in C++."""
    return f"set1({real(value)})"


CPP = Language(C_TYPES, OPS, number)
"""How generated C++ writes elementwise ops: as expressions of vectors."""


def compile_activation(region: Graph, rows: int, dtype: str) -> Activation:
    """The C++ body of an elementwise region.

    Args:
        region: Takes ``rows`` row arguments, then its captures.
        rows: 2 for gate and up, 1 for one projection.
        dtype: Element type of the result, that of the down GEMM's operand.

    Raises:
        UnsupportedError: Something in it is not elementwise or has no vector form.
    """
    read = read_elementwise(region, rows, dtype, CPP)
    lines: list[str] = []
    for i, (kind, wide) in enumerate(read.captures):
        at = f"(const {C_TYPES[kind]}*)captures[{i}]"
        lines.append(f"V c{i} = {f'load_n({at} + i, n)' if wide else f'broadcast({at})'};")
    lines += [f"V {s.name} = round_to<{C_TYPES[s.dtype]}>({s.text});" for s in read.statements]
    return Activation(tuple(lines), read.names, read.result)
