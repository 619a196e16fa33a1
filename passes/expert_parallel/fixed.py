"""The flat form where every token gives each rank equally many slots: nothing has to be counted.

A router that chooses in groups of equal load (mixture of grouped experts, arXiv:2505.21411, section 3) gives every rank
the same number of rows, whatever the tokens, if each rank holds whole groups and all ranks have equally many tokens.
Splits are then known before a single id is, and ids travel beside the rows.
"""

from __future__ import annotations

from moec.ir.core import Value
from moec.ir.routing import equal_load_groups
from moec.ir.types import PlanType
from moec.passes.expert_parallel.route import Route, Writer, tensor_type
from moec.passes.expert_parallel.site import Site


def has_equal_loads(site: Site) -> bool:
    """True if every token has equally many slots on every rank."""
    load = equal_load_groups(site.op)
    return load is not None and len(set(site.sizes)) == 1 and site.sizes[0] % load.experts == 0


class Fixed(Route):
    """Fixed splits, without an exchange of counts."""

    def __init__(self, w: Writer, x: Value, ids: Value) -> None:
        site = w.site
        self.w, self.like, experts = w, tensor_type(ids), site.attr("experts")
        rows_type = w.slot_type(x, self.like)
        rows, self.plan = w.op("moe.dispatch", x, ids, types=[rows_type, PlanType(experts)], experts=experts)
        self.rows = self._out(rows)
        self.slots, self.tokens = w.slots(self.plan, self.like)
        local = w.op("moe.owners", ids, sizes=site.sizes)[1]
        self.ids = w.to(self._out(w.to(w.select(w.column(local), self.slots), "i32")), "i64")

    def _out(self, rows: Value) -> Value:
        return self.w.all_to_all(rows, "R", group=self.w.site.group, ranks=self.w.site.ranks)

    def go(self, tokens: Value) -> Value:
        return self._out(self.w.select(tokens, self.tokens))

    def go_slots(self, values: Value) -> Value:
        return self._out(self.w.select(self.w.column(values), self.slots))

    def back(self, rows: Value) -> Value:
        return self.w.all_to_all(rows, "S", group=self.w.site.group, ranks=self.w.site.ranks)
