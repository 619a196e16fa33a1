"""Activation regions as C++: one expression of a vector per traced op, rounded to its traced type.

torch computes an elementwise op on narrow types in f32 and rounds its result. The generated function does the same, op
by op, so that a result differs from the reference's by no more than the elementary functions do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moec.ir.attributes import Operand
from moec.ir.core import Graph, Op, Value
from moec.ir.types import TensorType

C_TYPES = {"f32": "float", "bf16": "bf16", "f16": "f16"}
"""Element types that kernels read and write, and their names in C++."""


class UnsupportedError(Exception):
    """A region that has no vector form; the message says which op, as the end of a sentence."""


@dataclass(frozen=True)
class Activation:
    """Body of the C++ function and what it reads besides its rows.

    Attributes:
        body: Statements; ``g`` and ``u`` (or ``g`` alone) are the rows, ``captures`` the pointers.
    """

    body: str


Emit = Callable[[list[str], dict[str, str]], str]


def _alpha(symbol: str) -> Emit:
    def emit(a: list[str], kw: dict[str, str]) -> str:
        alpha = kw.get("alpha")
        return f"{a[0]} {symbol} {a[1]}" if alpha is None else f"{a[0]} {symbol} {a[1]} * {alpha}"

    return emit


def _clamp(a: list[str], kw: dict[str, str]) -> str:
    low = kw.get("min", a[1] if len(a) > 1 else "")
    high = kw.get("max", a[2] if len(a) > 2 else "")
    text = f"at_least({a[0]}, {low})" if low else a[0]
    return f"at_most({text}, {high})" if high else text


def _function(name: str, arity: int = 1) -> Emit:
    return lambda a, kw: f"{name}({', '.join(a[:arity])})"


def _binary(symbol: str) -> Emit:
    return lambda a, kw: f"{a[0]} {symbol} {a[1]}"


def _same(a: list[str], kw: dict[str, str]) -> str:
    return a[0]


_FIRST_ALONE = ("_to_copy", "to", "convert_element_type", "clone", "alias", "detach", "contiguous")
"""Ops that give their first argument, in the type of their result."""
_OPS: dict[str, Emit] = {
    **{name: _function(name) for name in ("silu", "relu", "sigmoid", "tanh", "exp", "erf")},
    "neg": _function("negate"),
    "abs": _function("absolute"),
    "sqrt": _function("root"),
    "rsqrt": lambda a, kw: f"set1(1.0f) / root({a[0]})",
    "reciprocal": lambda a, kw: f"set1(1.0f) / {a[0]}",
    "square": lambda a, kw: f"{a[0]} * {a[0]}",
    "mul": _binary("*"),
    "div": _binary("/"),
    "add": _alpha("+"),
    "sub": _alpha("-"),
    "rsub": lambda a, kw: f"{a[1]} - {a[0]}" + (f" * {kw['alpha']}" if "alpha" in kw else ""),
    "minimum": _function("minimum", 2),
    "maximum": _function("maximum", 2),
    "clamp": _clamp,
    "clamp_min": _function("at_least", 2),
    "clamp_max": _function("at_most", 2),
    "hardtanh": _clamp,
    **dict.fromkeys(_FIRST_ALONE, _same),
}
_SHARED_BY_OVERLOADS = {"default", "Tensor", "Scalar", "dtype", "self", "other", "Tensor_Scalar"}


def _number(value: float) -> str:
    value = float(value)
    if math.isnan(value):
        return 'set1(__builtin_nanf(""))'
    if math.isinf(value):
        return f"set1({'-' if value < 0 else ''}__builtin_inff())"
    return f"set1((float){value.hex()})"


def _expression(op: Op, names: dict[Value, str]) -> str:
    target = str(op.attrs["target"])
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")

    def text(value: Any) -> str:
        if isinstance(value, Operand):
            return names[op.operands[value.index]]
        if value is None:
            return ""
        if isinstance(value, (bool, int, float)):
            return _number(value)
        raise UnsupportedError(f"the activation calls {target} with {value!r}")

    args: Sequence[Any] = op.attrs.get("args", ())
    kwargs: dict[str, Any] = dict(op.attrs.get("kwargs", {}))
    known = namespace in ("aten", "prims") and overload in _SHARED_BY_OVERLOADS and not op.regions
    if name == "gelu" and known:
        kind = kwargs.get("approximate", "none")
        return f"{'gelu_tanh' if kind == 'tanh' else 'gelu'}({text(args[0])})"
    if name == "pow" and known and len(args) == 2 and args[1] in (2, 3):
        base = text(args[0])
        return " * ".join([base] * int(args[1]))
    emit = _OPS.get(name) if known else None
    if emit is None:
        raise UnsupportedError(f"the activation calls {target}")
    if name in _FIRST_ALONE:
        return emit([text(args[0])], {})
    if kwargs.keys() - {"alpha", "min", "max"}:
        raise UnsupportedError(f"the activation calls {target} with {', '.join(kwargs)}")
    if name == "hardtanh" and len(args) + len(kwargs) < 3:
        args = (*args, -1.0, 1.0)[:3] if len(args) == 1 else (*args, 1.0)
    return emit([text(a) for a in args], {k: text(v) for k, v in kwargs.items() if v is not None})


def _check(value: Value, row: TensorType, what: str) -> TensorType:
    """Rows, or what broadcasts along a row: a number or one value for each column."""
    type = value.type
    if not isinstance(type, TensorType) or type.dtype.name not in C_TYPES:
        raise UnsupportedError(f"the activation has {what} of type {getattr(type, 'dtype', type)}")
    width = row.shape[-1:]
    if type.shape not in (row.shape, width, (1, *width), (), (1,)):
        raise UnsupportedError(f"the activation has {what} of shape {list(type.shape)}")
    return type


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
        _check(arg, row, "rows")
        names[arg] = name
    for i, arg in enumerate(region.args[rows:]):
        type = _check(arg, row, "a captured tensor")
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
        type = _check(op.result, row, f"a result of {op.attrs['target']}")
        names[op.result] = f"v{position}"
        lines.append(f"V v{position} = round_to<{C_TYPES[type.dtype.name]}>({_expression(op, names)});")
    (result,) = region.terminator.operands
    type = _check(result, row, "a result")
    if type.dtype.name != dtype or type.shape != row.shape:
        raise UnsupportedError(f"the activation gives {type.dtype}{list(type.shape)}, the down GEMM takes {dtype}")
    lines.append(f"return {names[result]};")
    return Activation("\n        ".join(lines))
