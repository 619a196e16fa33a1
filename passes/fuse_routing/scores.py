"""Reading scores: what weights were before scaling and renormalising, what scores were before scoring."""

from __future__ import annotations

import math
from typing import Any

from moec.ir.core import Value
from moec.ir.types import DType
from moec.passes.matching import CASTS, arg, function, last_dim, maker, peel_views, rank, tensor


class NoAttribute(Exception):
    """This router is not one of the attributes' routers; ``str`` says what does not fit."""


def dtype_of(value: Value) -> DType:
    """The element type of a tensor.

    Raises:
        NoAttribute: It is no tensor.
    """
    t = tensor(value)
    if t is None:
        raise NoAttribute(f"{value!r} is no tensor")
    return t.dtype


def same_device(a: Value, b: Value) -> bool:
    """True if two tensors are on one device."""
    first, second = tensor(a), tensor(b)
    return first is not None and second is not None and first.device == second.device


def number(value: Any) -> float | None:
    """A Python number as a float; None for anything else, a truth value included."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def same_slots(a: Any, b: Any) -> bool:
    """True if two values hold the same elements for each token: one value, or views of one that keep its rows."""
    first, second = tensor(a), tensor(b)
    if first is None or second is None or peel_views(a) is not peel_views(b):
        return False
    return first.shape[0] == second.shape[0]


def scaled(weights: Value) -> tuple[Value, float]:
    """``(weights before, factor)``; factor 1 if they are not multiplied by a number."""
    op = maker(weights, "mul", "div")
    factor = number(arg(op, 1, "other")) if op is not None else None
    if op is None or factor is None:
        return weights, 1.0
    if function(op) == "div":
        # Dividing by a power of two is multiplying by another one, to the last bit.
        if abs(math.frexp(factor)[0]) != 0.5 or arg(op, 2, "rounding_mode") is not None:
            return weights, 1.0
        factor = 1 / factor
    return arg(op, 0, "self"), factor


def renormalised(weights: Value) -> tuple[Value, float | None]:
    """``(weights before, eps)`` if ``weights`` is divided by its own sum; eps None if it is not divided.

    Raises:
        NoAttribute: It is divided by something else.
    """
    op = maker(weights, "div")
    if op is None or arg(op, 2, "rounding_mode") is not None:
        return weights, None
    source, total = arg(op, 0, "self"), arg(op, 1, "other")
    eps: float | None = 0.0
    plus = maker(total, "add")
    if plus is not None:
        eps = number(arg(plus, 1, "other"))
        if eps is None or arg(plus, 2, "alpha", 1) != 1:
            raise NoAttribute("something is added to the sum of the weights")
        total = arg(plus, 0, "self")
    summed = maker(total, "sum")
    if summed is None or arg(summed, 0, "self") is not source or arg(summed, 2, "keepdim", False) is not True:
        raise NoAttribute("the weights are divided by something else than their sum")
    if rank(source) != 2 or not last_dim(source, arg(summed, 1, "dim")):
        raise NoAttribute("the weights are added over another dimension than k")
    if not dtype_of(source) == dtype_of(total) == dtype_of(weights):
        raise NoAttribute("the sum of the weights is taken in another type")
    return source, eps


def unscored(value: Value) -> tuple[Value, str, DType]:
    """``(logits, scoring, type of the scores)`` of a score tensor.

    Raises:
        NoAttribute: The scores look like one of the known kinds and are another.
    """
    op = maker(value, "softmax", "_softmax", "sigmoid", "sqrt")
    if op is None:
        return value, "identity", dtype_of(value)
    name = function(op)
    source = op.operands[0]
    if name in ("softmax", "_softmax"):
        if not last_dim(source, arg(op, 1, "dim")) or rank(source) != 2:
            raise NoAttribute("the softmax does not run over the experts")
        itself = name == "_softmax" and arg(op, 2, "half_to_float", False) is True
        if not itself and arg(op, 2, "dtype") is None and dtype_of(source) != dtype_of(value):
            raise NoAttribute("the softmax changes type by itself (autocast)")
        return source, "softmax", dtype_of(value)
    if dtype_of(source) != dtype_of(value):
        raise NoAttribute(f"{name} changes type")
    if name == "sigmoid":
        return source, "sigmoid", dtype_of(value)
    soft = maker(source, "softplus")
    if soft is None or arg(soft, 1, "beta", 1) != 1 or arg(soft, 2, "threshold", 20) != 20:
        raise NoAttribute("a square root that is not of a softplus")
    return arg(soft, 0, "self"), "sqrtsoftplus", dtype_of(value)


def before_cast(value: Value, dtype: DType) -> Value:
    """The logits before the cast to the scores' type; a narrowing cast would change the choice, so it stays outside."""
    op = maker(value, *CASTS)
    if op is not None and rank(arg(op, 0, "self")) == 2 and same_device(arg(op, 0, "self"), value):
        before: Value = arg(op, 0, "self")
        if dtype_of(before).bits <= dtype.bits and dtype_of(value) == dtype and dtype_of(before).is_float:
            return before
    return value
