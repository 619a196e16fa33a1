"""The pass ``interleave-layers``.

Contract:
1. A layer whose experts lie on several ranks is begun and run on by ops of their own (``moe.begin``, ``moe.resume``),
   and all ops of the graph are put in an order in which ranks wait only where nothing else can run: the attention of
   one micro-batch runs while the rows of another travel.
2. Every op runs once, on the operands it had, behind all it depends on: no bit changes. The order is a function of the
   graph alone, so that all ranks begin the same collectives in the same order.
3. A graph in which nothing large is independent of a layer, or in which something has an effect, stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir.beside import makers
from moec.ir.core import Graph, Op, Value
from moec.ir.staged import stops
from moec.ir.types import TokenType
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.effects import is_pure
from moec.passes.matching import function
from moec.passes.registry import register_pass

_SPREAD = "moe.parallel_experts"
_LARGE_OPS = frozenset({"moe.experts", _SPREAD, "moe.grouped_gemm"})
_LARGE_CALLS = frozenset(
    {"linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "einsum", "scaled_dot_product_attention"}
)
"""What takes long enough to be worth a layer in pieces."""


@register_pass
@dataclass(frozen=True)
class InterleaveLayers(Pass):
    """Runs the attention of one micro-batch while the rows of another's layer travel.

    For whole programs without gradients in which several micro-batches go through the same layers (dual batch, as
    DeepSeek-V3, arXiv:2412.19437, section 3.4, and SGLang's two-batch overlap decode). Where a program waits for rows,
    whatever else is ready runs first; of the layers that wait, the one that was left first goes on.

    Runs behind ``expert-parallel`` and ``overlap``. The result has no gradients: a layer that trains stays one op.
    """

    name: ClassVar[str] = "interleave-layers"
    pass_class: ClassVar[PassClass] = PassClass.BITWISE
    summary: ClassVar[str] = "other micro-batches compute while the rows of a layer travel"

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        layers = [op for op in graph.ops if op.name == _SPREAD and stops(op.regions[0])]
        if not layers:
            return PassResult(False)
        effect = next((op for op in graph.ops if op.name != "return" and not is_pure(op)), None)
        if effect is not None:
            ctx.remark("missed", self.name, f"{effect.name} has an effect and must keep its place", effect)
            return PassResult(False)
        before = {op: makers(op) for op in graph.ops}
        split = 0
        for op in layers:
            if not any(_large(o) and o is not op and o not in before[op] and op not in before[o] for o in graph.ops):
                ctx.remark(
                    "missed", self.name, "nothing large could run meanwhile: all needs it or is needed by it", op
                )
                continue
            what = f"what else is ready runs where it waits, {len(stops(op.regions[0]))} times"
            if not ctx.take_fuel(self.name, what, op):
                break
            ctx.remark("applied", self.name, what, op)
            _split(graph, op)
            split += 1
        if split:
            graph.ops = schedule(graph)
        return PassResult(split > 0, {"interleaved": split})


def _large(op: Op) -> bool:
    return op.name in _LARGE_OPS or function(op) in _LARGE_CALLS


def _split(graph: Graph, layer: Op) -> None:
    """Put ops that begin a layer and run it on in its place."""
    region = layer.regions[0].clone()
    begin = Op(
        "moe.begin", layer.operands, [TokenType()], attrs=layer.attrs, regions=[region], groups=layer.groups,
        loc=layer.loc,
    )  # fmt: skip
    token: Value = graph.insert_before(layer, begin).result
    count = len(stops(region))
    for i in range(count):
        types = [TokenType()] if i < count - 1 else [r.type for r in layer.results]
        names = [] if i < count - 1 else [r.name for r in layer.results]
        last = graph.insert_before(layer, Op("moe.resume", [token], types, loc=layer.loc, names=names))
        token = last.results[0]
    for old, new in zip(layer.results, last.results, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
    layer.erase()


def schedule(graph: Graph) -> list[Op]:
    """The ops in an order in which waits come as late as can be.

    Of what is ready and does not wait, that goes first which the first layer to be begun needs; what only waits go in
    the order in which their layers were left.
    """
    ops = graph.ops[:-1]
    place = {op: i for i, op in enumerate(ops)}
    begins = [op for op in ops if op.name == "moe.begin"]
    serves = dict.fromkeys(ops, len(begins))
    for number, begin in reversed(list(enumerate(begins))):
        for op in (begin, *makers(begin)):
            serves[op] = number
    order: list[Op] = []
    done: dict[Op, int] = {}
    left = list(ops)
    while left:
        ready = [op for op in left if all(v.op is None or v.op in done for v in op.operands)]
        moving = [op for op in ready if op.name != "moe.resume"]
        if moving:
            op = min(moving, key=lambda o: (serves[o], place[o]))
        else:
            op = min(ready, key=lambda o: _left_at(o, done))
        left.remove(op)
        done[op] = len(order)
        order.append(op)
    return [*order, graph.terminator]


def _left_at(resume: Op, done: dict[Op, int]) -> int:
    maker = resume.operands[0].op
    assert maker is not None
    return done[maker]
