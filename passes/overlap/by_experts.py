"""A program of a layer cut along its experts: chunk after chunk, some of every rank's experts with all their rows.

Experts are numbered anew, those of the first chunk before those of the second and inside a chunk rank after rank, so
that one dispatch sorts the rows by chunk and a chunk is a piece of them. From there on every value that has a row for
each of these becomes one value a chunk, by the dataflow: rows that are narrowed, sent, waited for, computed and sent
home. Counts travel once, and rows are put together again where tokens take them.

A chunk of experts as they stand reads a piece of the rank's weights. Where chunks hold any experts, each reads all of
the rank's, by ids that are the rank's own numbers, and experts of other chunks have no rows. Neither copies weights.

A rank's own rows may be a chunk before all others: they need no links, and their experts run while the first rows of
the others travel. Own experts then run twice, with other rows.

Each row meets the weights that it met before, each expert has the rows it had before in the same order, and a token
adds its rows in the same order: no bit changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy

from moec.ir.beside import own_experts
from moec.ir.builder import Builder
from moec.ir.core import Graph, Op, Value, clone_op
from moec.ir.opdef import op_def
from moec.ir.types import TensorType, Type
from moec.passes.calls import is_call
from moec.passes.expert_parallel.route import tensor_type
from moec.passes.overlap.chunks import Chunks, Range, Whole

ROW_OPS = ("comm.all_to_all.start", "comm.wait", "quant.rows", "quant.restore")
"""Ops that make a row of each row."""
ROW_CALLS = ("aten.ones_like.default", "aten.to.dtype", "aten.index_select.default")
HOME_OPS = ("moe.combine", "moe.sum_slots", "moe.place_slots")
"""Ops that take all rows, first operand, in the order of a plan."""
WEIGHTS = ("up", "down", "up_bias", "down_bias")


class _Cutter:
    """Writes the cut program."""

    def __init__(self, region: Graph, plan: Chunks) -> None:
        self.region, self.plan, self.sizes = region, plan, plan.sizes
        self.chunks = plan.count
        self.graph = Graph(region.name, attrs=dict(region.attrs), meta=dict(region.meta))
        self.b = Builder(self.graph)
        self.whole: dict[Value, Value] = {a: self.graph.add_arg(a.type, a.name) for a in region.args}
        self.parts: dict[Value, list[Value]] = {}
        self.sorted: set[Value] = set()  # values in the plan's order that were not split yet
        self.counts: Value | None = None
        self.own_counts: Value | None = None
        self.dispatch = self._only("moe.dispatch")
        self.experts = own_experts(region)
        self.layer = next(iter(self.experts), None)

    def _only(self, name: str) -> Op:
        found = [op for op in self.region.ops if op.name == name]
        if len(found) != 1:
            raise Whole(f"its rows are not sorted once and sent straight to their experts ({len(found)} {name})")
        return found[0]

    def run(self) -> Graph:
        own = self._own()
        for here in (self.plan.own_first, self.plan.rank):
            if here >= 0 and self.sizes[here] != own:
                raise Whole(f"rank {here} holds {self.sizes[here]} experts, the program is for {own}")
        for op in self.region.ops:
            self.b.loc = op.loc
            self._write(op)
        return self.graph

    def _own(self) -> int:
        assert self.layer is not None
        return int(op_def(self.layer.name).attr(self.layer, "experts"))

    def _rank_like(self, own: int) -> int:
        """A rank that holds as many experts as this one: as they stand, chunks are the same on all such ranks."""
        if self.plan.orders:
            return self.plan.rank
        if own not in self.sizes:
            raise Whole(f"no rank of {self.sizes} holds {own} experts")
        return self.sizes.index(own)

    def _range(self, chunk: int) -> Range:
        return self.plan.at(chunk, self._rank_like(self._own()))

    def _held(self, chunk: int) -> tuple[int, ...]:
        """The rank's experts that run for the chunk, where they are no piece of its own."""
        return self.plan.held(self.plan.rank, self._range(chunk))

    def _stays(self, chunk: int) -> bool:
        """Whether the chunk is of own rows."""
        return chunk == 0 and self.plan.own_first >= 0

    def _write(self, op: Op) -> None:
        if op is self.dispatch:
            self._dispatch(op)
        elif op.name == "moe.loads":
            self._loads(op)
        elif op.name == "moe.slots":
            self._clone(op)
            self.sorted.update(op.results)
        elif op.name == "moe.arrivals":
            self._arrivals(op)
        elif op in self.experts:
            self._experts(op)
        elif op.name in HOME_OPS:
            self._clone(op, {0: self._together(op.operands[0])})
        elif not any(v in self.parts or v in self.sorted for v in op.operands):
            self._clone(op)
        elif op.name in ROW_OPS or is_call(op, *ROW_CALLS):
            self._each(op)
        else:
            raise Whole(f"{op.name} takes rows of several chunks")

    def _clone(self, op: Op, instead: dict[int, Value] | None = None) -> None:
        given = [(instead or {}).get(i) or self.whole[v] for i, v in enumerate(op.operands)]
        at = iter(given)
        self.b.insert(clone_op(op, lambda _: next(at), self.whole))

    def _dispatch(self, op: Op) -> None:
        if op_def(op.name).attr(op, "experts") != sum(self.sizes):
            raise Whole("its rows are sorted by something else than all experts")
        x, ids = (self.whole[v] for v in op.operands)
        places = self.b.op("moe.renumber", ids, attrs={"order": self.plan.order()}).result
        self._clone(op, {0: x, 1: places})
        self.sorted.add(op.results[0])

    def _loads(self, op: Op) -> None:
        if self.whole.get(op.operands[1]) is not self.whole[self.dispatch.results[1]] or self.counts is not None:
            raise Whole("other rows than those of its tokens are counted")
        attrs = {"sizes": self.plan.parts(), "order": self.plan.order()}
        rows, plan = (self.whole[v] for v in op.operands)
        by_expert, self.counts = self.b.op("moe.loads", rows, plan, attrs=attrs).results
        self.whole[op.results[0]] = by_expert if self.plan.own_first < 0 else self._sent(by_expert)
        like = tensor_type(op.results[1])
        count = len(self.sizes)
        self.parts[op.results[1]] = [
            self.b.call("aten.slice.Tensor", [self.counts, 0, c * count, (c + 1) * count], result_types=[like]).result
            for c in range(self.chunks)
        ]

    def _sent(self, by_expert: Value) -> Value:
        """The counts that ranks tell each other: of own experts, whose rows stay, none."""
        here = self.plan.own_first
        first, last = sum(self.sizes[:here]), sum(self.sizes[: here + 1])
        pieces = [self._slice(by_expert, *edges) for edges in ((0, first), (first, last), (last, sum(self.sizes)))]
        self.own_counts = pieces[1]
        like = tensor_type(pieces[1])
        pieces[1] = self.b.call("aten.zeros_like.default", [pieces[1]], result_types=[like]).result
        return self.b.call("aten.cat.default", [pieces], result_types=[by_expert.type]).result

    def _slice(self, value: Value, first: int, last: int) -> Value:
        t = tensor_type(value)
        some = t.with_(shape=(sympy.Integer(last - first), *t.shape[1:]))
        return self.b.call("aten.slice.Tensor", [value, 0, first, last], result_types=[some]).result

    def _arrivals(self, op: Op) -> None:
        by_rank, ids = [], []
        for chunk in range(self.chunks):
            mine = {"among": self._held(chunk)} if self.plan.orders else {"only": self._range(chunk)}
            counts, attrs = self.whole[op.operands[0]], {**op.attrs, **mine}
            if self._stays(chunk):
                assert self.own_counts is not None
                counts, attrs = self.own_counts, {"ranks": 1}
            made = self.b.op(
                op.name, counts, attrs=attrs,
                result_types=[op.results[0].type, self._type(op.results[1].type, chunk)],
            ).results  # fmt: skip
            by_rank.append(made[0])
            ids.append(made[1])
        self.parts[op.results[0]], self.parts[op.results[1]] = by_rank, ids

    def _type(self, type: Type, chunk: int) -> Type:
        """The type of a chunk's rows: their number is a symbol of its own."""
        if not isinstance(type, TensorType) or not type.rank:
            return type
        rows = str(type.shape[0]) if type.shape[0].is_Symbol else "S"
        rows = "L" if self._stays(chunk) else rows
        return type.with_(shape=(sympy.Symbol(f"{rows}{chunk}", integer=True), *type.shape[1:]))

    def _split(self, value: Value) -> list[Value]:
        """The chunks of a value that has a row for each of the plan's."""
        if value in self.sorted:
            self.sorted.remove(value)
            if self.counts is None:
                raise Whole("rows are sent before they are counted")
            types = [self._type(value.type, c) for c in range(self.chunks)]
            attrs = {"chunks": self.chunks}
            self.parts[value] = self.b.op(
                "moe.split_rows", self.whole[value], self.counts, attrs=attrs, result_types=types
            ).results
        return self.parts[value]

    def _part(self, value: Value, chunk: int) -> Value:
        return self._split(value)[chunk] if value in self.parts or value in self.sorted else self.whole[value]

    def _each(self, op: Op) -> None:
        """A copy of ``op`` for every chunk; own rows are there without a copy of what brings them."""
        staying = [0] if self.plan.own_first >= 0 and op.dialect == "comm" else []
        here = [self._part(op.operands[0], chunk) for chunk in staying]
        chunks = range(len(staying), self.chunks)
        self._copies(op, lambda chunk: [self._part(v, chunk) for v in op.operands], op.results, chunks)
        if staying:
            self.parts[op.result] = here + self.parts[op.result]

    def _copies(
        self, op: Op, operands: Callable[[int], list[Value]], rows: Sequence[Value], chunks: Sequence[int]
    ) -> list[Op]:
        made: list[Op] = []
        for chunk in chunks:
            types = [self._type(r.type, chunk) if r in rows else r.type for r in op.results]
            copy = Op(
                op.name, operands(chunk), types, attrs=op.attrs, regions=[r.clone() for r in op.regions],
                groups=op.groups, loc=op.loc,
            )  # fmt: skip
            made.append(self.b.insert(copy))
        for i, result in enumerate(op.results):
            self.parts[result] = [copy.results[i] for copy in made]
        return made

    def _together(self, value: Value) -> Value:
        """All chunks' rows, one after the other."""
        if value not in self.parts and value not in self.sorted:
            return self.whole[value]
        return self.b.call("aten.cat.default", [self._split(value)], result_types=[value.type]).result

    def _experts(self, op: Op) -> None:
        """The experts of every chunk, on views of their weights, or in another order on the whole of them."""
        if op is not self.layer:
            raise Whole("its experts run more than once")
        places = {i: n for n in WEIGHTS for i in self._places(op, n)}
        needs = op.attrs.get("needs")
        skip = needs is not None
        if needs is not None and any(need for i, need in enumerate(needs) if i > 2 and i + skip not in places):
            raise Whole("what its activation uses besides has a gradient, a sum over all experts")

        def operands(chunk: int) -> list[Value]:
            first, last = self._range(chunk)
            found = []
            for i, value in enumerate(op.operands):
                if i not in places or self.plan.orders:
                    found.append(self._part(value, chunk))
                    continue
                found.append(self._slice(self.whole[value], first, last))
            return found

        needed = [i for i, need in enumerate(needs or ()) if need]
        weights = [r for r, i in zip(op.results, needed, strict=False) if i > 2]
        if weights and self.plan.own_first >= 0:
            raise Whole("gradients of own experts would be added up in another order")
        rows = [r for r in op.results if r not in weights]
        made = self._copies(op, operands, rows, range(self.chunks))
        for chunk, copy in enumerate(made):
            first, last = self._range(chunk)
            if not self.plan.orders:
                copy.attrs["experts"] = last - first
            elif needs is not None:
                copy.attrs["only"] = self._held(chunk)
        for result in weights:
            for chunk, value in enumerate(self.parts[result]):
                t, (first, last) = tensor_type(value), self._range(chunk)
                value.type = t.with_(shape=(sympy.Integer(last - first), *t.shape[1:]))
            self.whole[result] = self._joined(result)
            del self.parts[result]

    def _joined(self, weights: Value) -> Value:
        """The gradients of all experts' weights, from those of every chunk's."""
        if not self.plan.orders:
            return self._together(weights)
        order = tuple(e for chunk in range(self.chunks) for e in self._held(chunk))
        return self.b.op("moe.join_experts", self.parts[weights], attrs={"order": order}).result

    @staticmethod
    def _places(op: Op, name: str) -> range:
        at = op_def(op.name).group_index(name)
        start = sum(op.groups[:at])
        return range(start, start + op.groups[at])


def cut_by_experts(region: Graph, chunks: Chunks) -> Graph:
    """The same program in chunks of experts.

    Args:
        region: A program of a ``moe.parallel_experts``.
        chunks: Which experts are in every chunk. Own rows come first in a forward alone.

    Raises:
        Whole: The program's rows take another way than sorted, counted, sent, computed, sent home.
    """
    return _Cutter(region, chunks).run()
