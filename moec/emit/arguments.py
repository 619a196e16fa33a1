"""Attribute templates of ops as argument trees of fx nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from moec.capture.arguments import OPAQUE
from moec.emit.errors import EmitError
from moec.ir.attributes import ListAttr, Literal, Operand, Region
from moec.ir.core import Op
from moec.ir.torch_bridge import resolve_target
from moec.ir.torch_dtypes import TO_TORCH
from moec.ir.types import DType

_MAKERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "slice": lambda items: slice(*items),
    "range": lambda items: range(*items),
    "Size": torch.Size,
    "dict": dict,
}


def decode(tree: Any, op: Op, operand: Callable[[int], Any], region: Callable[[int], Any]) -> Any:
    """The fx argument that a template stands for.

    Args:
        tree: The template, or a part of it.
        op: The op it belongs to; ``meta`` holds its opaque arguments.
        operand: Gives the node (or constant) of the op's n-th operand.
        region: Gives the ``get_attr`` node of the op's n-th region.

    Raises:
        EmitError: An argument has no torch meaning, or is only known to the process that captured it.
    """
    if isinstance(tree, Operand):
        return operand(tree.index)
    if isinstance(tree, Region):
        return region(tree.index)
    if isinstance(tree, ListAttr):
        return [decode(v, op, operand, region) for v in tree.items]
    if isinstance(tree, dict):
        return {k: decode(v, op, operand, region) for k, v in tree.items()}
    if isinstance(tree, tuple):
        items = tuple(decode(v, op, operand, region) for v in tree)
        head = tree[0] if tree else None
        if isinstance(head, Literal) and head.kind == "py" and head.text in _MAKERS:
            return _MAKERS[head.text](items[1:])
        if isinstance(head, Literal) and head.kind == "opaque" and ": tuple " in head.text:
            return items[0](*items[1:])
        return items
    if isinstance(tree, DType):
        return TO_TORCH[tree.name]
    if isinstance(tree, Literal):
        return _literal(tree, op)
    if isinstance(tree, sympy.Expr):
        if tree.is_Integer:
            return int(tree)
        raise EmitError(
            f"{op.attrs.get('target', op.name)}: the argument {tree} is a symbolic expression, which fx cannot hold",
            op=repr(op),
            source=op.loc.source or None,
            hint="pass it as an operand of type sym_int",
        )
    return tree


def _literal(literal: Literal, op: Op) -> Any:
    if literal.kind == "device":
        return torch.device(literal.text)
    if literal.kind == "py":
        return {"Ellipsis": Ellipsis, "None": None}.get(literal.text)
    if literal.kind == "complex":
        return complex(literal.text)
    if literal.kind == "op":
        return resolve_target(literal.text)
    if literal.kind == "opaque":
        kept = op.meta.get(OPAQUE)
        if kept is None:
            raise EmitError(
                f"{op.attrs.get('target', op.name)} has the argument {literal.text!r}, which IR text cannot hold",
                op=repr(op),
                source=op.loc.source or None,
                hint="emit the graph in the process that captured it",
            )
        return kept[int(literal.text.split(":")[0])]
    return getattr(torch, literal.text)
