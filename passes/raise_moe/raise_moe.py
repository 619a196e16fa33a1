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

import sympy

from moec.ir.attributes import Operand
from moec.ir.core import Graph, Location, Op, Value
from moec.ir.types import PlanType, TensorType, as_dim
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.dce import erase_unused
from moec.passes.hazards import write_within
from moec.passes.matching import ancestors, between, peel_views, rank, tensor
from moec.passes.raise_moe import anchors
from moec.passes.raise_moe.activation import RowProgram, read_rows, split_bias
from moec.passes.raise_moe.anchors import Gemm
from moec.passes.raise_moe.combine import read_combine
from moec.passes.raise_moe.dispatch import DispatchPlan, expert_count, read_dispatch
from moec.passes.raise_moe.raise_loops import raise_loops
from moec.passes.raise_moe.refusal import Refusal
from moec.passes.registry import register_pass


class _Emitter:
    """Inserts the raised ops in front of one op."""

    def __init__(self, graph: Graph, before: Op, loc: Location) -> None:
        self.graph, self.before, self.loc = graph, before, loc

    def add(self, op: Op) -> list[Value]:
        op.loc = self.loc
        self.graph.insert_before(self.before, op)
        return op.results

    def matrix(self, value: Value, rows: sympy.Expr, top_k: sympy.Expr) -> Value:
        """``value`` as ``[T, k]``; k is a number, or ``value`` is that matrix."""
        if rank(value) == 2:
            return value
        t = tensor(value)
        assert t is not None
        view = Op(
            "torch.call",
            [value],
            [t.with_(shape=(as_dim(rows), top_k))],
            attrs={"target": "aten.view.default", "args": (Operand(0), [-1, int(top_k)])},
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
    up_bias: list[tuple[Value, ...]]
    program: RowProgram | None
    down_bias: tuple[Value, ...]
    post: RowProgram | None
    finished: Value
    weights: Value
    out: Value


def _same_rows(ups: list[Gemm], down: Gemm) -> None:
    """Refuse GEMMs that do not work on the same rows, grouped by the same experts."""
    first = ups[0]
    experts = {expert_count(g) for g in (*ups, down)}
    if any(g.sorted != down.sorted or peel_views(g.groups) is not peel_views(down.groups) for g in ups):
        raise Refusal("the up and the down GEMM group their rows differently", down.op)
    if len(experts) != 1:
        raise Refusal(f"the weights hold {' and '.join(map(str, sorted(experts)))} experts", down.op)
    if len(ups) > 2:
        raise Refusal(f"{len(ups)} expert GEMMs feed one; gate and up, together or apart, are known", down.op)
    if any(g.rows is not first.rows for g in ups):
        raise Refusal("the gate and the up GEMM read different rows", down.op)


def _read(down: Gemm, ups: list[Gemm]) -> _Block:
    _same_rows(ups, down)
    dispatch = read_dispatch(ups[0])
    experts = expert_count(down)
    per_token = {dispatch.x, dispatch.ids, ups[0].rows, *dispatch.row_ids}
    per_token |= {peel_views(v) for v in (dispatch.x, dispatch.ids)}
    if dispatch.permutation is not None:
        per_token.add(dispatch.permutation)
    biased = [_split_bias(up, experts, dispatch) for up in ups]
    program = read_rows("activation", [h for h, _ in biased], down.rows, per_token)
    rows, down_bias = _split_bias(down, experts, dispatch)
    combine = read_combine(rows, dispatch)
    post = read_rows("post", [rows], combine.rows, per_token, split=False)
    block = _Block(
        ups,
        down,
        dispatch,
        [b for _, b in biased],
        program,
        down_bias,
        post,
        combine.rows,
        combine.weights,
        combine.out,
    )
    if not dispatch.top_k.is_Integer and (rank(dispatch.ids) != 2 or rank(combine.weights) != 2):
        raise Refusal("k is computed at run time, and ids or weights are no matrix [T, k]", down.op)
    _check_closed(block)
    return block


def _split_bias(gemm: Gemm, experts: int, dispatch: DispatchPlan) -> tuple[Value, tuple[Value, ...]]:
    """``(rows after the bias, bias)``; the bias is in the GEMM or in what follows it."""
    if gemm.bias:
        return gemm.out, gemm.bias
    rows, bias = split_bias(gemm.out, experts, dispatch.row_ids)
    return rows, () if bias is None else (bias,)


def _check_closed(block: _Block) -> None:
    """Refuse a block whose inside is seen from outside, or whose operands are written to while it runs."""
    inside = between([g.op.results[0] for g in block.ups], block.out)
    inside |= {g.op for g in block.ups}
    for op in inside:
        for result in op.results:
            if result is not block.out and any(u not in inside for u in result.users):
                raise Refusal(f"{result!r}, inside the block, is also used elsewhere", op)
    operands = [block.dispatch.x, block.dispatch.ids, block.weights]
    operands += [w for g in (*block.ups, block.down) for w in g.weights]
    operands += [b for bias in (*block.up_bias, block.down_bias) for b in bias]
    operands += [v for p in (block.program, block.post) if p is not None for v in p.captures]
    maker = block.out.op
    graph = block.down.op.parent
    assert maker is not None and graph is not None
    write = write_within(graph, ancestors([block.out], operands))
    if write is not None:
        raise Refusal(f"{write.attrs.get('target', write.name)} writes to memory of the block while it runs", write)


def _gemm(gemm: Gemm, rows: Value, plan: Value, bias: tuple[Value, ...], name: str) -> Op:
    r, n = tensor(rows), tensor(gemm.out)
    assert r is not None and n is not None
    return Op(
        "moe.grouped_gemm",
        [rows, *gemm.weights, plan, *bias],
        [n.with_(shape=(r.shape[0], n.shape[1]))],
        attrs={"form": gemm.form, "stacked": gemm.stacked},
        groups=[1, len(gemm.weights), 1, len(bias)],
        names=[name],
    )


def _activation(program: RowProgram, rows: list[Value], width: Value) -> Op:
    r, w = tensor(rows[0]), tensor(width)
    assert r is not None and w is not None
    return Op(
        "moe.activation",
        [*rows, *program.captures],
        [w.with_(shape=(r.shape[0], w.shape[1]))],
        attrs={"layout": program.layout},
        regions=[program.region],
        groups=[len(rows), len(program.captures)],
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
    x, experts = tensor(d.x), expert_count(block.down)
    assert x is not None
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
    names = ("h",) if len(block.ups) == 1 else ("g", "u")
    h = [
        emit.add(_gemm(up, rows, plan, bias, name))[0]
        for up, bias, name in zip(block.ups, block.up_bias, names, strict=True)
    ]
    (a,) = emit.add(_activation(block.program or _identity(h[0]), h, block.down.rows))
    (o,) = emit.add(_gemm(block.down, a, plan, block.down_bias, "o"))
    if block.post is not None:
        (o,) = emit.add(_activation(block.post, [o], block.finished))
    assert isinstance(block.out.type, TensorType)
    combine = Op("moe.combine", [o, weights, plan], [block.out.type], names=[block.out.name])
    combine.results[0].meta = dict(block.out.meta)
    (y,) = emit.add(combine)
    block.out.replace_all_uses_with(y)
    erase_unused(maker)


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
            what = f"block of {block.dispatch.top_k} experts per token"
            if not ctx.take_fuel(self.name, what, down.op):
                break
            ctx.remark("applied", self.name, what, down.op)
            _write(graph, block)
            raised += 1
        for op in gemms:
            if op not in told and op.parent is graph:
                ctx.remark("missed", self.name, "an expert GEMM without a second one: no up and down projection", op)
        raised += raise_loops(graph, ctx, self.name)
        return PassResult(raised > 0, {"blocks": raised})
