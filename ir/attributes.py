"""Attribute values: plain Python data plus a few literals that torch needs.

An attribute is ``None | bool | int | float | str | DType | Literal | sympy.Expr | Type | tuple | dict[str, attr]``.
Lists become tuples when an op is made, so that attributes compare and hash by value. In the ``args`` and ``kwargs``
templates of ``torch.call``, :class:`Operand` stands for the op's n-th operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Operand:
    """Place of operand ``index`` inside the argument template of ``torch.call``."""

    index: int


@dataclass(frozen=True)
class Region:
    """Place of nested graph ``index`` inside the argument template of a higher-order op (printed ``@0``)."""

    index: int


@dataclass(frozen=True)
class Literal:
    """A torch constant that is no number: ``#device<"cpu">``, ``#memory_format<"contiguous_format">``."""

    kind: str
    text: str


@dataclass(frozen=True)
class ListAttr:
    """A Python list inside an argument template (printed ``[a, b]``); a plain tuple is printed ``(a, b)``."""

    items: tuple[Any, ...]


def freeze(value: Any) -> Any:
    """Lists to :class:`ListAttr`, recursively; everything else as it is."""
    if isinstance(value, list):
        return ListAttr(tuple(freeze(v) for v in value))
    if isinstance(value, tuple):
        return tuple(freeze(v) for v in value)
    if isinstance(value, dict):
        return {k: freeze(v) for k, v in value.items()}
    return value


def map_operands(tree: Any, fn: Any) -> Any:
    """``tree`` with every :class:`Operand` replaced by ``fn(index)``; the containers keep their kind."""
    if isinstance(tree, Operand):
        return fn(tree.index)
    if isinstance(tree, ListAttr):
        return ListAttr(tuple(map_operands(v, fn) for v in tree.items))
    if isinstance(tree, tuple):
        return tuple(map_operands(v, fn) for v in tree)
    if isinstance(tree, dict):
        return {k: map_operands(v, fn) for k, v in tree.items()}
    return tree
