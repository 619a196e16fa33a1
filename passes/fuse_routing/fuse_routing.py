"""The pass ``fuse-routing``.

Contract:
1. The ids and weights that a block dispatches and combines by come out of one ``moe.route`` on the router logits.
2. A router that the attributes of ``moe.route`` describe becomes those attributes. Where they describe its choice and
   not what follows, torch calls on the weights or ids stay after it. Any other router becomes a region.
3. Logits, scores and whatever else is used elsewhere stay computed as they were.
4. A router over tokens of two dimensions is one over rows.
5. A router whose logits cannot be told apart stays as torch calls, with a remark; the experts are fused all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import sympy
import torch

from moec.ir.core import Graph, Op, Value
from moec.ir.torch_bridge import resolve_target
from moec.ir.types import SymType, TensorType
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.dce import erase_unused
from moec.passes.effects import is_pure
from moec.passes.fuse_routing.cut import read_part
from moec.passes.fuse_routing.rows import FlatRouter, flat_router
from moec.passes.fuse_routing.scores import NoAttribute
from moec.passes.hazards import write_within
from moec.passes.matching import ancestors, function, rank, same_dim, tensor
from moec.passes.regions import NotClosed, extract
from moec.passes.registry import register_pass

GEMMS = frozenset({"linear", "mm", "addmm", "matmul", "bmm", "einsum", "baddbmm", "_grouped_mm", "embedding"})


class _Unknown(Exception):
    """The router cannot be cut out; ``str`` is the reason."""


@dataclass(frozen=True)
class _Routed:
    """A ``moe.route`` to insert, the values whose place its results take, and the torch calls that stay after it."""

    op: Op
    weights: Value
    ids: Value
    after: list[Op]
    flat: FlatRouter | None = None

    def undo(self) -> None:
        """Forget the op, which is in no graph, and what was done to the graph for it."""
        self.op.drop_operands()
        if self.flat is not None:
            self.flat.undo()


def _fused(weights: Value, ids: Value) -> _Routed:
    """``moe.route`` with attributes.

    Raises:
        NoAttribute: They do not describe this router, nor the choice in it.
    """
    router, w, i, after = read_part(weights, ids, _stops([weights, ids]))
    op = Op(
        "moe.route",
        [router.logits, *([router.bias] if router.bias else [])],
        [w.type, i.type],
        attrs=router.attrs,
        groups=[1, 1 if router.bias else 0, 0],
        names=["weights", "ids"],
    )
    return _Routed(op, w, i, after)


def _flattened(graph: Graph, weights: Value, ids: Value) -> _Routed | None:
    """``moe.route`` on rows, of a router over tokens of two dimensions."""
    flat = flat_router(graph, weights, ids, _stops([weights, ids]))
    if flat is None:
        return None
    try:
        return replace(_fused(flat.weights, flat.ids), flat=flat)
    except NoAttribute:
        flat.undo()
        return None


def _stops(values: list[Value]) -> list[Value]:
    """The values where a router begins: results of GEMMs, of moe ops, and sizes."""
    stops: list[Value] = []
    for op in ancestors(values):
        if function(op) in GEMMS or op.name != "torch.call" or op.regions:
            stops.extend(op.results)
        else:
            stops.extend(r for r in op.results if isinstance(r.type, SymType))
    return stops


def _has_row_per_token(value: Value, tokens: sympy.Expr) -> bool:
    """True for ``[T, ..]``; a vector only where T is no number, else it may be one entry per expert."""
    t = tensor(value)
    return t is not None and t.rank > (1 if tokens.is_Integer else 0) and same_dim(t.shape[0], tokens)


def _has_entry_per_token(value: Value, tokens: sympy.Expr) -> bool:
    """True if ``value`` [.., B, S, ..] with T = B * S may hold something for each token, as token ids [B, S] do."""
    t = tensor(value)
    if t is None or t.rank < 2:
        return False
    if not tokens.is_Integer:
        return any(d.free_symbols & tokens.free_symbols for d in t.shape)
    return tokens in (sympy.prod(t.shape), sympy.prod(t.shape[:-1]))


def _draws(op: Op) -> bool:
    """True for calls that draw random numbers."""
    target = resolve_target(op.attrs["target"])
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def _region(weights: Value, ids: Value) -> Op:
    """``moe.route`` with the router as a region.

    Raises:
        _Unknown: There is no one tensor of logits, or the router uses sizes computed outside.
    """
    w = tensor(weights)
    assert w is not None and w.shape[1].is_Integer
    stops = _stops([weights, ids])
    ops = ancestors([weights, ids], stops)
    if not ops or any(op.name != "torch.call" for op in ops):
        raise _Unknown("the expert ids come straight from outside the graph")
    inner = {r for op in ops for r in op.results}
    used = [v for op in ops for v in op.operands]
    inputs = list(dict.fromkeys(v for v in (*used, weights, ids) if v not in inner))
    drawing = next((op for op in ops if not is_pure(op) or _draws(op)), None)
    if drawing is not None:
        raise _Unknown(f"{drawing.attrs['target']} in the router draws numbers or writes memory")
    per_token = [v for v in inputs if _has_row_per_token(v, w.shape[0])]
    if len(per_token) != 1 or rank(per_token[0]) != 2:
        raise _Unknown(f"{len(per_token)} tensors with a row per token enter the router; one, the logits, is known")
    (logits,) = per_token
    beside = next((v for v in inputs if v is not logits and _has_entry_per_token(v, w.shape[0])), None)
    if beside is not None:
        raise _Unknown(f"{beside!r} with an entry per token enters the router besides the logits")
    scored = tensor(logits)
    if scored is None or not scored.dtype.is_float:
        raise _Unknown("what enters the router with a row per token is no tensor of logits")
    chosen = tensor(ids)
    assert chosen is not None
    try:
        region, captures = extract("router", ops, [logits], [weights, ids], rows=w.shape[0], symbol="T")
    except NotClosed as reason:
        raise _Unknown(f"the router cannot stand alone: {reason}") from None
    return Op(
        "moe.route",
        [logits, *captures],
        [weights.type, ids.type],
        attrs={"k": int(chosen.shape[1])},
        regions=[region],
        groups=[1, 0, len(captures)],
        names=["weights", "ids"],
    )


def _has_route(weights: Value, ids: Value) -> bool:
    """True if a ``moe.route`` chooses these experts, whatever torch calls follow it."""
    read = {v for op in ancestors([weights, ids], _stops([weights, ids])) for v in op.operands}
    return any(v.op is not None and v.op.name == "moe.route" for v in (weights, ids, *read))


def _routed(graph: Graph) -> list[tuple[Value, Value, Op]]:
    """``(weights, ids, op that uses the weights)`` of every block that is not routed by ``moe.route`` yet."""
    found = []
    for op in graph.ops:
        if op.name == "moe.experts":
            weights, ids = op.operands[2], op.operands[1]
        elif op.name == "moe.combine" and op.operands[2].op is not None and op.operands[2].op.name == "moe.dispatch":
            weights, ids = op.operands[1], op.operands[2].op.operands[1]
        else:
            continue
        if not _has_route(weights, ids):
            found.append((weights, ids, op))
    return found


def _insert(graph: Graph, route: Op, weights: Value, ids: Value) -> None:
    """Put ``route`` where its operands exist and nothing that uses its results comes earlier."""
    users = {u for v in (weights, ids) for u in v.users if u is not route}
    position = {op: i for i, op in enumerate(graph.ops)}
    after = max((position[v.op] + 1 for v in route.operands if v.op is not None), default=0)
    before = min(position[u] for u in users)
    if after > before:
        raise _Unknown("the weights are used before all that the router needs is computed")
    write = write_within(graph, ancestors([weights, ids], route.operands), graph.ops[before])
    if write is not None:
        raise _Unknown(f"{write.attrs.get('target', write.name)} writes to memory of the router while it runs")
    old = [v.op for v in (weights, ids) if v.op is not None]
    graph.insert(before, route)
    for value, new in zip((weights, ids), route.results, strict=True):
        new.meta = dict(value.meta)
        for user, index in list(value.uses):
            if user is not route:
                user.set_operand(index, new)
    for op in old:
        erase_unused(op)


@register_pass
@dataclass(frozen=True)
class FuseRouting(Pass):
    """Turns the calls that make expert ids and weights from router logits into ``moe.route``."""

    name: ClassVar[str] = "fuse-routing"
    pass_class: ClassVar[PassClass] = PassClass.BITWISE
    summary: ClassVar[str] = "router logits to ids and weights in one op"

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        stats = {"attributes": 0, "regions": 0}
        for weights, ids, user in _routed(graph):
            if ctx.leaves(self.name, user):
                continue
            if ids.op is None:
                ctx.remark("note", self.name, "the expert ids come from outside the block", user)
                continue
            if not isinstance(weights.type, TensorType) or weights.type.rank != 2:
                ctx.remark("missed", self.name, "the router weights are no matrix [T, k]", user)
                continue
            if not isinstance(weights.type.shape[1], sympy.Integer):
                ctx.remark("missed", self.name, "k is computed at run time", user)
                continue
            route: _Routed | None = None
            try:
                route = self._route(graph, weights, ids, user, ctx)
                what = f"router of top {route.op.attrs['k']} in one op"
                if not ctx.take_fuel(self.name, what, user):
                    route.undo()
                    break
                _insert(graph, route.op, route.weights, route.ids)
            except _Unknown as reason:
                if route is not None:
                    route.undo()
                ctx.remark("missed", self.name, str(reason), user)
                continue
            if route.flat is not None:
                route.flat.finish()
            stats["regions" if route.op.regions else "attributes"] += 1
            ctx.remark("applied", self.name, what, user)
        return PassResult(any(stats.values()), stats)

    def _route(self, graph: Graph, weights: Value, ids: Value, user: Op, ctx: PassContext) -> _Routed:
        try:
            route = _fused(weights, ids)
        except NoAttribute as reason:
            found = _flattened(graph, weights, ids)
            route = found or _Routed(_region(weights, ids), weights, ids, [])
            if found is None:
                ctx.remark("note", self.name, f"the router is a region: {reason}", user)
        if route.after:
            calls = ", ".join(dict.fromkeys(function(op) for op in route.after))
            ctx.remark("note", self.name, f"torch calls follow the choice of experts: {calls}", user)
        route.op.loc = user.loc
        return route
