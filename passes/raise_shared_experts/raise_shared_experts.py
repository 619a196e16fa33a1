"""The pass ``raise-shared-experts``.

Contract:
1. A dense MLP on a MoE block's tokens whose result is added to the block's becomes ``moe.dispatch``,
   ``moe.grouped_gemm``, ``moe.activation``, ``moe.combine`` of one expert that every token goes to, or stays exactly as
   it was, with a remark that says why.
2. The meaning is unchanged up to the order of additions inside a GEMM.
3. Other dense MLPs are left alone, without a remark. In a graph that was cut out of its model as a shared expert
   (``ctx.cut_as``), the block is not there to be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir.core import Graph, Location, Op, Value
from moec.ir.types import SymType, as_dim, dtype
from moec.passes.base import SHARED_EXPERT, WITH_SHARED, Pass, PassClass, PassContext, PassResult
from moec.passes.dce import erase_unused
from moec.passes.matching import rank, tensor
from moec.passes.raise_moe.block import Block, Emitter, Projection
from moec.passes.raise_moe.refusal import Refusal
from moec.passes.raise_shared_experts.beside import alone, beside_blocks
from moec.passes.raise_shared_experts.dense import Dense
from moec.passes.raise_shared_experts.read import SharedExpert, read_shared, row_type
from moec.passes.registry import register_pass

_NO_MLP = "what was cut out as a shared expert is no dense MLP"


def _write(graph: Graph, expert: SharedExpert) -> None:
    maker, loc = expert.out.op, expert.down.op.loc
    assert maker is not None
    emit = Emitter(graph, maker, Location(loc.module, loc.source, loc.stack))
    x = _as_rows(emit, expert.x)
    column, one = _column(emit, x), as_dim(1)
    ids_type = row_type(column).with_(dtype=dtype("i64"))
    ids = emit.call("aten.zeros_like.default", (column,), ids_type, {"dtype": ids_type.dtype})
    weights = (
        emit.call("aten.ones_like.default", (column,), row_type(column))
        if expert.factor is None
        else _as_rows(emit, expert.factor)
    )
    block = Block(
        x=x,
        ids=ids,
        weights=weights,
        top_k=one,
        experts=1,
        ups=[_projection(up) for up in expert.ups],
        down=_projection(expert.down),
        activation=expert.activation,
        inner=expert.down.rows,
        post=None,
        finished=expert.down.out,
        out=row_type(expert.out),
        sentinels=True,  # the ids are made here: nothing in them has to be checked when it runs
    )
    y = _as_batch(emit, block.write(emit, expert.out.name), expert)
    y.meta = dict(expert.out.meta)
    expert.out.replace_all_uses_with(y)
    erase_unused(maker)


def _projection(gemm: Dense) -> Projection:
    return Projection((gemm.weight,), gemm.form, gemm.out, () if gemm.bias is None else (gemm.bias,))


def _column(emit: Emitter, x: Value) -> Value:
    """``[T, 1]`` of the tokens, for its shape."""
    t = row_type(x)
    return emit.call("aten.slice.Tensor", (x, 1, 0, 1), t.with_(shape=(t.shape[0], as_dim(1))))


def _as_rows(emit: Emitter, value: Value) -> Value:
    """``[..., N]`` as ``[T, N]``."""
    if rank(value) == 2:
        return value
    t = row_type(value)
    return emit.call("aten.reshape.default", (value, [-1, int(t.shape[-1])]), t)


def _as_batch(emit: Emitter, rows: Value, expert: SharedExpert) -> Value:
    """``[T, N]`` in the shape of the expert's result."""
    t = tensor(expert.out)
    assert t is not None
    if t.rank == 2:
        return rows
    unknown = [i for i, d in enumerate(t.shape) if not d.is_Integer]
    sizes: list[object] = [int(d) if d.is_Integer else -1 for d in t.shape]
    if len(unknown) > 1:  # then the tokens come in the same shape
        for i in unknown:
            sizes[i] = emit.call("aten.sym_size.int", (expert.x, i), SymType("int", t.shape[i]))
    return emit.call("aten.reshape.default", (rows, sizes), t)


@register_pass
@dataclass(frozen=True)
class RaiseSharedExperts(Pass):
    """Says the shared expert of a MoE block as one expert that every token goes to.

    A shared expert (DeepSeekMoE, arXiv:2401.06066) is a dense MLP, gated or not, that reads the tokens a MoE block
    reads and whose result is added to the block's. A factor of each token's own, as the sigmoid gate of Qwen2-MoE,
    becomes its router weight; scales and casts on the way to the sum stay torch calls. It is found by its dataflow. A
    dense MLP that the block's own result depends on, such as a dense layer before it, is none, and stays with PyTorch.

    The order of additions inside GEMMs may change, and a bias is added in the tokens' type.
    """

    name: ClassVar[str] = "raise-shared-experts"
    pass_class: ClassVar[PassClass] = PassClass.REORDERS
    tolerance: ClassVar[float] = 2e-5
    summary: ClassVar[str] = "dense MLPs beside MoE blocks to one expert for every token"

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        if ctx.cut_as in (SHARED_EXPERT, WITH_SHARED):
            found = alone(graph.outputs[0 if ctx.cut_as == SHARED_EXPERT else -1]) if graph.outputs else None
            if found is None:
                ctx.remark("missed", self.name, _NO_MLP)
            pairs = [] if found is None else [found]
        else:
            pairs = list(beside_blocks(graph))
        raised = 0
        for down, ups in pairs:
            if ctx.leaves(self.name, down.op):
                continue
            try:
                expert = read_shared(down, ups)
            except Refusal as refusal:
                ctx.remark("missed", self.name, str(refusal), _place(refusal.op, down))
                continue
            what = "a shared expert" if expert.factor is None else "a shared expert with a factor for each token"
            if not ctx.take_fuel(self.name, what, down.op):
                break
            ctx.remark("applied", self.name, what, down.op)
            _write(graph, expert)
            raised += 1
        return PassResult(raised > 0, {"shared experts": raised})


def _place(op: Op | None, down: Dense) -> Op:
    return down.op if op is None else op
