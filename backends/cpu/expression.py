"""Activation regions as C++: one expression of a vector per traced op, rounded to its traced type.

torch computes an elementwise op on narrow types in f32 and rounds its result. The generated function does the same, op
by op, so that a result differs from the reference's by no more than the elementary functions do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moec.backends import calls
from moec.backends.calls import (
    FIRST_ALONE,
    Call,
    Emit,
    UnsupportedError,
    emit_alpha,
    emit_binary,
    emit_clamp,
    emit_function,
    emit_same,
)
from moec.backends.cpu.cpp import C_TYPES, real
from moec.ir.core import Graph, Op, Value
from moec.ir.types import TensorType


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
_OPS: dict[str, Emit] = {
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


def number(value: float) -> str:
    """A vector of one number in C++."""
    return f"set1({real(value)})"


def read_call(op: Op, names: Mapping[Value, str], where: str = "the activation") -> Call:
    """The op's name and arguments in C++. ``where`` says in messages what the op is part of.

    Raises:
        UnsupportedError: It has no vector form.
    """
    return calls.read_call(op, names, where, _OPS, number)


def expression(op: Op, names: Mapping[Value, str], where: str = "the activation") -> str:
    """The C++ expression of an elementwise op; see :func:`read_call`."""
    call = read_call(op, names, where)
    return _OPS[call.name](call.args, call.kwargs)


def compile_activation(region: Graph, rows: int, dtype: str) -> Activation:
    """The C++ body of an elementwise region.

    Args:
        region: Takes ``rows`` row arguments, then its captures.
        rows: 2 for gate and up, 1 for one projection.
        dtype: Element type of the result, that of the down GEMM's operand.

    Raises:
        UnsupportedError: Something in it is not elementwise or has no vector form.
    """
    row = region.args[0].type
    assert isinstance(row, TensorType)
    names: dict[Value, str] = {}
    lines: list[str] = []
    for arg, name in zip(region.args[:rows], ("g", "u"), strict=False):
        calls.check_value(arg, row, C_TYPES, "rows")
        names[arg] = name
    for i, arg in enumerate(region.args[rows:]):
        type = calls.check_value(arg, row, C_TYPES, "a captured tensor")
        c_type = C_TYPES[type.dtype.name]
        wide = bool(type.shape) and type.shape[-1] == row.shape[-1]
        at = f"(const {c_type}*)captures[{i}]"
        read = f"load_n({at} + i, n)" if wide else f"broadcast({at})"
        names[arg] = f"c{i}"
        lines.append(f"V c{i} = {read};")
    for position, op in enumerate(region.ops):
        if op is region.terminator:
            break
        if op.name != "torch.call" or len(op.results) != 1:
            raise UnsupportedError(f"the activation holds {op.attrs.get('target', op.name)}")
        type = calls.check_value(op.result, row, C_TYPES, f"a result of {op.attrs['target']}")
        names[op.result] = f"v{position}"
        lines.append(f"V v{position} = round_to<{C_TYPES[type.dtype.name]}>({expression(op, names)});")
    (result,) = region.terminator.operands
    type = calls.check_value(result, row, C_TYPES, "a result")
    if type.dtype.name != dtype or type.shape != row.shape:
        raise UnsupportedError(f"the activation gives {type.dtype}{list(type.shape)}, the down GEMM takes {dtype}")
    return Activation(tuple(lines), names, names[result])
