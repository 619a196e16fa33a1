"""The form in which every rank sees all tokens: an all-gather there, an all-to-all of expert rows back.

It sends a token to every rank, once. That is less than the flat form sends where a token has more experts than there
are ranks, and little more where it has about as many; and it needs no counts before tokens can leave.
"""

from __future__ import annotations

from moec.ir.core import Value
from moec.ir.types import PlanType, TensorType
from moec.passes.expert_parallel.route import Route, Writer, symbol, tensor_type


class Gather(Route):
    """All tokens to all ranks; each takes the slots of its own experts."""

    def __init__(self, w: Writer, x: Value, ids: Value) -> None:
        site = w.site
        self.w, t = w, tensor_type(ids)
        (mine,) = w.op("moe.count_tokens", x)
        self.tokens = w.all_gather(mine, type=TensorType.of("i64", site.ranks, device=t.device))
        everyone = w.to(self._all(w.to(ids, "i32")), "i64")
        (self.own,) = w.op("moe.own_ids", everyone, group=site.group, sizes=site.sizes)
        gathered = self._all(x)
        all_rows, self.inner = w.op(
            "moe.dispatch", gathered, self.own, types=[w.slot_type(gathered, t), PlanType(site.own)],
            experts=site.own, sentinels=True,
        )  # fmt: skip
        by_expert = w.op("moe.loads", all_rows, self.inner, sizes=(site.own,))[0]
        _, self.ids = w.arrivals(by_expert, 1)
        self.rows = self._live(all_rows)
        reach_types = [
            TensorType.of("i64", symbol("U"), device=t.device),
            TensorType.of("i64", symbol("U"), t.shape[1], device=t.device),
            TensorType.of("i64", site.ranks, device=t.device),
            PlanType(site.ranks),
        ]
        *_, self.plan = w.op("moe.reach", ids, types=reach_types, sizes=site.sizes)
        counts = TensorType.of("i64", site.ranks, device=t.device)
        self.home = w.op("moe.loads", x, self.plan, types=[counts, counts], sizes=(1,) * site.ranks)[1]
        self.slots_back = w.op("moe.segment_slots", self.own, self.tokens)[0]
        self._inner_slots: tuple[Value, Value] | None = None

    def _all(self, rows: Value) -> Value:
        return self.w.all_gather(rows, self.tokens)

    def _live(self, rows: Value) -> Value:
        return self.w.op("moe.live_rows", rows, self.inner, types=[self.w.rows(rows, "R")])[0]

    def _slots(self) -> tuple[Value, Value]:
        self._inner_slots = self._inner_slots or self.w.slots(self.inner, tensor_type(self.own))
        return self._inner_slots

    def go(self, tokens: Value) -> Value:
        return self._live(self.w.select(self._all(tokens), self._slots()[1]))

    def go_slots(self, values: Value) -> Value:
        return self._live(self.w.select(self.w.column(self._all(values)), self._slots()[0]))

    def back(self, rows: Value) -> Value:
        (by_slot,) = self.w.op("moe.slot_rows", rows, self.inner, types=[rows.type])
        site = self.w.site
        return self.w.all_to_all(by_slot, "S", self.slots_back, self.home, group=site.group, ranks=site.ranks)
