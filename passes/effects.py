"""What an op does besides its results: is it pure, what does it write to, which memory do its results share.

Sharing is told conservatively: "may share" is the answer wherever a schema does not settle it. ``reshape``, ``to`` and
``contiguous`` share or copy depending on strides and types that the IR does not know; ``type_as``, ``dropout`` and
other composites may hand back their input although their schema does not say so.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from moec.ir.attributes import Operand
from moec.ir.core import Op
from moec.ir.opdef import op_def
from moec.ir.torch_bridge import resolve_target
from moec.ir.types import NoneType, SymType, Type

FRESH_COMPOSITES = frozenset(
    [
        "linear",
        "matmul",
        "softmax",
        "log_softmax",
        "floor_divide",
        "true_divide",
        "divide",
        "multiply",
        "subtract",
        "where",
        "diff",
        "one_hot",
        "square",
        "argsort",
        "__and__",
        "__or__",
        "__xor__",
        "greater",
        "greater_equal",
        "less",
        "less_equal",
        "not_equal",
        "layer_norm",
        "rms_norm",
        "group_norm",
        "scaled_dot_product_attention",
        "cross_entropy_loss",
        "nll_loss",
    ]
)
"""Composite ATen ops (built from others, so their schema promises nothing) whose result is always new memory."""

SHARING_WITHOUT_SAYING = frozenset(
    ["_unsafe_view", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "native_dropout"]
)
"""ATen ops that are no composites and may share memory although their schema shows no alias."""

_PY_WRITES = frozenset(
    ["setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"]
)
"""Functions of Python's ``operator`` that write to their first argument where it is a tensor."""


@cache
def _schema(target: str) -> Any:
    return None if target.startswith(("py.", "hop.")) else getattr(resolve_target(target), "_schema", None)


@cache
def _is_composite(target: str) -> bool:
    fn = resolve_target(target)
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(fn.name(), "CompositeImplicitAutograd"))


def is_pure(op: Op) -> bool:
    """True if the op may be removed when unused, merged with an equal one, or moved past other pure ops."""
    if _is_py_write(op) or not op_def(op.name).is_pure(op):
        return False
    return all(is_pure(inner) for region in op.regions for inner in region.ops if inner.name != "return")


def _is_py_write(op: Op) -> bool:
    """True for ``operator.iadd`` and its like on a tensor (on numbers they write nothing)."""
    if op.name != "torch.call" or not op.attrs["target"].startswith("py."):
        return False
    name = op.attrs["target"].rpartition(".")[2]
    return name in _PY_WRITES and bool(op.operands) and may_hold_memory(op.operands[0].type)


def is_removable(op: Op) -> bool:
    """True if the op is pure and nobody uses a result of it."""
    return op.name != "return" and not any(r.uses for r in op.results) and is_pure(op)


def may_hold_memory(t: Type) -> bool:
    """False for types whose values are plain numbers or nothing at all."""
    return not isinstance(t, (SymType, NoneType))


def _operands_in(tree: Any) -> set[int]:
    found: set[int] = set()

    def visit(t: Any) -> None:
        if isinstance(t, Operand):
            found.add(t.index)
        elif isinstance(t, dict):
            for v in t.values():
                visit(v)
        elif isinstance(t, tuple):
            for v in t:
                visit(v)
        elif hasattr(t, "items"):
            for v in t.items:
                visit(v)

    visit(tree)
    return found


def _by_argument(op: Op) -> list[tuple[Any, set[int]]]:
    """(schema argument, operand indices in it) for every argument of an ``OpOverload`` call that is given."""
    schema = _schema(op.attrs["target"])
    args, kwargs = op.attrs.get("args", ()), op.attrs.get("kwargs", {})
    out: list[tuple[Any, set[int]]] = []
    for i, a in enumerate(schema.arguments):
        if i < len(args) and not a.kwarg_only:
            out.append((a, _operands_in(args[i])))
        elif a.name in kwargs:
            out.append((a, _operands_in(kwargs[a.name])))
    return out


def written_operands(op: Op) -> set[int]:
    """Indices of the operands whose memory the op may write to."""
    if op.name != "torch.call":
        return set() if op.name == "return" or is_pure(op) else set(range(len(op.operands)))
    if op.attrs["target"].startswith("py."):
        return {0} if _is_py_write(op) else set()
    if _schema(op.attrs["target"]) is None:
        return {i for i, v in enumerate(op.operands) if may_hold_memory(v.type)}
    written: set[int] = set()
    for argument, indices in _by_argument(op):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= indices
    return written


def shared_operands(op: Op) -> set[int]:
    """Indices of the operands that some result of the op may share memory with."""
    if op.name == "return" or not any(may_hold_memory(r.type) for r in op.results):
        return set()
    everything = {i for i, v in enumerate(op.operands) if may_hold_memory(v.type)}
    if op.regions:
        return everything  # a nested graph may return its argument
    if op.name != "torch.call":
        return set() if is_pure(op) else everything
    target: str = op.attrs["target"]
    schema = _schema(target)
    if schema is None:
        return everything
    name = target.split(".")[1]
    annotated: set[int] = set()
    for argument, indices in _by_argument(op):
        if argument.alias_info is not None:
            annotated |= indices
    if annotated:
        return annotated & everything
    if name in FRESH_COMPOSITES:
        return set()
    return everything if name in SHARING_WITHOUT_SAYING or _is_composite(target) else set()
