"""``cse``: computes equal things once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from moec.ir.core import Graph, Op, Value
from moec.passes.aliases import AliasSets, reaches_outside
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.effects import is_pure, may_hold_memory, shared_operands, written_operands
from moec.passes.registry import register_pass
from moec.passes.structure import op_key


@register_pass
@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Merges pure ops that are equal: same operands, attributes, result types and nested graphs.

    Two things that look equal are kept apart where merging could be seen: memory that something writes to lies
    between them or is what they make, or both are outputs of the graph, which the caller may write to separately.
    """

    name = "cse"
    pass_class = PassClass.BITWISE

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        stats = {"merged": 0}
        for nested in [graph, *(r for op in graph.walk() for r in op.regions)]:
            if not self._run_on(nested, ctx, stats):
                break
        return PassResult(stats["merged"] > 0, stats)

    def _run_on(self, graph: Graph, ctx: PassContext, stats: dict[str, int]) -> bool:
        """Merge in one graph; False when the fuel is spent."""
        written = written_values(graph)
        escaping = escaping_values(graph)
        writes = 0
        known: dict[Hashable, Op] = {}
        merged: list[Op] = []
        spent = False
        for op in graph.ops:
            if op.name == "return":
                continue
            if not is_pure(op):
                writes += 1
                continue
            if any(r in written for r in op.results):
                continue
            # What reads memory that is written somewhere equals only what reads it between the same two writes.
            epoch = writes if any(v in written for v in op.operands) else -1
            first = known.setdefault((op_key(op), epoch), op)
            if first is op:
                continue
            if any(a in escaping and b in escaping for a, b in zip(first.results, op.results, strict=True)):
                ctx.remark("missed", self.name, "both results may be outputs, which must not share memory", op)
                continue
            if not ctx.take_fuel(self.name, "merge", op):
                spent = True
                break
            for kept, gone in zip(first.results, op.results, strict=True):
                if gone in escaping:
                    escaping.add(kept)
                gone.replace_all_uses_with(kept)
            merged.append(op)
        graph.erase_many(merged)
        stats["merged"] += len(merged)
        return not spent


def written_values(graph: Graph) -> set[Value]:
    """The values whose memory some op of the graph may write to."""
    aliases = AliasSets(graph)
    targets: list[Value] = []
    outside = False
    for op in graph.ops:
        aliases.add(op)
        targets += [op.operands[i] for i in written_operands(op)]
        outside = outside or (reaches_outside(op) and not is_pure(op))
    found = {v for t in targets for v in aliases.of(t)}
    return found | set(aliases.outside) if outside else found


def escaping_values(graph: Graph) -> set[Value]:
    """The values whose memory may be that of an output of the graph."""
    found: set[Value] = {v for v in graph.outputs if may_hold_memory(v.type)}
    for op in reversed(graph.ops):
        if any(r in found for r in op.results):
            found |= {op.operands[i] for i in shared_operands(op)}
    return found
