"""Making and reading ``torch.call`` ops: values in and out of argument templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moec.ir.attributes import ListAttr, Operand, map_operands
from moec.ir.core import Location, Op, Value
from moec.ir.types import Type


def call_op(
    target: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result_types: Sequence[Type],
    *,
    loc: Location | None = None,
    names: Sequence[str] = (),
) -> Op:
    """A ``torch.call`` that is in no graph yet; every :class:`Value` inside ``args`` and ``kwargs`` is an operand."""
    operands: list[Value] = []

    def strip(tree: Any) -> Any:
        if isinstance(tree, Value):
            operands.append(tree)
            return Operand(len(operands) - 1)
        if isinstance(tree, (list, ListAttr)):
            return ListAttr(tuple(strip(v) for v in (tree.items if isinstance(tree, ListAttr) else tree)))
        if isinstance(tree, tuple):
            return tuple(strip(v) for v in tree)
        if isinstance(tree, Mapping):
            return {k: strip(v) for k, v in tree.items()}
        return tree

    attrs: dict[str, Any] = {"target": target, "args": strip(tuple(args))}
    if kwargs:
        attrs["kwargs"] = strip(dict(kwargs))
    return Op("torch.call", operands, result_types, attrs=attrs, groups=(len(operands),), loc=loc, names=names)


def is_call(op: Op | None, *targets: str) -> bool:
    """True if ``op`` is a ``torch.call`` of one of ``targets`` (``aten.add.Tensor``)."""
    return op is not None and op.name == "torch.call" and op.attrs["target"] in targets


def packet(op: Op) -> str:
    """``aten.add`` for a call of ``aten.add.Tensor``, or "" for another op."""
    return op.attrs["target"].rpartition(".")[0] if op.name == "torch.call" else ""


def call_args(op: Op) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with the operand values in their places (lists stay ``ListAttr``)."""
    at = op.operands.__getitem__
    return map_operands(op.attrs.get("args", ()), at), map_operands(op.attrs.get("kwargs", {}), at)


def bound_args(op: Op) -> dict[str, Any]:
    """The arguments of an ``OpOverload`` call by the names of its schema, defaults filled in.

    Raises:
        IRError: The target is not registered in this process.
    """
    from moec.ir.torch_bridge import resolve_target  # torch is needed only here

    args, kwargs = call_args(op)
    bound: dict[str, Any] = {}
    for i, a in enumerate(resolve_target(op.attrs["target"])._schema.arguments):
        if i < len(args) and not a.kwarg_only:
            bound[a.name] = args[i]
        elif a.name in kwargs:
            bound[a.name] = kwargs[a.name]
        elif a.has_default_value():
            bound[a.name] = a.default_value
    return bound
