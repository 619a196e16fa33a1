"""Types of IR values. Dimensions are sympy expressions, so that a dynamic batch stays a fact of the type."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from moec.ir.errors import IRError, nearest


@dataclass(frozen=True)
class DType:
    """An element type. ``name`` is the text form (``bf16``), ``bits`` its storage width."""

    name: str
    bits: int
    kind: str  # "float" | "int" | "uint" | "bool" | "complex"

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    def __str__(self) -> str:
        return self.name


_TABLE = [
    ("f64", 64, "float"),
    ("f32", 32, "float"),
    ("f16", 16, "float"),
    ("bf16", 16, "float"),
    ("f8e4m3fn", 8, "float"),
    ("f8e5m2", 8, "float"),
    ("f8e4m3fnuz", 8, "float"),
    ("f8e5m2fnuz", 8, "float"),
    ("f8e8m0fnu", 8, "float"),
    ("f4e2m1fn_x2", 8, "float"),
    ("i64", 64, "int"),
    ("i32", 32, "int"),
    ("i16", 16, "int"),
    ("i8", 8, "int"),
    ("u64", 64, "uint"),
    ("u32", 32, "uint"),
    ("u16", 16, "uint"),
    ("u8", 8, "uint"),
    ("i1", 8, "bool"),
    ("c32", 32, "complex"),
    ("c64", 64, "complex"),
    ("c128", 128, "complex"),
]
DTYPES: dict[str, DType] = {n: DType(n, b, k) for n, b, k in _TABLE}


def dtype(name: str) -> DType:
    """The element type called ``name``.

    Raises:
        IRError: No such type; the message names the nearest ones.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise IRError(f"unknown element type {name!r}; {nearest(name, DTYPES)}") from None


class Type:
    """Base of all types. Types are immutable and compare by value."""


Dim = sympy.Expr


def as_dim(d: int | str | sympy.Expr) -> sympy.Expr:
    """An ``int``, a symbol name or a sympy expression as a dimension."""
    if isinstance(d, str):
        return sympy.Symbol(d, integer=True)
    return sympy.Integer(d) if isinstance(d, int) else d


@dataclass(frozen=True)
class TensorType(Type):
    """``bf16[T, 4096]``. ``device`` is a torch device string; ``"cpu"`` is not printed, others are as ``@cuda:0``."""

    dtype: DType
    shape: tuple[sympy.Expr, ...]
    device: str = "cpu"

    @staticmethod
    def of(dt: str | DType, *shape: int | str | sympy.Expr, device: str = "cpu") -> TensorType:
        """Shorthand: ``TensorType.of("bf16", "T", 4096)``."""
        return TensorType(dt if isinstance(dt, DType) else dtype(dt), tuple(as_dim(d) for d in shape), device)

    @property
    def rank(self) -> int:
        return len(self.shape)

    def with_(self, *, dtype: DType | None = None, shape: tuple[sympy.Expr, ...] | None = None) -> TensorType:
        """The same type with another element type or shape."""
        return TensorType(dtype or self.dtype, self.shape if shape is None else shape, self.device)


@dataclass(frozen=True)
class SymType(Type):
    """A Python-level number computed from shapes: ``sym_int<s0*4>``, ``sym_float<zf1>``, ``sym_bool<...>``."""

    kind: str  # "int" | "float" | "bool"
    expr: sympy.Basic


@dataclass(frozen=True)
class PlanType(Type):
    """``!moe.plan<8>``: which slot goes to which of ``experts`` experts, as ``moe.dispatch`` sorted them."""

    experts: int


@dataclass(frozen=True)
class TokenType(Type):
    """``!comm.token``: a started, not yet awaited communication."""


@dataclass(frozen=True)
class NoneType(Type):
    """``none``: the result of an op that returns nothing, kept for its effect."""


@dataclass(frozen=True)
class OpaqueType(Type):
    """``!torch.opaque<"ScriptObject">``: a value the IR carries and does not understand."""

    text: str
