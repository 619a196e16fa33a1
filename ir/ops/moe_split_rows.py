"""``moe.split_rows``: rows in chunks whose sizes are known when running."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.parallel_semantics import split_rows
from moec.ir.types import TensorType


@register_op
class SplitRows(OpDef):
    """The rows of every chunk, one after the other; they share the memory of all rows.

    ``%a, %b = moe.split_rows %rows, %counts {chunks = 2} : bf16[S0, 4096], bf16[S1, 4096]``
    The first ``N`` of ``%counts`` add up to the rows of the first chunk, and so on; rows behind the last stay out.
    """

    name = "moe.split_rows"
    operands = (
        OperandDef("rows", doc="rows, those of the first chunk first"),
        OperandDef("counts", doc="i64[K * N], rows of every chunk for every rank"),
    )
    attrs = (AttrDef("chunks", "int", "number of chunks K"),)
    results = ("chunks",)
    variadic_results = True

    def verify(self, op: Op) -> None:
        rows, chunks = op.operands[0].type, self.attr(op, "chunks")
        if not isinstance(rows, TensorType) or not rows.rank:
            self.fail(op, "rows must be a tensor with rows")
        if len(op.results) != chunks or chunks < 1:
            self.fail(op, f"there are {len(op.results)} results for {chunks} chunks")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return list(split_rows(inputs[0], inputs[1], self.attr(op, "chunks")))
