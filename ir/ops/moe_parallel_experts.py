"""``moe.parallel_experts``: a routed expert layer whose experts lie on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, RegionDef, register_op
from moec.ir.ops.moe_experts import Experts
from moec.ir.types import TensorType

FORMS = ("flat", "fixed", "hierarchical", "gather")


@register_op
class ParallelExperts(OpDef):
    """A ``moe.experts`` whose weights are this rank's share: tokens travel to their experts, results travel home.

    ``%y = moe.parallel_experts %x, %ids, %w, [%w13], [%w2] {experts = 8, group = "ep", sizes = (2, 2, 2, 2)} {...}``
    The regions are this rank's programs: what it computes, sends and waits for, and the same for the gradients. Rank r
    holds the next ``sizes[r]`` experts; ids count all of them. A slot's row comes home as the expert made it and is
    combined there, in order of k: the result has the bits of one process that holds all experts. Nothing but the
    operands is kept for the backward, so rows travel there a second time.

    What does not wait for rows may be computed here while they travel: a shared expert reads the operands of
    ``beside``, and its result is a further one. The forward gives all results, the backward begins with their
    gradients.
    """

    name = "moe.parallel_experts"
    operands = (
        *(OperandDef(o.name, o.arity, o.doc.replace("[E", "[E'")) for o in Experts.operands),
        OperandDef("beside", "many", "what is read by that which is computed beside the layer"),
    )
    attrs = (
        AttrDef("experts", "int", "number of experts E on all ranks"),
        AttrDef("sentinels", "bool", "ids outside 0 .. E-1 mean no expert", default=False),
        AttrDef("group", "str", "name of the group, or mesh axis"),
        AttrDef("sizes", "any", "experts of every rank"),
        AttrDef(
            "form", "str", "how tokens travel", default="flat", choices=("flat", "fixed", "hierarchical", "gather")
        ),
        AttrDef("backend", "str", "who runs the experts of this rank; the reference where it is empty", default=""),
    )
    regions = (
        RegionDef("forward", "from the operands to the results"),
        RegionDef("backward", "from the results' gradients and the operands to the gradients of all but ids"),
    )
    results = ("result", "beside")
    variadic_results = True

    def verify(self, op: Op) -> None:
        if sum(self.attr(op, "sizes")) != self.attr(op, "experts"):
            self.fail(op, f"sizes {self.attr(op, 'sizes')} do not add up to {self.attr(op, 'experts')} experts")
        x, ids, w = (v.type for v in op.operands[:3])
        if not all(isinstance(t, TensorType) and t.rank == 2 for t in (x, ids, w)):
            self.fail(op, "x, ids and weights must be matrices [T, H], [T, k], [T, k]")
        forward, backward = op.regions
        if not op.results or (len(op.results) > 1) != bool(op.group("beside")):
            self.fail(op, "there is a result, and others where there are operands beside")
        if len(forward.args) != len(op.operands) or len(backward.args) != len(op.operands) + len(op.results):
            self.fail(op, "the regions take the operands, the second one behind the results' gradients")
        if len(forward.outputs) != len(op.results) or len(backward.outputs) != len(op.operands) - 1:
            self.fail(op, "the regions give the results, and a gradient for every operand but ids")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return run(op.regions[0], inputs)
