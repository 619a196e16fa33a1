"""``moe.reach``: which tokens go to which node, each once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.parallel_semantics import reach
from moec.ir.types import TensorType


@register_op
class Reach(OpDef):
    """Copies of tokens for nodes: one for every node that holds an expert of the token, however many it holds.

    ``%tokens, %ids, %copies, %plan = moe.reach %chosen {sizes = (4, 4)} : i64[U], i64[U, 2], i64[2], !moe.plan<2>``
    ``tokens`` names the token of every copy, those for node 0 first; ``ids`` holds the experts it is sent for, counted
    from the node's first, and -1 elsewhere; ``copies`` counts them by node. The plan sorts all slots by node: what
    comes back slot by slot is combined with it.
    """

    name = "moe.reach"
    operands = (OperandDef("chosen", doc="int[T, k] experts"),)
    attrs = (AttrDef("sizes", "any", "experts of every node"),)
    results = ("tokens", "ids", "copies", "plan")

    def verify(self, op: Op) -> None:
        ids = op.operands[0].type
        if not isinstance(ids, TensorType) or ids.rank != 2 or ids.dtype.kind not in ("int", "uint"):
            self.fail(op, "the chosen experts must be an integer matrix [T, k]")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return list(reach(inputs[0], self.attr(op, "sizes")))
