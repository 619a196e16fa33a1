"""Functions of whole rows as Triton: a row is one tensor in registers, reductions are over its live columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.backends.calls import UnsupportedError
from moec.backends.rows import read_rows
from moec.backends.triton.kernels.dtypes import rounded
from moec.backends.triton.kernels.expression import TRITON
from moec.ir.core import Graph


@dataclass(frozen=True)
class RowFunction:
    """A region as the statements of a program that has one row.

    Attributes:
        lines: They read the row at ``at`` and the captures at ``c0_at``, ``c1_at``, ...
        result: The name of the result, ``columns(width)`` wide.
        takes: Columns of the row it is given.
        width, dtype: Of the result.
        captures: Element type of every captured tensor, and whether it has a value for each column (else one alone).
    """

    lines: tuple[str, ...]
    result: str
    takes: int
    width: int
    dtype: str
    captures: tuple[tuple[str, bool], ...]


def padded(width: int) -> int:
    """Elements of the tensor that holds a row: a power of two."""
    return 1 << max(0, width - 1).bit_length()


@dataclass(frozen=True)
class _Row:
    """A value; ``start`` and ``step`` say which columns of the given row it is, None where it is computed."""

    name: str
    width: int | None
    moving: bool
    start: int | None = None
    step: int = 1


class _Statements:
    """A row program of Triton's statements.

    Args:
        where: What it is, for messages.
    """

    language = TRITON
    widest: int | None = 16384

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: list[str] = []
        self.captures: list[tuple[str, bool]] = []
        self.takes = 0

    def given(self, width: int) -> _Row:
        self.takes = width
        return self._columns(0, width, 1)

    def capture(self, index: int, dtype: str, width: int | None) -> _Row:
        self.captures.append((dtype, width is not None))
        if width is None:
            return self._put(f"tl.load(c{index}_at).to(tl.float32)", None, False)
        i = f"tl.arange(0, {padded(width)})"
        return self._put(f"tl.load(c{index}_at + {i}, mask={i} < {width}, other=0.0).to(tl.float32)", width, False)

    def each(self, text: str, operands: Sequence[_Row], dtype: str = "f32") -> _Row:
        width = next((o.width for o in operands if o.width is not None), None)
        return self._put(rounded(text, dtype), width, any(o.moving for o in operands))

    def total(self, node: _Row) -> _Row:
        return self._reduce(node, "sum", "0.0")

    def largest(self, node: _Row) -> _Row:
        return self._reduce(node, "max", 'float("-inf")')

    def smallest(self, node: _Row) -> _Row:
        return self._reduce(node, "min", 'float("inf")')

    def piece(self, node: _Row, start: int, width: int, step: int = 1) -> _Row:
        if node.start is None:
            raise UnsupportedError(f"{self.where} takes columns of what it has computed")
        return self._columns(node.start + start * node.step, width, node.step * step)

    def join(self, nodes: Sequence[_Row]) -> _Row:
        raise UnsupportedError(f"{self.where} joins {len(nodes)} rows")

    def _columns(self, start: int, width: int, step: int) -> _Row:
        """Columns of the given row."""
        i = f"tl.arange(0, {padded(width)})"
        at = f"at + {start} + {step} * {i}"
        name = self._put(f"tl.load({at}, mask={i} < {width}, other=0.0).to(tl.float32)", width, True).name
        return _Row(name, width, True, start, step)

    def _reduce(self, node: _Row, kind: str, neutral: str) -> _Row:
        assert node.width is not None
        text = node.name
        if padded(node.width) != node.width:
            text = f"tl.where(tl.arange(0, {padded(node.width)}) < {node.width}, {text}, {neutral})"
        return self._put(f"tl.{kind}({text}, 0)", None, node.moving)

    def _put(self, text: str, width: int | None, moving: bool) -> _Row:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return _Row(name, width, moving)


def compile_rows(region: Graph, where: str) -> RowFunction:
    """A region of whole rows as Triton.

    Args:
        region: Takes the rows ``[R, N]``, then its captures; gives rows ``[R, M]``.
        where: What it is, for messages ("the activation").

    Raises:
        UnsupportedError: It mixes rows, or an op in it is not known.
    """
    program = _Statements(where)
    result, dtype = read_rows(region, where, program)
    captures = tuple(program.captures)
    return RowFunction(tuple(program.lines), result.name, program.takes, result.width or 0, dtype, captures)
