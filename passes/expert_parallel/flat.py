"""The flat form: one all-to-all there and one back, a row for every slot.

Rows are sorted by expert, so those for one rank lie together. Ranks first tell each other how many rows go to each
expert. Rows then come in order of rank, and inside in that of expert, token and choice: an expert sees them in the very
order in which one process would have them.
"""

from __future__ import annotations

from moec.ir.core import Value
from moec.ir.types import PlanType
from moec.passes.expert_parallel.route import Route, Writer, tensor_type


class Flat(Route):
    """Variable splits, after an exchange of counts."""

    def __init__(self, w: Writer, x: Value, ids: Value) -> None:
        site = w.site
        self.w, self.group, self.ranks = w, site.group, site.ranks
        t, experts = tensor_type(ids), site.attr("experts")
        rows, self.plan = w.op(
            "moe.dispatch", x, ids, types=[w.slot_type(x, t), PlanType(experts)], experts=experts,
            sentinels=site.attr("sentinels"),
        )  # fmt: skip
        by_expert, self.send = w.op("moe.loads", rows, self.plan, sizes=site.sizes)
        counts = w.exchange_counts(by_expert, site.sizes, site.own, group=self.group)
        self.recv, self.ids = w.arrivals(counts, self.ranks)
        self._slots: tuple[Value, Value] | None = None
        self.like = t
        self.rows = self._out(rows)

    def _out(self, rows: Value) -> Value:
        return self.w.all_to_all(rows, "R", self.send, self.recv, group=self.group, ranks=self.ranks)

    def slots(self) -> tuple[Value, Value]:
        """Slot and token of every row that is sent."""
        self._slots = self._slots or self.w.slots(self.plan, self.like)
        return self._slots

    def go(self, tokens: Value) -> Value:
        return self._out(self.w.select(tokens, self.slots()[1]))

    def go_slots(self, values: Value) -> Value:
        return self._out(self.w.select(self.w.column(values), self.slots()[0]))

    def back(self, rows: Value) -> Value:
        return self.w.all_to_all(rows, "S", self.recv, self.send, group=self.group, ranks=self.ranks)
