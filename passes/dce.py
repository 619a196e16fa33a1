"""``dce``: removes what nobody uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moec.ir.core import Graph, Op
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.effects import is_pure, is_removable
from moec.passes.registry import register_pass


def erase_unused(start: Op, erase: Callable[[Op], None] = Op.erase) -> None:
    """Erase ``start`` and, in turn, its makers, as far as they are pure and unused.

    Args:
        start: An op of a graph.
        erase: Does the erasing of one op.
    """
    work = [start]
    while work:
        op = work.pop()
        if op.parent is not None and is_removable(op):
            makers = [v.op for v in op.operands if v.op is not None]
            erase(op)
            work += makers


@register_pass
@dataclass(frozen=True)
class DeadCodeElimination(Pass):
    """Removes pure ops without uses, in nested graphs too.

    Ops with effects stay, used or not; arguments of graphs stay, since callers count on them.
    """

    name = "dce"
    pass_class = PassClass.BITWISE

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        removed = self._run_on(graph, ctx)
        return PassResult(removed > 0, {"removed": removed})

    def _run_on(self, graph: Graph, ctx: PassContext) -> int:
        dead: set[Op] = set()
        removed = 0
        for op in reversed(graph.ops):
            # A use by a dead op is no use. Users come after makers, so one sweep from the end finds all of them.
            if op.name != "return" and all(user in dead for r in op.results for user in r.users) and is_pure(op):
                if not ctx.take_fuel(self.name, "remove", op):
                    break
                dead.add(op)
            else:
                removed += sum(self._run_on(region, ctx) for region in op.regions)
        graph.erase_many(dead)
        return removed + len(dead)
