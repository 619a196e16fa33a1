"""``moe.begin``: a spread layer up to where it would wait for rows the first time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import OpDef, RegionDef, op_def, register_op
from moec.ir.ops.moe_parallel_experts import ParallelExperts
from moec.ir.staged import Staged, stops
from moec.ir.types import TokenType, Type


@register_op
class Begin(OpDef):
    """Begins a ``moe.parallel_experts``: its forward runs up to the first wait for rows, and is left there.

    ``%t = moe.begin %x, %ids, %w, [%w13], [%w2] {experts = 8, group = "ep", sizes = (4, 4)} {...} : !comm.token``
    Each ``moe.resume`` runs it on to the next such wait, the last one to its end. What stands between runs while rows
    travel. There are no gradients: the layer that trains is one op.
    """

    name = "moe.begin"
    operands = ParallelExperts.operands
    attrs = ParallelExperts.attrs
    regions = (RegionDef("forward", "from the operands to the results"),)
    results = ("token",)

    def infer(self, op: Op) -> Sequence[Type] | None:
        return [TokenType()]

    def verify(self, op: Op) -> None:
        if len(op.regions[0].args) != len(op.operands):
            self.fail(op, "the program takes the operands")
        if not stops(op.regions[0]):
            self.fail(op, "the program waits for no rows, so there is nothing to be left for")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        def execute(inner: Op, values: Sequence[Any]) -> list[Any]:
            return op_def(inner.name).evaluate(inner, values, run)

        return [Staged(op.regions[0], inputs, stops(op.regions[0]), execute)]
