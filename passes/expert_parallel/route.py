"""The ways between tokens and experts: what a form of expert parallelism has to say, and helpers to say it.

A :class:`Route` writes the ops that bring rows to their experts and home again. Forward and backward take the same
ways: a token's row and its result's gradient go out, expert rows and rows of the input's gradient come back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import sympy

from moec.ir.builder import Builder
from moec.ir.core import Op, Value
from moec.ir.types import DType, TensorType, TokenType, dtype
from moec.passes.expert_parallel.site import Site


def symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True)


def tensor_type(value: Value) -> TensorType:
    assert isinstance(value.type, TensorType)
    return value.type


class Writer:
    """Writes ops of one region."""

    def __init__(self, builder: Builder, site: Site) -> None:
        self.b, self.site = builder, site

    def op(self, name: str, *operands: Value, types: Sequence[object] | None = None, **attrs: object) -> list[Value]:
        """Append an op of single operands; its results."""
        return self.b.op(name, *operands, attrs=attrs, result_types=types).results  # type: ignore[arg-type]

    def rows(self, source: Value, count: str) -> TensorType:
        """The type of ``source`` with another number of rows."""
        t = tensor_type(source)
        return t.with_(shape=(symbol(count), *t.shape[1:]))

    def wait(self, start: Op, type: TensorType) -> Value:
        """What a started communication brings."""
        assert isinstance(start.results[0].type, TokenType)
        return self.b.op("comm.wait", start.results[0], result_types=[type]).result

    def slot_type(self, source: Value, ids: TensorType) -> TensorType:
        """The type of a row of ``source`` for every slot of ids [T, k]."""
        t = tensor_type(source)
        return t.with_(shape=(t.shape[0] * ids.shape[1], *t.shape[1:]))

    def all_to_all(
        self,
        rows: Value,
        count: str,
        send: Value | None = None,
        recv: Value | None = None,
        *,
        group: str,
        ranks: int,
        type: TensorType | None = None,
    ) -> Value:
        """Send rows by the given counts (else equal parts), and wait; ``count`` names the number of rows that come."""
        attrs = {"group": group, "ranks": ranks}
        start = self.b.op("comm.all_to_all.start", rows, send, recv, attrs=attrs)
        return self.wait(start, type or self.rows(rows, count))

    def all_gather(self, rows: Value, counts: Value | None = None, type: TensorType | None = None) -> Value:
        """The rows of all ranks of the layer's group, and wait."""
        attrs = {"group": self.site.group, "ranks": self.site.ranks}
        start = self.b.op("comm.all_gather.start", rows, counts, attrs=attrs)
        return self.wait(start, type or self.rows(rows, "A"))

    def exchange_counts(self, counts: Value, send: Sequence[int], own: int, *, group: str) -> Value:
        """Send every rank the counts of its experts: i64[N * own]."""
        ranks = len(send)
        attrs = {"group": group, "ranks": ranks, "send_sizes": tuple(send), "recv_sizes": (own,) * ranks}
        type = TensorType.of("i64", ranks * own, device=tensor_type(counts).device)
        return self.wait(self.b.op("comm.all_to_all.start", counts, attrs=attrs), type)

    def arrivals(self, counts: Value, ranks: int) -> tuple[Value, Value]:
        """Rows from every rank, and the own expert of each: i64[N], i64[R, 1]."""
        device = tensor_type(counts).device
        types = [TensorType.of("i64", ranks, device=device), TensorType.of("i64", symbol("R"), 1, device=device)]
        by_rank, ids = self.op("moe.arrivals", counts, types=types, ranks=ranks)
        return by_rank, ids

    def select(self, source: Value, index: Value) -> Value:
        """``source[index]``"""
        t = tensor_type(source).with_(shape=(tensor_type(index).shape[0], *tensor_type(source).shape[1:]))
        return self.b.call("aten.index_select.default", [source, 0, index], result_types=[t]).result

    def column(self, matrix: Value) -> Value:
        """A matrix [T, k] as [T*k, 1]."""
        t = tensor_type(matrix)
        type = t.with_(shape=(t.shape[0] * t.shape[1], sympy.Integer(1)))
        return self.b.call("aten.reshape.default", [matrix, [-1, 1]], result_types=[type]).result

    def to(self, value: Value, kind: str) -> Value:
        wanted: DType = dtype(kind)
        type = tensor_type(value).with_(dtype=wanted)
        return self.b.call("aten.to.dtype", [value, wanted], result_types=[type]).result

    def slots(self, plan: Value, like: TensorType) -> tuple[Value, Value]:
        """Slot and token of every row of a plan; ``like`` is a matrix [T, k]."""
        type = TensorType.of("i64", like.shape[0] * like.shape[1], device=like.device)
        slots, tokens = self.b.op("moe.slots", plan, result_types=[type, type]).results
        return slots, tokens


class Route(ABC):
    """A form of expert parallelism, written into one region. Making it writes what comes first.

    Attributes:
        w: Writes the region.
        rows: x at the experts, [R, H].
        ids: Which of this rank's experts each of these rows is for, i64[R, 1].
        plan: The slots in the order in which their rows come home.
    """

    w: Writer
    rows: Value
    ids: Value
    plan: Value

    @abstractmethod
    def __init__(self, w: Writer, x: Value, ids: Value) -> None: ...

    @abstractmethod
    def go(self, tokens: Value) -> Value:
        """Another tensor with a row per token, at the experts: [T, N] to [R, N]."""

    @abstractmethod
    def go_slots(self, values: Value) -> Value:
        """A value per slot, at the experts: [T, k] to [R, 1]."""

    @abstractmethod
    def back(self, rows: Value) -> Value:
        """Rows of the experts, at home in the order of ``plan``: [R, N] to [S, N]."""

    def combine(self, rows: Value, weights: Value, result: TensorType) -> Value:
        """The layer's result from rows of the experts: [R, N] to [T, N]."""
        return self.w.b.op("moe.combine", self.back(rows), weights, self.plan, result_types=[result]).result

    def sum_rows(self, rows: Value, like: TensorType) -> Value:
        """A gradient of token rows from gradients of the experts' rows: [R, H] to [T, H]."""
        return self.w.op("moe.sum_slots", self.back(rows), self.plan, types=[like])[0]

    def place(self, values: Value, like: TensorType) -> Value:
        """A value per slot from values of the experts' rows: [R, 1] to [T, k]."""
        return self.w.op("moe.place_slots", self.back(values), self.plan, types=[like])[0]
