"""Small helpers for reading graphs of ``torch.call``: which function, which argument, which values lie between."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy

from moec.ir.attributes import ListAttr, Operand
from moec.ir.core import Op, Value
from moec.ir.types import SymType, TensorType

# Functions that hand on the same elements in the same order (shape may differ).
VIEWS = frozenset(
    ("view", "reshape", "_unsafe_view", "alias", "contiguous", "clone", "squeeze", "unsqueeze", "flatten", "unflatten")
)
CASTS = frozenset({"to", "_to_copy", "type_as"})
FREE = frozenset(
    {
        *("view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select"),
        *("detach", "alias", "split", "chunk"),
    }
)
"""What gives another look at memory that is there, and takes no time on a device."""
ATTENTION_CORE = "scaled_dot_product_attention"


def function(op: Op | None) -> str:
    """The bare name of a ``torch.call``'s function (``index`` for ``aten.index.Tensor``), else ""."""
    if op is None or op.name != "torch.call":
        return ""
    target: str = op.attrs["target"]
    return target.rsplit(".", 1)[1] if target.startswith(("py.", "hop.")) else target.split(".")[1]


def maker(value: Any, *names: str) -> Op | None:
    """The ``torch.call`` of one of ``names`` that makes ``value``, if that is what makes it."""
    if isinstance(value, Value) and value.op is not None and function(value.op) in names:
        return value.op
    return None


def _resolve(op: Op, tree: Any) -> Any:
    if isinstance(tree, Operand):
        return op.operands[tree.index]
    if isinstance(tree, ListAttr):
        return [_resolve(op, t) for t in tree.items]
    if isinstance(tree, tuple):
        return tuple(_resolve(op, t) for t in tree)
    return tree


def arg(op: Op, index: int, name: str = "", default: Any = None) -> Any:
    """Argument ``index`` (or keyword ``name``) of a ``torch.call``: a Value, a list of them, or a constant."""
    args = op.attrs.get("args", ())
    if index < len(args):
        return _resolve(op, args[index])
    return _resolve(op, op.attrs.get("kwargs", {}).get(name, default))


def tensor(value: Any) -> TensorType | None:
    """The tensor type of ``value``, or None if it is no tensor."""
    return value.type if isinstance(value, Value) and isinstance(value.type, TensorType) else None


def rank(value: Any) -> int:
    t = tensor(value)
    return t.rank if t is not None else -1


def whole(value: Any) -> sympy.Expr | None:
    """A Python int, or the number computed from sizes that ``value`` is, as an expression; None for anything else."""
    if isinstance(value, Value) and isinstance(value.type, SymType) and isinstance(value.type.expr, sympy.Expr):
        return value.type.expr if value.type.kind == "int" else None
    return sympy.Integer(value) if isinstance(value, int) and not isinstance(value, bool) else None


def same_dim(a: Any, b: Any) -> bool:
    """True if two dimensions are the same expression."""
    return bool((a - b).expand() == 0)


def peel(value: Any, names: Iterable[str]) -> Any:
    """``value`` with the outermost calls of ``names`` taken off."""
    names = tuple(names)
    while (op := maker(value, *names)) is not None:
        value = arg(op, 0, "self")
    return value


def peel_views(value: Any) -> Any:
    return peel(value, VIEWS)


def as_slots(value: Any, tokens: Any, top_k: Any) -> Value | None:
    """The ``[T, k]`` (or ``[T*k]``) tensor that ``value`` is a view of, the matrix nearest to where it is made."""
    found: Value | None = None
    while True:
        t = tensor(value)
        matrix = t is not None and t.rank == 2 and t.shape[1] == top_k and same_dim(t.shape[0], tokens)
        vector = t is not None and t.rank == 1 and same_dim(t.shape[0], tokens * top_k)
        if matrix or (vector and rank(found) != 2):
            found = value
        op = maker(value, *VIEWS)
        if op is None:
            return found
        value = arg(op, 0, "self")


def single_index(value: Any) -> tuple[Value, Value] | None:
    """``(source, index)`` if ``value`` is ``source[index]`` with one index tensor on the first dimension."""
    op = maker(value, "index", "index_select")
    if op is None:
        return None
    if function(op) == "index_select":
        return (arg(op, 0, "self"), arg(op, 2, "index")) if arg(op, 1, "dim") == 0 else None
    indices = arg(op, 1, "indices")
    if isinstance(indices, (list, tuple)) and len(indices) == 1 and isinstance(indices[0], Value):
        return arg(op, 0, "self"), indices[0]
    return None


def last_dim(value: Any, dim: Any) -> bool:
    """True if ``dim`` names the last dimension of ``value`` (an int, or a list of one)."""
    if isinstance(dim, (list, tuple)):
        if len(dim) != 1:
            return False
        dim = dim[0]
    return isinstance(dim, int) and not isinstance(dim, bool) and dim in (-1, rank(value) - 1)


def ancestors(values: Iterable[Value], stop: Iterable[Value] = ()) -> set[Op]:
    """Every op that ``values`` depend on, not going past the values in ``stop``."""
    barrier = set(stop)
    seen: set[Op] = set()
    stack = [v for v in values if v not in barrier]
    while stack:
        op = stack.pop().op
        if op is None or op in seen:
            continue
        seen.add(op)
        stack.extend(v for v in op.operands if v not in barrier)
    return seen


def between(source: Iterable[Value], target: Value) -> set[Op]:
    """The ops on the paths from ``source`` to ``target``; the makers of ``source`` are not among them."""
    starts = set(source)
    reach: set[Op] = set()
    stack = list(starts)
    while stack:
        for user in stack.pop().users:
            if user not in reach:
                reach.add(user)
                stack.extend(user.results)
    return {op for op in ancestors([target], starts) if op in reach}


def clamp_bounds(op: Op) -> tuple[Any, Any] | None:
    """``(low, high)`` of a clamp, each None where there is none; None for what is no clamp."""
    low_at, high_at = {"clamp": (1, 2), "clamp_min": (1, None), "clamp_max": (None, 1)}.get(function(op), (None, None))
    if low_at is None and high_at is None:
        return None
    return (
        None if low_at is None else arg(op, low_at, "min"),
        None if high_at is None else arg(op, high_at, "max"),
    )
