"""The pass ``carry-shared-experts``.

Contract:
1. A shared expert (one expert, all tokens) on the tokens of a layer whose experts lie on several ranks is computed
   inside that layer's programs: forwards between the first rows that leave and those that arrive, and so its gradients
   backwards. It is computed by the same ops on the same operands: no bit changes.
2. It stays where it is, with a remark, where the layer depends on it or it on the layer, or where something between
   them has an effect.
3. Ops that the shared expert needs and that stand behind the layer come before it; users of it that stand before the
   layer go behind it. Nothing else moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.ir.beside import beside_experts, makers
from moec.ir.core import Graph, Op, Value, clone_op
from moec.ir.types import TensorType
from moec.passes.base import WITH_SHARED, Pass, PassClass, PassContext, PassResult
from moec.passes.calls import call_op
from moec.passes.effects import is_pure
from moec.passes.matching import VIEWS, function, peel, same_dim, tensor
from moec.passes.overlap.order import reorder
from moec.passes.registry import register_pass

_SPREAD = "moe.parallel_experts"
_ROWWISE = 3
"""Operands of experts with a row a token: tokens, ids, weights."""


class Apart(Exception):
    """The shared expert stays where it is; ``str`` is the reason."""


@register_pass
@dataclass(frozen=True)
class CarrySharedExperts(Pass):
    """Computes a shared expert while the tokens of its layer travel to the experts of other ranks.

    A layer that is spread over ranks is one op, which waits for its rows. The shared expert beside it needs none that
    travel: it becomes part of the layer's programs, where it stands behind the starts and before their waits. Runs
    behind ``expert-parallel``; ``overlap`` then decides before which chunk it is computed.
    """

    name: ClassVar[str] = "carry-shared-experts"
    pass_class: ClassVar[PassClass] = PassClass.BITWISE
    summary: ClassVar[str] = "shared experts run while the rows of their layer travel"

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        carried = 0
        for op in [op for op in graph.ops if _is_shared(op)]:
            layer = _layer_of(op, graph, ctx.cut_as == WITH_SHARED)
            if layer is None:
                continue
            try:
                before, behind = _moves(graph, layer, op)
            except Apart as reason:
                ctx.remark("missed", self.name, f"the shared expert stays outside: {reason}", op)
                continue
            what = "a shared expert runs while rows travel"
            if not ctx.take_fuel(self.name, what, op):
                break
            ctx.remark("applied", self.name, what, op)
            _move(graph, layer, before, behind)
            _carry(graph, layer, op)
            carried += 1
        return PassResult(carried > 0, {"carried": carried})


def _is_shared(op: Op) -> bool:
    """One expert, which every token goes to."""
    return op.name == "moe.experts" and op.attrs["experts"] == 1 and function(op.operands[1].op) == "zeros_like"


def _layer_of(op: Op, graph: Graph, known: bool) -> Op | None:
    """The layer that reads the same tokens, whatever shape they have; any, where they are known to belong together."""
    tokens = peel(op.operands[0], VIEWS)
    layers = [o for o in graph.ops if o.name == _SPREAD]
    return next((o for o in layers if known or peel(o.operands[0], VIEWS) is tokens), None)


def _moves(graph: Graph, layer: Op, op: Op) -> tuple[list[Op], list[Op]]:
    """What has to come before the layer, and what behind it, so that the shared expert can be where the layer is.

    Raises:
        Apart: It cannot.
    """
    if not all(is_pure(o) for o in (layer, op)):
        raise Apart("it has an effect")
    needs = makers(op)
    if layer in needs:
        raise Apart("it depends on the layer")
    if op in makers(layer):
        raise Apart("the layer depends on it")
    rows, own = tensor(op.operands[0]), tensor(layer.operands[0])
    if rows is None or own is None or not same_dim(rows.shape[0], own.shape[0]):
        raise Apart("it has other tokens than the layer")
    if len(set(op.operands)) < len(op.operands):
        raise Apart("it reads something twice")
    if op.operands[1].op not in _parts(op).inside:
        raise Apart("its ids are not made of its tokens")
    place = {o: i for i, o in enumerate(graph.ops)}
    first, last = sorted((place[layer], place[op]))
    effect = next((o for o in graph.ops[first:last] if not is_pure(o)), None)
    if effect is not None:
        raise Apart(f"{effect.name} between them has an effect and must keep its place")
    before = [o for o in graph.ops[first:last] if o in needs and place[o] > place[layer]]
    after: dict[Op, None] = {}
    for o in graph.ops[first:last]:
        if any(v.op is op or v.op in after for v in o.operands):
            after[o] = None
    return before, list(after)


def _move(graph: Graph, layer: Op, before: Sequence[Op], behind: Sequence[Op]) -> None:
    moving = {*before, *behind}
    rest = [o for o in graph.ops if o not in moving]
    at = rest.index(layer)
    graph.ops = [*rest[:at], *before, layer, *behind, *rest[at + 1 :]]


@dataclass(frozen=True)
class _Parts:
    """What of a shared expert comes in from outside the layer's programs.

    Attributes:
        inside: Ops that make its ids, and its weights where these are ones.
        operands: What all that reads, each once: tokens first.
    """

    inside: Sequence[Op]
    operands: Sequence[Value]


def _parts(op: Op) -> _Parts:
    x, own = op.operands[0], makers(op)
    assert op.parent is not None
    from_x: dict[Value, None] = {x: None}
    inside: list[Op] = []
    for maker in [o for o in op.parent.ops if o in own]:
        if maker.operands and all(v in from_x for v in maker.operands) and maker is not x.op:
            inside.append(maker)
            from_x.update(dict.fromkeys(maker.results))
    needed = [o for o in inside if any(_reaches(o, v) for v in op.operands[1:_ROWWISE])]
    made = {r for o in needed for r in o.results}
    return _Parts(needed, list(dict.fromkeys([x, *(v for v in op.operands if v not in made)])))


def _reaches(op: Op, value: Value) -> bool:
    return value.op is not None and (op is value.op or op in makers(value.op))


def _carry(graph: Graph, layer: Op, op: Op) -> None:
    """Put the shared expert into the programs of the layer, an op with a result more."""
    parts = _parts(op)
    regions = [region.clone() for region in layer.regions]
    grads = len(layer.results)
    _compute(regions[0], op, parts)
    _differentiate(regions[1], op, parts, grads)
    for region in regions:
        reorder(region, dict.fromkeys(beside_experts(region), 0))
    made = Op(
        _SPREAD,
        [*layer.operands, *parts.operands],
        [*(r.type for r in layer.results), op.result.type],
        attrs=layer.attrs,
        regions=regions,
        groups=(*layer.groups[:-1], layer.groups[-1] + len(parts.operands)),
        loc=layer.loc,
        names=[*(r.name for r in layer.results), op.result.name],
    )
    made.meta = dict(layer.meta)
    graph.insert_before(layer, made)
    for old, new in zip((*layer.results, op.result), made.results, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
    layer.erase()
    op.erase()
    for maker in reversed(parts.inside):
        if not any(r.uses for r in maker.results):
            maker.erase()


def _given(region: Graph, parts: _Parts) -> dict[Value, Value]:
    """New arguments of a region for what is read, and its copies of what is made inside."""
    held = sum(arg.name.startswith("beside") for arg in region.args)
    env = {v: region.add_arg(v.type, f"beside{held + i}") for i, v in enumerate(parts.operands)}
    end = region.terminator
    for maker in parts.inside:
        region.insert_before(end, clone_op(maker, env.__getitem__, env))
    return env


def _return(region: Graph, more: Sequence[Value]) -> None:
    end = region.terminator
    outs = [*end.operands, *more]
    end.erase()
    region.append(Op("return", outs, groups=(len(outs),), loc=end.loc))


def _compute(region: Graph, op: Op, parts: _Parts) -> None:
    env = _given(region, parts)
    copy = region.insert_before(region.terminator, clone_op(op, env.__getitem__, env))
    _return(region, copy.results)


def _differentiate(region: Graph, op: Op, parts: _Parts, grads: int) -> None:
    """Gradients of what the shared expert reads, in that order; zeros for what has none."""
    grad = Value(op.result.type, region, grads, f"grad{grads}")
    region.args.insert(grads, grad)
    for i, arg in enumerate(region.args):
        arg.index = i
    env = _given(region, parts)
    read = set(parts.operands)
    needs = tuple(v in read and i != 1 and _is_float(v) for i, v in enumerate(op.operands))
    types = [v.type for v, need in zip(op.operands, needs, strict=True) if need]
    made = Op(
        "moe.experts_backward", [grad, *(env[v] for v in op.operands)], types, attrs={**op.attrs, "needs": needs},
        regions=[r.clone() for r in op.regions], groups=(1, *op.groups), loc=op.loc,
    )  # fmt: skip
    end = region.terminator
    region.insert_before(end, made)
    results = iter(made.results)
    found = {v: next(results) for v, need in zip(op.operands, needs, strict=True) if need}
    for value in parts.operands:
        if value not in found:
            zeros = call_op("aten.zeros_like.default", (env[value],), {}, [value.type], loc=op.loc)
            found[value] = region.insert_before(end, zeros).result
    _return(region, [found[v] for v in parts.operands])


def _is_float(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.dtype.is_float
