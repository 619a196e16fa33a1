"""Which values of a graph may share memory: a union-find that follows the program from top to bottom."""

from __future__ import annotations

from moec.ir.core import Graph, Op, Value
from moec.passes.effects import may_hold_memory, shared_operands


def reaches_outside(op: Op) -> bool:
    """True for ops that hand out, and may write to, memory which is none of their operands: the module's own."""
    if op.name == "torch.call":
        return bool(op.attrs["target"].startswith("hop."))
    return op.name in ("torch.get_attr", "torch.opaque")


class AliasSets:
    """Sets of values that may share memory, for the part of the program seen so far.

    Memory from outside the graph (arguments, constants of the module) is one set: a caller may hand in the same
    tensor twice.
    """

    def __init__(self, graph: Graph) -> None:
        self._outside: list[Value] = []
        self._members: dict[Value, list[Value]] = {}
        for a in graph.args:
            if may_hold_memory(a.type):
                self._members[a] = self._outside
                self._outside.append(a)

    def add(self, op: Op) -> None:
        """Take the next op of the program into account."""
        shared = [op.operands[i] for i in sorted(shared_operands(op))]
        for r in op.results:
            if not may_hold_memory(r.type):
                continue
            self._members[r] = [r]
            for source in shared:
                self._merge(r, source)
            if reaches_outside(op):
                self._join(self._members[r], self._outside)

    def _merge(self, a: Value, b: Value) -> None:
        self._join(self.of(a), self.of(b))

    def _join(self, one: list[Value], other: list[Value]) -> None:
        if one is other:
            return
        # "outside" keeps its identity; else the smaller set moves
        if one is self._outside or (other is not self._outside and len(one) > len(other)):
            one, other = other, one
        other += one
        for v in one:
            self._members[v] = other

    def of(self, value: Value) -> list[Value]:
        """The values that may share memory with ``value``, itself among them."""
        return self._members.setdefault(value, [value])

    @property
    def outside(self) -> list[Value]:
        """The values that may lie in memory of the caller or of the module."""
        return self._outside

    def is_outside(self, value: Value) -> bool:
        """True if the memory of ``value`` may belong to the caller or to the module."""
        return self.of(value) is self._outside
