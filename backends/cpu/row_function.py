"""A region of whole rows as the body of a C++ function."""

from __future__ import annotations

from dataclasses import dataclass

from moec.backends.cpu.row_program import RowProgram
from moec.backends.rows import read_rows
from moec.ir.core import Graph


@dataclass(frozen=True)
class RowFunction:
    """A region as the body of a C++ function of a row.

    Attributes:
        takes: Columns of the row it is given.
        width, dtype: Of the result.
        floats: Of working memory.
    """

    body: str
    takes: int
    width: int
    dtype: str
    floats: int


def compile_rows(region: Graph, where: str) -> RowFunction:
    """A region of whole rows as C++.

    Args:
        region: Takes the rows ``[R, N]``, then its captures; gives rows ``[R, M]``.
        where: What it is, for messages ("the activation").

    Raises:
        UnsupportedError: It mixes rows, or an op in it is not known.
    """
    program = RowProgram()
    result, dtype = read_rows(region, where, program)
    program.result(result)
    return RowFunction(program.body(), program.takes, result.width or 0, dtype, program.floats)
