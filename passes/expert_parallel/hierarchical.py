"""The node-aware form: a token goes to each node once, and is spread over the node's ranks there.

Links between nodes are slower than those inside. In the flat form a token crosses as often as it has experts on another
node; here it crosses once for each node, to the rank that has this rank's place there (as DeepSeek-V3's dispatch does,
arXiv:2412.19437, section 3.2.2; Pangu Ultra MoE, arXiv:2505.04519). Expert rows come back one for each slot, so that
they can be combined at home in order of k.

Two groups belong to the axis: ``<axis>.node`` joins the ranks of one place on all nodes, ``<axis>.local`` those of one
node.
"""

from __future__ import annotations

from moec.ir.core import Value
from moec.ir.types import PlanType, TensorType
from moec.passes.expert_parallel.route import Route, Writer, symbol, tensor_type


class Hierarchical(Route):
    """Between nodes once a token, inside a node once a slot."""

    def __init__(self, w: Writer, x: Value, ids: Value, nodes: int, rank: int) -> None:
        site = w.site
        self.w, self.x, self.nodes, self.each = w, x, nodes, site.ranks // nodes
        self.between, self.within = f"{site.group}.node", f"{site.group}.local"
        by_node = [site.sizes[n * self.each : (n + 1) * self.each] for n in range(nodes)]
        here = by_node[max(0, rank) // self.each]
        t = tensor_type(ids)
        copies = TensorType.of("i64", nodes, device=t.device)
        types = [
            TensorType.of("i64", symbol("U"), device=t.device),
            TensorType.of("i64", symbol("U"), t.shape[1], device=t.device),
            copies,
            PlanType(nodes),
        ]
        self.tokens, local, self.send, self.plan = w.op("moe.reach", ids, types=types, sizes=tuple(map(sum, by_node)))
        self.recv = w.all_to_all(self.send, "", group=self.between, ranks=nodes, type=copies)
        self.ids_here = w.to(self._to_node(w.to(local, "i32")), "i64")
        x_here = self._to_node(w.select(x, self.tokens))
        experts = sum(here)
        rows, self.inner = w.op(
            "moe.dispatch", x_here, self.ids_here, types=[w.slot_type(x_here, t), PlanType(experts)],
            experts=experts, sentinels=True,
        )  # fmt: skip
        by_expert, self.send_here = w.op("moe.loads", rows, self.inner, sizes=here)
        counts = w.exchange_counts(by_expert, here, site.own, group=self.within)
        self.recv_here, self.ids = w.arrivals(counts, self.each)
        self.rows = self._in_node(rows)
        slots_type = TensorType.of("i64", nodes, device=t.device)
        self.home = w.op("moe.loads", x, self.plan, types=[slots_type, slots_type], sizes=(1,) * nodes)[1]
        self.slots_back = w.op("moe.segment_slots", self.ids_here, self.recv)[0]
        self._inner_slots: tuple[Value, Value] | None = None

    def _to_node(self, rows: Value) -> Value:
        return self.w.all_to_all(rows, "P", self.send, self.recv, group=self.between, ranks=self.nodes)

    def _in_node(self, rows: Value) -> Value:
        return self.w.all_to_all(rows, "R", self.send_here, self.recv_here, group=self.within, ranks=self.each)

    def _slots(self) -> tuple[Value, Value]:
        """Slot and copy of every row that is spread over the node."""
        self._inner_slots = self._inner_slots or self.w.slots(self.inner, tensor_type(self.ids_here))
        return self._inner_slots

    def go(self, tokens: Value) -> Value:
        return self._in_node(self.w.select(self._to_node(self.w.select(tokens, self.tokens)), self._slots()[1]))

    def go_slots(self, values: Value) -> Value:
        here = self._to_node(self.w.select(values, self.tokens))
        return self._in_node(self.w.select(self.w.column(here), self._slots()[0]))

    def _home_in_node(self, rows: Value) -> Value:
        return self.w.all_to_all(rows, "L", self.recv_here, self.send_here, group=self.within, ranks=self.each)

    def back(self, rows: Value) -> Value:
        w, here = self.w, self._home_in_node(rows)
        (by_slot,) = w.op("moe.slot_rows", here, self.inner, types=[here.type])
        return w.all_to_all(by_slot, "S", self.slots_back, self.home, group=self.between, ranks=self.nodes)
