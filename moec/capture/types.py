"""IR types of the values that torch records on fx nodes (fake tensors, SymInts, None, tuples)."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from moec.ir.exprs import symbol
from moec.ir.torch_dtypes import FROM_TORCH
from moec.ir.types import NoneType, OpaqueType, SymType, TensorType, Type

UNKNOWN = OpaqueType("unknown")
"""The type of a node on which torch recorded no value."""


def plain_expr(expr: sympy.Basic) -> sympy.Basic:
    """``expr`` over the IR's own symbols, so that it equals the same expression read from text.

    A ShapeEnv's symbols are positive or bounded integers; of the IR's, the name alone is their identity.
    """
    names = {s: symbol(s.name) for s in expr.free_symbols}
    return expr.xreplace(names) if names else expr


def dim_of(size: int | torch.SymInt) -> sympy.Expr:
    """One dimension of a shape. No guard is installed on a SymInt."""
    if isinstance(size, int):
        return sympy.Integer(size)
    expr = getattr(size.node, "expr", None)
    if isinstance(expr, sympy.Basic):
        return plain_expr(expr)
    return symbol(str(size))  # a nested (jagged) dimension has no expression


def _sym(kind: str, value: Any) -> SymType:
    expr = getattr(value.node, "expr", None)
    return SymType(kind, plain_expr(expr) if isinstance(expr, sympy.Basic) else symbol(str(value)))


def type_of(value: Any) -> Type:
    """The IR type of a recorded value.

    Args:
        value: A (fake) tensor, SymInt, SymFloat, SymBool, Python number, None, or any object.
    """
    if isinstance(value, torch.Tensor):
        dtype = FROM_TORCH.get(value.dtype)
        if dtype is None:
            return OpaqueType(f"tensor {value.dtype}")
        return TensorType(dtype, tuple(dim_of(d) for d in value.shape), str(value.device))
    if isinstance(value, torch.SymInt):
        return _sym("int", value)
    if isinstance(value, torch.SymFloat):
        return _sym("float", value)
    if isinstance(value, torch.SymBool):
        return _sym("bool", value)
    if isinstance(value, bool):
        return SymType("bool", sympy.true if value else sympy.false)
    if isinstance(value, int):
        return SymType("int", sympy.Integer(value))
    if isinstance(value, float):
        return SymType("float", sympy.Float(value))
    if value is None:
        return NoneType()
    return OpaqueType(type(value).__name__)
