"""``fuse-experts``: the raised ops of one block become ``moe.experts``.

Contract:
1. A chain dispatch, grouped GEMM, activation, grouped GEMM, (activation of rows,) combine whose inner values are used
   nowhere else becomes one ``moe.experts`` with the same regions.
2. Two grouped GEMMs on the same rows that feed one activation become gate and up of layout ``separate``.
3. Anything else stays, with a remark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moec.ir.core import Graph, Op, Value
from moec.ir.opdef import op_def
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.hazards import write_within
from moec.passes.registry import register_pass


class _NoFit(Exception):
    """The chain is not closed; ``str`` is the reason."""


def _attr(op: Op, name: str) -> Any:
    return op_def(op.name).attr(op, name)


def _made_by(value: Value, name: str) -> Op:
    op = value.op
    if op is None or op.name != name:
        raise _NoFit(f"{value!r} is not made by {name}")
    if len(value.users) != 1:
        raise _NoFit(f"{value!r}, inside the block, is also used elsewhere")
    return op


@dataclass(frozen=True)
class _Chain:
    dispatch: Op
    ups: list[Op]
    activation: Op
    down: Op
    post: Op | None
    combine: Op


def _trace(combine: Op) -> _Chain:
    rows, _, plan = combine.operands
    dispatch = plan.op
    if dispatch is None or dispatch.name != "moe.dispatch":
        raise _NoFit("the plan does not come from moe.dispatch")
    post = None
    if rows.op is not None and rows.op.name == "moe.activation":
        post = _made_by(rows, "moe.activation")
        if _attr(post, "layout") != "rows":
            raise _NoFit("the function after the down GEMM is not one of whole rows")
        rows = post.group("rows")[0]
    down = _made_by(rows, "moe.grouped_gemm")
    activation = _made_by(down.operands[0], "moe.activation")
    ups = [_made_by(v, "moe.grouped_gemm") for v in activation.group("rows")]
    users = {*ups, down, combine}
    if any(g.group("plan")[0] is not plan for g in (*ups, down)):
        raise _NoFit("the GEMMs use different plans")
    if any(u.operands[0] is not dispatch.results[0] for u in ups):
        raise _NoFit("an up GEMM does not read the dispatched rows")
    if set(plan.users) - users or set(dispatch.results[0].users) - set(ups):
        raise _NoFit("the dispatched rows or their plan are also used elsewhere")
    if len({(_attr(u, "form"), _attr(u, "stacked"), bool(u.group("bias"))) for u in ups}) != 1:
        raise _NoFit("gate and up lie differently")
    if _attr(ups[0], "stacked") != _attr(down, "stacked"):
        raise _NoFit("up and down weights are stacked differently")
    if len({bool(g.group("scales")) for g in (*ups, down)}) != 1:
        raise _NoFit("some of the weights have scales, others have none")
    chain = [dispatch, *ups, activation, down, *([post] if post else []), combine]
    assert combine.parent is not None
    write = write_within(combine.parent, chain)
    if write is not None:
        raise _NoFit(f"{write.attrs.get('target', write.name)} writes to memory of the block while it runs")
    return _Chain(dispatch, ups, activation, down, post, combine)


def _fuse(graph: Graph, chain: _Chain) -> None:
    first, combine = chain.ups[0], chain.combine
    groups = [
        [chain.dispatch.operands[0]],
        [chain.dispatch.operands[1]],
        [combine.operands[1]],
        [w for u in chain.ups for w in u.group("weights")],
        list(chain.down.group("weights")),
        [b for u in chain.ups for b in u.group("bias")],
        list(chain.down.group("bias")),
        list(chain.activation.group("captures")),
        list(chain.post.group("captures")) if chain.post else [],
        [s for u in chain.ups for s in u.group("scales")],
        list(chain.down.group("scales")),
    ]
    regions = [chain.activation.regions[0].clone("activation")]
    if chain.post:
        regions.append(chain.post.regions[0].clone("post"))
    fused = Op(
        "moe.experts",
        [v for g in groups for v in g],
        [combine.result.type],
        attrs={
            "experts": _attr(chain.dispatch, "experts"),
            "layout": _attr(chain.activation, "layout"),
            "up_form": _attr(first, "form"),
            "down_form": _attr(chain.down, "form"),
            "stacked": _attr(first, "stacked"),
            "sentinels": _attr(chain.dispatch, "sentinels"),
        },
        regions=regions,
        groups=[len(g) for g in groups],
        loc=combine.loc,
        names=[combine.result.name],
    )
    fused.results[0].meta = dict(combine.result.meta)
    graph.insert_before(combine, fused)
    combine.result.replace_all_uses_with(fused.result)
    gone = [combine, chain.post, chain.down, chain.activation, *chain.ups, chain.dispatch]
    graph.erase_many([op for op in gone if op is not None])


@register_pass
@dataclass(frozen=True)
class FuseExperts(Pass):
    """Turns dispatch, up GEMM, activation, down GEMM and combine of one block into ``moe.experts``."""

    name: ClassVar[str] = "fuse-experts"
    pass_class: ClassVar[PassClass] = PassClass.BITWISE
    summary: ClassVar[str] = "a block's dispatch, GEMMs, activation and combine in one op"

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        fused = 0
        for op in list(graph.ops):
            if op.name != "moe.combine":
                continue
            try:
                chain = _trace(op)
            except _NoFit as reason:
                ctx.remark("missed", self.name, str(reason), op)
                continue
            what = f"{_attr(chain.dispatch, 'experts')} experts in one op"
            if not ctx.take_fuel(self.name, what, op):
                break
            ctx.remark("applied", self.name, what, op)
            _fuse(graph, chain)
            fused += 1
        return PassResult(fused > 0, {"fused": fused})
