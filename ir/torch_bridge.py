"""What ``torch.call`` names: finding the function, calling it, and knowing whether it has effects."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from moec.ir.attributes import ListAttr, Literal, Operand
from moec.ir.core import Graph, Op
from moec.ir.errors import IRError, nearest
from moec.ir.torch_dtypes import TO_TORCH
from moec.ir.types import DType

_PY_MODULES = {"_operator", "operator", "math", "torch", "builtins", "torch.sym"}


@cache
def resolve_target(target: str) -> Any:
    """The callable that a ``torch.call`` target names.

    Raises:
        IRError: No such op is registered in this process; its library may not be imported.
    """
    head, _, rest = target.partition(".")
    try:
        if head == "py":
            module, _, attr = rest.rpartition(".")
            if module not in _PY_MODULES:
                raise IRError(f"torch.call target {target!r} is outside the allowed modules {sorted(_PY_MODULES)}")
            return getattr(importlib.import_module(module), attr)
        if head == "hop":
            return getattr(torch.ops.higher_order, rest)
        packet, _, overload = rest.rpartition(".")
        return getattr(getattr(getattr(torch.ops, head), packet), overload)
    except (AttributeError, ImportError):
        own = head in ("aten", "prims", "py", "hop")
        hint = None if own else f"import the library that registers {head!r} first"
        near = ""
        if head == "aten":
            near = "; " + nearest(rest.split(".")[0], [n for n in dir(torch.ops.aten) if not n.startswith("_")])
        raise IRError(f"torch has no operation {target!r}{near}", hint=hint) from None


def to_python(tree: Any, values: Sequence[Any]) -> Any:
    """An argument template with the operands' values put in and IR literals turned into torch's."""
    if isinstance(tree, Operand):
        return values[tree.index]
    if isinstance(tree, ListAttr):
        return [to_python(v, values) for v in tree.items]
    if isinstance(tree, tuple):
        return tuple(to_python(v, values) for v in tree)
    if isinstance(tree, dict):
        return {k: to_python(v, values) for k, v in tree.items()}
    if isinstance(tree, DType):
        return TO_TORCH[tree.name]
    if isinstance(tree, Literal):
        return torch.device(tree.text) if tree.kind == "device" else getattr(torch, tree.text)
    return tree


def flatten_result(value: Any) -> list[Any]:
    """What a call returned as the list of the op's results."""
    return list(value) if isinstance(value, (tuple, list)) else [value]


def call_target(op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
    """Execute a ``torch.call`` eagerly on torch values."""
    fn = resolve_target(op.attrs["target"])
    if op.regions:
        raise IRError(f"{op.attrs['target']} has nested graphs; executing it needs the fx door", op=repr(op))
    out = fn(*to_python(op.attrs.get("args", ()), inputs), **to_python(op.attrs.get("kwargs", {}), inputs))
    return flatten_result(out) if len(op.results) != 1 or isinstance(out, (tuple, list)) else [out]


_IMPURE_WORDS = ("rand", "dropout", "bernoulli", "_assert", "set_", "sym_constrain", "item", "normal")


@cache
def _pure_target(target: str) -> bool:
    if target.startswith("py."):
        return True
    if target.startswith("hop."):
        return False
    fn = resolve_target(target)
    schema = getattr(fn, "_schema", None)
    if schema is None:
        return False
    if schema.is_mutable or not schema.returns:
        return False
    if torch.Tag.nondeterministic_seeded in fn.tags:
        return False
    return not any(w in target.split(".")[1] for w in _IMPURE_WORDS)


def is_pure_call(op: Op) -> bool:
    """True if the call may be removed when unused, merged with an equal one, or moved."""
    return _pure_target(op.attrs["target"]) or _draws_nothing(op)


def _draws_nothing(op: Op) -> bool:
    """Whether attention that may draw random numbers is told to drop nothing out."""
    if op.attrs["target"] != "aten.scaled_dot_product_attention.default":
        return False
    args, kwargs = op.attrs.get("args", ()), op.attrs.get("kwargs", {})
    dropout = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    return isinstance(dropout, (int, float)) and dropout == 0
