"""``moe.activation``: the expert's program between its GEMMs, as a region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.moe_semantics import split_gate
from moec.ir.opdef import AttrDef, OpDef, OperandDef, RegionDef, register_op

LAYOUTS = ("concat", "interleaved", "separate", "single", "rows")


@register_op
class Activation(OpDef):
    """Applies a traced function to every row.

    ``%a = moe.activation [%h] {layout = "concat"} { (%g, %u) -> ... } : bf16[2*T, 14336]``
    ``layout`` says where gate and up lie in the rows: ``concat`` halves, ``interleaved`` even and odd columns,
    ``separate`` two tensors, ``single`` no gate; there the region is elementwise over ``(%g, %u)`` or ``(%h)``.
    ``rows`` means a function of whole rows (a norm, say). Captured tensors (norm weights, limits) follow as further
    arguments.
    """

    name = "moe.activation"
    operands = (
        OperandDef("rows", "many", "[R, N]; two tensors for separate"),
        OperandDef("captures", "many", "tensors that the region uses besides the rows"),
    )
    attrs = (AttrDef("layout", "str", "where gate and up lie", default="concat", choices=LAYOUTS),)
    regions = (RegionDef("body", "the function of one row"),)

    def verify(self, op: Op) -> None:
        layout, rows = self.attr(op, "layout"), op.group("rows")
        if len(rows) != (2 if layout == "separate" else 1):
            self.fail(op, f"layout {layout!r} does not take {len(rows)} row tensors")
        inputs = 1 if layout in ("single", "rows") else 2
        want = inputs + len(op.group("captures"))
        if len(op.regions[0].args) != want:
            self.fail(op, f"the region takes {len(op.regions[0].args)} arguments, layout and captures give {want}")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        n = op.groups[0]
        return run(op.regions[0], [*split_gate(inputs[:n], self.attr(op, "layout")), *inputs[n:]])
