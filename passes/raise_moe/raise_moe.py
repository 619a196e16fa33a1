"""The pass ``raise-moe``.

Contract:
1. Every expert GEMM of the graph either becomes part of ``moe.dispatch``, ``moe.grouped_gemm``, ``moe.activation``,
   ``moe.combine`` (and their torch calls disappear), or stays exactly as it was, with a remark that says why.
2. The meaning is unchanged up to the order of additions inside a GEMM.
3. No module metadata is used: blocks are found by their dataflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir.attributes import Operand
from moec.ir.core import Graph, Location, Op, Value
from moec.ir.opdef import op_def
from moec.ir.types import PlanType, TensorType, as_dim
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.matching import rank, tensor
from moec.passes.raise_moe import anchors
from moec.passes.raise_moe.activation import RowProgram, read_rows, split_bias
from moec.passes.raise_moe.anchors import Gemm
from moec.passes.raise_moe.combine import read_combine
from moec.passes.raise_moe.dispatch import DispatchPlan, read_dispatch
from moec.passes.raise_moe.refusal import Refusal
from moec.passes.registry import register_pass


def erase_dead(graph: Graph, start: Op) -> None:
    """Erase the ops that only ``start``'s value needed, ``start`` included."""
    stack = [start]
    while stack:
        op = stack.pop()
        if op.parent is not graph or any(r.uses for r in op.results) or not op_def(op.name).is_pure(op):
            continue
        makers = [v.op for v in op.operands if v.op is not None]
        op.erase()
        stack.extend(makers)


class _Emitter:
    """Inserts the raised ops in front of one op."""

    def __init__(self, graph: Graph, before: Op, loc: Location) -> None:
        self.graph, self.before, self.loc = graph, before, loc

    def add(self, op: Op) -> list[Value]:
        op.loc = self.loc
        self.graph.insert_before(self.before, op)
        return op.results

    def matrix(self, value: Value, rows: object, top_k: int) -> Value:
        """``value`` as ``[T, k]``."""
        if rank(value) == 2:
            return value
        t = tensor(value)
        assert t is not None
        view = Op(
            "torch.call",
            [value],
            [t.with_(shape=(as_dim(rows), as_dim(top_k)))],  # type: ignore[arg-type]
            attrs={"target": "aten.view.default", "args": (Operand(0), [-1, top_k])},
            groups=[1],
            names=[value.name],
        )
        return self.add(view)[0]


@dataclass(frozen=True)
class _Block:
    """One MoE block as read from the graph."""

    ups: list[Gemm]
    down: Gemm
    dispatch: DispatchPlan
    up_bias: list[Value | None]
    program: RowProgram | None
    down_bias: Value | None
    post: RowProgram | None
    activated: Value
    weights: Value
    out: Value


def _read(down: Gemm, ups: list[Gemm]) -> _Block:
    if len(ups) != 1:
        raise Refusal(f"{len(ups)} expert GEMMs feed one; one up GEMM (gate and up together) is known", down.op)
    (up,) = ups
    if up.sorted != down.sorted or up.groups is not down.groups:
        raise Refusal("the up and the down GEMM group their rows differently", down.op)
    dispatch = read_dispatch(up)
    per_token = {dispatch.x, dispatch.ids, up.rows, *dispatch.row_ids}
    if dispatch.permutation is not None:
        per_token.add(dispatch.permutation)
    hidden, up_bias = split_bias(up.out, dispatch.row_ids)
    program = read_rows("activation", hidden, down.rows, per_token)
    rows, down_bias = split_bias(down.out, dispatch.row_ids)
    combine = read_combine(rows, dispatch)
    post = read_rows("post", rows, combine.rows, per_token, split=False)
    return _Block([up], down, dispatch, [up_bias], program, down_bias, post, down.rows, combine.weights, combine.out)


def _gemm(gemm: Gemm, rows: Value, plan: Value, bias: Value | None, name: str) -> Op:
    r, n = tensor(rows), tensor(gemm.out)
    assert r is not None and n is not None
    return Op(
        "moe.grouped_gemm",
        [rows, gemm.weight, plan, *([bias] if bias else [])],
        [n.with_(shape=(r.shape[0], n.shape[1]))],
        attrs={"form": gemm.form},
        groups=[1, 1, 1, 1 if bias else 0],
        names=[name],
    )


def _activation(program: RowProgram, rows: Value, width: Value) -> Op:
    r, w = tensor(rows), tensor(width)
    assert r is not None and w is not None
    return Op(
        "moe.activation",
        [rows, *program.captures],
        [w.with_(shape=(r.shape[0], w.shape[1]))],
        attrs={"layout": program.layout},
        regions=[program.region],
        groups=[1, len(program.captures)],
        names=["a"],
    )


def _identity(rows: Value) -> RowProgram:
    region = Graph("activation")
    region.append(Op("return", [region.add_arg(rows.type, "h")], groups=[1]))
    return RowProgram("single", region, [])


def _write(graph: Graph, block: _Block) -> None:
    maker = block.out.op
    assert maker is not None
    module = block.down.op.loc.module
    emit = _Emitter(graph, maker, Location(module, block.down.op.loc.source, block.down.op.loc.stack))
    d = block.dispatch
    x, weight = tensor(d.x), tensor(block.ups[0].weight)
    assert x is not None and weight is not None
    experts = int(weight.shape[0])
    ids = emit.matrix(d.ids, x.shape[0], d.top_k)
    weights = emit.matrix(block.weights, x.shape[0], d.top_k)
    slots = x.shape[0] * d.top_k
    rows, plan = emit.add(
        Op(
            "moe.dispatch",
            [d.x, ids],
            [x.with_(shape=(slots, x.shape[1])), PlanType(experts)],
            attrs={"experts": experts},
            names=["rows", "plan"],
        )
    )
    (h,) = emit.add(_gemm(block.ups[0], rows, plan, block.up_bias[0], "h"))
    (a,) = emit.add(_activation(block.program or _identity(h), h, block.activated))
    (o,) = emit.add(_gemm(block.down, a, plan, block.down_bias, "o"))
    if block.post is not None:
        (o,) = emit.add(_activation(block.post, o, o))
    assert isinstance(block.out.type, TensorType)
    combine = Op("moe.combine", [o, weights, plan], [block.out.type], names=[block.out.name])
    combine.results[0].meta = dict(block.out.meta)
    (y,) = emit.add(combine)
    block.out.replace_all_uses_with(y)
    erase_dead(graph, maker)


@register_pass
@dataclass(frozen=True)
class RaiseMoe(Pass):
    """Finds MoE blocks by their expert GEMMs and says them as dispatch, grouped GEMMs, activation and combine."""

    name: ClassVar[str] = "raise-moe"
    pass_class: ClassVar[PassClass] = PassClass.REORDERS
    tolerance: ClassVar[float] = 2e-5
    summary: ClassVar[str] = "torch calls to moe.dispatch, moe.grouped_gemm, moe.activation, moe.combine"

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        gemms = anchors.find(graph)
        raised, told = 0, set()
        for down in gemms.values():
            ups = anchors.feeders(down, gemms)
            if not ups:
                continue
            told |= {down.op, *(u.op for u in ups)}
            try:
                block = _read(down, ups)
            except Refusal as refusal:
                ctx.remark("missed", self.name, str(refusal), refusal.op or down.op)
                continue
            ctx.remark("applied", self.name, f"block of {block.dispatch.top_k} experts per token", down.op)
            _write(graph, block)
            raised += 1
        for op in gemms:
            if op not in told and op.parent is graph:
                ctx.remark("missed", self.name, "an expert GEMM without a second one: no up and down projection", op)
        return PassResult(raised > 0, {"blocks": raised})
