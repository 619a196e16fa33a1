"""The pass ``raise-moe``.

Contract:
1. Every expert GEMM of the graph, and every loop over experts, either becomes part of ``moe.dispatch``,
   ``moe.grouped_gemm``, ``moe.activation``, ``moe.combine`` (and their torch calls disappear), or stays exactly as it
   was, with a remark that says why.
2. The meaning is unchanged up to the order of additions inside a GEMM.
3. No module metadata is used: blocks are found by their dataflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir.core import Graph, Location, Value
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.dce import erase_unused
from moec.passes.hazards import write_within
from moec.passes.matching import ancestors, between, peel_views, rank, tensor
from moec.passes.raise_moe import anchors
from moec.passes.raise_moe.activation import read_rows, split_bias
from moec.passes.raise_moe.anchors import Gemm
from moec.passes.raise_moe.block import Block, Emitter, Projection
from moec.passes.raise_moe.combine import read_combine
from moec.passes.raise_moe.dispatch import DispatchPlan, expert_count, read_dispatch
from moec.passes.raise_moe.raise_loops import raise_loops
from moec.passes.raise_moe.refusal import LONE, Refusal
from moec.passes.registry import register_pass


@dataclass(frozen=True)
class _Found:
    """A block as read from the graph.

    Attributes:
        block: What it says.
        ups: Its up GEMMs.
        down: Its down GEMM.
        out: Its result.
    """

    block: Block
    ups: list[Gemm]
    down: Gemm
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


def _read(down: Gemm, ups: list[Gemm]) -> _Found:
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
    out = tensor(combine.out)
    assert out is not None
    block = Block(
        x=dispatch.x,
        ids=dispatch.ids,
        weights=combine.weights,
        top_k=dispatch.top_k,
        experts=experts,
        ups=[
            Projection(up.weights, up.form, up.out, bias, up.scales) for up, (_, bias) in zip(ups, biased, strict=True)
        ],
        down=Projection(down.weights, down.form, down.out, down_bias, down.scales),
        activation=program,
        inner=down.rows,
        post=read_rows("post", [rows], combine.rows, per_token, split=False),
        finished=combine.rows,
        out=out,
    )
    if not dispatch.top_k.is_Integer and (rank(dispatch.ids) != 2 or rank(combine.weights) != 2):
        raise Refusal("k is computed at run time, and ids or weights are no matrix [T, k]", down.op)
    found = _Found(block, ups, down, combine.out)
    _check_closed(found)
    return found


def _split_bias(gemm: Gemm, experts: int, dispatch: DispatchPlan) -> tuple[Value, tuple[Value, ...]]:
    """``(rows after the bias, bias)``; the bias is in the GEMM or in what follows it."""
    if gemm.bias:
        return gemm.out, gemm.bias
    rows, bias = split_bias(gemm.out, experts, dispatch.row_ids)
    return rows, () if bias is None else (bias,)


def _check_closed(found: _Found) -> None:
    """Refuse a block whose inside is seen from outside, or whose operands are written to while it runs."""
    inside = between([g.op.results[0] for g in found.ups], found.out)
    inside |= {g.op for g in found.ups}
    for op in inside:
        for result in op.results:
            if result is not found.out and any(u not in inside for u in result.users):
                raise Refusal(f"{result!r}, inside the block, is also used elsewhere", op)
    graph = found.down.op.parent
    assert graph is not None
    write = write_within(graph, ancestors([found.out], found.block.operands))
    if write is not None:
        raise Refusal(f"{write.attrs.get('target', write.name)} writes to memory of the block while it runs", write)


def _write(graph: Graph, found: _Found) -> None:
    maker, loc = found.out.op, found.down.op.loc
    assert maker is not None
    y = found.block.write(Emitter(graph, maker, Location(loc.module, loc.source, loc.stack)), found.out.name)
    y.meta = dict(found.out.meta)
    found.out.replace_all_uses_with(y)
    erase_unused(maker)


@register_pass
@dataclass(frozen=True)
class RaiseMoe(Pass):
    """Finds MoE blocks by their expert GEMMs and says them as dispatch, grouped GEMMs, activation and combine.

    The experts' GEMMs are one op for all (grouped, or batched with indexed weights), or those of a loop over experts
    that adds the rows of one expert after the other to a running sum. The order of additions may change: inside a GEMM,
    and among the experts of a token, whose sum is rounded once where a loop rounds it after every expert.
    """

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
            if ctx.leaves(self.name, down.op):
                continue
            try:
                found = _read(down, ups)
            except Refusal as refusal:
                ctx.remark("missed", self.name, str(refusal), refusal.op or down.op)
                continue
            what = f"block of {found.block.top_k} experts per token"
            if not ctx.take_fuel(self.name, what, down.op):
                break
            ctx.remark("applied", self.name, what, down.op)
            _write(graph, found)
            raised += 1
        for op in gemms:
            if op not in told and op.parent is graph:
                ctx.remark("missed", self.name, LONE, op)
        raised += raise_loops(graph, ctx, self.name)
        return PassResult(raised > 0, {"blocks": raised})
