"""Reading router weights: the masks under which a slot's weight is 0 whatever the tokens are.

The reader goes backward from the weights through calls that keep a 0 where it is: views, casts, products, quotients by
anything, bounds that hold 0, a softmax of -inf. Where it meets ``where``, ``masked_fill`` or a product with a mask, the
mask is noted. Its other finding is a mask mixed with numbers (a straight-through estimator): there a weight of 0 has a
gradient, and the slot cannot be left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from moec.ir.core import Op, Value
from moec.passes.matching import CASTS, VIEWS, arg, clamp_bounds, function, maker, tensor

_PRODUCTS = frozenset({"mul", "multiply"})
_QUOTIENTS = frozenset({"div", "true_divide", "divide"})
_SAME_ZERO = frozenset({"neg", "abs", "relu", "nan_to_num", "detach"})
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
_ONES = frozenset({"ones", "ones_like", "new_ones"})
_FILLED = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}
_SPREAD = VIEWS | CASTS | {"expand", "expand_as", "detach"}
_NOT = frozenset({"bitwise_not", "logical_not"})
_COMPARED = frozenset({"eq", "ne"})
_SUMS = frozenset({"add", "sub", "rsub"})
_SOFTMAX = frozenset({"softmax", "_softmax"})
INFINITE = float("inf")


@dataclass(frozen=True)
class Mask:
    """Slots that need no expert: those where ``value``, a bool tensor, is ``dead``.

    Attributes:
        value: One element for each slot, in the order of slots; or, not ``aligned``, what broadcasts to ``[T, k]``.
        dead: Which truth value drops a slot.
        aligned: There is an element for each slot.
    """

    value: Value
    dead: bool
    aligned: bool = True


@dataclass
class Masks:
    """What the weights say.

    Attributes:
        found: The masks, those nearest to the weights first.
        ops: The calls that were read.
        refused: Masks that say nothing, and why.
    """

    found: list[Mask] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    refused: list[tuple[Value, str]] = field(default_factory=list)


def constant(value: Any) -> float | None:
    """The number that ``value`` is everywhere, if the graph says so."""
    while (op := maker(value, *_SPREAD)) is not None:
        value = arg(op, 0, "self")
    literal = maker(value, "lift_fresh_copy")
    held = _held(literal.operands[0] if literal is not None else value, literal is not None)
    if held is not None:
        return held
    if maker(value, *_ZEROS) is not None:
        return 0.0
    if maker(value, *_ONES) is not None:
        return 1.0
    op = maker(value, *_FILLED)
    if op is not None:
        value = arg(op, _FILLED[function(op)], "s" if function(op) == "scalar_tensor" else "fill_value")
    return float(value) if isinstance(value, (int, float)) else None


def _held(value: Any, literal: bool) -> float | None:
    """The number in a tensor that the program holds: one of its text, or a constant of an exported program."""
    if not isinstance(value, Value) or (value.op is not None and not (literal and value.op.name == "torch.get_attr")):
        return None
    held = (value.meta if value.op is None else value.op.meta).get("value")
    if type(held) is torch.Tensor and held.numel() == 1 and held.device.type == "cpu":
        return float(held.item())
    return None


def is_bool(value: Any) -> bool:
    """True for a tensor of truth values."""
    t = tensor(value)
    return t is not None and t.dtype.kind == "bool"


def same_shape(a: Any, b: Any) -> bool:
    """True for two tensors of one shape: element i of one belongs to element i of the other."""
    one, other = tensor(a), tensor(b)
    return one is not None and other is not None and one.shape == other.shape


def selected(op: Op) -> tuple[Value, Any, Any] | None:
    """``(condition, where it is true, where it is false)`` of ``where``, ``masked_fill`` or ``x[mask] = number``."""
    name = function(op)
    found: tuple[Any, Any, Any]
    if name == "where":
        found = arg(op, 0, "condition"), arg(op, 1, "self"), arg(op, 2, "other")
    elif name == "masked_fill":
        found = arg(op, 1, "mask"), arg(op, 2, "value"), arg(op, 0, "self")
    elif name == "index_put":
        indices, values = arg(op, 1, "indices"), arg(op, 2, "values")
        whole = isinstance(indices, list) and len(indices) == 1 and same_shape(indices[0], op.results[0])
        if not whole or constant(values) is None or arg(op, 3, "accumulate", False) is True:
            return None
        found = indices[0], values, arg(op, 0, "self")
    else:
        return None
    return found if is_bool(found[0]) else None


def as_mask(value: Any, dead: bool, aligned: bool = True) -> Mask | None:
    """The mask behind a tensor of truth values, or of 0 and 1: without negations, casts, ``1 - mask`` and views.

    Args:
        value: Slots are dropped where it is ``dead`` (1 or 0).
        dead: See there.
        aligned: It has an element for each slot; else its shape counts, and views of it stay.
    """
    found = None
    views = VIEWS if aligned else frozenset[str]()
    while True:
        if is_bool(value):
            found = Mask(value, dead, aligned)
        op = maker(value, *views, *CASTS, *_NOT, *_COMPARED, "detach", "rsub", "sub")
        if op is None:
            return found
        name, value = function(op), arg(op, 0, "self")
        if name in ("rsub", "sub"):
            whole, value = (arg(op, 1), value) if name == "rsub" else (value, arg(op, 1))
            if constant(whole) != 1 or not isinstance(value, Value) or arg(op, 2, "alpha", 1) != 1:
                return found
            dead = not dead
        elif name in _NOT or name in _COMPARED:
            other = arg(op, 1, "other") if name in _COMPARED else 0
            if not is_bool(value) or other not in (0, 1):
                return found
            dead = dead == ((name != "ne") == bool(other))


def read_masks(weights: Value) -> Masks:
    """The masks under which elements of ``weights`` [T, k] are 0 and hand no gradient back."""
    out = Masks()
    seen: set[tuple[Value, float]] = set()
    stack: list[tuple[Value, float]] = [(weights, 0.0)]  # a value, and what it must be at a dropped slot
    while stack:
        value, number = stack.pop()
        if (value, number) in seen or value.op is None or value.op.name != "torch.call":
            continue
        seen.add((value, number))
        known = len(out.found)
        further = _step(value.op, value, number, same_shape(value, weights), out)
        if further or len(out.found) > known:
            out.ops.append(value.op)
        stack.extend(further)
    return out


def _step(op: Op, value: Value, number: float, matrix: bool, out: Masks) -> list[tuple[Value, float]]:
    """Notes the masks of one call; gives the values that must hold ``number`` at a slot for ``value`` to hold it."""
    name, t = function(op), tensor(value)
    if t is None or not t.dtype.is_float:
        return []
    if (chosen := selected(op)) is not None:
        condition, taken, left = chosen
        further = []
        for dead, filled, rest in ((True, taken, left), (False, left, taken)):
            if constant(filled) == number:
                _note(out, condition, dead, value, matrix)
                if same_shape(rest, value):
                    further.append((rest, number))
        return further
    source = arg(op, 0, "self")
    if name in VIEWS or name in CASTS:
        if number == 0 and as_mask(source, False) is not None:
            _note(out, value, False, value, matrix)
            return []
        return [(source, number)] if isinstance(source, Value) else []
    if number != 0:
        return []
    if name in _PRODUCTS:
        factors = [f for f in (source, arg(op, 1, "other")) if isinstance(f, Value)]
        return [(f, 0.0) for f in factors if _is_number(f, value, matrix, out)]
    if not same_shape(source, value):
        return []
    if name in _SOFTMAX:
        return [(source, -INFINITE)]
    exact = name in _QUOTIENTS and arg(op, 2, "rounding_mode") is None
    return [(source, 0.0)] if exact or name in _SAME_ZERO or _holds_zero(op) else []


def _is_number(factor: Value, value: Value, matrix: bool, out: Masks) -> bool:
    """Notes a factor that is a mask; True for another one, whose zeros are those of the product."""
    if as_mask(factor, False) is not None:
        _note(out, factor, False, value, matrix)
        return False
    if not same_shape(factor, value):
        return False
    if _mixes_a_mask(factor):
        out.refused.append((factor, f"{factor!r} is a mask mixed with numbers: where it is 0 it may have a gradient"))
    return True


def _note(out: Masks, operand: Value, dead: bool, value: Value, matrix: bool) -> None:
    """Note the mask that ``operand`` is in the call that makes ``value``; ``matrix``: that has the shape [T, k]."""
    aligned = same_shape(operand, value)
    mask = as_mask(operand, dead, aligned)
    if mask is None or not (aligned or (matrix and same_shape(mask.value, operand))):
        out.refused.append((operand, f"{operand!r} masks slots in another shape than theirs"))
    elif mask not in out.found:
        out.found.append(mask)


def without_mask(value: Value, masks: list[Mask]) -> Value | None:
    """What the call that makes ``value`` masks, if that is all it does and the mask is one of ``masks``."""
    if value.op is None:
        return None
    pairs: list[tuple[Value, bool, Any]] = []
    chosen = selected(value.op)
    if chosen is not None:
        condition, taken, left = chosen
        pairs = [(condition, d, r) for d, f, r in ((True, taken, left), (False, left, taken)) if constant(f) == 0]
    elif function(value.op) in _PRODUCTS:
        one, other = arg(value.op, 0, "self"), arg(value.op, 1, "other")
        pairs = [(f, False, r) for f, r in ((one, other), (other, one)) if isinstance(f, Value)]
    for operand, dead, rest in pairs:
        same = isinstance(rest, Value) and rest.type == value.type
        if same and as_mask(operand, dead, same_shape(operand, value)) in masks:
            return rest
    return None


def _holds_zero(op: Op) -> bool:
    """True for ``clamp`` and its like with numbers as bounds and 0 between them."""
    bounds = clamp_bounds(op)
    if bounds is None or not all(b is None or isinstance(b, (int, float)) for b in bounds):
        return False
    low, high = bounds
    return (low is None or low <= 0) and (high is None or high >= 0)


def _mixes_a_mask(value: Value) -> bool:
    """True for a sum that a mask, cast to numbers, is part of."""
    if maker(value, *_SUMS) is None:
        return False
    stack, seen = [value], set()
    while stack:
        op = maker(stack.pop(), *VIEWS, *CASTS, *_SUMS, *_PRODUCTS)
        if op is None or op in seen:
            continue
        seen.add(op)
        if function(op) in CASTS and is_bool(op.operands[0]):
            return True
        stack.extend(op.operands)
    return False
