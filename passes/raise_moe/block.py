"""Writing one MoE block as ops of the moe dialect: dispatch, grouped GEMMs, activation, combine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from moec.ir.core import Graph, Location, Op, Value
from moec.ir.types import PlanType, TensorType, Type, as_dim
from moec.passes.calls import call_op
from moec.passes.matching import rank, tensor
from moec.passes.raise_moe.activation import RowProgram


class Emitter:
    """Inserts ops in front of one op."""

    def __init__(self, graph: Graph, before: Op, loc: Location) -> None:
        self.graph, self.before, self.loc = graph, before, loc

    def add(self, op: Op) -> list[Value]:
        """Put ``op`` in place; its results."""
        op.loc = self.loc
        self.graph.insert_before(self.before, op)
        return op.results

    def call(self, target: str, args: Sequence[Any], type: Type, kwargs: Mapping[str, Any] | None = None) -> Value:
        """The only result, of ``type``, of a torch call on values and constants."""
        return self.add(call_op(target, args, kwargs or {}, [type]))[0]

    def matrix(self, value: Value, rows: sympy.Expr, top_k: sympy.Expr) -> Value:
        """``value`` as ``[T, k]``; k is a number, or ``value`` is that matrix."""
        if rank(value) == 2:
            return value
        t = tensor(value)
        assert t is not None
        types = [t.with_(shape=(as_dim(rows), top_k))]
        return self.add(call_op("aten.view.default", (value, [-1, int(top_k)]), {}, types, names=[value.name]))[0]


@dataclass(frozen=True)
class Projection:
    """The weights of one grouped GEMM.

    Attributes:
        weights: One ``[E, N, K]`` (``[E, K, N]``), or E matrices.
        form: How a weight lies, ``nk`` or ``kn``.
        like: A value of the type that its rows have, ``[..., N]``.
        bias: One ``[E, N]``, or E vectors, or none.
        scales: Of weights in f8e4m3fn.
    """

    weights: tuple[Value, ...]
    form: str
    like: Value
    bias: tuple[Value, ...] = ()
    scales: tuple[Value, ...] = ()

    @property
    def stacked(self) -> bool:
        """One tensor holds the weights of all experts."""
        return len(self.weights) == 1 and rank(self.weights[0]) == 3

    def op(self, rows: Value, plan: Value, name: str) -> Op:
        """The grouped GEMM of ``rows``."""
        r, n = tensor(rows), tensor(self.like)
        assert r is not None
        assert n is not None
        return Op(
            "moe.grouped_gemm",
            [rows, *self.weights, plan, *self.bias, *self.scales],
            [n.with_(shape=(r.shape[0], n.shape[-1]))],
            attrs={"form": self.form, "stacked": self.stacked},
            groups=[1, len(self.weights), 1, len(self.bias), len(self.scales)],
            names=[name],
        )


@dataclass(frozen=True)
class Block:
    """A MoE block, ready to be written.

    Attributes:
        x: Token rows ``[T, H]``.
        ids: Chosen experts, ``[T, k]`` or a vector of as many.
        weights: Router weights, ``[T, k]`` or a vector of as many.
        top_k: k.
        experts: E.
        ups: One projection, or gate and up.
        down: The down projection.
        activation: Between them; None if the rows go on as they are.
        inner: A value of the type that the activation's rows have.
        post: After the down projection; None if there is nothing.
        finished: A value of the type that the rows have after it.
        out: The type of the combined rows.
        sentinels: Ids out of range mean no expert.
    """

    x: Value
    ids: Value
    weights: Value
    top_k: sympy.Expr
    experts: int
    ups: Sequence[Projection]
    down: Projection
    activation: RowProgram | None
    inner: Value
    post: RowProgram | None
    finished: Value
    out: TensorType
    sentinels: bool = False

    @property
    def operands(self) -> list[Value]:
        """Everything that the block takes in."""
        projections = (*self.ups, self.down)
        programs = [p for p in (self.activation, self.post) if p is not None]
        taken = [v for p in projections for v in (*p.weights, *p.bias, *p.scales)]
        return [self.x, self.ids, self.weights, *taken, *(v for p in programs for v in p.captures)]

    def write(self, emit: Emitter, name: str) -> Value:
        """Write the block; its combined rows, called ``name``."""
        x = tensor(self.x)
        assert x is not None
        ids = emit.matrix(self.ids, x.shape[0], self.top_k)
        weights = emit.matrix(self.weights, x.shape[0], self.top_k)
        dispatch = Op(
            "moe.dispatch",
            [self.x, ids],
            [x.with_(shape=(x.shape[0] * self.top_k, x.shape[1])), PlanType(self.experts)],
            attrs={"experts": self.experts, **({"sentinels": True} if self.sentinels else {})},
            names=["rows", "plan"],
        )
        rows, plan = emit.add(dispatch)
        names = ("h",) if len(self.ups) == 1 else ("g", "u")
        h = [emit.add(up.op(rows, plan, n))[0] for up, n in zip(self.ups, names, strict=True)]
        (a,) = emit.add(_activation(self.activation or _identity(h[0]), h, self.inner))
        (o,) = emit.add(self.down.op(a, plan, "o"))
        if self.post is not None:
            (o,) = emit.add(_activation(self.post, [o], self.finished))
        return emit.add(Op("moe.combine", [o, weights, plan], [self.out], names=[name]))[0]


def _activation(program: RowProgram, rows: list[Value], width: Value) -> Op:
    r, w = tensor(rows[0]), tensor(width)
    assert r is not None
    assert w is not None
    return Op(
        "moe.activation",
        [*rows, *program.captures],
        [w.with_(shape=(r.shape[0], w.shape[-1]))],
        attrs={"layout": program.layout},
        regions=[program.region],
        groups=[len(rows), len(program.captures)],
        names=["a"],
    )


def _identity(rows: Value) -> RowProgram:
    region = Graph("activation")
    region.append(Op("return", [region.add_arg(rows.type, "h")], groups=[1]))
    return RowProgram("single", region, [])
