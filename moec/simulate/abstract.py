"""Values without their numbers: floats have shapes alone, integers are what they are.

What is sent where depends on which experts were chosen, never on activations. So a graph is executed with its floats on
torch's meta device, integers and plans as they are, and a layer of 64 ranks fits in memory. Ops that mix the two where
torch would not are told what they give by :data:`SHAPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from moec.ir.core import Graph, Op, Value
from moec.ir.errors import MoecError
from moec.ir.opdef import op_def
from moec.ir.parallel_semantics import loads
from moec.ir.torch_dtypes import TO_TORCH
from moec.ir.types import SymType, TensorType
from moec.simulate.errors import SimulationError

META = "meta"

SHAPES: dict[str, Callable[[Op, Sequence[Any]], Sequence[int]]] = {
    "moe.combine": lambda op, v: [v[2].tokens],
    "moe.sum_slots": lambda op, v: [v[1].tokens],
    "moe.place_slots": lambda op, v: [v[1].tokens, v[1].top_k],
    "moe.add_tokens": lambda op, v: v[2].shape,
    "moe.experts": lambda op, v: [len(v[0])],
    "moe.parallel_experts": lambda op, v: [len(v[0])],
    "moe.grouped_gemm": lambda op, v: [len(v[0])],
    "moe.activation": lambda op, v: [len(v[0])],
}
"""First dimensions of the result of ops whose meaning is not executed; the others are those of its type."""


def _loads(op: Op, plan: Any) -> list[Any]:
    get = op_def(op.name).attr
    return list(loads(plan, get(op, "sizes"), torch.device("cpu"), get(op, "order")))


_COUNTS: dict[str, Callable[[Op, Sequence[Any]], list[Any]]] = {
    "moe.count_tokens": lambda op, v: [torch.tensor([len(v[0])])],
    "moe.loads": lambda op, v: _loads(op, v[1]),
}
"""Ops that give integers on the device of a float operand, which has no device here."""


def without_numbers(value: Any) -> Any:
    """A float tensor on the meta device; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.device.type != META:
        return torch.empty(value.shape, dtype=value.dtype, device=META)
    return value


def known(value: Any) -> bool:
    """Whether a value's numbers are known."""
    return not (isinstance(value, Tensor) and value.device.type == META)


def sizes_of(type: TensorType, symbols: Mapping[sympy.Symbol, int], what: str) -> list[int]:
    """The dimensions of a type as numbers.

    Raises:
        SimulationError: One has a symbol that nobody gave a number.
    """
    found = []
    for dim in type.shape:
        value = dim.subs(symbols) if not dim.is_Integer else dim
        if not value.is_Integer:
            free = ", ".join(sorted(str(s) for s in value.free_symbols))
            raise SimulationError(f"{what} has the size {dim}, and {free} is not given", hint=f"--size {free}=NUMBER")
        found.append(int(value))
    return found


def argument(value: Value, symbols: Mapping[sympy.Symbol, int]) -> Any:
    """What stands for an argument of a graph: a tensor without numbers, or a size.

    Raises:
        SimulationError: Its type has a symbol that nobody gave a number, or is none that can be made up.
    """
    if isinstance(value.type, TensorType):
        sizes = sizes_of(value.type, symbols, repr(value))
        return torch.empty(sizes, dtype=TO_TORCH[value.type.dtype.name], device=META)
    if isinstance(value.type, SymType):
        number = value.type.expr.subs(symbols)
        if not number.is_number:
            free = ", ".join(sorted(str(s) for s in number.free_symbols))
            raise SimulationError(f"{value!r} is {value.type.expr}, and {free} is not given", hint=f"--size {free}=N")
        return int(number) if value.type.kind == "int" else float(number)
    raise SimulationError(f"the argument {value!r} of type {value.type} cannot be made up")


def execute(
    op: Op,
    values: Sequence[Any],
    symbols: Mapping[sympy.Symbol, int],
    run: Callable[[Graph, Sequence[Any]], list[Any]],
) -> list[Any]:
    """The results of one op, without numbers where they are floats.

    Raises:
        SimulationError: What the op does depends on numbers that are not known.
    """
    if op.name == "moe.experts_backward":
        return _gradients(op, values)
    if op.name in SHAPES:
        return [_made(op, SHAPES[op.name](op, values), symbols)]
    if op.name in _COUNTS:
        return _COUNTS[op.name](op, values)
    try:
        results = op_def(op.name).evaluate(op, values, run)
    except MoecError:
        raise
    except (RuntimeError, NotImplementedError) as first:
        try:
            results = op_def(op.name).evaluate(op, [v.to(META) if isinstance(v, Tensor) else v for v in values], run)
        except (RuntimeError, NotImplementedError):
            why = str(first).strip().splitlines()[0] if str(first).strip() else type(first).__name__
            raise SimulationError(
                f"what {op.name} gives depends on numbers that a simulation does not have: {why}", op=repr(op)
            ) from first
    return [without_numbers(r) for r in results]


def _gradients(op: Op, values: Sequence[Any]) -> list[Any]:
    """Those of an op of experts: as large as its operands, or as the part of them of the experts that it names."""
    get = op_def(op.name).attr
    only, found = get(op, "only"), []
    types = iter(r.type for r in op.results)
    for value in (v for v, need in zip(values[1:], get(op, "needs"), strict=True) if need):
        made, type = without_numbers(value.to(META)), next(types)
        if only is not None and isinstance(type, TensorType) and type.shape[0].is_Integer:
            made = made[: int(type.shape[0])]
        found.append(made)
    return found


def _made(op: Op, first: Sequence[int], symbols: Mapping[sympy.Symbol, int]) -> Tensor:
    type = op.result.type
    assert isinstance(type, TensorType)
    rest = sizes_of(type.with_(shape=type.shape[len(first) :]), symbols, repr(op.result))
    return torch.empty([*first, *rest], dtype=TO_TORCH[type.dtype.name], device=META)
