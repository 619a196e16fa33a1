"""Reading an elementwise activation: one statement for each traced op, in a backend's language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moec.backends.calls import Language, UnsupportedError
from moec.ir.core import Graph, Value
from moec.ir.types import TensorType


@dataclass(frozen=True)
class Statement:
    """``name`` is ``text`` rounded to ``dtype``."""

    name: str
    text: str
    dtype: str


@dataclass(frozen=True)
class ElementwiseRegion:
    """An activation, read.

    Attributes:
        statements: One for every op; ``g`` and ``u`` (or ``g`` alone) are the rows, ``c0``, ``c1``, ... the captures.
        names: What each value of the region is called.
        result: The name of the result.
        captures: Element type of every captured tensor, and whether it has a value for each column (else one alone).
    """

    statements: tuple[Statement, ...]
    names: Mapping[Value, str]
    result: str
    captures: tuple[tuple[str, bool], ...]


def read_elementwise(region: Graph, rows: int, dtype: str, language: Language) -> ElementwiseRegion:
    """The statements of an elementwise region.

    Args:
        region: Takes ``rows`` row arguments, then its captures.
        rows: 2 for gate and up, 1 for one projection.
        dtype: Element type of the result, that of the down GEMM's operand.
        language: What its expressions are written in.

    Raises:
        UnsupportedError: Something in it is not elementwise or has no form in the language.
    """
    row = region.args[0].type
    assert isinstance(row, TensorType)
    names: dict[Value, str] = {}
    captures: list[tuple[str, bool]] = []
    statements: list[Statement] = []
    for arg, name in zip(region.args[:rows], ("g", "u"), strict=False):
        _check(arg, row, language, "rows")
        names[arg] = name
    for i, arg in enumerate(region.args[rows:]):
        type = _check(arg, row, language, "a captured tensor")
        captures.append((type.dtype.name, bool(type.shape) and type.shape[-1] == row.shape[-1]))
        names[arg] = f"c{i}"
    for position, op in enumerate(region.ops):
        if op is region.terminator:
            break
        if op.name != "torch.call" or len(op.results) != 1:
            raise UnsupportedError(f"the activation holds {op.attrs.get('target', op.name)}")
        type = _check(op.result, row, language, f"a result of {op.attrs['target']}")
        text = language.expression(op, names, "the activation")
        names[op.result] = f"v{position}"
        statements.append(Statement(names[op.result], text, type.dtype.name))
    (result,) = region.terminator.operands
    type = _check(result, row, language, "a result")
    if type.dtype.name != dtype or type.shape != row.shape:
        raise UnsupportedError(f"the activation gives {type.dtype}{list(type.shape)}, the down GEMM takes {dtype}")
    return ElementwiseRegion(tuple(statements), names, names[result], tuple(captures))


def _check(value: Value, row: TensorType, language: Language, what: str) -> TensorType:
    """The type of a value, which is rows or broadcasts along a row."""
    type = value.type
    if not isinstance(type, TensorType) or type.dtype.name not in language.types:
        raise UnsupportedError(f"the activation has {what} of type {getattr(type, 'dtype', type)}")
    width = row.shape[-1:]
    if type.shape not in (row.shape, width, (1, *width), (), (1,)):
        raise UnsupportedError(f"the activation has {what} of shape {list(type.shape)}")
    return type
