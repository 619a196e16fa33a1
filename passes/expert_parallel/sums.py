"""Routes whose results are added up on the way home: fewer bytes, in another order of sums."""

from __future__ import annotations

from moec.ir.core import Value
from moec.ir.types import TensorType
from moec.passes.expert_parallel.gather import Gather
from moec.passes.expert_parallel.hierarchical import Hierarchical
from moec.passes.expert_parallel.route import tensor_type


class GatherSums(Gather):
    """All-gather there, reduce-scatter back: a rank adds up what its experts give each token, then ranks are added."""

    def combine(self, rows: Value, weights: Value, result: TensorType) -> Value:
        everyone = self._all(weights)
        part_type = result.with_(shape=(tensor_type(everyone).shape[0], *result.shape[1:]))
        part = self.w.b.op("moe.combine", rows, everyone, self.inner, result_types=[part_type]).result
        return self._scatter(part, result)

    def sum_rows(self, rows: Value, like: TensorType) -> Value:
        return self._part(rows, like, "moe.sum_slots")

    def place(self, values: Value, like: TensorType) -> Value:
        return self._part(values, like, "moe.place_slots")

    def _part(self, rows: Value, like: TensorType, op: str) -> Value:
        count = tensor_type(self.own).shape[0]
        (part,) = self.w.op(op, rows, self.inner, types=[like.with_(shape=(count, *like.shape[1:]))])
        return self._scatter(part, like)

    def _scatter(self, part: Value, type: TensorType) -> Value:
        site = self.w.site
        attrs = {"group": site.group, "ranks": site.ranks}
        return self.w.wait(self.w.b.op("comm.reduce_scatter.start", part, self.tokens, attrs=attrs), type)


class HierarchicalSums(Hierarchical):
    """A node adds up what its experts give a token, and sends one row home; home adds the nodes' rows."""

    def combine(self, rows: Value, weights: Value, result: TensorType) -> Value:
        here = self._home_in_node(rows)
        factors = self._to_node(self.w.select(weights, self.tokens))
        part_type = result.with_(shape=(tensor_type(factors).shape[0], *result.shape[1:]))
        part = self.w.b.op("moe.combine", here, factors, self.inner, result_types=[part_type]).result
        return self._home(part, result)

    def sum_rows(self, rows: Value, like: TensorType) -> Value:
        return self._part(rows, like, "moe.sum_slots")

    def place(self, values: Value, like: TensorType) -> Value:
        return self._part(values, like, "moe.place_slots")

    def _part(self, rows: Value, like: TensorType, op: str) -> Value:
        count = tensor_type(self.ids_here).shape[0]
        types = [like.with_(shape=(count, *like.shape[1:]))]
        (part,) = self.w.op(op, self._home_in_node(rows), self.inner, types=types)
        return self._home(part, like)

    def _home(self, part: Value, type: TensorType) -> Value:
        rows = self.w.all_to_all(part, "U", self.recv, self.send, group=self.between, ranks=self.nodes)
        return self.w.op("moe.add_tokens", rows, self.tokens, self.x, types=[type])[0]
