"""``return``: closes a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, check_template, register_op


@register_op
class Return(OpDef):
    """Ends a graph and gives its outputs.

    ``template`` is absent where the outputs are just the operands in order. A captured fx graph may return constants
    or nested tuples; then it holds that tree, with ``Operand(i)`` where the values go.
    """

    name = "return"
    operands = (OperandDef("values", "many", "the outputs"),)
    attrs = (AttrDef("template", "any", "tree of outputs of a captured graph", default=None),)
    results = ()
    pure = False

    def verify(self, op: Op) -> None:
        if self.attr(op, "template") is not None:
            check_template(self, op, op.attrs["template"])

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return list(inputs)
